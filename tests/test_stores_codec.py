"""bfloat16 and int8 encodings in a feature store: their error, and that a store returns floats."""

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from samlove.errors import SamloveError
from stores import FeatureStore, FeatureStoreWriter
from stores.codec import decode, encode, shapes

SHAPE = (4, 6, 8, 8)  # rows, channels, height, width
KEYS = ["a", "b", "c"]


def make_values(seed: int) -> np.ndarray:
    """Channels of very different magnitudes, one of them all zeros."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(SHAPE) * 10 ** rng.uniform(-3, 3, (*SHAPE[:2], 1, 1))
    values[:, 2] = 0
    return values.astype(np.float32)


def make_store(root, coding, **options) -> FeatureStore:
    writer = FeatureStoreWriter(root / "store", root / "scratch", {"dtype": coding}, KEYS, 2, 1, **options)
    for number, keys in writer.todo():
        items = {}
        for key in keys:
            values = make_values(KEYS.index(key))
            coded = encode("embed", values, coding) if coding else {"embed": values.astype(np.float16)}
            items[key] = {**coded, "valid": np.arange(SHAPE[0]) > 1}
        writer.write_shard(number, items)
    writer.publish()
    return FeatureStore.open(root / "store")


finite = st.floats(-(2.0**127), 2.0**127, width=32)


@given(arrays(np.float32, array_shapes(max_dims=4), elements=finite))
def test_bfloat16_rounds_as_torch_does(values):
    (bits,) = encode("x", values, "bfloat16").values()
    assert bits.dtype == np.uint16
    found = decode({"x.bfloat16": bits})["x"]
    assert found.dtype == np.float32
    expected = torch.from_numpy(values).bfloat16().float().numpy()
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))
    assert (np.abs(found - values) <= np.abs(values) * 2**-8 + 1e-40).all()


@given(arrays(np.float32, array_shapes(min_dims=2, max_dims=4), elements=st.floats(-60000, 60000, width=32)))
def test_int8_error_is_at_most_half_a_step(values):
    coded = encode("x", values, "int8")
    scale = coded["x.scale"]
    assert coded["x.int8"].dtype == np.int8 and scale.shape == (*values.shape[:2], *[1] * (values.ndim - 2))
    found = decode(coded)["x"]
    assert found.dtype == np.float32
    bound = scale.astype(np.float64) * 0.5001 + np.abs(values) * 2.0**-22 + 1e-43
    assert (np.abs(found.astype(np.float64) - values) <= bound).all()


def test_int8_has_one_scale_per_row_and_channel():
    values = make_values(0)
    values[0, 1] *= 1000
    found, before = decode(encode("x", values, "int8"))["x"], decode(encode("x", make_values(0), "int8"))["x"]
    elsewhere = np.ones(SHAPE[:2], bool)
    elsewhere[0, 1] = False
    np.testing.assert_array_equal(found[elsewhere], before[elsewhere])
    assert not found[:, 2].any()


@pytest.mark.parametrize(
    ("coding", "value"),
    [(coding, value) for coding in ("bfloat16", "int8") for value in (np.nan, np.inf, -np.inf)]
    + [("int8", 65_600), ("int8", -65_600), ("bfloat16", 3.4e38)],
)
def test_the_error_for_a_value_that_cannot_be_stored_names_the_array(coding, value):
    values = make_values(0)
    values[1, 1, 1, 1] = value
    with pytest.raises(SamloveError, match=f"embed: expected finite .* {coding}"):
        encode("embed", values, coding)


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("coding", [None, "bfloat16", "int8"])
def test_a_store_returns_floats_and_its_manifest_shows_their_encoding(tmp_path, coding, compression):
    store = make_store(tmp_path, coding, compression=compression)
    assert store.shapes == {"embed": SHAPE, "valid": SHAPE[:1]}
    assert store.shapes == shapes(store.manifest["arrays"])
    for number, key in enumerate(KEYS):
        values = make_values(number)
        expected = decode(encode("embed", values, coding))["embed"] if coding else values.astype(np.float16)
        for rows in (slice(None), slice(0, 1), slice(1, 3)):
            found = store.read(key, rows)
            assert set(found) == {"embed", "valid"} and found["embed"].dtype == expected.dtype
            np.testing.assert_array_equal(found["embed"], expected[rows])
    stored = {"embed"} if coding is None else set(encode("embed", make_values(0), coding))
    assert set(store.read_stored("a")) == set(store.manifest["arrays"]) == stored | {"valid"}


def test_a_compressed_store_is_smaller_and_zarr_reads_the_same_values(tmp_path):
    sizes = {}
    for compression in ("none", "zstd"):
        (tmp_path / compression).mkdir()
        store = make_store(tmp_path / compression, "int8", compression=compression)
        sizes[compression] = sum(p.stat().st_size for p in store.path.rglob("c/**/*") if p.is_file())
        for shard in store.shards:
            group = zarr.open_group(store.path / shard, mode="r")
            for row, key in enumerate(group.attrs["keys"]):
                for name, value in store.read_stored(key).items():
                    np.testing.assert_array_equal(value, group[name][row])
    assert sizes["zstd"] < sizes["none"]


def test_damage_to_a_compressed_store_is_found(tmp_path):
    store = make_store(tmp_path, "int8", compression="zstd")
    path = next(p for p in (store.path / "shard-00000.zarr" / "embed.int8" / "c").rglob("*") if p.is_file())
    whole = path.read_bytes()
    for place in (0, 100, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(SamloveError, match="shard-00000"):
            store = FeatureStore.open(store.path)
            for key in KEYS[:2]:
                store.read(key)
