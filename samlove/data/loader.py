"""The trainer's dataset: one expression per item, from packed shards, in an order that seed and epoch determine.

The arrays of an item are views of memory-mapped files: nothing is copied until `collate` builds a batch.
Safe in DataLoader workers, forked or spawned: each of them maps the files itself.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from samlove.config import Resident
from samlove.errors import RequestError, SamloveError
from stores import ShardReader
from stores.fingerprint import fingerprint_id, flat
from stores.remote import AnyPath

FEATURES = ("audio", "visual", "text", "sam2")  # the sources whose fingerprints a shard set records
_VIDEO_ARRAYS = ("audio", "audio_valid", "visual", "sam2_image_embed", "sam2_high_res_0", "sam2_high_res_1")


class ExpressionDataset(Dataset):
    """Map-style dataset: item i is one expression with its video's arrays (see `__getitem__`).

    Raises RequestError if `root` holds no shards, SamloveError if the shards were not written by samlove.data.pack,
    are truncated, or hold no expression.
    """

    def __init__(self, root: str | AnyPath) -> None:
        self.reader = ShardReader(root)
        self._held: list[dict[str, Any]] = []  # after `to`: the samples, with tensors instead of arrays
        self._items: list[tuple[int, str, int, int]] = []  # sample, row_id, text, mask (-1: none)
        for place in range(len(self.reader)):
            sample = self.reader[place]
            missing = [name for name in (*_VIDEO_ARRAYS, "text", "text_mask", "masks", "rows") if name not in sample]
            if missing:
                names = ", ".join(missing)
                raise SamloveError(
                    f"{root}: sample {sample['__key__']!r} has no {names}: not written by the pack stage; "
                    "run: dvc repro pack"
                )
            self._items += [(place, row["row_id"], row["text"], row["mask"]) for row in sample["rows"]]
        if not self._items:
            raise SamloveError(f"{root}: expected at least one expression, found none; run: samlove audit")

    @property
    def features(self) -> dict[str, Any]:
        """The fingerprints of the four feature stores that the shards were packed from.

        Raises SamloveError if the shards do not record them.
        """
        made = self.reader.manifest.get("fingerprint", {})
        if missing := [name for name in FEATURES if name not in made]:
            raise SamloveError(
                f"{self.reader.root}: the manifest has no fingerprint of {', '.join(missing)}; run: dvc repro pack"
            )
        return {name: made[name] for name in FEATURES}

    @property
    def made_from(self) -> dict[str, Any]:
        """The fingerprint of the shards, one entry per field, without the digest of their rows."""
        made = {**self.reader.manifest.get("fingerprint", {}), **self.features}
        return {name: value for name, value in flat(made).items() if name != "rows_sha256"}

    @property
    def id(self) -> str:
        """Identifies these exact shards, by their fingerprint and the checksums of all their bytes."""
        return fingerprint_id(self.reader.manifest)

    @property
    def dims(self) -> dict[str, int]:
        """Widths of the features and the number of frames: {"audio": dA, "visual": dV, "text": dT, "frames": N}."""
        first = self.reader[0]
        dims = {name: first[name].shape[-1] for name in ("audio", "visual", "text")}
        return {**dims, "frames": first["visual"].shape[0]}

    @property
    def videos(self) -> list[int]:
        """The video of each item, as the number of its sample in the shards."""
        return [place for place, *_ in self._items]

    def to(self, device: torch.device) -> None:
        """Copy all samples to `device`; from then on, items are tensors there. Workers must not read items on a GPU.

        text_mask stays on the CPU: the trainer needs the text lengths of every batch, and reading them from a GPU
        would force a sync.
        """
        self._held = [
            {name: torch.tensor(v, device=device) if _moves(name, v) else v for name, v in sample.items()}
            for sample in map(self.reader.__getitem__, range(len(self.reader)))
        ]

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """One expression; letters as in samlove.data.pack. Arrays are read-only views, in the stores' dtypes.

        audio (N,dA), audio_valid (N,), visual (N,1+P,dV), sam2_image_embed (C,h,w), sam2_high_res_0,
        sam2_high_res_1, text (L,dT), text_mask (L,) bool, mask (S,S) uint8 (all 0 for a null expression),
        row_id str, media_id str.
        """
        place, row_id, text, mask = self._items[i]
        sample = self._held[place] if self._held else self.reader[place]
        masks = sample["masks"]
        return {
            **{name: sample[name] for name in _VIDEO_ARRAYS},
            "text": sample["text"][text],
            "text_mask": sample["text_mask"][text],
            "mask": masks[mask] if mask >= 0 else _blank(masks),
            "row_id": row_id,
            "media_id": sample["__key__"],
        }


def _moves(name: str, value: Any) -> bool:
    return isinstance(value, np.ndarray) and name != "text_mask"


def _blank(masks: Any) -> Any:
    """An empty mask of the shape and type of those in `masks` (m,S,S), where m may be 0."""
    if isinstance(masks, Tensor):
        return masks.new_zeros(masks.shape[1:])
    return np.zeros(masks.shape[1:], masks.dtype)


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Stack items into a batch: every array gets a new first axis B and becomes a tensor of the same dtype.

    row_id and media_id become lists of str. The trainer converts numbers to float32 only on its device: this halves
    the bytes that are written here and transferred, and writing costs more than reading here.
    """
    batch: dict[str, Any] = {}
    for name, first in items[0].items():
        values = [item[name] for item in items]
        if isinstance(first, np.ndarray):
            batch[name] = torch.from_numpy(np.stack(values))  # (B, ...)
        else:
            batch[name] = torch.stack(values) if isinstance(first, Tensor) else values
    return batch


