"""Reads predicted masks in the formats that projects write; docs/protocols.md lists them.

Every format becomes mask logits by frame number. A grey level or a stored bin stands for a probability p and becomes
log(p / (1 - p)), with p kept off 0 and 1 by half a grey level; a binary mask is a grey one of 0 and 255.
"""

import os
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from samlove.data.dataset import load_labels
from samlove.data.images import MAX_PIXELS
from samlove.errors import RequestError, SamloveError, absence
from samlove.scoring.metrics import EDGES
from samlove.scoring.protocols import finite
from stores import PredictionReader
from stores.fingerprint import parse_json

SUFFIXES = (".png", ".npy", ".npz")
SAMPLED = 64  # expressions read to find out whether masks hold 0 and 1 or 0 to 255
# What NumPy raises for a damaged or hostile file; a header of a few bytes can ask for any amount of memory.
BROKEN = (ValueError, EOFError, OSError, MemoryError, RuntimeError, zipfile.BadZipFile, zlib.error)
_GREY = 0x010101  # of load_labels: grey level 1 in an image with three channels


def grey_logits(values: np.ndarray, highest: int) -> np.ndarray:
    """Logits, float32, of the probabilities values / highest."""
    p = np.clip(values / highest, 0.5 / 255, 1 - 0.5 / 255)
    return np.log(p / (1 - p)).astype(np.float32)


_OF_GREY = grey_logits(np.arange(256), 255)


