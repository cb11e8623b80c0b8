"""Writes the weights of the micro profile's networks."""

from pathlib import Path

from safetensors.torch import save_file
from torch import nn


def export(model: nn.Module, path: Path) -> None:
    """Write parameters in fp16 and buffers unchanged, for samlove.model.weights.load_state_dict; atomic."""
    parameters = dict(model.named_parameters())
    tensors = {n: (v.half() if n in parameters else v).contiguous() for n, v in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial)
    partial.replace(path)