def make_resident(sets: Sequence[ExpressionDataset], asked: Resident, device: torch.device) -> Resident:
    """Load all shards of `sets` into the `asked` memory; prints one line about it, and returns off, ram or gpu.

    auto chooses the GPU if the shards fit into half of its free memory, because the model needs the rest; else RAM, if
    they fit into 4/5 of the available memory; else off, which reads samples when they are drawn. RAM means the
    system's page cache, which all processes share and which the system frees if memory runs short.
    Raises RequestError if the shards do not fit into the memory that `asked` names.
    """
    size = sum(each.reader.nbytes for each in sets)
    room = {
        "gpu": torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else 0,
        "ram": psutil.virtual_memory().available * 4 // 5,
    }
    fitting: list[Resident] = [place for place in ("gpu", "ram") if size <= room[place]]
    place = (fitting or ["off"])[0] if asked == "auto" else asked
    needed = f"{size / 1e9:.3g} GB"
    usable = f"usable: {room['gpu'] / 1e9:.3g} GB on the GPU, {room['ram'] / 1e9:.3g} GB in RAM"
    if place not in (*fitting, "off"):
        raise RequestError(
            f"train.yaml: resident: {asked} needs more memory ({needed} of shards; {usable}); set resident to auto "
            "or off"
        )
    where = {"off": "read from disk", "ram": "held in RAM", "gpu": "held on the GPU"}[place]
    print(f"shards are {where}: {needed}; {usable}", flush=True)
    for each in sets:
        if place == "gpu":
            each.to(device)
        elif place == "ram":
            each.reader.preload()
    return place


class PoolSampler(Sampler[int]):
    """The order of the items for (seed, epoch): each item once, drawn from `pool` videos at a time.

    Videos enter the pool in random order. Each remaining item of the pool's videos is equally likely to be drawn next.
    A video without remaining items is replaced. A video's arrays are therefore needed only during one part of the
    epoch, and are read from disk once if `pool` videos fit in memory. A pool of all videos gives a plain permutation,
    in which the samples of one video are far apart.

    The position is the whole state of an epoch: with `start`, the sampler yields the remaining items. Process `rank`
    of `ranks` gets every ranks-th of them. The batches of a step, taken together, therefore hold the same items in
    the same order, for any number of processes and workers.
    """

    def __init__(
        self, videos: Sequence[int], pool: int, seed: int, epoch: int, start: int = 0, rank: int = 0, ranks: int = 1
    ) -> None:
        """videos: the video of each item, as any numbers. start: a position in the order of all processes together."""
        if not 0 <= start <= len(videos):
            raise SamloveError(f"expected a position within the epoch of {len(videos)} items, found {start}")
        if pool < 1 or not 0 <= rank < ranks:
            raise SamloveError(f"expected pool >= 1 and 0 <= rank < ranks, found {pool=}, {rank=}, {ranks=}")
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
