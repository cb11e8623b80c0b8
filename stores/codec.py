"""Narrower forms of a float feature than float16: how a feature store keeps them, and floats back from them.

A feature NAME is kept under other names, so that a store says of itself how it is kept:
    bfloat16    NAME.bfloat16, uint16: the upper half of each float32, rounded to nearest, ties to even
    int8        NAME.int8 and NAME.scale, float32 (rows, channels, 1, ...): what an int8 counts, a channel of each row
"""

from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np

from samlove.errors import SamloveError

Coding = Literal["bfloat16", "int8"]
CODINGS: tuple[str, ...] = get_args(Coding)
BFLOAT16, INT8, SCALE = ".bfloat16", ".int8", ".scale"
STEPS = 127  # of an int8 on either side of zero


def encode(name: str, values: np.ndarray, coding: Coding) -> dict[str, np.ndarray]:
    """Float32 values, for int8 of shape (rows, channels, ...), as the arrays that keep them.

    bfloat16 is off by at most 2^-8 of a value; int8 by half its scale, which is the largest magnitude of the channel
    in that row over 127. Raises SamloveError, naming the array, where a value is not finite, is beyond bfloat16, or
    for int8 beyond float16, in which shards are packed from it.
    """
    values = np.ascontiguousarray(values, np.float32)
    limit = np.finfo(np.float16).max if coding == "int8" else np.uint32(0x7F7F7FFF).view(np.float32)
    largest = np.abs(values).max(initial=0)  # NaN where there is any
    if not largest <= limit:
        raise SamloveError(
            f"{name}: expected finite values of at most {limit:.6g} to keep as {coding}, found {largest}"
        )
    if coding == "bfloat16":
        bits = values.view(np.uint32)
        return {name + BFLOAT16: ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)}
    largest = np.abs(values).max(axis=tuple(range(2, values.ndim)), keepdims=True)  # (rows, channels, 1, ...)
    scale = largest / np.float32(STEPS)
    steps = np.rint(values / np.where(scale > 0, scale, np.float32(1)))
    return {name + INT8: np.clip(steps, -STEPS, STEPS).astype(np.int8), name + SCALE: scale}


def decode(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The features of an item: coded ones as float32, all others as they are."""
    features: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        if name.endswith(BFLOAT16):
            bits = array.astype(np.uint32)
            bits <<= 16  # in place: half the time
            features[name.removesuffix(BFLOAT16)] = bits.view(np.float32)
        elif name.endswith(INT8):
            base = name.removesuffix(INT8)
            features[base] = array.astype(np.float32)
            features[base] *= arrays[base + SCALE]
        elif not name.endswith(SCALE):
            features[name] = array
    return features


def is_coded(names: Mapping[str, Any]) -> bool:
    """Whether `decode` has anything to do."""
    return any(name.endswith((BFLOAT16, INT8)) for name in names)


def shapes(arrays: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[int, ...]]:
    """The shape of each feature, from a manifest's `arrays`."""
    return {
        name.removesuffix(BFLOAT16).removesuffix(INT8): tuple(spec["shape"])
        for name, spec in arrays.items()
        if not name.endswith(SCALE)
    }
