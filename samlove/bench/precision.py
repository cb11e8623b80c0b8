"""What each way of keeping SAM2's embeddings costs and changes: bytes, reading, mask logits, J&F.

Generated clips through the micro profile's SAM2; the light SAM2 follows every thing from its true mask on frame 0. The
embeddings come from a store of each precision, the reference from float32.
"""

import json
import tempfile
import time
from pathlib import Path
from statistics import mean, median
from typing import get_args

import numpy as np
import torch
import torch.nn.functional as F
from sam2.modeling.sam2_base import NO_OBJ_SCORE
from torch import Tensor

from samlove.config import Sam2Config, Sam2Dtype
from samlove.features.encoders.sam2_image import Sam2ImageEncoder
from samlove.micro.clips import Clip, draw_clip
from samlove.model.sam2 import LightSam2
from samlove.scoring.metrics import f_score, jaccard
from stores import FeatureStore, FeatureStoreWriter
from stores.chunks import Compression

MICRO = {"config": "samlove/micro/sam2_micro.yaml", "checkpoint": "weights/micro/sam2/sam2.safetensors"}
CLIPS, SEED, ROUNDS = 12, 7, 5
SHARD = 16  # clips, as the stage sam2@eval
REFERENCE: Sam2Dtype = "float32"
COMPRESSIONS: tuple[Compression, ...] = ("none", "zstd")


def run(clips: int = CLIPS) -> dict:
    """Prints a table, and the same as one JSON object on the last line; returns it.

    By dtype, for none and zstd: bytes a frame on disk, frames/s of reading whole clips from a warm cache into floats
    (median of the rounds, in turns). Mask logits against those of float32 where both find the object: largest and mean
    difference; share of all pixels that change sides of 0; J&F against the true masks, in percent.
    """
    rng = np.random.default_rng(SEED)
    drawn = [draw_clip(rng) for _ in range(clips)]
    dtypes: tuple[Sam2Dtype, ...] = get_args(Sam2Dtype)
    with tempfile.TemporaryDirectory() as folder:
        stores = {
            (dtype, compression): _write(Path(folder), drawn, dtype, compression)
            for dtype in dtypes
            for compression in COMPRESSIONS
        }
        frames = clips * len(drawn[0].frames)
        rates: dict[tuple, list[float]] = {kind: [] for kind in stores}
        for _ in range(ROUNDS):
            for kind, store in stores.items():
                began = time.perf_counter()
                for key in store.keys():
                    store.read(key)
                rates[kind].append(frames / (time.perf_counter() - began))
        model = LightSam2.load(MICRO["config"], MICRO["checkpoint"])
        masks = {dtype: _follow(model, stores[dtype, "none"], drawn) for dtype in dtypes}
        found = {
            dtype: {
                **{
                    f"{what}_{compression}": value
                    for compression in COMPRESSIONS
                    for what, value in (
                        ("bytes_a_frame", round(_data_bytes(stores[dtype, compression]) / frames)),
                        ("frames_per_s", round(median(rates[dtype, compression]))),
                    )
                },
                **_effect(masks[dtype], masks[REFERENCE], drawn),
            }
            for dtype in dtypes
        }
    names = list(found[REFERENCE])
    print(f"{'':10}" + "".join(f"{name:>20}" for name in names))
    for dtype, row in found.items():
        print(f"{dtype:10}" + "".join(f"{row[name]:>20}" for name in names))
    result = {"bench": "precision", "clips": clips, "frames": frames, "rounds": ROUNDS, "by_dtype": found}
    print(json.dumps(result))
    return result


def _write(folder: Path, clips: list[Clip], dtype: Sam2Dtype, compression: Compression) -> FeatureStore:
    encoder = Sam2ImageEncoder(
        Sam2Config(**MICRO, dtype=dtype, compression=compression),
        torch.device("cpu"),
    )
    root = folder / f"{dtype} {compression}"
    writer = FeatureStoreWriter(
        root / "store",
        root / "scratch",
        encoder.fingerprint(),
        [str(i) for i in range(len(clips))],
        SHARD,
        chunk_rows=1,
        compression=compression,
    )
    for number, keys in writer.plan():
        images = {key: torch.from_numpy(clips[int(key)].frames).permute(0, 3, 1, 2) for key in keys}  # (T, 3, S, S)
        writer.write_shard(number, {key: encoder.encode([image])[0] for key, image in images.items()})
    writer.publish()
    return FeatureStore.open(root / "store")


def _data_bytes(store: FeatureStore) -> int:
    """Of the arrays' files: with few items the rest, a few kB a shard, would weigh more than it does."""
    return sum(p.stat().st_size for p in Path(str(store.path)).rglob("c/**/*") if p.is_file())


def _follow(model: LightSam2, store: FeatureStore, clips: list[Clip]) -> list[Tensor]:
    """Mask logits (K, T, h, w) of the K things of each clip that are seen on frame 0."""
    logits = []
    for key, clip in enumerate(clips):
        embeds = {name: torch.from_numpy(array) for name, array in store.read(str(key)).items()}
        logits.append(model.track(embeds, masks=torch.from_numpy(_seen(clip)[:, 0])))
    return logits


def _seen(clip: Clip) -> np.ndarray:
    return clip.masks[clip.masks[:, 0].any((1, 2))]  # (K, T, S, S)


def _effect(logits: list[Tensor], reference: list[Tensor], clips: list[Clip]) -> dict[str, float]:
    found, wanted = (torch.cat([part.flatten(0, 1) for part in parts]) for parts in (logits, reference))  # (all, h, w)
    both = (found > NO_OBJ_SCORE).flatten(1).any(1) & (wanted > NO_OBJ_SCORE).flatten(1).any(1)
    difference = (found - wanted)[both].abs()
    scores = []
    for part, clip in zip(logits, clips, strict=True):
        size = clip.masks.shape[-2:]
        for mask, truth in zip(F.interpolate(part, size=size, mode="bilinear"), _seen(clip), strict=True):
            target = torch.from_numpy(truth)
            scores.append((jaccard(mask, target) + f_score(mask, target)) / 2)
    return {
        "largest": float(f"{difference.max().item():.3g}"),
        "mean": float(f"{difference.mean().item():.3g}"),
        "pixels_flipped": float(f"{((found > 0) != (wanted > 0)).float().mean().item():.3g}"),
        "J&F": round(100 * mean(scores), 2),
    }
