"""What the trainer reads: one expression an item, from packed shards, in an order known by seed and epoch.

The arrays of an item are views on mapped files: an item costs nothing until `collate` copies it into a batch.
Safe in DataLoader workers, forked or spawned: each maps the files for itself.
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

FEATURES = ("audio", "visual", "text", "sam2")  # the sources whose fingerprints a shard set carries
_VIDEO_ARRAYS = ("audio", "audio_valid", "visual", "sam2_image_embed", "sam2_high_res_0", "sam2_high_res_1")


class ExpressionDataset(Dataset):
    """Map-style: item i is one expression with its video's arrays (see `__getitem__`).

    Raises, on opening, RequestError where `root` holds no shards, SamloveError where they are not those of
    samlove.data.pack, are torn, or hold no expression.
    """

    def __init__(self, root: str | AnyPath) -> None:
        self.reader = ShardReader(root)
        self._held: list[dict[str, Any]] = []  # the samples with tensors for arrays, after `to`
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
        """The fingerprints of the four feature stores that the shards were packed from.

        Raises SamloveError where the shards do not say.
        """
        made = self.reader.manifest.get("fingerprint", {})
        if missing := [name for name in FEATURES if name not in made]:
            raise SamloveError(
                f"{self.reader.root}: expected shards that say what they were packed from, found nothing of "
                f"{', '.join(missing)} in their manifest; pack them: dvc repro pack"
            )
        return {name: made[name] for name in FEATURES}

    @property
    def made_from(self) -> dict[str, Any]:
        """What the shards say that they come from, a field each, but for their own rows."""
        made = {**self.reader.manifest.get("fingerprint", {}), **self.features}
        return {name: value for name, value in flat(made).items() if name != "rows_sha256"}

    @property
    def id(self) -> str:
        """Stands for the very shards: what they come from, and every byte of them by its checksum."""
        return fingerprint_id(self.reader.manifest)

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

    def to(self, device: torch.device) -> None:
        """Copy all samples to `device`. Items are tensors there from now on; no worker may then read from a GPU.

        But for text_mask: of each batch the trainer asks how long its texts are, and to ask a GPU is to wait for it.
        """
        self._held = [
            {name: torch.tensor(v, device=device) if _moves(name, v) else v for name, v in sample.items()}
            for sample in map(self.reader.__getitem__, range(len(self.reader)))
        ]

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """One expression; letters as in samlove.data.pack. Arrays are views, not writable, in the stores' dtypes.

        audio (N,dA), audio_valid (N,), visual (N,1+P,dV), sam2_image_embed (C,h,w), sam2_high_res_0,
        sam2_high_res_1, text (L,dT), text_mask (L,) bool, mask (S,S) uint8 (all 0 where nothing is referred to),
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
    """A mask without an object, as those of `masks` (m,S,S), of which there may be none."""
    if isinstance(masks, Tensor):
        return masks.new_zeros(masks.shape[1:])
    return np.zeros(masks.shape[1:], masks.dtype)


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch of items: every array stacked on a new first axis B, as a tensor of its own dtype.

    row_id and media_id become lists of str. The trainer makes float32 of the numbers on its device: half as many bytes
    are written and moved there, which here costs more than reading does.
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
    """Hold all shards of `sets` where `asked`; says in one line where that is, and returns it: off, ram or gpu.

    auto is the GPU where they fit into half of its free memory, for the rest is the model's; else RAM, where they fit
    into 4/5 of what is available; else off: they are read as they are drawn. RAM means the system's page cache, which
    all processes share and which gives way where memory runs short.
    Raises RequestError where there is not that room in a place asked for by name.
    """
    size = sum(each.reader.nbytes for each in sets)
    room = {
        "gpu": torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else 0,
        "ram": psutil.virtual_memory().available * 4 // 5,
    }
    fitting: list[Resident] = [place for place in ("gpu", "ram") if size <= room[place]]
    place = (fitting or ["off"])[0] if asked == "auto" else asked
    found = (
        f"{size / 1e9:.3g} GB of shards; room for {room['gpu'] / 1e9:.3g} GB on the GPU, {room['ram'] / 1e9:.3g} in RAM"
    )
    if place not in (*fitting, "off"):
        raise RequestError(f"train.yaml: resident: {asked} needs more room ({found}); expected auto, or off")
    print(f"resident: {place} ({found})", flush=True)
    for each in sets:
        if place == "gpu":
            each.to(device)
        elif place == "ram":
            each.reader.preload()
    return place


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
