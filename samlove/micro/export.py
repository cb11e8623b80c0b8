"""How the scripts that make the micro profile's networks write them."""

from pathlib import Path

from safetensors.torch import save_file
from torch import nn


def export(model: nn.Module, path: Path) -> None:
    """The parameters in fp16, the buffers as they are, for samlove.model.weights.load_state_dict; atomic."""
    parameters = dict(model.named_parameters())
    tensors = {n: (v.half() if n in parameters else v).contiguous() for n, v in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial)
    partial.replace(path)
