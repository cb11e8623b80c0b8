"""Where pretrained weights come from: a local path, or "hub:NAME" on the Hugging Face hub.

The network is touched for "hub:NAME" only. A file is read without unpickling anything but tensors.
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
    """The local file that `weights` names.

    hub_file: the file to fetch for "hub:NAME"; None where these weights are on no hub.
    Raises RequestError, saying what the file is and how to get it, where there is none.
    """
    if weights.startswith(HUB):
        if hub_file is None:
            raise RequestError(f"{weights}: {what} is not on the hub; {remedy}")
        from huggingface_hub import hf_hub_download

        return Path(from_hub(weights, what, remedy, lambda name: hf_hub_download(name, hub_file)))
    path = Path(weights)
    if not path.is_file():
        raise RequestError(f"{path}: no such file; expected {what}; {remedy}")
    return path


def from_hub(weights: str, what: str, remedy: str, download: Callable[[str], str]) -> str:
    """What `download` gives for the NAME of "hub:NAME"; RequestError where it cannot be fetched."""
    try:
        return download(weights.removeprefix(HUB))
    except (OSError, ValueError) as error:  # huggingface_hub's errors are one or the other
        reason = str(error).strip().split("\n")[0]
        raise RequestError(f"{weights}: cannot fetch {what} from the Hugging Face hub: {reason}; {remedy}") from error


def load_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors file, or of a torch file read with weights_only=True, by name.

    A torch file may hold them under "model", as SAM2's do. Floating tensors come as float32, whatever they are
    stored as. Raises SamloveError where the file is not readable so.
    """
    tensors: Any
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise a dozen unrelated types for a broken file
        kind = "safetensors" if isinstance(error, SafetensorError) else "torch, weights only"
        reason = str(error).strip().split("\n")[0]
        raise SamloveError(f"{path}: not readable as weights ({kind}): {reason}; fetch the file again") from error
    if isinstance(tensors, dict) and isinstance(tensors.get("model"), dict):
        tensors = tensors["model"]
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise SamloveError(f"{path}: expected a dictionary of tensors by name, found something else")
    return {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}


def load_into(module: torch.nn.Module, tensors: dict[str, torch.Tensor], path: Path, what: str) -> None:
    """Give `module` all its weights; raises SamloveError where a name or a shape does not fit."""
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
