"""Each encoder against the library that it uses, on small checkpoints in the official formats."""

import json
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from samlove.config import AudioConfig, Sam2Config, TextConfig, VisualConfig
from samlove.data.dataset import RefAvsFolder
from samlove.errors import RequestError, SamloveError
from samlove.features.encoders.base import to_store
from samlove.features.encoders.clip_image import ClipImageEncoder
from samlove.features.encoders.frames import frame_sources
from samlove.features.encoders.sam2_image import LEVELS, Sam2ImageEncoder
from samlove.features.encoders.text import TextEncoder
from samlove.features.encoders.timm_image import TimmEncoder, build_timm
from samlove.features.encoders.vggish import RATE, VggishEncoder, build_vggish, log_mel, pad_or_trim
from samlove.features.sizes import text_width
from samlove.model.sam2 import LightSam2
from samlove.model.sam2_build import checkpoint_path, instantiate_sam2, load_sam2_weights
from samlove.model.weights import load_state_dict
from stores.codec import decode
from tests import small_encoders as small
from tests.impostors import IMPOSTORS

CPU = torch.device("cpu")
STRANGE = ("\n", "\x1b", "weights_only", "PyTorch")  # in messages of torch: colour codes, advice to load unsafely
TEXTS = ["the red star", "the object making the loudest sound of all", "it"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> RefAvsFolder:
    """Three videos: complete, with frames and audio missing at the end, and with a different sample rate."""
    folder = RefAvsFolder(tmp_path_factory.mktemp("media"))
    small.write_clip(folder, "whole", frames=3, seconds=3)
    small.write_clip(folder, "short", frames=2, seconds=1.1)
    small.write_clip(folder, "other_rate", frames=4, seconds=4, rate=44_100)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(small.clip_folder(tmp_path_factory.mktemp("clip")))


@pytest.fixture(scope="module", params=["vggish", "vit", "clip image", "roberta", "clip text", "sam2"])
def encoder_and_sources(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, folder: RefAvsFolder, clip: str
) -> tuple[Any, list[Any]]:
    """Each encoder in float32, on three items."""
    root, name = tmp_path_factory.mktemp("weights"), request.param
    media = ["whole", "short", "other_rate"]
    frames = list(frame_sources(folder, media, 3).values())
    make: dict[str, Callable[[], tuple[Any, list[Any]]]] = {
        "vggish": lambda: (
            VggishEncoder(small.audio_config(root, dtype="float32"), 3, CPU),
            [folder.audio_path(m) for m in media],
        ),
        "vit": lambda: (TimmEncoder(small.vit_config(root, dtype="float32"), CPU), frames),
        "clip image": lambda: (
            ClipImageEncoder(VisualConfig(encoder="clip", weights=clip, image_size=32, dtype="float32"), CPU),
            frames,
        ),
        "roberta": lambda: (TextEncoder(small.roberta_config(root, dtype="float32"), CPU), TEXTS),
        "clip text": lambda: (
            TextEncoder(TextConfig(weights=clip, dtype="float32"), CPU),
            TEXTS,
        ),
        "sam2": lambda: (Sam2ImageEncoder(small.sam2_config(root, dtype="float32"), CPU), frames),
    }
    return make[name]()


def test_a_batch_equals_its_items_encoded_one_by_one(encoder_and_sources: tuple[Any, list[Any]]) -> None:
    encoder, sources = encoder_and_sources
    items = [encoder.load(source) for source in sources]
    together = encoder.encode(items)
    assert len(together) == len(items)
    for item, found in zip(items, together, strict=True):
        (alone,) = encoder.encode([item])
        assert found.keys() == alone.keys()
        for name, array in alone.items():
            np.testing.assert_allclose(found[name], array, rtol=1e-4, atol=1e-5, err_msg=name)


def test_fingerprint_is_json_and_needs_no_network(encoder_and_sources: tuple[Any, list[Any]]) -> None:
    encoder, _ = encoder_and_sources
    fresh = copy(encoder)
    fresh.__dict__.pop("network", None)
    fingerprint = fresh.fingerprint()
    assert json.loads(json.dumps(fingerprint)) == fingerprint == encoder.fingerprint()
    assert "network" not in fresh.__dict__
    assert len(fingerprint["weights_sha256"]) == 64
    assert fingerprint["dtype"] == "float32"


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: VggishEncoder(AudioConfig(weights="no/vggish.pth"), 10, CPU), "no/vggish.pth.*VGGish.*releases"),
        (
            lambda: TimmEncoder(VisualConfig(weights="no/vit.pth"), CPU),
            "no/vit.pth.*vit_base_patch16.*hub:timm/vit_",
        ),
        (lambda: ClipImageEncoder(VisualConfig(weights="no/clip"), CPU), "no/clip.*CLIP.*hf download openai/clip"),
        (lambda: TextEncoder(TextConfig(weights="no/roberta"), CPU), "no/roberta.*hf download distilbert/distil"),
        (
            lambda: Sam2ImageEncoder(Sam2Config(config="configs/sam2/sam2_hiera_t.yaml", checkpoint="no/sam2.pt"), CPU),
            "no/sam2.pt.*SAM 2 checkpoint.*hub:facebook/sam2.*dl.fbaipublicfiles.com",
        ),
        (lambda: Sam2ImageEncoder(Sam2Config(config="no.yaml", checkpoint="no.pt"), CPU), "no.yaml.*sam2_hiera_l.yaml"),
    ],
)
def test_missing_weights_are_reported_with_how_to_get_them(build: Callable[[], Any], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        build()


# --- weights and dtype -----------------------------------------------------------------------------------------------


def test_weights_are_read_as_float32_from_any_dtype(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(3).half(), "b": torch.arange(3), "c": torch.ones(2, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "w.safetensors")
    torch.save({"model": tensors}, tmp_path / "w.pt")
    for path in (tmp_path / "w.safetensors", tmp_path / "w.pt"):
        found = load_state_dict(path)
        assert {name: value.dtype for name, value in found.items()} == {
            "a": torch.float32,
            "b": torch.int64,
            "c": torch.float32,
        }
        torch.testing.assert_close(found["a"], torch.arange(3.0))


@pytest.mark.parametrize("kind", IMPOSTORS)
def test_a_file_in_place_of_weights_is_refused_in_plain_words(kind: str, tmp_path: Path) -> None:
    make, says = IMPOSTORS[kind]
    path = tmp_path / "weights.pt"
    make(path)
    with pytest.raises(SamloveError, match=rf"^{path}: .*{says}") as raised:
        load_state_dict(path)
    assert not [word for word in STRANGE if word in str(raised.value)]


def test_the_content_of_a_file_not_its_name_decides_how_it_is_read(tmp_path: Path) -> None:
    network = torch.nn.Linear(2, 2)
    save_file(network.state_dict(), tmp_path / "w.pt")
    torch.save(dict(network.named_parameters()), tmp_path / "w.safetensors")
    for path in (tmp_path / "w.pt", tmp_path / "w.safetensors"):
        found = load_state_dict(path)
        assert set(found) == {"weight", "bias"}
        np.testing.assert_array_equal(found["weight"].numpy(), network.weight.detach().numpy())


def test_a_path_may_begin_with_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USER", "nobody of that name")
    audio = small.audio_config(tmp_path / "w").model_copy(update={"weights": "~/w/vggish.pth"})
    visual = small.vit_config(tmp_path / "w").model_copy(update={"weights": "~/w/vit.pth"})
    text = small.roberta_config(tmp_path / "t").model_copy(update={"weights": "~/t"})
    sam2 = small.sam2_config(tmp_path / "w").model_copy(update={"checkpoint": "~/w/sam2.pt", "config": "~/sam2.yaml"})
    (tmp_path / "sam2.yaml").write_bytes(Path(small.TINY_SAM2).read_bytes())
    for encoder in (VggishEncoder(audio, 1, CPU), TimmEncoder(visual, CPU), TextEncoder(text, CPU)):
        assert len(encoder.fingerprint()["weights_sha256"]) == 64
    assert Sam2ImageEncoder(sam2, CPU).network
    assert text_width(text) == 16
    with pytest.raises(RequestError, match="~nobody-of-that-name/w: ~ .* home folder is unknown"):
        TimmEncoder(visual.model_copy(update={"weights": "~nobody-of-that-name/w"}), CPU)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: path.symlink_to("/gone"), "link to /gone, which does not exist"),
        (lambda path: path.symlink_to(path), "link to .*, which leads back to it"),
        (
            lambda path: path.parent.rmdir() or path.parent.symlink_to("/gone"),
            "is a link to /gone, which does not exist",
        ),
        (lambda path: path.mkdir(), "a folder"),
    ],
)
def test_what_is_there_instead_of_weights_is_named(make: Callable[[Path], object], says: str, tmp_path: Path) -> None:
    path = tmp_path / "folder" / "w"
    path.parent.mkdir()
    make(path)
    for build in (
        lambda: VggishEncoder(AudioConfig(weights=str(path)), 1, CPU),
        lambda: TimmEncoder(VisualConfig(weights=str(path)), CPU),
        lambda: checkpoint_path(str(path)),
        *([] if path.is_dir() else [lambda: TextEncoder(TextConfig(weights=str(path)), CPU)]),
    ):
        with pytest.raises(RequestError, match=rf"^{path}: .*{says}; expected "):
            build()


