"""Packing: everything that training needs of one video, from four feature stores and the masks, becomes one sample.

A sample, keyed by media_id (letters: N frames, K of them for SAM 2, P patches, L text tokens, S mask size, d widths):
    audio (N,dA), audio_valid (N,) bool, visual (N,1+P,dV)         as in their stores
    sam2_image_embed (K,C,h,w), sam2_high_res_0, sam2_high_res_1   of K frames; int8 becomes float16 (precise enough)
    text (n,L,dT), text_mask (n,L) bool                            the video's n distinct expressions
    masks (m,K,S,S) uint8, 0 or 1                                  the m objects that they refer to, on these frames
    rows [{"row_id": str, "text": index, "mask": index, or -1 for a null expression}]
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from samlove.config import Section
from samlove.data.arrays import DIMENSIONS, check_arrays
from samlove.data.dataset import RefAvsFolder, load_mask, resize_mask
from samlove.data.digest import rows_digest
from samlove.errors import SamloveError
from stores import FeatureStore, ShardReader, ShardWriter
from stores.fingerprint import check_fingerprint, differing, flat

MEDIA_SOURCES = ("audio", "visual", "sam2")  # keyed by media_id; text is keyed by the expression


@dataclass
class Packed:
    """The result of packing a split: samples and rows written, and the rows left out because their features failed."""

    videos: int = 0
    rows: int = 0
    left_out: list[str] = field(default_factory=list)  # "row_id: reason"

    def __str__(self) -> str:
        lost = f"; {len(self.left_out)} rows left out, first: {self.left_out[0]}" if self.left_out else ""
        return f"{self.rows} expressions of {self.videos} videos{lost}"


def check_asked(store: FeatureStore, asked: Section, stage: str) -> None:
    """Raise SamloveError if a store's fingerprint contradicts its section of the configuration.

    Only settings are compared. Weights are identified by their hash, which needs the file, and library versions may
    differ between people who share a store. Imported features have no encoder to compare.
    """
    found = store.manifest["fingerprint"]
    said = {
        name: [f"{key}={part}" for key, part in sorted(value.items())] if isinstance(value, dict) else value
        for name, value in asked.model_dump(mode="json", exclude_none=True).items()  # None: found from the model
        if name in found and (name, found[name]) != ("encoder", "imported")
    }
    check_fingerprint(found, {**found, **said}, store.path, f"dvc repro {stage}")


def pack(
    out: Path,
    rows: pd.DataFrame,
    sources: Mapping[str, FeatureStore],
    folder: RefAvsFolder,
    mask_size: int,
    videos_per_shard: int,
    gt_mask_sha256: str = "",
    frames: Sequence[int] = (0,),
    stored: Sequence[int] | None = None,
) -> Packed:
    """Write the shards of one split to `out`. Their manifest records the fingerprint of each source, and digests of the
    rows and the masks.

    rows: rows of expressions.parquet, one split: row_id, media_id, fid, exp, null. sources: audio, visual, text, sam2.
    frames: the numbers of the K frames to pack. stored: those of the frames in the sam2 store; None: all of a video.
    A row whose features are in a store's failure log is left out and counted. Raises SamloveError if they are in
    neither the store nor its failure log, if a store has other arrays, or if a mask cannot be read.
    """
    for name, source in sources.items():
        check_arrays(name, source)
    packed = Packed()
    places = _places(sources["sam2"], frames, stored)
    fingerprint = shards_fingerprint(rows, sources, mask_size, gt_mask_sha256, frames)
    failed = {name: {f.key: f.error for f in source.failures} for name, source in sources.items()}
    with ShardWriter(out, videos_per_shard, fingerprint) as writer:
        for media_id, group in tqdm(rows.groupby("media_id", sort=False), desc=out.name, unit="video", mininterval=2):
            usable = []
            for row in group.itertuples():
                reason = _missing(str(media_id), str(row.exp), sources, failed)
                if reason:
                    packed.left_out.append(f"{row.row_id}: {reason}")
                else:
                    usable.append(row)
            if usable:
                writer.write(str(media_id), _sample(str(media_id), usable, sources, folder, mask_size, frames, places))
                packed.videos, packed.rows = packed.videos + 1, packed.rows + len(usable)
    return packed


def shards_fingerprint(
    rows: pd.DataFrame,
    sources: Mapping[str, FeatureStore],
    mask_size: int,
    gt_mask_sha256: str,
    frames: Sequence[int] = (0,),
) -> dict[str, Any]:
    """Everything that the shards of a split depend on, except the code; arguments as in `pack`."""
    fingerprint: dict[str, Any] = {name: source.manifest["fingerprint"] for name, source in sources.items()}
    return fingerprint | {
        "mask_size": mask_size,
        "rows_sha256": rows_digest(rows),
        "gt_mask_sha256": gt_mask_sha256,
        "sam2_frames": list(frames),
    }


def is_packed(out: Path, fingerprint: Mapping[str, Any]) -> bool:
    """Whether `out` holds complete shards of this fingerprint."""
    try:
        return not differing(flat(ShardReader(out).manifest.get("fingerprint", {})), flat(fingerprint))
    except SamloveError:
        return False


def _places(store: FeatureStore, frames: Sequence[int], stored: Sequence[int] | None) -> list[int]:
    """Where each of `frames` is in an item of the sam2 store. Raises SamloveError if the store has other frames."""
    found = store.shapes["sam2_image_embed"][0]
    expected = max(frames) + 1 if stored is None else len(stored)
    if found < expected or (stored is not None and found != expected):
        raise SamloveError(
            f"{store.path}: expected {expected} frames of every video, found {found}; run: dvc repro sam2, or set "
            "train_frames in sam2.yaml to what the store holds"
        )
    return list(frames) if stored is None else [list(stored).index(t) for t in frames]


def _missing(
    media_id: str, text: str, sources: Mapping[str, FeatureStore], failed: Mapping[str, Mapping[str, str]]
) -> str:
    """Why a row cannot be used; empty if it can."""
    for name, source in sources.items():
        key = media_id if name in MEDIA_SOURCES else text
        if key in source:
            continue
        if key not in failed[name]:
            raise SamloveError(
                f"{source.path}: {key!r} is in the index, but neither in the store nor in its failure log: "
                f"the store was built from a different index; run: dvc repro {name}"
            )
        return f"{name} failed: {failed[name][key]}"
    return ""


def _sample(
    media_id: str,
    rows: list[Any],
    sources: Mapping[str, FeatureStore],
    folder: RefAvsFolder,
    mask_size: int,
    frames: Sequence[int],
    places: Sequence[int],
) -> dict[str, Any]:
    texts = list(dict.fromkeys(str(row.exp) for row in rows))
    objects = list(dict.fromkeys(int(row.fid) for row in rows if not row.null))
    words = [sources["text"].read(text) for text in texts]
    masks = [
        resize_mask(load_mask(paths[t]), mask_size)
        for paths in (folder.mask_paths(media_id, fid, max(frames) + 1) for fid in objects)
        for t in frames
    ]
    parts = [sources["sam2"].read(media_id, slice(place, place + 1)) for place in places]
    levels = {name: np.concatenate([part[name] for part in parts]) for name in DIMENSIONS["sam2"]}  # (K, C, h, w)
    if sources["sam2"].manifest["fingerprint"].get("dtype") == "int8":
        levels = {name: level.astype(np.float16) for name, level in levels.items()}
    return {
        **sources["audio"].read(media_id),
        **sources["visual"].read(media_id),
        **levels,
        "text": np.stack([w["text"] for w in words]),  # (n, L, dT)
        "text_mask": np.stack([w["text_mask"] for w in words]),  # (n, L)
        "masks": np.array(masks, np.uint8).reshape(-1, len(frames), mask_size, mask_size),  # m may be 0
        "rows": [
            {
                "row_id": str(row.row_id),
                "text": texts.index(str(row.exp)),
                "mask": -1 if row.null else objects.index(int(row.fid)),
            }
            for row in rows
        ],
    }
