"""File systems without flock, such as Lustre without -o flock. tests/lockless.c makes one of a folder for a process."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

COMPILER = shutil.which("cc")
CODES = [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP]

pytestmark = pytest.mark.skipif(COMPILER is None or sys.platform != "linux", reason="needs a C compiler and Linux")
by_code = pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)

HOLD = """
import sys, time
from pathlib import Path
from samlove.features.lock import only_run
with only_run(Path("lock"), "the store"):
    print("held", flush=True)
    sys.stdin.read()
"""
STORES = """
from pathlib import Path
import numpy as np
from stores import FeatureStore, FeatureStoreWriter, PredictionReader, PredictionWriter
from stores.hdf5 import ExportReader, export_store, import_store
writer = FeatureStoreWriter(Path("store"), Path("scratch"), {"encoder": "x"}, ["a"], 2)
for number, keys in writer.plan():
    writer.write_shard(number, {key: {"x": np.arange(3)} for key in keys})
writer.publish()
export_store("store", "store.h5")
assert ExportReader("store.h5").read("a")["x"].tolist() == [0, 1, 2]
import_store("store.h5", "imported")
assert FeatureStore.open("imported").read("a")["x"].tolist() == [0, 1, 2]
with PredictionWriter("predictions.h5", 1, 2, np.array([0.5], np.float32)) as predictions:
    predictions.write(["r"], np.ones((1, 1, 2, 2), np.uint8))
assert PredictionReader("predictions.h5").read("r").sum() == 4
"""

TARGETS = """
from pathlib import Path
import pandas as pd
from PIL import Image
from samlove.data.dataset import RefAvsFolder
from samlove.data.targets import Targets
folder = RefAvsFolder("set")
for path in (folder.frame_path("v", 0), folder.mask_path("v", 0, 0)):
    path.parent.mkdir(parents=True)
    Image.linear_gradient("L").save(path)
rows = pd.DataFrame([{"media_id": "v", "fid": 0, "null": False}])
for digest in ("first", "first", "second"):
    found = Targets(folder, rows, digest, Path("targets")).load_masks("v", 0, 2, 8)
    assert (found == folder.load_masks("v", 0, 2, 8)).all()
    print(len([*Path("targets").glob("*.bits")]))
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("library") / "lockless.so"
    source = Path(__file__).with_name("lockless.c")
    subprocess.run([str(COMPILER), "-shared", "-fPIC", "-o", path, source, "-ldl"], check=True)
    return path


def start(script: str, folder: Path, library: Path, code: int) -> subprocess.Popen[str]:
    """Start a script in `folder`, where locks fail with the error `code`."""
    own = {"LD_PRELOAD": str(library), "LOCKLESS": str(folder), "LOCKLESS_ERRNO": str(code), "STORES_CACHE": "cache"}
    environment = {**os.environ, **own, "PYTHONPATH": str(Path(__file__).parents[1])}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", script], cwd=folder, env=environment, text=True, **pipes)  # type: ignore[call-overload]


@by_code
def test_one_run_at_a_time_without_locks(code: int, library: Path, tmp_path: Path) -> None:
    first = start(HOLD, tmp_path, library, code)
    assert first.stdout and first.stdout.readline() == "held\n"
    second = start(HOLD, tmp_path, library, code)
    assert f"the store: in use by another run (process {first.pid} on " in second.communicate()[1]
    assert first.communicate()[1] == "" and first.returncode == 0
    third = start(HOLD, tmp_path, library, code)
    assert third.communicate() == ("held\n", "")
    assert {path.name for path in tmp_path.iterdir()} == {"lock"}


def test_a_killed_run_without_locks_says_what_to_delete(library: Path, tmp_path: Path) -> None:
    killed = start(HOLD, tmp_path, library, errno.ENOLCK)
    assert killed.stdout and killed.stdout.readline() == "held\n"
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    message = start(HOLD, tmp_path, library, errno.ENOLCK).communicate()[1]
    assert f"(process {killed.pid} on " in message and message.rstrip().endswith("delete lock.held")
    (tmp_path / "lock.held").unlink()
    assert start(HOLD, tmp_path, library, errno.ENOLCK).communicate() == ("held\n", "")


@by_code
def test_stores_exports_and_predictions_need_no_locks(code: int, library: Path, tmp_path: Path) -> None:
    done = start(STORES, tmp_path, library, code)
    assert done.communicate()[1] == "" and done.returncode == 0


@by_code
def test_decoded_masks_need_no_locks(code: int, library: Path, tmp_path: Path) -> None:
    out, err = start(TARGETS, tmp_path, library, code).communicate()
    assert out.split() == ["1", "1", "2"], err  # another process may be reading the first: it is kept
    assert {path.suffix for path in (tmp_path / "targets").iterdir()} == {"", ".bits"}


def test_the_download_cache_says_which_variable_to_set(library: Path, tmp_path: Path) -> None:
    (tmp_path / "remote").mkdir()
    (tmp_path / "remote" / "manifest.json").write_text("{}")
    script = f"from stores import FeatureStore; FeatureStore.open('file://{tmp_path}/remote')"
    error = start(script, tmp_path, library, errno.ENOLCK).communicate()[1].splitlines()[-1]
    assert "RequestError: cache: a file system without file locks" in error and "set STORES_CACHE" in error
