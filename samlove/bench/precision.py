"""How the stored precision of SAM 2's embeddings affects bytes, read speed, mask logits and J&F.

Encodes generated videos with the micro profile's SAM 2. Then the light SAM 2 tracks every object from its ground-truth
mask in frame 0, with embeddings from one store per precision; float32 is the reference.
"""

import json
import tempfile
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import get_args

import numpy as np
import torch
import torch.nn.functional as F
from sam2.modeling.sam2_base import NO_OBJ_SCORE
from torch import Tensor

from samlove.bench.timing import in_turns, timed
from samlove.config import Sam2Config, Sam2Dtype
from samlove.features.encoders.sam2_image import Sam2ImageEncoder
from samlove.micro.clips import Clip, draw_clip
from samlove.model.sam2 import LightSam2
from samlove.scoring.metrics import f_score, jaccard
from stores import FeatureStore, FeatureStoreWriter
from stores.chunks import Compression

MICRO = {"config": "samlove/micro/sam2_micro.yaml", "checkpoint": "weights/micro/sam2/sam2.safetensors"}
CLIPS, SEED, ROUNDS = 12, 7, 5
SHARD = 16  # videos, as in the stage sam2
REFERENCE: Sam2Dtype = "float32"
COMPRESSIONS: tuple[Compression, ...] = ("none", "zstd")


def run(clips: int = CLIPS) -> dict:
    """Print a table, then the result as one JSON object on the last line. Returns the result.

    By dtype, for compression none and zstd: bytes per frame on disk, and frames/s of reading whole videos from a warm
    page cache into floats (median of the rounds). Mask logits compared with float32's: largest and mean difference over
    the frames in which both find the object, and the fraction of all pixels that change sign. J&F against the
    ground-truth masks, in percent.
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
        times = in_turns({kind: partial(timed, partial(_read_all, store)) for kind, store in stores.items()}, ROUNDS)
        seconds = {kind: median(one.wall for one in spent) for kind, spent in times.items()}
        model = LightSam2.load(MICRO["config"], MICRO["checkpoint"])
        masks = {dtype: _track(model, stores[dtype, "none"], drawn) for dtype in dtypes}
        found = {
            dtype: {
                **{
                    f"{what}_{compression}": value
                    for compression in COMPRESSIONS
                    for what, value in (
                        ("bytes_a_frame", round(_data_bytes(stores[dtype, compression]) / frames)),
                        ("frames_per_s", round(frames / seconds[dtype, compression])),
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
        Sam2Config.model_validate({**MICRO, "dtype": dtype, "compression": compression}),
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


def _read_all(store: FeatureStore) -> None:
    for key in store.keys():
        store.read(key)


def _data_bytes(store: FeatureStore) -> int:
    """Size of the arrays' files only: the other files, a few kB per shard, would count too much with few items."""
    return sum(p.stat().st_size for p in Path(str(store.path)).rglob("c/**/*") if p.is_file())


def _track(model: LightSam2, store: FeatureStore, clips: list[Clip]) -> list[Tensor]:
    """Per video, mask logits (K, T, h, w) of the K objects that are visible in frame 0."""
    logits = []
    for key, clip in enumerate(clips):
        embeds = {name: torch.from_numpy(array) for name, array in store.read(str(key)).items()}
        logits.append(model.track(embeds, masks=torch.from_numpy(_visible(clip)[:, 0])))
    return logits


def _visible(clip: Clip) -> np.ndarray:
    return clip.masks[clip.masks[:, 0].any((1, 2))]  # (K, T, S, S)


def _effect(logits: list[Tensor], reference: list[Tensor], clips: list[Clip]) -> dict[str, float]:
    found, wanted = (torch.cat([part.flatten(0, 1) for part in parts]) for parts in (logits, reference))  # (all, h, w)
    both = (found > NO_OBJ_SCORE).flatten(1).any(1) & (wanted > NO_OBJ_SCORE).flatten(1).any(1)
    difference = (found - wanted)[both].abs()
    scores = []
    for part, clip in zip(logits, clips, strict=True):
        size = clip.masks.shape[-2:]
        for mask, truth in zip(F.interpolate(part, size=size, mode="bilinear"), _visible(clip), strict=True):
            target = torch.from_numpy(truth)
            scores.append((jaccard(mask, target) + f_score(mask, target)) / 2)
    return {
        "largest": float(f"{difference.max().item():.3g}"),
        "mean": float(f"{difference.mean().item():.3g}"),
        "pixels_flipped": float(f"{((found > 0) != (wanted > 0)).float().mean().item():.3g}"),
        "J&F": round(100 * mean(scores), 2),
    }