def test_a_link_to_a_folder_that_dvc_would_not_follow_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DVC watches weights/PROFILE/STAGE, which may be a link itself; see also tests/test_links.py."""
    text, audio = small.roberta_config(tmp_path / "models" / "text"), small.audio_config(tmp_path / "models" / "audio")
    monkeypatch.chdir(tmp_path)
    stages = Path("weights/mine")
    stages.mkdir(parents=True)
    for stage in ("text", "audio"):
        (stages / stage).symlink_to(tmp_path / "models" / stage)
    builds = (
        lambda inside: TextEncoder(text.model_copy(update={"weights": f"{inside('text')}"}), CPU),
        lambda inside: VggishEncoder(audio.model_copy(update={"weights": f"{inside('audio')}/vggish.pth"}), 1, CPU),
    )
    for build in builds:
        build(lambda stage: stages / stage)
    for stage in ("text", "audio"):
        (stages / stage).unlink()
        (stages / stage).mkdir()
        (stages / stage / "here").symlink_to(tmp_path / "models" / stage)
    for build in builds:
        for root in (stages, tmp_path / stages):
            with pytest.raises(
                RequestError, match="/here: link to a folder, .* DVC would notice no change; .* cp -rLs"
            ):
                build(lambda stage, root=root: root / stage / "here")


def test_the_error_for_wrong_weights_names_the_mismatch(tmp_path: Path) -> None:
    config = small.audio_config(tmp_path).model_copy(update={"hidden": 8})
    encoder = VggishEncoder(config, 1, CPU)
    with pytest.raises(SamloveError, match=r"4 channels and hidden width 8.*embeddings\.0\.weight is \(16, 768\)"):
        encoder.encode([(torch.zeros(1, 1, 96, 64), np.ones(1, bool))])


def test_integers_in_place_of_weights_are_refused(tmp_path: Path) -> None:
    config = small.vit_config(tmp_path)
    tensors = load_state_dict(Path(config.weights))
    torch.save({name: (value * 100).to(torch.int8) for name, value in tensors.items()}, config.weights)
    with pytest.raises(SamloveError, match="cls_token is torch.int8, expected floating-point numbers; .* more; choose"):
        assert TimmEncoder(config, CPU).network


def test_the_error_for_a_value_outside_the_dtype_names_the_array() -> None:
    assert to_store("x", torch.tensor([65504.0]), "float16").dtype == np.float16
    with pytest.raises(SamloveError, match="visual: 70000 is beyond the range of float16.*dtype: float32"):
        to_store("visual", torch.tensor([1.0, -70_000.0]), "float16")
    with pytest.raises(SamloveError, match="visual.*not finite"):
        to_store("visual", torch.tensor([float("nan")]), "float32")


# --- VGGish ----------------------------------------------------------------------------------------------------------


def test_vggish_has_the_official_names_and_shapes() -> None:
    from torchvggish.torchvggish import VGG, make_layers

    with torch.device("meta"):
        ours, official = build_vggish(), VGG(make_layers(), postprocess=False)
    shapes = [{name: value.shape for name, value in model.state_dict().items()} for model in (ours, official)]
    assert shapes[0] == shapes[1]
    assert "features.0.weight" in shapes[0]
    assert "embeddings.4.bias" in shapes[0]


@pytest.mark.slow
def test_vggish_reads_the_official_checkpoint(tmp_path: Path) -> None:
    from torchvggish.torchvggish import VGG, make_layers

    torch.manual_seed(0)
    official = VGG(make_layers(), postprocess=False).eval()
    path = tmp_path / "vggish-10086976.pth"  # 288 MB
    torch.save(official.state_dict(), path, _use_new_zipfile_serialization=False)  # the release's format
    encoder = VggishEncoder(AudioConfig(weights=str(path), dtype="float32"), 2, CPU)
    patches = log_mel(np.random.default_rng(0).normal(0, 0.1, 2 * RATE).astype(np.float32))
    (found,) = encoder.encode([(patches, np.ones(2, bool))])
    with torch.inference_mode():
        np.testing.assert_array_equal(found["audio"], official(patches).numpy())


def test_any_wav_gives_ten_patches_for_ten_seconds(tmp_path: Path, folder: RefAvsFolder) -> None:
    encoder = VggishEncoder(small.audio_config(tmp_path), 10, CPU)
    found = encoder.encode([encoder.load(folder.audio_path(m)) for m in ("whole", "short")])
    assert [item["audio"].shape for item in found] == [(10, 128), (10, 128)]
    assert found[0]["audio"].dtype == np.float16
    assert found[0]["audio_valid"].tolist() == [True] * 3 + [False] * 7
    assert found[1]["audio_valid"].tolist() == [True] + [False] * 9


def test_pad_or_trim() -> None:
    assert [pad_or_trim(np.ones(n), 10)[0].shape for n in (0, 159_999, 160_001)] == [(160_000,)] * 3
    assert not pad_or_trim(np.ones(0), 10)[1].any()
    assert pad_or_trim(np.ones(9 * RATE), 10)[1].tolist() == [True] * 9 + [False]
    assert pad_or_trim(np.ones(159_840), 10)[1].all()


def test_a_different_rate_is_resampled(tmp_path: Path, folder: RefAvsFolder) -> None:
    encoder = VggishEncoder(small.audio_config(tmp_path), 3, CPU)
    (original, _), (resampled, _) = (encoder.load(folder.audio_path(m)) for m in ("whole", "other_rate"))
    assert original.shape == resampled.shape == (3, 1, 96, 64)
    loud = original > 0  # the bands of the two tones
    assert loud.float().mean() > 0.02
    torch.testing.assert_close(resampled[loud], original[loud], rtol=0, atol=0.1)


def test_pre_relu_is_the_input_of_the_last_relu(tmp_path: Path, folder: RefAvsFolder) -> None:
    with_relu, before = (VggishEncoder(small.audio_config(tmp_path, pre_relu=p), 3, CPU) for p in (False, True))
    item = with_relu.load(folder.audio_path("whole"))
    signed = before.encode([item])[0]["audio"]
    assert (signed < 0).any()
    np.testing.assert_array_equal(np.maximum(signed, 0), with_relu.encode([item])[0]["audio"])
    assert with_relu.fingerprint() != before.fingerprint()


def test_postprocess_is_pca_and_eight_bits(tmp_path: Path, folder: RefAvsFolder) -> None:
    plain = VggishEncoder(small.audio_config(tmp_path, dtype="float32"), 1, CPU)
    encoder = VggishEncoder(small.audio_config(tmp_path, postprocess=True), 1, CPU)
    item = plain.load(folder.audio_path("whole"))
    pca = torch.load(tmp_path / "vggish_pca_params-970ea276.pth", weights_only=False)
    rotated = pca["pca_eigen_vectors"] @ (plain.encode([item])[0]["audio"][0] - pca["pca_means"])
    wanted = np.round((np.clip(rotated, -2, 2) + 2) * 255 / 4)
    found = encoder.encode([item])[0]["audio"]
    assert found.shape == (1, 128)
    assert np.abs(found[0] - wanted).max() <= 1  # a value at the edge of two steps may round either way
    assert encoder.fingerprint()["pca_sha256"]
    (tmp_path / "vggish_pca_params-970ea276.pth").unlink()
    with pytest.raises(RequestError, match="vggish_pca_params-970ea276.pth: no such file"):
        VggishEncoder(encoder.config, 1, CPU)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"pca_means": np.zeros(128)}, "expected VGGish's PCA, arrays pca_eigen_vectors and pca_means"),
        (torch.zeros(3), "expected VGGish's PCA"),
        (
            {"pca_eigen_vectors": np.zeros((64, 64)), "pca_means": np.zeros(64)},
            r"a PCA of 128 values, found \(64, 64\)",
        ),
        ({"pca_eigen_vectors": "x", "pca_means": np.zeros(128)}, "expected VGGish's PCA"),
        ({"pca_eigen_vectors": np.array([object()])}, "holds .*besides tensors"),
    ],
)
def test_another_file_in_place_of_the_pca_is_refused(value: Any, says: str, tmp_path: Path) -> None:
    encoder = VggishEncoder(small.audio_config(tmp_path, postprocess=True), 1, CPU)
    torch.save(value, tmp_path / "vggish_pca_params-970ea276.pth")
    with pytest.raises(SamloveError, match=rf"vggish_pca_params-970ea276.pth: .*{says}.*; download https.*\.pth$"):
        _ = encoder.postprocessor


# --- frames ----------------------------------------------------------------------------------------------------------


def test_vit_tokens_equal_timms(tmp_path: Path, folder: RefAvsFolder) -> None:
    encoder = TimmEncoder(small.vit_config(tmp_path, dtype="float32"), CPU)
    frames = encoder.load(frame_sources(folder, ["whole"], 3)["whole"])
    assert frames.shape == (3, 3, 32, 32)
    found = encoder.encode([frames])[0]["visual"]
    network = build_timm(small.VIT, small.VIT_ARGS, 32).eval()
    network.load_state_dict(load_state_dict(tmp_path / "vit.pth"), strict=False)
    with torch.inference_mode():
        wanted = network.forward_features(frames.float() / 127.5 - 1)  # type: ignore[operator]
    assert found.shape == (3, 1 + 4, 32)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_vit_position_embeddings_are_resampled_to_a_different_size(tmp_path: Path) -> None:
    from timm.layers import resample_abs_pos_embed

    encoder = TimmEncoder(small.vit_config(tmp_path, trained_at=32, image_size=64), CPU)
    trained = load_state_dict(tmp_path / "vit.pth")["pos_embed"]
    torch.testing.assert_close(encoder.network.pos_embed.data, resample_abs_pos_embed(trained, (4, 4)))
    assert encoder.encode([torch.zeros(2, 3, 64, 64, dtype=torch.uint8)])[0]["visual"].shape == (2, 17, 32)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (
            {"patch_size": 32, "img_size": 64},
            r"patch_embed.proj.weight is \(32, 3, 32, 32\), expected \(32, 3, 16, 16\)",
        ),
        ({"patch_size": 8, "img_size": 32}, "patch_embed.proj.weight is"),
        ({"pre_norm": True}, "unexpected norm_pre.weight"),
        ({"reg_tokens": 4}, "unexpected reg_token"),
        ({"class_token": False, "global_pool": "avg"}, "missing cls_token"),
        ({"depth": 2}, "unexpected blocks.1."),
        ({"embed_dim": 64}, "cls_token is"),
        ({"init_values": 1e-5}, "unexpected blocks.0.ls1.gamma"),
    ],
    ids=str,
)
def test_the_weights_of_another_vit_are_refused(other: dict[str, Any], says: str, tmp_path: Path) -> None:
    """Of other patch sizes, timm's own function would resample the patches and compute something else."""
    import timm

    config = small.vit_config(tmp_path)
    network = timm.create_model(small.VIT, **{"num_classes": 0, "img_size": 32, **small.VIT_ARGS, **other})
    save_file(network.state_dict(), config.weights)
    with pytest.raises(SamloveError, match=f"not the weights of timm's {small.VIT} as configured: .*{says}"):
        _ = TimmEncoder(config, CPU).network


