"""The interface of the frozen encoders, and what they share: library versions and conversion to the store's dtype.

An encoder is built from its section of the configuration. It looks for its weights at once, so that a missing file is
reported early, and loads the network on the first `encode`.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from importlib.metadata import version
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from samlove.config import Dtype
from samlove.device import default_device
from samlove.errors import SamloveError

Arrays = dict[str, np.ndarray]
TORCH_DTYPES: dict[Dtype, torch.dtype] = {"float16": torch.float16, "float32": torch.float32}
Source = TypeVar("Source", contravariant=True)  # what `load` reads: a wav path, frame paths or an expression
Item = TypeVar("Item")  # what `load` returns


class Sources(Mapping[str, Any]):
    """{key: what `Encoder.load` reads}. A value is computed whenever it is asked for, in any thread; none is kept."""

    def __init__(self, keys: Iterable[str], source: Callable[[str], Any]) -> None:
        self._keys, self._source = dict.fromkeys(keys), source

    def __getitem__(self, key: str) -> Any:
        if key not in self._keys:
            raise KeyError(key)
        return self._source(key)

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


class Encoder(Protocol[Source, Item]):
    """Reading and computing are separate, so that the next items can be read while the current ones are computed."""

    def fingerprint(self) -> dict:
        """Everything that the arrays depend on, except the media: flat, JSON. Cheap: does not load the network."""
        ...

    def load(self, source: Source) -> Item:
        """Read and preprocess one item; called from several threads. Raises SamloveError if it cannot be read."""
        ...

    def encode(self, items: list[Item]) -> list[Arrays]:
        """The arrays of each item, in the store's dtype. Raises SamloveError if a value does not fit it."""
        ...


class OnDevice:
    """An encoder that can be sent to another process: the copy uses that process's device and loads its own network."""

    device: torch.device

    def __getstate__(self) -> dict[str, Any]:
        loaded = {name for name in self.__dict__ if isinstance(getattr(type(self), name, None), cached_property)}
        return {name: value for name, value in self.__dict__.items() if name not in {"device", *loaded}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, device=default_device())


def library_versions(*names: str) -> list[str]:
    """["timm 1.0.31", ...], without local version labels ("+cpu"), which depend on the machine."""
    return [f"{name} {version(name).split('+')[0]}" for name in names]


def to_store(name: str, values: Tensor, dtype: Dtype) -> np.ndarray:
    """`values` on the CPU in the store's dtype.

    Raises SamloveError, naming the array, if a value is not finite or is outside the dtype's range.
    """
    values = values.detach().float()
    largest = values.abs().max().item() if values.numel() else 0.0  # NaN if any value is
    if not math.isfinite(largest):
        raise SamloveError(f"{name}: a value is not finite; the weights or the imported file are damaged")
    if largest > np.finfo(dtype).max:
        raise SamloveError(
            f"{name}: {largest:.6g} is beyond the range of {dtype} ({np.finfo(dtype).max}); "
            "set dtype: float32 in the encoder's file under configs/"
        )
    # Check, narrow and reorder on the device: on a GPU this costs almost nothing, and float16 halves the bytes to move.
    return values.to(TORCH_DTYPES[dtype]).contiguous().cpu().numpy()
