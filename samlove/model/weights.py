"""Pretrained weights: from a local path, or from "hub:NAME" on the Hugging Face Hub.

Only "hub:NAME" uses the network. Reading a file unpickles nothing but tensors.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from samlove.errors import RequestError, SamloveError

HUB = "hub:"


def resolve_file(weights: str, what: str, remedy: str, hub_file: str | None = None) -> Path:
    """The local file that `weights` names; "hub:NAME" downloads it from the Hugging Face Hub.

    hub_file: the name of the file in the Hub repository NAME; None if these weights are not on the Hub.
    Raises RequestError, saying what the file is and how to get it, if there is no such file.
    """
    if weights.startswith(HUB):
        if hub_file is None:
            raise RequestError(f"{weights}: expected a local file, hub: is not supported for {what}; {remedy}")
        from huggingface_hub import hf_hub_download

        return Path(from_hub(weights, what, remedy, lambda name: hf_hub_download(name, hub_file)))
    path = Path(weights)
    if not path.is_file():
        raise RequestError(f"{path}: no such file; expected {what}; {remedy}")
    return path


def from_hub(weights: str, what: str, remedy: str, download: Callable[[str], str]) -> str:
    """Call `download` with the NAME of "hub:NAME". Raises RequestError if the download fails."""
    try:
        return download(weights.removeprefix(HUB))
    except (OSError, ValueError) as error:  # huggingface_hub's errors are subclasses of these
        reason = str(error).strip().split("\n")[0]
        raise RequestError(f"{weights}: {what} cannot be downloaded from the Hub: {reason}; {remedy}") from error


def load_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors file, or of a torch file read with weights_only=True, by name.

    A torch file may hold them under "model", as SAM 2's do. Floating-point tensors are returned as float32, whatever
    their stored dtype. Raises SamloveError if the file cannot be read this way.
    """
    tensors: Any
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise a dozen unrelated types for a broken file
        kind = "safetensors" if isinstance(error, SafetensorError) else "torch, weights_only=True"
        reason = str(error).strip().split("\n")[0]
        raise SamloveError(f"{path}: not readable as weights ({kind}): {reason}; download the file again") from error
    if isinstance(tensors, dict) and isinstance(tensors.get("model"), dict):
        tensors = tensors["model"]
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise SamloveError(f"{path}: expected a dictionary of named tensors, found something else")
    return {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}


def load_into(module: torch.nn.Module, tensors: dict[str, torch.Tensor], path: Path, what: str) -> None:
    """Load all weights of `module`. Raises SamloveError if a name or shape does not fit."""
    own = module.state_dict()
    faults = [f"missing {name}" for name in own if name not in tensors]
    faults += [f"unexpected {name}" for name in tensors if name not in own]
    faults += [
        f"{name} is {tuple(tensors[name].shape)}, expected {tuple(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    if faults:
        shown = "; ".join(faults[:3]) + (f"; and {len(faults) - 3} more" if len(faults) > 3 else "")
        raise SamloveError(f"{path}: these are not the weights of {what} as configured: {shown}")
    module.load_state_dict(tensors)
