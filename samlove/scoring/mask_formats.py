"""Reads predicted masks in the formats that projects write; docs/protocols.md lists them."""

import os
import re
import threading
import zipfile
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from samlove.data.dataset import load_labels
from samlove.data.images import identified
from samlove.data.rle import decode_rle
from samlove.errors import RequestError, SamloveError, absence
from samlove.scoring.masks import Masks
from samlove.scoring.metrics import EDGES
from stores import PredictionReader
from stores.fingerprint import parse_json

SUFFIXES = (".png", ".npy", ".npz")
FROM_1 = ", frames numbered from 1"
# What NumPy raises for a damaged or hostile file; a header of a few bytes can ask for any amount of memory.
BROKEN = (ValueError, EOFError, OSError, MemoryError, RuntimeError, zipfile.BadZipFile, zlib.error)
_GREY = 0x010101  # of load_labels: grey level 1 in an image with three channels
REMEDY = "ask for the file again, or for the masks in another format"  # for a damaged predictions.h5 of anyone


def open_masks(path: Path, rows: pd.DataFrame, splits: Collection[str], frames: int) -> Masks:
    """The predicted masks at `path`, whatever their format.

    rows: all rows of the dataset, from samlove.data.audit.parse_rows. splits: those that will be scored. frames: of a
    video. Raises RequestError if nothing at `path` is in a known format or belongs to the dataset.
    """
    ids = {*rows["row_id"], *rows["uid"]}
    order = {split: rows.loc[rows["split"] == split, "row_id"].tolist() for split in splits}
    if path.is_file():
        found = _open_file(path, order, frames)
    elif path.is_dir():
        found = _open_folder(path, ids, order, frames)
    else:
        raise RequestError(f"{path}: {absence(path)}; expected a folder of masks, or an .npz, .json or .h5 file")
    if not isinstance(found, MaskFiles):
        found.unused += [str(key) for key in found.keys() if key not in ids]
    if not ids.intersection(found.keys()):
        raise RequestError(
            f"{path}: no mask of an expression of the dataset; expected PNG, NumPy, COCO RLE or predictions.h5 with "
            f"names such as {rows['uid'].iloc[0]}, found {found.unused[0] if found.unused else 'no masks'} "
            "(docs/protocols.md has the formats)"
        )
    return found


def _open_file(path: Path, order: Mapping[str, list[str]], frames: int) -> Masks:
    match path.suffix.lower():
        case ".h5":
            return MaskBins(path, [path])
        case ".npz":
            return MaskArchive(path)
        case ".npy" if len(order) == 1:
            return MaskArrays(path, {path: next(iter(order.values()))})
        case ".npy":
            raise RequestError(
                f"{path}: one array holds one split, and {len(order)} are asked for; name one with --split, or choose "
                f"a folder with {'.npy, '.join(order)}.npy"
            )
        case ".json":
            return MaskRle(path, [path], frames)
    raise RequestError(f"{path}: expected a folder, or an .npz, .npy, .json or .h5 file")


def _open_folder(path: Path, ids: set[str], order: Mapping[str, list[str]], frames: int) -> Masks:
    places = (path, *(path / split for split in order))
    if stored := [file for place in places if (file := place / "predictions.h5").is_file()]:
        return MaskBins(path, stored)
    if arrays := {file: keys for split, keys in order.items() if (file := path / f"{split}.npy").is_file()}:
        return MaskArrays(path, arrays)
    files = MaskFiles(path, ids, frames)
    if not files.keys() and (texts := sorted(path.glob("*.json"))):
        return MaskRle(path, texts, frames)
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
        for folder, folders, names in os.walk(path, onerror=_refuse, followlinks=True):
            folders[:] = sorted(name for name in folders if not _leads_back(Path(folder, name)))
            parts = Path(folder).relative_to(path).parts
            for file in (Path(folder, name) for name in sorted(names) if not name.startswith(".")):
                key, frame = _owner(parts, file.stem, ids)
                suffix = file.suffix.lower()
                if key is None or suffix not in SUFFIXES or (frame is None and suffix == ".png"):
                    self.unused.append(str(file))
                elif frame in found.setdefault(key, {}):
                    self.doubled.append(str(file))
                else:
                    found[key][frame] = file
                    kinds.setdefault(suffix, file)
        if len(kinds) > 1:
            raise RequestError(f"{path}: expected masks of one format, found {' and '.join(map(str, kinds.values()))}")
        self.first = _first({frame for of_key in found.values() for frame in of_key if frame is not None}, frames)
        self._files = found
        self.what = f"{next(iter(kinds), '')[1:].upper()} files" + FROM_1 * self.first

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
            if number is not None and values.ndim >= 2 and set(values.shape[:-2]) <= {1}:  # (h, w), (1, h, w)
                frames[number - self.first] = values.reshape(values.shape[-2:])
            elif len(self._files[key]) == 1:
                frames = _by_frame(values, file)
            else:
                raise SamloveError(
                    f"{file}: expected a mask (height, width), because the expression has other files; found the shape "
                    f"{values.shape}"
                )
        return frames