@pytest.mark.parametrize(("model", "args"), [("resnet18", {"embed_dim": 32}), ("no_such_model", {})])
def test_a_model_that_timm_cannot_build_is_refused(model: str, args: dict[str, int]) -> None:
    with pytest.raises(RequestError, match=f"{model}: timm cannot build it.*visual.yaml"):
        build_timm(model, args, 32)


def test_short_videos_repeat_their_last_frame(folder: RefAvsFolder) -> None:
    sources = frame_sources(folder, ["short", "absent"], 3)
    assert [path.name for path in sources["short"]] == ["0.jpg", "1.jpg", "1.jpg"]
    assert sources["absent"] == [folder.frame_path("absent", 0)] * 3


def test_the_clip_image_encoder_loads_with_and_without_the_rest_of_clip(
    tmp_path: Path, clip: str, folder: RefAvsFolder
) -> None:
    from transformers import CLIPModel

    whole = CLIPModel.from_pretrained(clip)
    whole.vision_model.save_pretrained(tmp_path)
    values = {"encoder": "clip", "image_size": 32, "dtype": "float32"}
    encoders = [ClipImageEncoder(VisualConfig(**values, weights=w), CPU) for w in (clip, str(tmp_path))]
    frames = encoders[0].load(frame_sources(folder, ["whole"], 1)["whole"])
    found = [encoder.encode([frames])[0]["visual"] for encoder in encoders]
    np.testing.assert_array_equal(found[0], found[1])
    assert found[0].shape == (1, 1 + 4, 16)
    bigger = ClipImageEncoder(VisualConfig(**{**values, "image_size": 64}, weights=clip), CPU)
    assert bigger.encode([torch.zeros(1, 3, 64, 64, dtype=torch.uint8)])[0]["visual"].shape == (1, 17, 16)


