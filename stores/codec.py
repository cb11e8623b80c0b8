"""Encodes float features for storage as bfloat16 or int8, and decodes them to float32.

The name of a stored array shows how feature NAME is encoded:
    bfloat16    NAME.bfloat16, uint16: the upper half of each float32, rounded to nearest, ties to even
    int8        NAME.int8 and NAME.scale, float32 (rows, channels, 1, ...): one int8 step, per row and channel
"""

from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np

from samlove.errors import SamloveError

Coding = Literal["bfloat16", "int8"]
CODINGS: tuple[str, ...] = get_args(Coding)
BFLOAT16, INT8, SCALE = ".bfloat16", ".int8", ".scale"
STEPS = 127  # int8 steps on either side of zero


def encode(name: str, values: np.ndarray, coding: Coding) -> dict[str, np.ndarray]:
    """Encode float32 values as the arrays to store; int8 expects shape (rows, channels, ...).

    The error is at most 2^-8 of a value for bfloat16. For int8 it is at most half the scale, which is the largest
    magnitude of the channel in that row divided by 127. Raises SamloveError, naming the array, if a value is not
    finite or out of range: beyond bfloat16 or, for int8, beyond float16, the dtype in which training shards store it.
    """
    values = np.ascontiguousarray(values, np.float32)
    limit = np.finfo(np.float16).max if coding == "int8" else np.uint32(0x7F7F7FFF).view(np.float32)
    largest = np.abs(values).max(initial=0)  # NaN if any value is NaN
    if not largest <= limit:
        raise SamloveError(
            f"{name}: expected finite values of at most {limit:.6g} to store as {coding}, found {largest}"
        )
    if coding == "bfloat16":
        bits = values.view(np.uint32)
        return {name + BFLOAT16: ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)}
    largest = np.abs(values).max(axis=tuple(range(2, values.ndim)), keepdims=True)  # (rows, channels, 1, ...)
    scale = largest / np.float32(STEPS)
    steps = np.rint(values / np.where(scale > 0, scale, np.float32(1)))
    return {name + INT8: np.clip(steps, -STEPS, STEPS).astype(np.int8), name + SCALE: scale}


def decode(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The features of an item: encoded ones as float32, all others unchanged.

    Raises SamloveError if encoded arrays have other dtypes or shapes than `encode` gives them.
    """
    features: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        _check(name, array, arrays)
        if name.endswith(BFLOAT16):
            bits = array.astype(np.uint32)
            bits <<= 16  # in place, which takes half the time
            features[name.removesuffix(BFLOAT16)] = bits.view(np.float32)
        elif name.endswith(INT8):
            base = name.removesuffix(INT8)
            features[base] = array.astype(np.float32)
            features[base] *= arrays[base + SCALE]
        elif not name.endswith(SCALE):
            features[name] = array
    return features


def _check(name: str, array: np.ndarray, arrays: Mapping[str, np.ndarray]) -> None:
    """Raise SamloveError if an array cannot be decoded as its name says."""
    dtype, scale = array.dtype, arrays.get(name.removesuffix(INT8) + SCALE)
    if name.endswith(BFLOAT16) and dtype != np.uint16:
        raise SamloveError(f"{name}: expected uint16, found {dtype}")
    if not name.endswith(INT8):
        return
    if scale is None or (dtype, scale.dtype) != (np.int8, np.float32):
        found = "none" if scale is None else scale.dtype
        raise SamloveError(f"{name}: expected int8 with a float32 scale, found {dtype} with {found}")
    if scale.ndim != array.ndim or any(n not in (1, m) for n, m in zip(scale.shape, array.shape, strict=True)):
        raise SamloveError(f"{name}: expected a scale for {array.shape}, found one of {scale.shape}")


def is_coded(names: Mapping[str, Any]) -> bool:
    """Whether any of the arrays is encoded."""
    return any(name.endswith((BFLOAT16, INT8)) for name in names)


def shapes(arrays: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[int, ...]]:
    """The shape of each feature, from a manifest's `arrays`."""
    return {
        name.removesuffix(BFLOAT16).removesuffix(INT8): tuple(spec["shape"])
        for name, spec in arrays.items()
        if not name.endswith(SCALE)
    }
