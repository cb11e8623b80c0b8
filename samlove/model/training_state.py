"""The state of an unfinished training run, from which it resumes.

FOLDER/state.safetensors    weights, the optimiser's moments and random states; the header is Progress
FOLDER/made_by.json         fingerprint of the run
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from samlove.model.checkpoint import read_tensors, write_tensors
from samlove.model.optimizer import Optimizers
from stores.fingerprint import differing, flat

STATE, MADE_BY = "state.safetensors", "made_by.json"


@dataclass
class Progress:
    """The position of a run, its losses and scores so far."""

    epoch: int = 0  # epochs completed
    consumed: int = 0  # samples of this epoch, over all processes
    step: int = 0  # optimiser steps taken
    sums: dict[str, float] = field(default_factory=dict)  # of each loss over the samples consumed
    best: float = -1.0  # best validation score so far, in percent; -1 before the first one
    history: list[dict[str, float]] = field(default_factory=list)  # metrics logged to DVCLive, one row per epoch


def save_state(
    path: Path, progress: Progress, parameters: Mapping[str, torch.nn.Parameter], optimizer: Optimizers
) -> None:
    """Write the state of a run atomically. parameters: all that `optimizer` trains, by name, on one device."""
    tensors: dict[str, Tensor] = {"random": torch.get_rng_state()}
    device = _device(parameters)
    if device.type == "cuda":
        tensors["random_cuda"] = torch.cuda.get_rng_state(device)
    for name, parameter in parameters.items():
        tensors[f"model/{name}"] = parameter
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}/{name}"] = value
    write_tensors(path, tensors, asdict(progress))


def restore_state(path: Path, parameters: Mapping[str, torch.nn.Parameter], optimizer: Optimizers) -> Progress:
    """Set the parameters, the optimiser and torch's random states as `save_state` found them. Returns the progress."""
    tensors, progress = read_tensors(path)
    device = _device(parameters)
    torch.set_rng_state(tensors.pop("random"))
    if device.type == "cuda":
        torch.cuda.set_rng_state(tensors.pop("random_cuda"), device)
    with torch.no_grad():
        for key, value in tensors.items():
            kind, name = key.split("/", 1)
            parameter = parameters[name]
            if kind == "model":
                parameter.copy_(value)
            else:
                optimizer.state[parameter][kind] = value.to(device)
    return Progress(**progress)


def _device(parameters: Mapping[str, torch.nn.Parameter]) -> torch.device:
    return next(iter(parameters.values())).device


def report_other_runs(folder: Path, fingerprint: Mapping[str, Any]) -> None:
    """Report the interrupted runs next to `folder` that cannot be resumed, and how their fingerprints differ.

    fingerprint: of the run in `folder`.
    """
    current = flat(fingerprint)
    for file in sorted(folder.parent.glob(f"*/{MADE_BY}")):
        if file.parent != folder and (file.parent / STATE).exists():
            stored = flat(json.loads(file.read_text(encoding="utf-8")))
            differences = differing(stored, current)
            fields = "; ".join(f"{name}: {a!r} stored, {b!r} now" for name, (a, b) in differences.items())
            tqdm.write(
                f"{file.parent}: interrupted run not resumed, because it differs ({fields}); to resume it, "
                "restore these values and run: dvc repro train; to discard it, delete the folder"
            )
