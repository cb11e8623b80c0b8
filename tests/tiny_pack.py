"""Masks and four feature stores of a synthetic Ref-AVS folder, small enough to pack in a moment."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from samlove.data.dataset import RefAvsFolder
from samlove.data.pack import Packed, pack
from stores import Failure, FeatureStore, FeatureStoreWriter
from stores.codec import Coding, encode

N, PATCHES, L, SIZE = 3, 4, 5, 8  # frames, patches, text tokens, mask size
ROWS = pd.DataFrame(
    [
        ("r0", "m_a", 1, "the red disc", False),
        ("r1", "m_a", 2, "the object making the loudest sound", False),
        ("r2", "m_a", 1, "the object making the loudest sound", False),
        ("r3", "-m.b", 1, "the red disc", False),
        ("r4", "null_c-m_a", 0, "the silent square", True),
        ("r5", "null_c-m_a", 0, "--it, on the left", True),
    ],
    columns=["row_id", "media_id", "fid", "exp", "null"],
)


def features_of(name: str, key: str) -> dict[str, np.ndarray]:
    """The item `key` of the store `name`; the same on every call."""
    rng = np.random.default_rng([ord(c) for c in name + key])

    def values(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float16)

    if name == "audio":
        return {"audio": values(N, 6), "audio_valid": np.arange(N) < 2}
    if name == "visual":
        return {"visual": values(N, 1 + PATCHES, 7)}
    if name == "text":
        return {"text": values(L, 8), "text_mask": np.arange(L) < 1 + len(key) % L}
    levels = {"sam2_image_embed": (8, 2, 2), "sam2_high_res_0": (2, 8, 8), "sam2_high_res_1": (4, 4, 4)}
    return {level: values(N, *shape) for level, shape in levels.items()}


def make_store(
    root: Path,
    name: str,
    fingerprint: dict | None = None,
    failed: tuple[str, ...] = (),
    coding: Coding | None = None,
    rows: Sequence[int] | None = None,
) -> FeatureStore:
    """coding: how all arrays are stored; see stores.codec. rows: of axis 0 that are stored; None: all."""

    def item(key: str) -> dict[str, np.ndarray]:
        features = features_of(name, key)
        features = features if rows is None else {n: a[list(rows)] for n, a in features.items()}
        return {k: v for n, a in features.items() for k, v in encode(n, a, coding).items()} if coding else features

    keys = list(dict.fromkeys(ROWS["exp" if name == "text" else "media_id"]))
    fingerprint = fingerprint or {"encoder": name, "dtype": "float16"}
    writer = FeatureStoreWriter(root / name, root / "scratch" / name, fingerprint, keys, 2, chunk_rows=1)
    for number, planned in writer.todo():
        writer.write_shard(number, {key: item(key) for key in planned if key not in failed})
    writer.publish([Failure(key, name, "truncated file") for key in failed])
    return FeatureStore.open(root / name)


def make_stores(root: Path, failed: dict[str, tuple[str, ...]] | None = None) -> dict[str, FeatureStore]:
    failed = failed or {}
    return {name: make_store(root, name, failed=failed.get(name, ())) for name in ("audio", "visual", "text", "sam2")}


def true_mask(media_id: str, fid: int, height: int = 12, width: int = 16) -> np.ndarray:
    """(height, width) bool: a rectangle that differs for each object."""
    mask = np.zeros((height, width), bool)
    mask[2 : 5 + 2 * fid, 3 : 6 + len(media_id)] = True
    return mask


def mask_on(media_id: str, fid: int, frame: int) -> np.ndarray:
    """The object's mask on a frame, bool: `true_mask` on frame 0, then further down; object 2 is out of sight on 1."""
    return np.roll(true_mask(media_id, fid), frame, axis=0) & ((fid, frame) != (2, 1))


def make_folder(root: Path) -> RefAvsFolder:
    folder = RefAvsFolder(root / "set")
    for row in ROWS[~ROWS["null"]].itertuples():
        for frame in range(N):
            path = folder.mask_path(row.media_id, row.fid, frame)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask_on(row.media_id, row.fid, frame).astype(np.uint8) * 255).save(path)
            image = folder.frame_path(row.media_id, frame)
            image.parent.mkdir(parents=True, exist_ok=True)
            image.touch()
    return folder


def make_shards(
    root: Path, out: str = "shards", failed: dict[str, tuple[str, ...]] | None = None, frames: Sequence[int] = (0,)
) -> Packed:
    """Pack everything to root/out, two videos per shard. frames: those with SAM 2's embedding and masks."""
    return pack(root / out, ROWS, make_stores(root, failed), make_folder(root), SIZE, 2, frames=frames)
