"""`samlove store` as a user calls it, on feature stores of small real encoders."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import soundfile
import yaml

from pipelines import audio, sam2, text, visual
from samlove.cli import main as cli
from samlove.data.dataset import RefAvsFolder
from stores import FeatureStore
from stores.inspect import diff
from tests import small_encoders as small
from tests.store_kinds import KEYS, STORES, make_items


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def samlove(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Runs the command in this process, so that torch is loaded only once."""

    def run(*arguments: str) -> Done:
        monkeypatch.setattr("sys.argv", ["samlove", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Done(int(ended.value.code or 0), *capsys.readouterr())

    return run


def test_verify_names_the_damage_and_exits_1(samlove: Callable[..., Done], tmp_path: Path) -> None:
    for kind in STORES:
        path = tmp_path / type(kind).__name__
        kind.write(path, make_items(KEYS))
        done = samlove("store", "verify", str(path), "--deep")
        assert (done.returncode, done.stderr) == (0, "")
        assert f"{path}: {len(KEYS)} items, " in done.stdout
        file = max((p for p in [path, *path.rglob("*")] if p.is_file()), key=lambda p: p.stat().st_size)
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        done = samlove("store", "verify", str(path), "--deep")
        assert (done.returncode, done.stderr) == (1, "")
        assert str(file) in done.stdout


def test_info_shows_kind_size_and_fingerprint(samlove: Callable[..., Done], tmp_path: Path) -> None:
    for kind in STORES:
        what = kind.what
        path = tmp_path / what
        kind.write(path, make_items(KEYS))
        done = samlove("store", "info", str(path))
        assert (done.returncode, done.stderr) == (0, "")
        assert f"{path}: {what}\n" in done.stdout
        for line in (f"items      {len(KEYS)} in ", "made by    made: here"):
            assert line in done.stdout
        assert ("(3, 4, 4) uint8" in done.stdout) == (what != "checkpoint")  # each tensor has its own shape
        kind.write(path, {})
        assert "items      0 in " in samlove("store", "info", str(path)).stdout


@pytest.mark.parametrize("command", ["info", "verify", "retry"])
def test_a_missing_artefact_is_an_invalid_request(samlove: Callable[..., Done], tmp_path: Path, command: str) -> None:
    done = samlove("store", command, str(tmp_path / "nowhere"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_diff_says_what_differs(samlove: Callable[..., Done], tmp_path: Path) -> None:
    for kind in STORES:
        for number, keys in enumerate((KEYS[:5], KEYS[1:6], KEYS[:5])):
            items = make_items(KEYS)
            if number == 1:
                items[KEYS[2]] = items[KEYS[2]] ^ 128
            kind.write(tmp_path / type(kind).__name__ / str(number), {key: items[key] for key in keys})
        first, second, third = (tmp_path / type(kind).__name__ / str(n) for n in range(3))
        assert not diff(first, third)
        found = diff(first, second)
        assert (found.only_first, found.only_second, found.changed) == ([KEYS[0]], [KEYS[5]], [KEYS[2]])
        assert list(found.largest.values()) == [128]
        assert not found.fingerprint
        done = samlove("store", "diff", str(first), str(second))
        assert done.returncode == 1
        assert f"1 items only in the second: {KEYS[5]}" in done.stdout
    done = samlove("store", "diff", str(first), str(third))
    assert (done.returncode, done.stdout) == (0, "no difference\n")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with small encoders and three videos."""
    small.make_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def stages(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project with all its feature stores."""
    for main in (audio.main, visual.main, text.main):
        main()
    for group in ("train", "eval"):
        monkeypatch.setattr("sys.argv", ["sam2", group])
        sam2.main()
    return project


def test_every_store_verifies_and_covers_its_splits(samlove: Callable[..., Done], stages: Path) -> None:
    for name in ("audio", "visual", "text", "sam2_train", "sam2_eval"):
        done = samlove("store", "verify", "--deep", "--live", f"data/small/features/{name}")
        assert (done.returncode, done.stderr) == (0, ""), done.stdout
        assert "recomputed items are within 0.005 of the stored ones" in done.stdout
    assert "train: 1 of 1" in samlove("store", "info", "data/small/features/sam2_train").stdout
    assert "val: 0 of 1" in samlove("store", "info", "data/small/features/sam2_train").stdout


def test_live_finds_changed_weights_and_changed_audio(samlove: Callable[..., Done], stages: Path) -> None:
    section = stages / "configs" / "small" / "audio.yaml"
    before = section.read_text()
    section.write_text(yaml.safe_dump({**yaml.safe_load(before), "pre_relu": True}))
    done = samlove("store", "verify", "--live", "data/small/features/audio")
    assert done.returncode == 1
    assert "differs from the current setup: pre_relu: False stored, True now" in done.stdout
    section.write_text(before)
    wav = RefAvsFolder("data/dataset/small").audio_path("b")
    soundfile.write(wav, np.zeros(16_000), 16_000)
    done = samlove("store", "verify", "--live", "data/small/features/audio")
    assert done.returncode == 1
    assert "b: its source " in done.stdout


def test_retry_computes_only_the_failed_items(
    samlove: Callable[..., Done],
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("samlove.features.extract.FAILURE_BUDGET", 1.0)
    wav = RefAvsFolder("data/dataset/small").audio_path("b")
    shutil.copy(wav, project / "whole.wav")
    wav.write_bytes(wav.read_bytes()[:100])
    audio.main()
    (failure,) = FeatureStore.open("data/small/features/audio").failures
    assert failure.key == "b"
    shown = samlove("store", "info", "data/small/features/audio").stdout
    assert "b: data/dataset/small/media/b/audio.wav: truncated" in shown
    shutil.copy(project / "whole.wav", wav)
    done = samlove("store", "retry", "data/small/features/audio")
    assert done.returncode == 0, done.stderr
    assert "1 of 3 items computed" in done.stdout
    assert "recovered 1 of 1 failed items; now run: dvc commit audio" in done.stdout
    assert FeatureStore.open("data/small/features/audio").keys() == ["a", "b", "c"]
    done = samlove("store", "retry", "data/small/features/audio")
    assert (done.returncode, done.stdout) == (0, "data/small/features/audio: no failed items\n")


def test_retry_refuses_a_changed_encoder(
    samlove: Callable[..., Done], project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("samlove.features.extract.FAILURE_BUDGET", 1.0)
    RefAvsFolder("data/dataset/small").audio_path("b").unlink()
    audio.main()
    section = project / "configs" / "small" / "audio.yaml"
    section.write_text(yaml.safe_dump({**yaml.safe_load(section.read_text()), "pre_relu": True}))
    done = samlove("store", "retry", "data/small/features/audio")
    assert done.returncode == 1
    assert "pre_relu: expected True, found False); to fix it, run: dvc repro audio" in done.stderr
