"""Small checkpoints in the official formats and small videos, for tests of the encoders and their stages."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import soundfile
import torch
import yaml
from PIL import Image

from samlove.config import AudioConfig, Sam2Config, Section, TextConfig, VisualConfig
from samlove.data.dataset import RefAvsFolder
from samlove.features.encoders.timm_image import build_timm
from samlove.features.encoders.vggish import build_vggish
from samlove.model.sam2_build import instantiate_sam2

TINY_SAM2 = str(Path(__file__).parent / "sam2_tiny.yaml")
VIT = "vit_tiny_patch16_224"
VIT_ARGS = {"embed_dim": 32, "depth": 1, "num_heads": 2}
LETTERS = [chr(c) for c in range(ord("a"), ord("z") + 1)]


def write_clip(folder: RefAvsFolder, media_id: str, frames: int, seconds: float, rate: int = 16_000) -> None:
    """Write JPEG frames of smooth noise, 48 x 36, and a stereo wav of two tones."""
    rng = np.random.default_rng(len(media_id) + frames)
    folder.frame_path(media_id, 0).parent.mkdir(parents=True)
    for t in range(frames):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        coarse.resize((48, 36)).save(folder.frame_path(media_id, t))
    time = np.arange(round(seconds * rate)) / rate
    tones = 0.3 * np.sin(2 * np.pi * np.array([[440], [660]]) * time)  # (2, samples)
    soundfile.write(folder.audio_path(media_id), tones.T, rate, subtype="PCM_16")


def audio_config(root: Path, **options: object) -> AudioConfig:
    """A VGGish of 4 channels: vggish.pth and its PCA file in the release's format, torch.save with NumPy arrays."""
    torch.manual_seed(0)
    root.mkdir(parents=True, exist_ok=True)
    torch.save(build_vggish(4, 16).state_dict(), root / "vggish.pth")
    rng = np.random.default_rng(0)
    pca = {"pca_eigen_vectors": rng.normal(size=(128, 128)), "pca_means": rng.normal(size=128)}
    torch.save(pca, root / "vggish_pca_params-970ea276.pth")
    return AudioConfig.model_validate({"weights": str(root / "vggish.pth"), "channels": 4, "hidden": 16, **options})


def vit_config(root: Path, trained_at: int = 32, image_size: int = 32, **options: object) -> VisualConfig:
    """A ViT with a classifier, as in timm's checkpoints."""
    torch.manual_seed(0)
    root.mkdir(parents=True, exist_ok=True)
    tensors = build_timm(VIT, VIT_ARGS, trained_at).state_dict()
    tensors |= {"head.weight": torch.zeros(1000, 32), "head.bias": torch.zeros(1000)}
    torch.save(tensors, root / "vit.pth")
    values = {"model": VIT, "model_args": VIT_ARGS, "weights": str(root / "vit.pth"), "image_size": image_size}
    return VisualConfig.model_validate(values | options)


def roberta_config(folder: Path, **options: object) -> TextConfig:
    """A RoBERTa with a language-modelling head and without a pooler, as in distilroberta-base."""
    from transformers import RobertaConfig, RobertaForMaskedLM, RobertaTokenizerFast

    torch.manual_seed(0)
    names = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "Ġ", *LETTERS]
    RobertaTokenizerFast(vocab={name: i for i, name in enumerate(names)}, merges=[]).save_pretrained(folder)
    sizes: Any = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = RobertaConfig(vocab_size=len(names), max_position_embeddings=40, type_vocab_size=1, **sizes)
    RobertaForMaskedLM(config).save_pretrained(folder)
    return TextConfig.model_validate({"weights": str(folder), **options})


def clip_folder(folder: Path) -> Path:
    """A whole CLIP: image encoder with 32 pixels in patches of 16, text encoder with 30 tokens."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    torch.manual_seed(0)
    names = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={name: i for i, name in enumerate(names)}, merges=[]).save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    ends = {"bos_token_id": len(names) - 2, "eos_token_id": len(names) - 1, "pad_token_id": len(names) - 1}
    text = {**sizes, **ends, "vocab_size": len(names), "max_position_embeddings": 30}
    CLIPModel(
        CLIPConfig(text_config=text, vision_config={**sizes, "image_size": 32, "patch_size": 16}, projection_dim=8)
    ).save_pretrained(folder)
    return folder


def sam2_config(root: Path, **options: object) -> Sam2Config:
    """The tests' SAM 2 with random weights, as {"model": state dict}."""
    torch.manual_seed(0)
    root.mkdir(parents=True, exist_ok=True)
    torch.save({"model": instantiate_sam2(TINY_SAM2).state_dict()}, root / "sam2.pt")
    return Sam2Config.model_validate({"config": TINY_SAM2, "checkpoint": str(root / "sam2.pt"), **options})


def make_project(root: Path) -> None:
    """A working folder with a profile of small encoders, an index of three videos and two expressions, and media."""
    sections: dict[str, Section] = {
        "audio": audio_config(root / "weights"),
        "visual": vit_config(root / "weights"),
        "text": roberta_config(root / "weights" / "roberta"),
        "sam2": sam2_config(root / "weights"),
    }
    (root / "configs" / "small").mkdir(parents=True)
    (root / "configs" / "cluster").mkdir()
    (root / "configs" / "cluster" / "local.yaml").write_text("kind: local\n")
    (root / "configs" / "profile.yaml").write_text("profile: small\n")
    for name, section in sections.items():
        (root / "configs" / "small" / f"{name}.yaml").write_text(yaml.safe_dump(section.model_dump()))
    (root / "configs" / "small" / "dataset.yaml").write_text("frames: 3\n")
    folder = RefAvsFolder(root / "data" / "dataset" / "small")
    splits = {"a": "train", "b": "val", "c": "test_s"}
    for media_id in splits:
        write_clip(folder, media_id, frames=3, seconds=3)
    index = root / "data" / "small" / "index"
    index.mkdir(parents=True)
    pd.DataFrame({"media_id": list(splits), "split": list(splits.values())}).to_parquet(index / "videos.parquet")
    pd.DataFrame({"exp": ["it", "the red star", "it"]}).to_parquet(index / "expressions.parquet")