def _first(numbers: Collection[int], frames: int) -> int:
    """The number of the first frame: 1 if no mask has number 0 and the last number is that of frames, else 0."""
    return int(bool(numbers) and min(numbers) == 1 and max(numbers) == frames)


def _leads_back(folder: Path) -> bool:
    """Whether a folder is a link to itself or a folder above it, so that a walk would not end."""
    return folder.is_symlink() and folder.parent.resolve().is_relative_to(folder.resolve())


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
    """The grey levels of a PNG, or bool if its pixels are coloured or the labels of a palette.

    Raises SamloveError for an image of several colours, such as a heat map: it does not say which are the object.
    """
    labels = load_labels(path)
    with identified(path) as image:
        mode, palette = image.mode, np.reshape(image.getpalette("RGB") or [], (-1, 3))
    if mode in ("P", "PA"):
        grey = labels.dtype.kind == "i" and (palette == palette[:, :1]).all()
        return (labels // _GREY).astype(np.uint8) if grey else labels > 0
    if labels.dtype.itemsize < 4 or mode in ("I", "F"):
        return labels
    if not (labels % _GREY).any():
        return (labels // _GREY).astype(np.uint8)
    if len(np.unique(labels[labels > 0])) > 1:
        raise SamloveError(
            f"{path}: expected grey levels, or one colour on black, found several; save the mask as grey"
        )
    return labels > 0


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
    """`{split}.npy` arrays (E, T, h, w) in the order of metadata.csv."""

    what = "NumPy arrays"

    def __init__(self, path: Path, order: Mapping[Path, list[str]]) -> None:
        super().__init__(path)
        self._rows: dict[str, tuple[np.ndarray, int]] = {}
        for file, keys in order.items():
            values = _load(file)
            if values.ndim != 4 or len(values) != len(keys):
                raise RequestError(
                    f"{file}: expected an array (E, T, h, w) of the split's {len(keys)} expressions in the order of "
                    f"metadata.csv, found the shape {values.shape}"
                )
            self._rows |= {key: (values, i) for i, key in enumerate(keys)}

    def keys(self) -> Collection[str]:
        return self._rows.keys()

    def raw(self, key: str) -> dict[int, np.ndarray]:
        values, i = self._rows[key]
        return dict(enumerate(values[i]))


class MaskArchive(Masks):
    """An .npz file of arrays (T, h, w) by uid."""

    what = "NumPy arrays"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._of_thread = threading.local()  # an open archive cannot be shared by threads; opening takes long
        try:
            if not zipfile.is_zipfile(path):
                raise ValueError("not a zip archive, or truncated")
            names = self._archive().files
        except BROKEN as error:
            raise RequestError(f"{path}: not a readable .npz file: {error}") from None
        self._names = list(dict.fromkeys(names))
        self.doubled += [f"{path}: {name}" for name, n in Counter(names).items() if n > 1]

    def _archive(self) -> Any:
        if not hasattr(self._of_thread, "archive"):
            self._of_thread.archive = np.load(self.path, allow_pickle=False)
        return self._of_thread.archive

    def keys(self) -> Collection[str]:
        return self._names

    def raw(self, key: str) -> dict[int, np.ndarray]:
        try:
            return _by_frame(_numbers(self._archive()[key]), f"{self.path}: {key}")
        except BROKEN as error:
            raise SamloveError(f"{self.path}: {key}: not a readable array: {error}") from None


class MaskRle(Masks):
    """COCO's run-length encoding: `{uid: [RLE or null, ...]}`, or a list of `{"uid", "frame", "segmentation"}`."""

    def __init__(self, path: Path, files: Iterable[Path], frames: int) -> None:
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

        self.first = _first({frame for of_key in self._frames.values() for frame in of_key}, frames)
        self.what = "COCO RLE" + FROM_1 * self.first

    def keys(self) -> Collection[str]:
        return self._frames.keys()

    def raw(self, key: str) -> dict[int, np.ndarray]:
        found = {}
        for frame, rle in self._frames[key].items():
            if rle is not None:
                try:
                    found[frame - self.first] = decode_rle(rle)
                except SamloveError as error:
                    raise SamloveError(f"{self.path}: {key}, frame {frame}: {error}") from None
        return found


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


class MaskBins(Masks):
    """samlove's predictions.h5: probabilities as 256 bins, each read as the middle of its bin."""

    what = "samlove's predictions (256 levels)"

    def __init__(self, path: Path, files: Iterable[Path]) -> None:
        super().__init__(path)
        readers = [PredictionReader(file, REMEDY) for file in files]
        self._readers: dict[str, PredictionReader] = {}
        for reader in readers:
            if not np.array_equal(reader.edges, EDGES):
                raise RequestError(
                    f"{reader.path}: its bins are not those of samlove, which this scorer can read; {REMEDY}"
                )
            for row_id in reader.row_ids:
                if self._readers.setdefault(row_id, reader) is not reader:
                    self.doubled.append(f"{reader.path}: {row_id}")
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