# --- text ------------------------------------------------------------------------------------------------------------


def test_expressions_are_padded_and_truncated(tmp_path: Path) -> None:
    encoder = TextEncoder(small.roberta_config(tmp_path, max_tokens=8), CPU)
    short, long = encoder.encode(["it", "a long text that is cut"])
    assert short["text"].shape == long["text"].shape == (8, 16)
    assert short["text_mask"].tolist() == [True] * 4 + [False] * 4  # <s> i t </s>
    assert long["text_mask"].all()


def test_padding_does_not_reach_the_tokens(tmp_path: Path) -> None:
    config = small.roberta_config(tmp_path, dtype="float32")
    few, many = (TextEncoder(config.model_copy(update={"max_tokens": n}), CPU).encode(["it"])[0] for n in (4, 25))
    np.testing.assert_allclose(many["text"][many["text_mask"]], few["text"], rtol=1e-4, atol=1e-5)


def test_more_tokens_than_the_model_has_positions_are_refused(tmp_path: Path, clip: str) -> None:
    for encoder, longest in (
        (TextEncoder(small.roberta_config(tmp_path, max_tokens=39), CPU), 38),
        (TextEncoder(TextConfig(weights=clip, max_tokens=31), CPU), 30),
    ):
        with pytest.raises(RequestError, match=f"takes at most {longest} tokens"):
            encoder.encode(["it"])


