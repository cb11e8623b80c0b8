"""The trainer's dataset: one expression on one frame per item, from packed shards, in an order that seed and epoch
determine.

The arrays of an item are views of memory-mapped files: nothing is copied until `collate` builds a batch.
Safe in DataLoader workers, forked or spawned: each of them maps the files itself.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from samlove.config import Resident, TrainConfig
from samlove.errors import RequestError, SamloveError
from stores import ShardReader
from stores.fingerprint import fingerprint_id, flat
from stores.remote import AnyPath

FEATURES = ("audio", "visual", "text", "sam2")  # the sources whose fingerprints a shard set records
_DRAWS = 1 << 16  # random numbers that the sampler draws at a time; does not affect the order

# The arrays of every sample with their number of dimensions. A sample also has `rows`, a JSON list.
_VIDEO_ARRAYS = {"audio": 2, "audio_valid": 1, "visual": 3}
_LEVELS = dict.fromkeys(("sam2_image_embed", "sam2_high_res_0", "sam2_high_res_1"), 4)
_DIMENSIONS = {**_VIDEO_ARRAYS, **_LEVELS, "text": 3, "text_mask": 2, "masks": 4}


class ExpressionDataset(Dataset):
    """Map-style dataset of expressions on frames: item i is expression i // K on the frame i % K of the K that the
    shards hold of each video (see `__getitem__`).

    Raises RequestError if `root` holds no shards, SamloveError if the shards were not written by samlove.data.pack,
    are truncated, or hold no expression.
    """

    def __init__(self, root: str | AnyPath) -> None:
        self.reader = ShardReader(root)
        self._held: list[dict[str, Any]] = []  # after `to`: the samples, with tensors instead of arrays
        for layout in self.reader.index.layouts:
            found = {name: (dtype, dims) for name, dtype, _, dims in layout}
            if missing := [name for name in (*_DIMENSIONS, "rows") if name not in found]:
                raise SamloveError(
                    f"{root}: a sample has no {', '.join(missing)}: not written by the pack stage; run: dvc repro pack"
                )
            for name, dims in _DIMENSIONS.items():
                dtype, found_dims = found[name]
                if dtype is None or not dtype.isnative or dtype.itemsize > 8 or found_dims != dims:
                    raise SamloveError(
                        f"{root}: {name} of a sample: expected {dims} dimensions of little-endian numbers of at most "
                        f"8 bytes, found {found_dims} of {dtype}: not written by the pack stage; run: dvc repro pack"
                    )
        if not self.expressions:
            raise SamloveError(f"{root}: expected at least one expression, found none; run: samlove audit")

    @property
    def features(self) -> dict[str, Any]:
        """The fingerprints of the four feature stores that the shards were packed from.

        Raises SamloveError if the shards do not record them.
        """
        made = self.reader.manifest.get("fingerprint", {})
        if missing := [name for name in FEATURES if not isinstance(made.get(name), dict)]:
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

    @cached_property
    def frames(self) -> int:
        """K, the number of frames of each video that have a SAM 2 embedding and masks."""
        return self.reader[0]["sam2_image_embed"].shape[0]

    @property
    def expressions(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def _ends(self) -> np.ndarray:
        """For each video, the number of expressions up to and including its last one: int64 (videos,)."""
        return self.reader.index.row_ends

    @property
    def videos(self) -> np.ndarray:
        """The video of each expression, as the number of its sample in the shards: int32 (expressions,).

        Raises SamloveError if the index is damaged.
        """
        counts = np.diff(self._ends, prepend=0)
        if counts.min(initial=0) < 0:
            raise SamloveError(
                f"{self.reader.root}: a sample with fewer than 0 rows; run: dvc repro pack, or: dvc pull"
            )
        return np.repeat(np.arange(len(self._ends), dtype=np.int32), counts)

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
        return self.expressions * self.frames

    def __getitem__(self, i: int) -> dict[str, Any]:
        """One expression on one frame. Arrays are read-only views, in the stores' dtypes; letters as in pack.py.

        Of the whole video: audio (N,dA), audio_valid (N,), visual (N,1+P,dV). Of the frame: sam2_image_embed (C,h,w),
        sam2_high_res_0, sam2_high_res_1, mask (S,S) uint8 (all 0 if the object is out of sight or the expression is
        null). Of the expression: text (L,dT), text_mask (L,) bool, row_id str, media_id str.
        Raises IndexError if there is no item i, SamloveError if the shards or their index are damaged.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"item {i} of {len(self)}")
        expression, frame = divmod(i, self.frames)
        place = int(np.searchsorted(self._ends, expression, side="right"))
        sample = self._held[place] if self._held else self.reader[place]
        try:
            row = sample["rows"][expression - int(self._ends[place])]  # counted from the last one, which is -1
            row_id, text, mask = row["row_id"], row["text"], row["mask"]
            masks = sample["masks"]
            if not isinstance(row_id, str) or type(text) is not int or type(mask) is not int or text < 0 or mask < -1:
                raise TypeError(str(row))
            return {
                **{name: sample[name] for name in _VIDEO_ARRAYS},
                **{name: sample[name][frame] for name in _LEVELS},
                "text": sample["text"][text],
                "text_mask": sample["text_mask"][text],
                "mask": masks[mask][frame] if mask >= 0 else _blank(masks),
                "row_id": row_id,
                "media_id": sample["__key__"],
            }
        except (KeyError, TypeError, IndexError) as error:
            raise SamloveError(
                f"{self.reader.root}: row {expression} is not one of sample {place} ({error!r}); run: dvc repro pack"
            ) from None