class Masks:
    """Predicted masks by expression: a source of one format. Reading is thread-safe.

    path: for messages. what: the format in words. doubled: files or entries of a frame beyond the first, which is the
    one used. unused: files or entries of no expression of the dataset. has_scores: whether anything read so far has
    more than two values.
    """

    what = ""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.doubled: list[str] = []
        self.unused: list[str] = []
        self.has_scores = False

    def keys(self) -> Collection[str]:
        raise NotImplementedError

    def raw(self, key: str) -> dict[int, np.ndarray]:
        """Arrays (h, w) of an expression by frame, from 0: float logits, integer grey levels, or bool."""
        raise NotImplementedError

    def read(self, key: str) -> dict[int, np.ndarray]:
        """Logits (h, w) float32 by frame, from 0. Raises SamloveError, with the place, for masks that are unclear."""
        frames = {}
        for frame, values in self.raw(key).items():
            where = f"{self.path}: {key}, frame {frame}"
            if values.ndim != 2 or 0 in values.shape:
                raise SamloveError(f"{where}: expected a mask (height, width), found an array of shape {values.shape}")
            if values.size > MAX_PIXELS:
                raise SamloveError(f"{where}: expected at most {MAX_PIXELS:,} pixels, found the shape {values.shape}")
            frames[frame] = self._logits(values, where)
        return frames

    def _logits(self, values: np.ndarray, where: str) -> np.ndarray:
        if values.dtype.kind == "f":
            self.has_scores = True
            return finite(values, where)
        if values.dtype == bool:
            return _OF_GREY[values.astype(np.uint8) * np.uint8(255)]
        lowest, highest = int(values.min()), int(values.max())
        if lowest < 0 or highest > 65535:
            raise SamloveError(f"{where}: expected whole numbers in 0..65535, found {lowest}..{highest}")
        if highest > self.unit == 1:
            raise SamloveError(f"{where}: found the value {highest}, but other masks hold only 0 and 1; use 0 and 255")
        values = np.asarray(values, np.uint16)
        unit = 65535 if highest > 255 else self.unit
        if not self.has_scores and highest and unit > 1 and ((values > 0) & (values < unit)).any():
            self.has_scores = True
        if unit == 65535:
            return grey_logits(values, unit)
        return _OF_GREY[values * np.uint16(255 // unit)]

    @cached_property
    def unit(self) -> int:
        """The value of a pixel that certainly is object: 1 if the masks of a sample hold only 0 and 1, else 255."""
        keys = list(self.keys())
        for key in keys[:: max(len(keys) // SAMPLED, 1)]:
            if any(values.max(initial=0) > 1 for values in self.raw(key).values()):
                return 255
        return 1


def open_masks(path: Path, rows: pd.DataFrame, splits: Collection[str], frames: int) -> Masks:
    """The predicted masks at `path`, whatever their format.

    rows: all rows of the dataset, from samlove.data.audit.parse_rows. splits: those that will be scored. frames: of a
    video. Raises RequestError if nothing at `path` is in a known format or belongs to the dataset.
    """
    ids = {*rows["row_id"], *rows["uid"]}
    order = {split: rows.loc[rows["split"] == split, "row_id"].tolist() for split in splits}
    if path.is_file():
        found = _open_file(path, order)
    elif path.is_dir():
        found = _open_folder(path, ids, order, frames)
    else:
        raise RequestError(f"{path}: {absence(path)}; expected a folder of masks, or an .npz, .json or .h5 file")
    if not isinstance(found, MaskFiles):
        found.unused += [key for key in found.keys() if key not in ids]
    if not ids.intersection(found.keys()):
        raise RequestError(
            f"{path}: no mask belongs to an expression of the dataset; expected a name such as {rows['uid'].iloc[0]}"
            + (f", found {found.unused[0]}" if found.unused else "")
        )
    return found


def _open_file(path: Path, order: Mapping[str, list[str]]) -> Masks:
    match path.suffix.lower():
        case ".h5":
            return MaskBins(path, [path])
        case ".npz":
            return MaskArrays(path, {}, path)
        case ".npy" if len(order) == 1:
            return MaskArrays(path, {path: next(iter(order.values()))})
        case ".npy":
            raise RequestError(f"{path}: one array holds one split; expected a folder with {'.npy, '.join(order)}.npy")
        case ".json":
            return MaskRle(path, [path])
    raise RequestError(f"{path}: expected a folder, or an .npz, .npy, .json or .h5 file")


def _open_folder(path: Path, ids: set[str], order: Mapping[str, list[str]], frames: int) -> Masks:
    if stored := [file for split in order if (file := path / split / "predictions.h5").is_file()]:
        return MaskBins(path, stored)
    if arrays := {file: keys for split, keys in order.items() if (file := path / f"{split}.npy").is_file()}:
        return MaskArrays(path, arrays)
    files = MaskFiles(path, ids, frames)
    if not files.keys() and (texts := sorted(path.glob("*.json"))):
        return MaskRle(path, texts)
    return files


# --- files per expression or frame -----------------------------------------------------------------------------------


class MaskFiles(Masks):
    """A folder of PNG, .npy or .npz files, one per frame or per expression.

    A file belongs to the expression that names a folder above it (`uid/.../3.png`), two folders
    (`media_id/heart_1/3.png`) or the file (`uid_3.png`, `uid.npy`). The last number in a file's name is its frame.
    """

    def __init__(self, path: Path, ids: set[str], frames: int) -> None:
        super().__init__(path)
        found: dict[str, dict[int | None, Path]] = {}
        kinds: dict[str, Path] = {}
        for folder, folders, names in os.walk(path, onerror=_refuse):
            folders.sort()
            parts = Path(folder).relative_to(path).parts
            for file in (Path(folder, name) for name in sorted(names) if name.lower().endswith(SUFFIXES)):
                key, frame = _owner(parts, file.stem, ids)
                if key is None or (frame is None and file.suffix.lower() == ".png"):
                    self.unused.append(str(file))
                elif frame in found.setdefault(key, {}):
                    self.doubled.append(str(file))
                else:
                    found[key][frame] = file
                    kinds.setdefault(file.suffix.lower(), file)
        if len(kinds) > 1:
            raise RequestError(f"{path}: expected masks of one format, found {' and '.join(map(str, kinds.values()))}")
        numbers = {frame for of_key in found.values() for frame in of_key if frame is not None}
        self.first = int(bool(numbers) and min(numbers) == 1 and max(numbers) == frames)
        self._files = found
        self.what = f"{next(iter(kinds), '')[1:].upper()} files" + (", frames numbered from 1" if self.first else "")

    def keys(self) -> Collection[str]:
        return self._files.keys()

    def raw(self, key: str) -> dict[int, np.ndarray]:
        frames: dict[int, np.ndarray] = {}
        for number, file in self._files[key].items():
            if file.suffix.lower() == ".png":
                assert number is not None, file
                frames[number - self.first] = _grey(file)
                continue
            values = _load(file)
            if number is not None and values.ndim == 2:
                frames[number - self.first] = values
            else:
                frames |= _by_frame(values, file)
        return frames


def _refuse(error: OSError) -> None:
    """A folder that may not be read; os.walk would leave it out."""
    raise error


def _owner(parts: tuple[str, ...], stem: str, ids: set[str]) -> tuple[str | None, int | None]:
    """The expression and the frame of a file, by the names of its folders and its own."""
    numbers = re.findall(r"[0-9]{1,9}", stem)
    frame = int(numbers[-1]) if numbers else None
    pairs = (f"{a}_{b}" for a, b in zip(parts, parts[1:], strict=False))
    if key := next((name for name in (*parts, *pairs) if name in ids), None):
        return key, frame
    if stem in ids:
        return stem, None
    flat = re.fullmatch(r"(.+)[_-](?:frame[_-]?)?([0-9]{1,9})", stem)
    return (flat[1], int(flat[2])) if flat and flat[1] in ids else (None, None)


def _grey(path: Path) -> np.ndarray:
    """The grey levels of a PNG, or bool if its pixels are coloured or the labels of a palette."""
    labels = load_labels(path)
    if labels.max() <= 65535:
        return labels
    return labels // _GREY if not (labels % _GREY).any() else labels > 0


def _load(path: Path) -> np.ndarray:
    """The array of numbers in an .npy file, or the only one in an .npz file."""
    try:
        loaded = np.load(path, allow_pickle=False, mmap_mode="r" if path.suffix.lower() == ".npy" else None)
        if isinstance(loaded, np.ndarray):
            return _numbers(loaded)
        with loaded:
            names = loaded.files
            if len(names) != 1:
                raise ValueError(f"expected one array, found {len(names)}")
            return _numbers(loaded[names[0]])
    except BROKEN as error:
        raise SamloveError(f"{path}: not a readable array: {' '.join(str(error).split())}") from None


def _numbers(values: Any) -> np.ndarray:
    """The array, if it is one of real numbers. Raises ValueError otherwise."""
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "fiub":
        raise ValueError(f"expected floats, whole numbers or bool, found {getattr(values, 'dtype', 'no array')}")
    return values


def _by_frame(values: np.ndarray, where: object) -> dict[int, np.ndarray]:
    """(T, h, w), or (T, 1, h, w) or (1, T, h, w), as arrays by frame."""
    if values.ndim == 4 and 1 in values.shape[:2]:
        values = values.reshape(-1, *values.shape[2:])
    if values.ndim != 3:
        raise SamloveError(f"{where}: expected an array (frames, height, width), found the shape {values.shape}")
    return dict(enumerate(values))


# --- whole splits ----------------------------------------------------------------------------------------------------


class MaskArrays(Masks):
    """`{split}.npy` arrays (E, T, h, w) in the order of metadata.csv, or an .npz file of arrays (T, h, w) by uid."""

    def __init__(self, path: Path, order: Mapping[Path, list[str]], archive: Path | None = None) -> None:
        super().__init__(path)
        self.what = "NumPy arrays"
        self._rows: dict[str, tuple[np.ndarray, int]] = {}
        self._archive = archive
        self._names: list[str] = []
        for file, keys in order.items():
            values = _load(file)
            if values.ndim != 4 or len(values) != len(keys):
                raise RequestError(
                    f"{file}: expected an array (E, T, h, w) of the split's {len(keys)} expressions in the order of "
                    f"metadata.csv, found the shape {values.shape}"
                )
            self._rows |= {key: (values, i) for i, key in enumerate(keys)}
        if archive:
            try:
                if not zipfile.is_zipfile(archive):
                    raise ValueError("not a zip archive, or truncated")
                with np.load(archive, allow_pickle=False) as loaded:
                    self._names = list(dict.fromkeys(loaded.files))
                    self.doubled += [f"{archive}: {name}" for name, n in Counter(loaded.files).items() if n > 1]
            except BROKEN as error:
                raise RequestError(f"{archive}: not a readable .npz file: {error}") from None

    def keys(self) -> Collection[str]:
        return self._rows.keys() or self._names

    def raw(self, key: str) -> dict[int, np.ndarray]:
        if self._archive is None:
            values, i = self._rows[key]
            return dict(enumerate(values[i]))
        try:
            with np.load(self._archive, allow_pickle=False) as loaded:  # an open archive cannot be shared by threads
                return _by_frame(_numbers(loaded[key]), f"{self._archive}: {key}")
        except BROKEN as error:
            raise SamloveError(f"{self._archive}: {key}: not a readable array: {error}") from None


class MaskRle(Masks):
    """COCO's run-length encoding: `{uid: [RLE or null, ...]}`, or a list of `{"uid", "frame", "segmentation"}`."""

    what = "COCO RLE"

    def __init__(self, path: Path, files: Iterable[Path]) -> None:
        super().__init__(path)
        self._frames: dict[str, dict[int, Any]] = {}
        for file in files:
            try:
                content = parse_json(file.read_bytes())
                for key, frame, rle in _entries(content):
                    of_key = self._frames.setdefault(key, {})
                    if frame in of_key:
                        self.doubled.append(f"{file}: {key}, frame {frame}")
                    of_key.setdefault(frame, rle)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise RequestError(
                    f"{file}: expected {{uid: [RLE or null, ...]}} or a list of "
                    f'{{"uid", "frame", "segmentation"}}: {type(error).__name__}: {error}'
                ) from None

    def keys(self) -> Collection[str]:
        return self._frames.keys()

    def raw(self, key: str) -> dict[int, np.ndarray]:
        found = {frame: rle for frame, rle in self._frames[key].items() if rle is not None}
        return {frame: decode_rle(rle, f"{self.path}: {key}, frame {frame}") for frame, rle in found.items()}


def _entries(content: Any) -> Iterable[tuple[str, int, Any]]:
    if isinstance(content, dict):
        for key, frames in content.items():
            yield from ((key, frame, rle) for frame, rle in enumerate(frames))
        return
    for entry in content:
        if "segmentations" in entry:
            yield from ((entry["uid"], frame, rle) for frame, rle in enumerate(entry["segmentations"]))
        else:
            if (frame := int(entry["frame"])) < 0:
                raise ValueError(f"expected frames from 0, found {frame}")
            yield entry["uid"], frame, entry["segmentation"]


def decode_rle(rle: Any, where: str) -> np.ndarray:
    """bool (h, w) of COCO's {"size": [h, w], "counts": list or text}. Raises SamloveError if it does not fit together.

    Runs of 0 and 1 alternate, beginning with 0, column by column. A text holds groups of 5 bits as characters from "0"
    on, 0x20 marks that more follow, and from the fourth run on the difference to the run before the last.
    """
    try:
        height, width = map(int, rle["size"])
        if not (0 < height and 0 < width and height * width <= MAX_PIXELS):
            raise ValueError(f"expected a height and a width of 1 to {MAX_PIXELS:,} pixels, found {rle['size']}")
        counts = rle["counts"]
        runs = _runs(counts) if isinstance(counts, str) else [int(n) for n in counts]
        if min(runs, default=0) < 0 or sum(runs) != height * width:
            raise ValueError(f"runs of {sum(runs):,} pixels for a mask of {height} x {width}")
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise SamloveError(f"{where}: not a mask in COCO's run-length encoding: {error}") from None
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def _runs(text: str) -> list[int]:
    runs: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        value |= (bits & 0x1F) << shift
        shift += 5
        if not bits & 0x20:
            if bits & 0x10:  # negative
                value |= -1 << shift
            runs.append(value + runs[-2] if len(runs) > 2 else value)
            value = shift = 0
    return runs


class MaskBins(Masks):
    """samlove's predictions.h5: probabilities as 256 bins, each read as the middle of its bin."""

    what = "samlove's predictions (256 levels)"

    def __init__(self, path: Path, files: Iterable[Path]) -> None:
        super().__init__(path)
        readers = [PredictionReader(file) for file in files]
        for reader in readers:
            if not np.array_equal(reader.edges, EDGES):
                raise RequestError(f"{reader.path}: its bin edges differ from samlove.scoring.metrics.EDGES")
        self._readers = {row_id: reader for reader in readers for row_id in reader.row_ids}
        self.frames = max((reader.shape[0] for reader in readers), default=0)
        self.has_scores = True

    def keys(self) -> Collection[str]:
        return self._readers.keys()

    def raw(self, key: str) -> dict[int, np.ndarray]:
        return dict(enumerate(_BIN_LOGITS[self._readers[key].read(key)]))


def _bin_logits() -> np.ndarray:
    """A logit in each bin, (256,) float32; the last holds the probabilities that are 1 in float32."""
    middles = (np.append(0, EDGES[:-1]) + EDGES).astype(np.float64) / 2
    return np.append(np.log(middles / (1 - middles)), 17).astype(np.float32)


_BIN_LOGITS = _bin_logits()
