"""The predictions file: its contents, the rows it refuses, and damage."""

import h5py
import numpy as np
import pytest

from samlove.errors import SamloveError
from stores import PredictionReader, PredictionWriter

EDGES = np.sort(np.random.default_rng(0).random(255)).astype(np.float32)


def write(path, rows: dict[str, np.ndarray], attrs=None) -> PredictionReader:
    with PredictionWriter(path, 2, 8, EDGES, attrs) as writer:
        writer.write(list(rows), np.stack(list(rows.values())))
    return PredictionReader(path)


def make_rows(count: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {f"-row #{i} ü": rng.integers(0, 256, (2, 8, 8), np.uint8) for i in range(count)}


def test_edges_and_attrs_come_back_exactly(tmp_path):
    attrs = {"checkpoint": {"sha256": "ab" * 32, "epochs": 8}, "note": "ü" * 50_000, "controls": [1, None, True]}
    reader = write(tmp_path / "p.h5", make_rows(3), attrs)
    assert reader.attrs == attrs and reader.shape == (2, 8, 8)
    assert reader.edges.dtype == np.float32
    np.testing.assert_array_equal(reader.edges, EDGES)
    assert "-row #1 ü" in reader and "row" not in reader


def test_rows_may_come_in_several_batches(tmp_path):
    rows = make_rows(7)
    with PredictionWriter(tmp_path / "p.h5", 2, 8, EDGES) as writer:
        for part in (list(rows)[:3], [], list(rows)[3:]):
            writer.write(part, np.array([rows[r] for r in part], np.uint8).reshape(-1, 2, 8, 8))
    reader = PredictionReader(tmp_path / "p.h5")
    assert reader.row_ids == list(rows)
    for row_id, bins in rows.items():
        np.testing.assert_array_equal(reader.read(row_id), bins)


def test_each_row_is_one_compressed_chunk_with_a_checksum(tmp_path):
    write(tmp_path / "p.h5", {"a": np.zeros((2, 8, 8), np.uint8)})
    with h5py.File(tmp_path / "p.h5") as file:
        bins = file["bins"]
        assert bins.chunks == (1, 2, 8, 8) and bins.compression == "gzip" and bins.fletcher32


@pytest.mark.parametrize(
    ("row_ids", "bins", "match"),
    [
        (["a"], np.zeros((2, 2, 8, 8), np.uint8), r"expected bins \(1, 2, 8, 8\)"),
        (["a"], np.zeros((1, 3, 8, 8), np.uint8), r"found \(1, 3, 8, 8\)"),
        (["a"], np.zeros((1, 2, 8, 8), np.float32), "float32"),
        (["a", "a"], np.zeros((2, 2, 8, 8), np.uint8), "found a repeated one"),
    ],
)
def test_rows_of_the_wrong_shape_or_dtype_and_repeated_rows_are_refused(tmp_path, row_ids, bins, match):
    with pytest.raises(SamloveError, match=match), PredictionWriter(tmp_path / "p.h5", 2, 8, EDGES) as writer:
        writer.write(row_ids, bins)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_row_is_named(tmp_path):
    with pytest.raises(SamloveError, match="no row 'x' among its 2"):
        write(tmp_path / "p.h5", make_rows(2)).read("x")


def test_a_flipped_bit_is_found(tmp_path):
    rows = make_rows(3)
    write(tmp_path / "p.h5", rows)
    with h5py.File(tmp_path / "p.h5") as file:
        chunk = file["bins"].id.get_chunk_info(1)
    data = bytearray((tmp_path / "p.h5").read_bytes())
    data[chunk.byte_offset + chunk.size // 2] ^= 1
    (tmp_path / "p.h5").write_bytes(data)
    reader = PredictionReader(tmp_path / "p.h5")
    first, second, _ = rows
    np.testing.assert_array_equal(reader.read(first), rows[first])
    with pytest.raises(SamloveError, match=r"p\.h5.*cannot be read"):
        reader.read(second)


def test_another_hdf5_file_is_refused(tmp_path):
    with h5py.File(tmp_path / "p.h5", "w") as file:
        file["x"] = 1
    with pytest.raises(SamloveError, match="not a complete predictions file"):
        PredictionReader(tmp_path / "p.h5")
