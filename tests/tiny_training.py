"""A model and samples so small that an epoch takes milliseconds, for tests of checkpoints and training."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from samlove.config import FusionConfig, Sam2Config, TrainConfig
from samlove.model.checkpoint import Origin
from samlove.model.sam2_build import instantiate_sam2
from samlove.train import Samples
from stores.fingerprint import sha256_file

CONFIG = str(Path(__file__).with_name("sam2_tiny.yaml"))
DIMS = {"audio": 6, "visual": 8, "text": 10, "frames": 3}
PATCHES, TOKENS, MASK = 4, 5, 32


def write_sam2(path: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    save_file(instantiate_sam2(CONFIG, image_encoder=False).state_dict(), path)
    return path


def origin(sam2: Path, fusion: dict | None = None, **settings: Any) -> Origin:
    small = {"epochs": 2, "batch_size": 3, "accumulate": 2, "warmup_steps": 2, "lr": 1e-3, "workers": 0}
    return Origin(
        fusion=FusionConfig(**{"dim": 16, "blocks": 2, "heads": 2, **(fusion or {})}),
        train=TrainConfig(**{**small, **settings}),
        sam2=Sam2Config(config=CONFIG, checkpoint=str(sam2)),
        sam2_sha256=sha256_file(sam2),
        dims=DIMS,
        features={"text": {"encoder": "test"}},
    )


class Items:
    """Samples whose object is the left or the right half of the image, according to their text.

    nulls: of each four of them, the texts of two refer to nothing.
    """

    def __init__(self, count: int, seed: int, nulls: bool = False):
        self.count, self.seed, self.nulls = count, seed, nulls

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        generator = torch.Generator().manual_seed(1000 * self.seed + index)
        scene = torch.Generator().manual_seed(0)  # one image for all
        right = index % 2
        mask = torch.zeros(MASK, MASK)
        mask[:, right * MASK // 2 : (right + 1) * MASK // 2] = 1
        text = 0.1 * torch.randn(TOKENS, DIMS["text"], generator=generator)
        text += 4 * right - 2
        if self.nulls and index // 2 % 2:
            mask, text = torch.zeros(MASK, MASK), text * torch.tensor([1.0, -1.0]).repeat(DIMS["text"] // 2)
        return {
            "audio": torch.randn(DIMS["frames"], DIMS["audio"], generator=generator),
            "audio_valid": torch.ones(DIMS["frames"], dtype=torch.bool),
            "visual": torch.randn(DIMS["frames"], 1 + PATCHES, DIMS["visual"], generator=generator),
            "text": text,
            "text_mask": torch.arange(TOKENS) < 1 + index % 3,
            "sam2_image_embed": torch.randn(64, 4, 4, generator=scene),
            "sam2_high_res_0": torch.randn(8, 16, 16, generator=scene),
            "sam2_high_res_1": torch.randn(16, 8, 8, generator=scene),
            "mask": mask,
            "row_id": f"row{index}",
            "media_id": f"media{index}",
        }


def collate(items: list[dict]) -> dict:
    return {
        name: torch.stack([item[name] for item in items])
        if isinstance(items[0][name], torch.Tensor)
        else [item[name] for item in items]
        for name in items[0]
    }


def order(epoch: int) -> np.ndarray:
    return torch.randperm(10, generator=torch.Generator().manual_seed(epoch)).numpy()


def samples(train: Items | None = None, val: Items | None = None) -> Samples:
    train = Items(10, seed=1) if train is None else train
    return Samples(train, Items(4, seed=2) if val is None else val, collate, order)