def test_a_folder_with_a_missing_weight_is_refused(tmp_path: Path) -> None:
    config = small.roberta_config(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["roberta.encoder.layer.0.output.dense.bias"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SamloveError, match="RobertaModel missing: encoder.layer.0.output.dense.bias"):
        TextEncoder(config, CPU).encode(["it"])


def change(path: Path, **values: object) -> None:
    """Set keys of a JSON file; ... removes one."""
    found = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not ...}))


def save_bert(folder: Path) -> None:
    """A BERT whose weights transformers would load as a RoBERTa of the same sizes without an error."""
    from transformers import BertConfig, BertModel

    sizes = json.loads((folder / "config.json").read_text())
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    BertModel(
        BertConfig(**{name: sizes[name] for name in names}, max_position_embeddings=40, type_vocab_size=1)
    ).save_pretrained(folder)


def save_wordpiece(folder: Path) -> None:
    from transformers import BertTokenizer

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *small.LETTERS, "##a"]
    BertTokenizer(vocab={name: i for i, name in enumerate(names)}).save_pretrained(folder)


def wrap(folder: Path) -> None:
    """As sentence-transformers saves some models."""
    inside = folder / "0_Transformer"
    inside.mkdir()
    for path in [path for path in folder.iterdir() if path.is_file()]:
        path.rename(inside / path.name)
    (folder / "modules.json").write_text("[]")


