"""What the trainer reads: one expression an item, from packed shards, in an order known by seed and epoch.

The arrays of an item are views on mapped files: an item costs nothing until `collate` copies it into a batch.
Safe in DataLoader workers, forked or spawned: each maps the files for itself.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
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

    @property
    def videos(self) -> list[int]:
        """The video of each item, as its sample's number in the shards."""
        return [place for place, *_ in self._items]

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


class PoolSampler(Sampler[int]):
    """The order of the items that belongs to (seed, epoch): each item once, drawn from `pool` videos at a time.

    Videos enter the pool in random order; every item left of a video in it is as likely to be drawn next; a video
    that is used up is replaced. So a video's arrays are wanted for one stretch of the epoch, and read from the disk
    once if `pool` videos fit in memory. A pool of all videos is a plain permutation, where samples of one video lie
    far apart.

    The position is the whole state of an epoch: taken up at `start`, it gives what is left. Of what is left, process
    `rank` of `ranks` gets every ranks-th item, so that the batches of a step are together the same, and the order the
    same, however many processes and workers read them.
    """

    def __init__(
        self, videos: Sequence[int], pool: int, seed: int, epoch: int, start: int = 0, rank: int = 0, ranks: int = 1
    ) -> None:
        """videos: the video of each item, numbers of any kind. start: a position in the order of all processes."""
        if not 0 <= start <= len(videos):
            raise SamloveError(f"expected a position within the epoch of {len(videos)} items, found {start}")
        if pool < 1 or not 0 <= rank < ranks:
            raise SamloveError(f"expected a pool of 1 video or more and rank < ranks, found {pool}, {rank}, {ranks}")
        self.videos, self.pool, self.seed, self.epoch = videos, pool, seed, epoch
        self._mine = slice(start + rank, None, ranks)

    def __len__(self) -> int:
        return len(range(len(self.videos))[self._mine])

    def __iter__(self) -> Iterator[int]:
        return iter(self._order()[self._mine])

    def _order(self) -> list[int]:
        random = np.random.default_rng([self.seed, self.epoch])
        items_of: dict[int, list[int]] = {}
        for item, video in enumerate(self.videos):
            items_of.setdefault(video, []).append(item)
        left = {video: len(items) for video, items in items_of.items()}
        waiting = iter(random.permutation(list(items_of)).tolist())
        candidates = [item for video in islice(waiting, self.pool) for item in items_of[video]]
        order = []
        for draw in random.random(len(self.videos)).tolist():
            place = int(draw * len(candidates))
            order.append(candidates[place])
            candidates[place] = candidates[-1]
            candidates.pop()
            video = self.videos[order[-1]]
            left[video] -= 1
            if not left[video]:
                candidates += [item for entering in islice(waiting, 1) for item in items_of[entering]]
        return order