def _moves(name: str, value: Any) -> bool:
    return isinstance(value, np.ndarray) and name != "text_mask"


def _blank(masks: Any) -> Any:
    """An empty mask of the shape and type of those in `masks` (m,K,S,S), where m may be 0."""
    if isinstance(masks, Tensor):
        return masks.new_zeros(masks.shape[2:])
    return np.zeros(masks.shape[2:], masks.dtype)


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Stack items into a batch: every array gets a new first axis B and becomes a tensor of the same dtype.

    Raises SamloveError if the shapes of an array differ.

    row_id and media_id become lists of str. The trainer converts numbers to float32 only on its device: this halves
    the bytes that are written here and transferred, and writing costs more than reading here.
    """
    batch: dict[str, Any] = {}
    for name, first in items[0].items():
        values = [item[name] for item in items]
        shapes = {tuple(value.shape) for value in values if not isinstance(value, str)}
        if len(shapes) > 1:
            raise SamloveError(
                f"{name}: expected one shape in all samples, found {sorted(shapes)}; run: dvc repro pack"
            )
        if isinstance(first, np.ndarray):
            batch[name] = torch.from_numpy(np.stack(values))  # (B, ...)
        else:
            batch[name] = torch.stack(values) if isinstance(first, Tensor) else values
    return batch


def make_resident(
    sets: Sequence[ExpressionDataset], asked: Resident, device: torch.device, say: Callable[[str], object] = print
) -> Resident:
    """Load all shards of `sets` into the `asked` memory. Tells `say` so in one line, and returns off, ram or gpu.

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
    say(f"shards are {where}: {needed}; {usable}")
    for each in sets:
        if place == "gpu":
            each.to(device)
        elif place == "ram":
            each.reader.preload()
    return place


def epoch_order(videos: np.ndarray, frames: int, config: TrainConfig, epoch: int) -> np.ndarray:
    """The items of an epoch in their order, int64 (expressions,): each expression once, on its first frame or, with
    `supervise: any`, on one of its frames, all equally likely.

    videos, frames: of the ExpressionDataset.
    """
    expressions = PoolSampler(videos, config.pool, config.seed, epoch).order()
    if config.supervise == "first":
        return expressions * frames
    drawn = np.random.default_rng([config.seed, epoch, frames]).integers(frames, size=len(videos))  # by expression
    return expressions * frames + drawn[expressions]


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
        self,
        videos: Sequence[int] | np.ndarray,
        pool: int,
        seed: int,
        epoch: int,
        start: int = 0,
        rank: int = 0,
        ranks: int = 1,
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
        return map(int, self.order())

    def order(self) -> np.ndarray:
        """All items that the sampler yields: int64 (len(self),)."""
        return np.fromiter(islice(self._draw(), self._mine.start, None, self._mine.step), np.int64, len(self))

    def _draw(self) -> Iterator[int]:
        """The items of the epoch, one by one. Only those of the videos in the pool are Python objects."""
        random = np.random.default_rng([self.seed, self.epoch])
        videos = np.asarray(self.videos)
        grouped = np.argsort(videos, kind="stable")  # the items, video by video
        starts = np.flatnonzero(np.diff(videos[grouped], prepend=videos.min(initial=0) - 1))
        ends = np.append(starts[1:], len(videos))
        waiting = iter(random.permutation(np.argsort(grouped[starts])))  # videos as they first occur, then permuted
        candidates: list[int] = []  # remaining items of the videos in the pool
        places: list[int] = []  # for each of them, the place of its video in the pool
        left: list[int] = []  # for each place, the number of remaining items

        def enter(place: int, video: int) -> None:
            items = grouped[starts[video] : ends[video]].tolist()
            candidates.extend(items)
            places.extend([place] * len(items))
            left[place] = len(items)

        for place, video in enumerate(islice(waiting, self.pool)):
            left.append(0)
            enter(place, video)
        for start in range(0, len(videos), _DRAWS):
            for draw in random.random(min(_DRAWS, len(videos) - start)).tolist():
                chosen = int(draw * len(candidates))
                item, place = candidates[chosen], places[chosen]
                candidates[chosen], places[chosen] = candidates[-1], places[-1]
                candidates.pop()
                places.pop()
                left[place] -= 1
                if not left[place]:
                    for video in islice(waiting, 1):
                        enter(place, video)
                yield item
