"""What every frozen encoder is, and the two things they all do: say their versions, and narrow to the store's dtype.

An encoder is built from its section of the configuration; it finds its weights then, so that a missing file shows
at once, and loads the network at the first `encode`.
"""

import math
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
Source = TypeVar("Source", contravariant=True)  # what is read: the path of a wav, the paths of frames, a text
Item = TypeVar("Item")  # what reading it gives


class Encoder(Protocol[Source, Item]):
    """Reading and computing apart, so that the next items can be read while these are computed."""

    def fingerprint(self) -> dict:
        """All that its arrays depend on, but for the media: flat, JSON. Cheap: no network is loaded."""
        ...

    def load(self, source: Source) -> Item:
        """Read and preprocess one item; called from several threads. Raises SamloveError where it cannot be read."""
        ...

    def encode(self, items: list[Item]) -> list[Arrays]:
        """The arrays of each item, in the store's dtype. Raises SamloveError where a value does not fit it."""
        ...


class OnDevice:
    """An encoder that can be sent to another process: its copy has that process's device, and loads its own network."""

    device: torch.device

    def __getstate__(self) -> dict[str, Any]:
        loaded = {name for name in self.__dict__ if isinstance(getattr(type(self), name, None), cached_property)}
        return {name: value for name, value in self.__dict__.items() if name not in {"device", *loaded}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, device=default_device())


def library_versions(*names: str) -> list[str]:
    """["timm 1.0.31", ...]; a build's local part ("+cpu") is left out, for it names a machine, not a computation."""
    return [f"{name} {version(name).split('+')[0]}" for name in names]


def to_store(name: str, values: Tensor, dtype: Dtype) -> np.ndarray:
    """`values` on the CPU in the store's dtype.

    Raises SamloveError, naming the array, where one is not finite or lies outside the dtype's range.
    """
    values = values.detach().float()
    largest = values.abs().max().item() if values.numel() else 0.0  # NaN where there is any
    if not math.isfinite(largest):
        raise SamloveError(f"{name}: the encoder gave a value that is not finite; its weights are damaged")
    if largest > np.finfo(dtype).max:
        raise SamloveError(
            f"{name}: {largest:.6g} is beyond the range of {dtype} ({np.finfo(dtype).max}); "
            "set dtype: float32 in the encoder's file under configs/"
        )
    # Checked, narrowed and put in order where they are: on a GPU all that costs nothing, and half the bytes are moved.
    return values.to(TORCH_DTYPES[dtype]).contiguous().cpu().numpy()
