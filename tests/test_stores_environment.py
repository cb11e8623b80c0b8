"""A store's bytes do not depend on the settings of zarr and HDF5, which variables and YAML files can change."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

WRITE = """
import sys
from pathlib import Path
import numpy as np
from stores import FeatureStoreWriter
from stores.hdf5 import export_store, import_store
writer = FeatureStoreWriter(Path("store"), Path("scratch"), {"encoder": "x"}, ["a", "b", "c"], 2, 1, "zstd")
for number, keys in writer.plan():
    writer.write_shard(number, {key: {"zeros": np.zeros((3, 4), np.float16), "x": np.eye(3)[:2] > 0} for key in keys})
writer.publish()
export_store("store", "store.h5")
import_store("store.h5", "imported")
"""
FORMAT = {"ZARR_DEFAULT_ZARR_FORMAT": "2", "ZARR_JSON_INDENT": "7", "ZARR_ARRAY__ORDER": "F"}
BROKEN = {
    "ZARR_ARRAY__WRITE_EMPTY_CHUNKS": "False",
    "ZARR_CODECS": "{'crc32c': 'nothing.Codec'}",
    "ZARR_CODEC_PIPELINE__PATH": "nothing.Pipeline",
    "ZARR_CODEC_PIPELINE__BATCH_SIZE": "0",
    "ZARR_BUFFER": "nothing.Buffer",
    "ZARR_NDBUFFER": "nothing.Buffer",
    "ZARR_ASYNC__CONCURRENCY": "0",
    "ZARR_ASYNC__TIMEOUT": "1e-9",
    "HDF5_DRIVER": "nothing",
    "HDF5_VOL_CONNECTOR": "nothing",
}


def written(folder: Path, variables: dict[str, str]) -> dict[str, bytes]:
    """The files of a store, and of its export imported again, that a process with these variables writes."""
    folder.mkdir()
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ZARR")}
    environment = clean | {"PYTHONPATH": str(Path(__file__).parents[1])} | variables
    done = subprocess.run([sys.executable, "-c", WRITE], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    files = (path for name in ("store", "imported") for path in (folder / name).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return written(tmp_path_factory.mktemp("plain") / "stores", {})


@pytest.mark.parametrize("variables", [FORMAT, BROKEN], ids=["format", "broken"])
def test_variables_change_no_byte(variables: dict[str, str], plain: dict[str, bytes], tmp_path: Path) -> None:
    assert written(tmp_path / "stores", variables) == plain


def test_the_users_yaml_file_changes_no_byte(plain: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "zarr").mkdir()
    (tmp_path / "zarr" / "zarr.yaml").write_text("default_zarr_format: 2\njson_indent: 7\n")
    assert written(tmp_path / "stores", {"ZARR_CONFIG": str(tmp_path / "zarr")}) == plain
