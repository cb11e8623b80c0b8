"""What the trainer reads: one expression an item, from packed shards, in an order known by seed and epoch.

The arrays of an item are views on mapped files: an item costs nothing until `collate` copies it into a batch.
Safe in DataLoader workers, forked or spawned: each maps the files for itself.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from samlove.errors import SamloveError
from stores import ShardReader

FEATURES = ("audio", "visual", "text", "sam2")  # the sources whose fingerprints a shard set carries
_VIDEO_ARRAYS = ("audio", "audio_valid", "visual", "sam2_image_embed", "sam2_high_res_0", "sam2_high_res_1")


class ExpressionDataset(Dataset):
    """Map-style: item i is one expression with its video's arrays (see `__getitem__`).

    Raises, on opening, RequestError where `root` holds no shards, SamloveError where they are not those of
    samlove.pack, are torn, or hold no expression.
    """

    def __init__(self, root: str | Path) -> None:
        self.reader = ShardReader(root)
        self._items: list[tuple[int, str, int, int]] = []  # sample, row_id, text, mask (-1: none)
        for place in range(len(self.reader)):
            sample = self.reader[place]
            missing = [name for name in (*_VIDEO_ARRAYS, "text", "text_mask", "masks", "rows") if name not in sample]
            if missing:
                raise SamloveError(f"{root}: {sample['__key__']!r} lacks {missing}; not shards of pack: dvc repro pack")
            self._items += [(place, row["row_id"], row["text"], row["mask"]) for row in sample["rows"]]
        if not self._items:
            raise SamloveError(f"{root}: expected at least one expression, found none; look at: samlove audit")

    @property
    def features(self) -> dict[str, Any]:
        """The fingerprints of the four feature stores that the shards were packed from."""
        return {name: self.reader.manifest["fingerprint"][name] for name in FEATURES}

    @property
    def dims(self) -> dict[str, int]:
        """Widths of the features and the number of frames: {"audio": dA, "visual": dV, "text": dT, "frames": N}."""
        first = self.reader[0]
        dims = {name: first[name].shape[-1] for name in ("audio", "visual", "text")}
        return {**dims, "frames": first["visual"].shape[0]}

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """One expression; letters as in samlove.pack. Arrays are views, not writable, in the stores' dtypes.

        audio (N,dA), audio_valid (N,), visual (N,1+P,dV), sam2_image_embed (C,h,w), sam2_high_res_0,
        sam2_high_res_1, text (L,dT), text_mask (L,) bool, mask (S,S) uint8 (all 0 where nothing is referred to),
        row_id str, media_id str.
        """
        place, row_id, text, mask = self._items[i]
        sample = self.reader[place]
        masks = sample["masks"]
        return {
            **{name: sample[name] for name in _VIDEO_ARRAYS},
            "text": sample["text"][text],
            "text_mask": sample["text_mask"][text],
            "mask": masks[mask] if mask >= 0 else np.zeros(masks.shape[1:], masks.dtype),
            "row_id": row_id,
            "media_id": sample["__key__"],
        }


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch of items: every array stacked on a new first axis B, bool as bool and all else as float32 tensors.

    row_id and media_id become lists of str. `mask` is 0.0 or 1.0.
    """
    batch: dict[str, Any] = {}
    for name, first in items[0].items():
        values = [item[name] for item in items]
        if isinstance(first, np.ndarray):
            stacked = torch.from_numpy(np.stack(values))  # (B, ...)
            batch[name] = stacked if stacked.dtype == torch.bool else stacked.float()
        else:
            batch[name] = values
    return batch


class EpochSampler(Sampler[int]):
    """The permutation of 0..n-1 that belongs to (seed, epoch), from position `start` on.

    The position is the whole state of an epoch: taken up at `start`, it gives what is left, each item once.
    """

    def __init__(self, n: int, seed: int, epoch: int, start: int = 0) -> None:
        if not 0 <= start <= n:
            raise SamloveError(f"expected a position within the epoch of {n} items, found {start}")
        self.n, self.seed, self.epoch, self.start = n, seed, epoch, start

    def __len__(self) -> int:
        return self.n - self.start

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.n)
        return iter(order[self.start :].tolist())