def add_a_layer(folder: Path, name: str = ".layer.") -> None:
    tensors = load_file(folder / "model.safetensors")
    further = {key.replace(f"{name}0.", f"{name}9."): value.clone() for key, value in tensors.items()}
    save_file(further | tensors, folder / "model.safetensors", metadata={"format": "pt"})


def quantise(folder: Path) -> None:
    path = folder / "model.safetensors"
    save_file({n: (v * 100).to(torch.int8) for n, v in load_file(path).items()}, path, metadata={"format": "pt"})


def split(folder: Path) -> None:
    """Beside a file of weights, a list of several files, with other weights."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    save_file({n: v * 2 for n, v in tensors.items()}, folder / "part.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "part.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def unlink(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (save_bert, "tokenizer .* expected class BertTokenizer, found RobertaTokenizer"),
        (
            lambda f: change(f / "config.json", model_type="gpt2"),
            "expected model_type 'bert', .*'roberta', .*, found 'gpt2'; set weights: hub:distilbert/distilroberta",
        ),
        (
            lambda f: change(f / "config.json", model_type="camembert"),
            "tokenizer .* expected class CamembertTokenizer, found RobertaTokenizer",
        ),
        (lambda f: change(f / "config.json", model_type=...), "expected model_type .*, found None"),
        (lambda f: (f / "config.json").write_text("{"), "config.json: expected the configuration of a model"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json: expected the configuration of a model"),
        (unlink("config.json"), "config.json: no such file; expected as a part of a text encoder; set weights"),
        (unlink("model.safetensors"), "model.safetensors or pytorch_model.bin: no such file; expected as a part"),
        (wrap, "the model is in a folder inside it; set weights: .*/0_Transformer"),
        (lambda f: change(f / "config.json", num_hidden_layers=2), "weights of RobertaModel missing: encoder.layer.1"),
        (add_a_layer, "weights of RobertaModel not in config.json: roberta.encoder.layer.9"),
        (lambda f: change(f / "config.json", intermediate_size=64), "whose shapes differ from config.json: encoder"),
        (quantise, "weights of RobertaModel that are integers: roberta"),
        (split, "index.json: expected the weights in one file, found a list of several, .*; remove it, or set we"),
        (save_wordpiece, "tokenizer .* expected class RobertaTokenizer, found BertTokenizer"),
        (lambda f: change(f / "config.json", pad_token_id=0), "tokenizer .* expected pad_token_id 0, found 1"),
        (unlink("tokenizer.json"), "not readable as a RobertaTokenizer|tokenizer does not fit"),
        (unlink("tokenizer.json", "tokenizer_config.json"), "tokenizer does not fit"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors: expected tensors .* an empty file"),
    ],
)
def test_a_folder_of_another_model_or_tokenizer_is_refused(
    spoil: Callable[[Path], object], says: str, tmp_path: Path
) -> None:
    config = small.roberta_config(tmp_path)
    spoil(tmp_path)
    with pytest.raises(SamloveError, match=f"^{tmp_path}.*{says}") as raised:
        TextEncoder(config, CPU).encode(["it"])
    assert "\n" not in str(raised.value)


def test_clip_folders_are_checked_too(tmp_path: Path) -> None:
    roberta = small.roberta_config(tmp_path / "roberta").weights
    clip = small.clip_folder(tmp_path / "clip")
    integers = small.clip_folder(tmp_path / "integers")
    quantise(integers)
    deeper = small.clip_folder(tmp_path / "deeper")
    add_a_layer(deeper, ".layers.")
    for what in (
        ClipImageEncoder(VisualConfig(encoder="clip", weights=str(deeper)), CPU),
        TextEncoder(TextConfig(weights=str(deeper)), CPU),
    ):
        with pytest.raises(
            SamloveError, match="weights of CLIP.* not in config.json: (vision|text)_model.encoder.layers"
        ):
            assert what.network
    with pytest.raises(SamloveError, match="weights of CLIPVisionModel that are integers: "):
        assert ClipImageEncoder(VisualConfig(encoder="clip", weights=str(integers)), CPU).network
    with pytest.raises(SamloveError, match="weights of CLIPTextModel that are integers: "):
        assert TextEncoder(TextConfig(weights=str(integers)), CPU).network
    expected = "expected model_type 'clip' or 'clip_vision_model', found 'roberta'; .*openai/clip"
    with pytest.raises(RequestError, match=expected):
        ClipImageEncoder(VisualConfig(encoder="clip", weights=roberta), CPU)
    (clip / "tokenizer.json").unlink()
    with pytest.raises(SamloveError, match="tokenizer does not fit the network or is incomplete: expected tokens 54"):
        _ = TextEncoder(TextConfig(weights=str(clip)), CPU).tokenizer


def test_code_in_a_model_folder_is_never_run(tmp_path: Path) -> None:
    config = small.roberta_config(tmp_path / "roberta")
    ran = tmp_path / "ran"
    (tmp_path / "roberta" / "code.py").write_text(f"open({str(ran)!r}, 'w')")
    change(tmp_path / "roberta" / "config.json", auto_map={"AutoModel": "code.A", "AutoTokenizer": "code.B"})
    change(tmp_path / "roberta" / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.B", None]})
    TextEncoder(config, CPU).encode(["it"])
    change(tmp_path / "roberta" / "tokenizer_config.json", tokenizer_class="B")
    with pytest.raises(SamloveError, match="tokenizer does not fit"):
        TextEncoder(config, CPU).encode(["it"])
    assert not ran.exists()


# --- SAM 2 -----------------------------------------------------------------------------------------------------------


def test_frames_are_prepared_as_in_sam2(tmp_path: Path, folder: RefAvsFolder) -> None:
    from sam2.utils.misc import load_video_frames

    from samlove.features.encoders.frames import normalise
    from samlove.features.encoders.sam2_image import MEAN, STD

    encoder = Sam2ImageEncoder(small.sam2_config(tmp_path), CPU)
    ours = normalise(encoder.load(frame_sources(folder, ["whole"], 3)["whole"]), MEAN, STD)
    official, *_ = load_video_frames(str(folder.frame_path("whole", 0).parent), 64, False, compute_device=CPU)
    torch.testing.assert_close(ours, official, rtol=0, atol=0)


def test_both_cache_points_equal_what_sam2_computes(tmp_path: Path) -> None:
    frames = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    found = {}
    for point in ("pre_conv", "post_conv"):
        encoder = Sam2ImageEncoder(small.sam2_config(tmp_path, cache_point=point, dtype="float32"), CPU)
        found[point] = {name: torch.from_numpy(a) for name, a in encoder.encode([frames])[0].items()}
        assert (encoder.fingerprint()["decoder_convs_sha256"] is not None) == (point == "post_conv")
    assert [tuple(found["post_conv"][name].shape) for name in LEVELS] == [(2, 8, 16, 16), (2, 16, 8, 8), (2, 64, 4, 4)]
    assert [tuple(found["pre_conv"][name].shape) for name in LEVELS] == [(2, 64, 16, 16), (2, 64, 8, 8), (2, 64, 4, 4)]
    network = instantiate_sam2(small.TINY_SAM2)
    load_sam2_weights(network, str(tmp_path / "sam2.pt"))
    decoder: Any = network.sam_mask_decoder
    with torch.inference_mode():
        before = found["pre_conv"]
        conv = [decoder.conv_s0(before[LEVELS[0]]), decoder.conv_s1(before[LEVELS[1]]), before[LEVELS[2]]]
    for name, wanted in zip(LEVELS, conv, strict=True):
        torch.testing.assert_close(found["post_conv"][name], wanted, rtol=1e-4, atol=1e-5)


def test_a_sam2_checkpoint_of_another_size_is_refused(tmp_path: Path) -> None:
    config = small.sam2_config(tmp_path)
    other = tmp_path / "other.yaml"
    other.write_text(Path(small.TINY_SAM2).read_text().replace("d_model: 64", "d_model: 32"))
    with pytest.raises(SamloveError, match="sam2.pt: these are not the weights of this SAM 2 as configured"):
        _ = Sam2ImageEncoder(config.model_copy(update={"config": str(other)}), CPU).network


@pytest.mark.slow
def test_a_sam2_checkpoint_of_the_hub_equals_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = small.sam2_config(tmp_path)
    asked = []

    def download(name: str, file: str) -> str:
        asked.append((name, file))
        return local.checkpoint

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    from_hub = Sam2ImageEncoder(local.model_copy(update={"checkpoint": "hub:facebook/sam2-hiera-large"}), CPU)
    expected = Sam2ImageEncoder(local, CPU)
    assert from_hub.fingerprint() == expected.fingerprint()
    frames = [torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)]
    for found, wanted in zip(from_hub.encode(frames), expected.encode(frames), strict=True):
        for name, array in wanted.items():
            np.testing.assert_array_equal(found[name], array)
    assert asked == [("facebook/sam2-hiera-large", "sam2_hiera_large.pt")]  # fingerprint and weights: one file
    light = LightSam2.load(small.TINY_SAM2, "hub:facebook/sam2.1-hiera-base-plus")
    assert asked[1:] == [("facebook/sam2.1-hiera-base-plus", "sam2.1_hiera_base_plus.pt")]
    assert all((value == load_state_dict(from_hub.checkpoint)[key]).all() for key, value in light.state_dict().items())


def test_the_hub_is_refused_or_fails_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, file: str) -> str:
        raise OSError("no network\nmore")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    for checkpoint, says in (
        ("hub:facebook/sam2", "not an official SAM 2 model; expected one of: .*hub:facebook/sam2-hiera-large"),
        ("hub:facebook/sam2-hiera-tiny", "cannot be downloaded from the Hub: no network; .*dl.fbaipublicfiles.com"),
    ):
        with pytest.raises(RequestError, match=f"^{checkpoint}: .*{says}") as raised:
            checkpoint_path(checkpoint)
        assert "\n" not in str(raised.value)
    with pytest.raises(RequestError, match=r"^hub:any: .*not supported for VGGish's weights; download https.*\.pth$"):
        VggishEncoder(AudioConfig(weights="hub:any"), 10, CPU)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_sam2_dtypes_stay_within_their_error_bounds(tmp_path: Path, dtype: str) -> None:
    frames = [torch.randint(0, 256, (n, 3, 64, 64), dtype=torch.uint8) for n in (2, 1)]
    exact = Sam2ImageEncoder(small.sam2_config(tmp_path, dtype="float32"), CPU)
    narrow = Sam2ImageEncoder(small.sam2_config(tmp_path, dtype=dtype), CPU)
    assert narrow.fingerprint() == exact.fingerprint() | {"dtype": dtype}
    for found, wanted in zip(map(decode, narrow.encode(frames)), exact.encode(frames), strict=True):
        assert set(found) == set(LEVELS)
        for name, value in wanted.items():
            largest = np.abs(value).max(axis=(2, 3), keepdims=True)  # (F, C, 1, 1)
            bound = {
                "float16": np.abs(value) * 2**-11 + 2**-25,
                "bfloat16": np.abs(value) * 2**-8,
                "int8": largest / 253,
            }
            assert (np.abs(found[name].astype(np.float32) - value) <= bound[dtype] + 1e-6).all()
