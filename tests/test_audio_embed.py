"""Importing a folder of another project's audio embeddings as a store that the pack stage accepts."""

import numpy as np
import pytest
import torch

from samlove.config import AudioConfig
from samlove.data.pack import check_asked
from samlove.errors import RequestError, SamloveError
from samlove.features.audio_embed import import_audio_embed
from stores import FeatureStore


def write(folder, **values) -> dict:
    folder.mkdir(exist_ok=True)
    for name, value in values.items():
        torch.save(value, folder / f"{name}.pt")
    return values


def test_tensors_become_items_with_the_fingerprint_imported(tmp_path):
    made = write(tmp_path / "audio_embed", a_0_10000=torch.randn(10, 128), null_b=torch.rand(10, 128) * 255)
    made |= write(tmp_path / "audio_embed", grad=torch.randn(10, 128, requires_grad=True))
    assert import_audio_embed(tmp_path / "audio_embed", tmp_path / "audio") == 3
    store = FeatureStore.open(tmp_path / "audio")
    assert store.keys() == sorted(made)
    for key, value in made.items():
        item = store.read(key)
        np.testing.assert_array_equal(item["audio"], value.detach().numpy().astype(np.float16))
        assert item["audio_valid"].dtype == bool and item["audio_valid"].all()
    assert store.manifest["fingerprint"]["encoder"] == "imported"
    check_asked(store, AudioConfig(weights="w"), "audio")
    assert {p.name for p in tmp_path.iterdir()} == {"audio_embed", "audio"}


def test_float32_keeps_every_bit_and_must_match_the_configured_dtype(tmp_path):
    made = write(tmp_path / "audio_embed", a=torch.randn(10, 128))
    import_audio_embed(tmp_path / "audio_embed", tmp_path / "audio", "float32")
    store = FeatureStore.open(tmp_path / "audio")
    np.testing.assert_array_equal(store.read("a")["audio"], made["a"].numpy())
    with pytest.raises(SamloveError, match="dtype"):
        check_asked(store, AudioConfig(weights="w"), "audio")


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (torch.zeros(9, 128), r"bad\.pt: expected a tensor \(10, 128\), found \(9, 128\)"),
        ({"audio": torch.zeros(10, 128)}, r"bad\.pt: expected a tensor .* found dict"),
        (np.zeros((10, 128)), r"bad\.pt: holds numpy.*besides tensors; .*torch\.save\(torch\.as_tensor\(array\)"),
        (torch.full((10, 128), torch.nan), r"bad\.pt: .*not finite"),
        (torch.full((10, 128), 1e6), r"bad\.pt: 1e\+06 is beyond the range of float16"),
    ],
)
def test_an_invalid_file_is_named_and_nothing_is_left(tmp_path, value, match):
    write(tmp_path / "audio_embed", a=torch.zeros(10, 128), bad=value)
    with pytest.raises(SamloveError, match=match):
        import_audio_embed(tmp_path / "audio_embed", tmp_path / "audio")
    assert {p.name for p in tmp_path.iterdir()} == {"audio_embed"}


def test_truncated_and_missing_files(tmp_path):
    write(tmp_path / "audio_embed", a=torch.zeros(10, 128))
    with pytest.raises(RequestError, match="found none"):
        import_audio_embed(tmp_path, tmp_path / "audio")
    file = tmp_path / "audio_embed" / "a.pt"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(SamloveError, match=r"a\.pt: .*truncated"):
        import_audio_embed(tmp_path / "audio_embed", tmp_path / "audio")
