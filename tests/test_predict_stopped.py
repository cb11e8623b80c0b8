"""Ctrl-C and SIGTERM during `samlove predict`: nothing new stays behind, and what was there is untouched."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any, cast

import numpy as np
import pytest
from tqdm import tqdm

from samlove.predict.features import Plan, _write
from stores.manifest import replace_folder
from tests.videos import write_lossless

ROOT = Path(__file__).parents[1]
LOADING, WRITING = "audio: ", r"track: .* [1-9][0-9]*/"
slow = pytest.mark.slow


def content(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder below a folder, hidden ones too."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A minute, so that tracking takes a while after its first window."""
    frames = list(np.random.default_rng(0).integers(0, 255, (60, 48, 64, 3), np.uint8))
    return write_lossless(tmp_path_factory.mktemp("video") / "v.mkv", frames, np.zeros(16_000, np.int16))


@pytest.mark.parametrize(
    ("number", "moment"),
    [
        (signal.SIGTERM, WRITING),
        pytest.param(signal.SIGINT, WRITING, marks=slow),
        pytest.param(signal.SIGTERM, "track: ", marks=slow),
        pytest.param(signal.SIGINT, LOADING, marks=slow),
        pytest.param(signal.SIGTERM, "visual: ", marks=slow),
        pytest.param(signal.SIGINT, "text: ", marks=slow),
        pytest.param(signal.SIGTERM, "sam2: ", marks=slow),
        pytest.param(signal.SIGINT, "sam2: .*1/", marks=slow),
    ],
)
def test_a_signal_leaves_everything_as_it_was(video: Path, tmp_path: Path, number: int, moment: str) -> None:
    out, temporary = tmp_path / "here" / "out", tmp_path / "tmp"
    for folder in (out / "masks", temporary):
        folder.mkdir(parents=True)
    (out / "prediction.json").write_text("an earlier prediction")
    before = content(out.parent)
    command = [sys.executable, "-m", "samlove.cli.main", "predict", str(video), "a dog", "--out", str(out)]
    run = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(temporary)},
        stderr=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C of the terminal of the tests is not for it
    )
    said = b""
    assert run.stderr is not None
    while not re.search(moment.encode(), said):
        part = os.read(run.stderr.fileno(), 4096)
        assert part, said.decode()
        said += part
    run.send_signal(number)
    said += run.communicate(timeout=120)[1]
    assert run.returncode == 1
    # A bar that was just being made has not ended its line.
    assert said.decode().splitlines()[-1].endswith("stopped; run the same command again")
    assert "Traceback" not in said.decode()
    assert content(out.parent) == before
    assert not [path for path in temporary.rglob("*") if not path.name.startswith("torchinductor")]


class LargeEncoder:
    """Items that take zarr a while to write."""

    def fingerprint(self) -> dict[str, Any]:
        return {}

    def load(self, source: str) -> str:
        return source

    def encode(self, loaded: list[str]) -> list[dict[str, np.ndarray]]:
        return [{f"part{number}": np.ones((4096, 4096), np.float32) for number in range(2)}]


@pytest.mark.parametrize("delay", [0.15, 0.25])
def test_an_interrupt_waits_for_the_shard_that_is_being_written(tmp_path: Path, delay: float) -> None:
    """zarr writes in threads of its own, which must not make the folder again after it was deleted."""

    def interrupt() -> None:
        found = 0
        while found < 2:  # of the group and the first array
            time.sleep(0.001)
            with suppress(OSError):  # files are renamed meanwhile
                found = len(list(Path(folder).rglob("zarr.json")))
        begun = time.process_time()
        while time.process_time() < begun + delay:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), TemporaryDirectory(dir=tmp_path) as folder:
        plan = Plan(cast(Any, None), cast(Any, None), ["a dog"], "v", "")
        Thread(target=interrupt, daemon=True).start()
        _write("text", cast(Any, LargeEncoder()), plan, Path(folder), lambda **given: tqdm(**given, disable=True))
        time.sleep(60)  # on a fast machine, the shard was written before the signal
    time.sleep(0.5)  # for threads that are still writing
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_replaced_is_put_back(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("kept")
    before = content(tmp_path)
    with pytest.raises(FileNotFoundError):
        replace_folder(tmp_path / "missing", out)
    assert content(tmp_path) == before
