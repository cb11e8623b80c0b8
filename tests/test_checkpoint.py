import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from samlove.errors import RequestError, SamloveError
from samlove.model.checkpoint import Header, load_model, read_header, read_tensors, save_checkpoint, write_tensors
from stores.inspect import diff, open_artefact
from stores.verify import verify
from tests.tiny_training import Items, collate, origin, write_sam2


@pytest.fixture
def made(tmp_path):
    """(model, header, checkpoint); the trained parameters differ from their initial values."""
    start = origin(write_sam2(tmp_path / "sam2.safetensors"), fusion={"seg_tokens": 2})
    model = start.build().eval()
    model.sam2.set_trainable(prompt_encoder=True, mask_decoder=True)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    header = Header(**dict(start), epoch=3, validation={"J": 50.0, "F": 60.0, "J&F": 55.0})
    path = tmp_path / "model" / "best.safetensors"
    save_checkpoint(path, model, header)
    return model, header, path


def test_a_loaded_model_gives_the_same_outputs_as_the_saved_one(made):
    model, header, path = made
    batch = collate([Items(2, seed=0)[i] for i in range(2)])
    loaded = load_model(path)
    for found, expected in zip(loaded(batch), model(batch), strict=True):
        assert torch.equal(found, expected)
    assert not loaded.training
    assert read_header(path) == header


def test_a_checkpoint_holds_only_trained_parameters(made):
    model, _, path = made
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(load_file(path)) == trained
    assert not any("memory" in name for name in trained)


def test_a_different_sam2_is_refused(made):
    _, header, path = made
    write_sam2(path.parents[1] / "sam2.safetensors", seed=7)
    with pytest.raises(SamloveError, match=f"expected the SAM 2 that .*best.safetensors .*{header.sam2_sha256}.*found"):
        load_model(path)


def test_a_missing_sam2_is_named(made):
    (made[2].parents[1] / "sam2.safetensors").unlink()
    with pytest.raises(RequestError, match=r"sam2\.safetensors: no such file"):
        load_model(made[2])


def test_files_that_are_not_checkpoints_are_refused(made, tmp_path):
    _, _, path = made
    with pytest.raises(RequestError, match="no such file; run: dvc repro train"):
        load_model(tmp_path / "none.safetensors")
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SamloveError, match="not a complete safetensors file"):
        load_model(truncated)
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(SamloveError, match="without its header"):
        load_model(tmp_path / "foreign.safetensors")


def test_tensors_that_do_not_fit_are_named(made):
    _, header, path = made
    tensors, stored = read_tensors(path)
    del tensors["fusion.aud"]
    tensors["fusion.seg"] = torch.zeros(1, 16)
    write_tensors(path, tensors, stored)
    with pytest.raises(SamloveError, match=r"missing fusion.aud; fusion.seg is \(1, 16\), expected \(2, 16\)"):
        load_model(path)


def test_a_header_with_a_different_schema_is_refused(made):
    _, header, path = made
    tensors, stored = read_tensors(path)
    stored["when"] = stored.pop("epoch")
    write_tensors(path, tensors, stored)
    with pytest.raises(SamloveError, match="expected a header of schema 1"):
        read_header(path)


def test_a_failed_write_leaves_the_existing_file(made):
    _, _, path = made
    before = path.read_bytes()
    with pytest.raises(Exception, match="."):
        write_tensors(path, {"a": torch.zeros(2), "b": torch.zeros(2).to("meta")}, {})
    assert path.read_bytes() == before


def test_a_flipped_bit_is_refused_and_found_by_verify(made):
    _, _, path = made
    whole = path.read_bytes()
    assert verify(path, deep=True) == []
    for place in (len(whole) - 1, len(whole) // 2, whole.index(b'"blocks') + 12):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(SamloveError, match=r"best\.safetensors: (damaged: expected crc32c|expected a)"):
            load_model(path)
        (fault,) = verify(path, deep=True)
        assert fault.startswith(f"{path}: ")


def test_a_checkpoint_of_an_older_version_is_still_read(made):
    model, header, path = made
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    before = {name: value for name, value in header.model_dump(mode="json").items() if name != "shards"}
    save_file(trained, path, {"samlove": json.dumps(before)})
    assert read_header(path) == header
    loaded = load_model(path).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in trained.items())
    (fault,) = verify(path)
    assert "has no checksum (written by an older version)" in fault


def test_diff_of_two_checkpoints_shows_headers_and_tensors(made):
    model, header, path = made
    other = path.with_name("other.safetensors")
    with torch.no_grad():
        model.fusion.aud += 0.5
    save_checkpoint(other, model, header.model_copy(update={"epoch": 4, "sam2_sha256": "0" * 64}))
    found = diff(path, other)
    assert found.fingerprint == {"epoch": (3, 4), "sam2_sha256": (header.sam2_sha256, "0" * 64)}
    assert found.changed == ["fusion.aud"] and found.largest["tensor"] == pytest.approx(0.5)
    assert open_artefact(path).fingerprint["fusion"]["dim"] == 16
