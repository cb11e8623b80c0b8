"""`samlove bundle`: a checkpoint with what predict needs, as a folder that works elsewhere."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import samlove
from samlove.cli.main import app
from samlove.errors import RequestError, SamloveError
from samlove.predict.setup import find_setup
from stores.fingerprint import sha256_file
from tests.videos import frames_of, sound_of, write_lossless, write_refavs

SENTENCE = "The object making the loudest sound."


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("video")
    folder, _ = write_refavs(root, [1], [SENTENCE])
    return write_lossless(root / "v1.mkv", frames_of(folder, "v1")[:2], sound_of(1)[:32_000])


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "whole"
    checkpoint = find_setup().checkpoint
    app(["bundle", str(checkpoint), "--out", str(out), "--with-weights"], standalone_mode=False)
    return out


def test_a_whole_bundle_works_anywhere_and_gives_the_same(whole, video, tmp_path, monkeypatch):
    expected = samlove.load().segment(video, SENTENCE)
    moved = tmp_path / "elsewhere"
    shutil.copytree(whole, moved)
    monkeypatch.chdir(tmp_path)
    setup = find_setup("elsewhere")
    for path in (
        setup.audio.weights,
        setup.visual.weights,
        setup.text.weights,
        setup.sam2.checkpoint,
        setup.sam2.config,
    ):
        assert path.startswith("elsewhere/") and Path(path).exists()
    assert np.array_equal(samlove.load("elsewhere").segment(video, SENTENCE).logits, expected.logits)


def test_weights_that_differ_are_refused_by_their_hash(whole, video, tmp_path):
    for kind in ("audio", "sam2"):
        changed = tmp_path / kind
        shutil.copytree(whole, changed)
        file = next((changed / "weights" / kind).glob("*.safetensors"))
        before = sha256_file(file)
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        with pytest.raises(SamloveError) as refused:
            samlove.load(changed).segment(video, SENTENCE)
        assert before in str(refused.value) and sha256_file(file) in str(refused.value)


def test_a_small_bundle_names_the_weights_that_it_lacks(whole, video, tmp_path, capsys):
    out = tmp_path / "small"
    app(["bundle", str(find_setup().checkpoint), "--out", str(out)], standalone_mode=False)
    printed = capsys.readouterr().out
    lacking = json.loads((out / "bundle.json").read_text())["weights_sha256"]
    for name, sha256 in lacking.items():
        assert not (out / name).exists() and f"{name}  sha256 {sha256}" in printed
        assert sha256_file(whole / name) == sha256
    with pytest.raises(RequestError, match=r"small/weights/audio/vggish.safetensors"):
        samlove.load(out).segment(video, SENTENCE)
    for name in lacking:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(whole / name, out / name)
    assert samlove.load(out).segment(video, SENTENCE).masks.shape[0] == 1
    with pytest.raises(RequestError, match="already exists"):
        app(["bundle", str(find_setup().checkpoint), "--out", str(out)], standalone_mode=False)


def test_a_damaged_bundle_is_refused(whole, tmp_path):
    def changed(name: str, **values: object) -> Path:
        copy = tmp_path / name
        shutil.copytree(whole, copy)
        found = json.loads((copy / "bundle.json").read_text())
        (copy / "bundle.json").write_text(json.dumps(found | values))
        return copy

    settings = json.loads((whole / "bundle.json").read_text())["settings"]
    outside = settings | {"text": settings["text"] | {"weights": "../text"}}
    unknown = settings | {"text": settings["text"] | {"more": 1}}
    for folder, message in (
        (changed("a", checkpoint_sha256="0" * 64), "expected sha256 0000"),
        (changed("b", schema=2), "bundle of schema 1"),
        (changed("c", settings=outside), "inside the bundle"),
        (changed("d", settings=unknown), "text: "),
    ):
        with pytest.raises(SamloveError, match=message) as refused:
            samlove.load(folder)
        assert "\n" not in str(refused.value)
    config = changed("e") / "weights" / "sam2" / "sam2_micro.yaml"
    config.write_text(config.read_text().replace("num_maskmem: 7", "num_maskmem: 6"))
    with pytest.raises(
        SamloveError, match=f"{config}: expected sha256 {sha256_file(whole / config.relative_to(tmp_path / 'e'))}"
    ):
        samlove.load(tmp_path / "e")
    (changed("f") / "checkpoint.safetensors").unlink()
    with pytest.raises(SamloveError, match="checkpoint.safetensors: expected sha256 .*, found no such file"):
        samlove.load(tmp_path / "f")
    with pytest.raises(RequestError, match="without bundle.json"):
        samlove.load(tmp_path)
    with pytest.raises(RequestError, match="no such file"):
        samlove.load(tmp_path / "missing")
