"""Predicted masks as logits: what the values in a file mean.

A grey level or a stored bin stands for a probability p and becomes log(p / (1 - p)), with p kept off 0 and 1 by half a
grey level; a binary mask is a grey one of 0 and 255. samlove.scoring.mask_formats reads the files.
"""

from collections.abc import Collection, Iterator
from pathlib import Path
from threading import Lock

import numpy as np

from samlove.data.images import MAX_PIXELS
from samlove.errors import RequestError, SamloveError
from samlove.scoring.protocols import finite

UNITS = (1, 255, 65535)  # whole numbers that can stand for the probability 1


def grey_logits(values: np.ndarray, highest: int) -> np.ndarray:
    """Logits, float32, of the probabilities values / highest."""
    p = np.clip(values / highest, 0.5 / 255, 1 - 0.5 / 255)
    return np.log(p / (1 - p)).astype(np.float32)


_OF_GREY = grey_logits(np.arange(256), 255)


class Masks:
    """Predicted masks by expression: a source of one format. Reading is thread-safe.

    path: for messages. what: the format in words. doubled: files or entries of a frame beyond the first, which is the
    one used. unused: files or entries of no expression of the dataset, or of no known format. has_scores: whether
    anything read so far has more than two values.
    """

    what = ""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.doubled: list[str] = []
        self.unused: list[str] = []
        self.has_scores = False
        self._units: dict[bool, int] = {}
        self._are_logits = False
        self._lock = Lock()

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
            logits = finite(values, where)
            if _is_positive(logits):
                self._check_floats()
            return logits
        if values.dtype == bool:
            return _OF_GREY[values.astype(np.uint8) * np.uint8(255)]
        lowest, highest = int(values.min()), int(values.max())
        if lowest < 0 or highest > UNITS[-1]:
            raise SamloveError(f"{where}: expected whole numbers in 0..{UNITS[-1]}, found {lowest}..{highest}")
        unit = self._unit(_is_wide(values), highest)
        if not self.has_scores and ((values > 0) & (values < unit)).any():
            self.has_scores = True
        if unit == UNITS[-1]:
            return grey_logits(values, unit)
        return _OF_GREY[values.astype(np.uint8) * np.uint8(255 // unit)]

    def _unit(self, wide: bool, highest: int) -> int:
        """Which of UNITS is the probability 1 in a mask with this highest value.

        A dark mask does not show it: the value 1 can be an object, or 1/255. All masks of the source, of as many bits,
        have the same unit, the smallest that fits them.
        """
        *smaller, largest = UNITS if wide else UNITS[:2]
        if highest == 0 or highest > smaller[-1]:
            return largest
        with self._lock:
            if wide not in self._units:
                self._units[wide] = self._common_unit(wide, smaller, largest)
            return self._units[wide]

    def _common_unit(self, wide: bool, smaller: list[int], largest: int) -> int:
        found: set[int] = set()
        for mask in self._every("iu"):
            if _is_wide(mask) == wide:
                found.update(np.flatnonzero(np.bincount(mask.clip(0, UNITS[-1]).astype(np.int64).ravel())).tolist())
                if any(smaller[-1] < value < largest for value in found):
                    return largest
        if len(found - {0}) > 1 and found <= {0, *UNITS}:
            values = " and ".join(map(str, sorted(found - {0})))
            raise RequestError(f"{self.path}: expected one value for the object in all masks, found {values}; use 255")
        return next((unit for unit in smaller if max(found) <= unit), largest)

    def _check_floats(self) -> None:
        """Raise RequestError if no float of the source is below 0, as in probabilities and masks, which score wrong.

        Logits that mark all pixels pass, unless they could be probabilities.
        """
        with self._lock:
            if self._are_logits:
                return
            lowest, highest = np.inf, -np.inf
            for values in filter(np.size, self._every("f")):
                lowest, highest = min(lowest, float(values.min())), max(highest, float(values.max()))
                if lowest < 0:
                    break
            if lowest == 0 or 0 < lowest <= highest <= 1:
                raise RequestError(
                    f"{self.path}: expected floats that are logits, found only values in {lowest:g}..{highest:g}; save "
                    "binary masks as bool, and probabilities p as log(p / (1 - p)) or as grey PNGs"
                )
            self._are_logits = True

    def _every(self, kinds: str) -> Iterator[np.ndarray]:
        for key in self.keys():
            yield from (values for values in self.raw(key).values() if values.dtype.kind in kinds)


def _is_wide(values: np.ndarray) -> bool:
    return values.dtype.itemsize > 1


def _is_positive(values: np.ndarray) -> bool:
    """Whether no value is below 0, and some value is above."""
    return bool(values.min() >= 0 and values.any())
