"""Checkpoints: one safetensors file with the trained parameters; its header says how to rebuild the model.

See stores.tensors. The frozen parts of SAM 2 are not in it: they come from SAM 2's own checkpoint, identified by its
sha256.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from samlove.config import FusionConfig, Sam2Config, Size, TrainConfig
from samlove.errors import RequestError, SamloveError
from samlove.model.fusion import Fusion
from samlove.model.sam2_build import checkpoint_path
from samlove.model.sam2_love import SamLove
from samlove.model.weights import load_into
from stores.fingerprint import sha256_file
from stores.tensors import damage, from_metadata, seal, to_metadata

SCHEMA = 1


class Origin(BaseModel):
    """Everything that determines a model before its first training step: enough to rebuild it, or to resume a run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = SCHEMA
    fusion: FusionConfig
    train: TrainConfig
    sam2: Sam2Config
    sam2_sha256: str
    dims: dict[str, Size]  # feature widths audio, visual and text, and the number of frames
    features: dict[str, dict]  # fingerprints of the features it was trained on, as the shard sets hold them
    shards: dict[str, str] = {}  # split -> id of its shard set, see ExpressionDataset.id

    @field_validator("dims")
    @classmethod
    def _has_all_dims(cls, dims: dict[str, int]) -> dict[str, int]:
        if dims.keys() != {"audio", "visual", "text", "frames"}:
            raise ValueError(f"expected audio, visual, text and frames, found {', '.join(dims)}")
        return dims

    def build(self) -> SamLove:
        """A new model on the CPU, its fusion module initialised from torch's current random state."""
        return SamLove.build(self.fusion, self.sam2, self.dims)


class Header(Origin):
    epoch: int  # counted from 1
    validation: dict[str, float]  # the scores of samlove.scoring.validation

    @property
    def threshold(self) -> float | None:
        """The object score below which masks are left empty; None without `null_references: presence`."""
        return self.validation.get("threshold")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write a safetensors file atomically. header: JSON values. Raises OSError, for example if the disk is full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, partial, to_metadata(header))
    except SafetensorError as error:
        if not (number := re.search(r"\(os error (\d+)\)", str(error))):
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(partial)) from error
    seal(partial)
    os.replace(partial, path)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the header of a file that `write_tensors` wrote; the tensors are on the CPU.

    Raises RequestError if there is no such file, SamloveError if it has no header of samlove or its bytes are damaged.
    """
    with _opened(path) as file:
        header = from_metadata(file.metadata(), path)
        try:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, AttributeError, RuntimeError, TypeError) as error:  # a dtype that torch does not have
            raise SamloveError(f"{path}: tensors that cannot be read ({error}); run: dvc repro train") from None
    if fault := damage(path, deep=True):
        raise SamloveError(f"{path}: damaged: {fault}; restore the file, or delete it and run: dvc repro train")
    return tensors, header


def save_checkpoint(path: Path, model: SamLove, header: Header) -> None:
    """Write the trainable parameters of `model` atomically."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    write_tensors(path, trained, header.model_dump(mode="json"))


def read_header(path: str | Path) -> Header:
    """The header alone; raises the same errors as `load_model`."""
    path = Path(path)
    with _opened(path) as file:
        header = from_metadata(file.metadata(), path)
    try:
        return Header(**header)
    except (ValidationError, TypeError) as error:
        raise SamloveError(
            f"{path}: expected a header of schema {SCHEMA}, found a different one "
            f"({' '.join(str(error).split())[:200]}); to retrain, run: dvc repro train"
        ) from None


def load_model(path: str | Path, sam2: Sam2Config | None = None) -> SamLove:
    """The model of a checkpoint, on the CPU, in evaluation mode.

    The frozen parts of SAM 2 come from the file that the header names. sam2: the header's own settings with other
    paths, if that file is elsewhere. Raises RequestError if either file is missing, SamloveError if SAM 2's file is not
    the one that the model was trained with, or if tensors do not fit.
    """
    path = Path(path)
    header = read_header(path)
    if sam2 is not None:
        header = header.model_copy(update={"sam2": sam2})
    found = sha256_file(checkpoint_path(header.sam2.checkpoint))
    if found != header.sam2_sha256:
        raise SamloveError(
            f"{header.sam2.checkpoint}: expected the SAM 2 that {path} was trained with (sha256 {header.sam2_sha256}), "
            f"found sha256 {found}; restore that file or, to retrain, run: dvc repro train"
        )
    tensors, _ = read_tensors(path)
    _check_size(path, header, tensors)
    model = header.build()
    frozen = {name: value for name, value in model.state_dict().items() if name.startswith("sam2.")}
    load_into(model, {**frozen, **tensors}, path, "the model in its header")
    return model.eval()


def _check_size(path: Path, header: Header, tensors: Mapping[str, Tensor]) -> None:
    """Raise SamloveError if the model in the header is larger than the file, before memory is reserved for it."""
    if header.fusion.blocks > len(tensors):
        raise SamloveError(f"{path}: expected weights of {header.fusion.blocks} blocks, found {len(tensors)} tensors")
    with torch.device("meta"):
        expected = sum(p.numel() for p in Fusion(header.fusion, header.dims, 1).parameters())
    if expected > (found := sum(tensor.numel() for tensor in tensors.values())):
        raise SamloveError(f"{path}: expected at least {expected} weights of the model in its header, found {found}")


def _opened(path: Path) -> Any:
    if not path.is_file():
        raise RequestError(f"{path}: no such file; run: dvc repro train")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise SamloveError(
            f"{path}: not a complete safetensors file ({error}); copy it again, or run: dvc repro train"
        ) from None
