"""Checkpoints: one safetensors file with what was trained, and in its header all that made it (see stores.tensors).

SAM2's frozen parts are not repeated in it: they come from SAM2's own checkpoint, known by its sha256.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from samlove.config import FusionConfig, Sam2Config, TrainConfig
from samlove.errors import RequestError, SamloveError
from samlove.model.sam2_build import checkpoint_path
from samlove.model.sam2_love import SamLove
from samlove.model.weights import load_into
from stores import tensors as sealed
from stores.fingerprint import sha256_file

SCHEMA = 1


class Origin(BaseModel):
    """What determines a model before the first step: enough to build it again, or to take its training up again."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = SCHEMA
    fusion: FusionConfig
    train: TrainConfig
    sam2: Sam2Config
    sam2_sha256: str
    dims: dict[str, int]  # of the features: audio, visual, text, frames
    features: dict  # fingerprints of what it was trained on, as the shards have them
    shards: dict[str, str] = {}  # split -> what stands for the very shards, see ExpressionDataset.id

    def build(self) -> SamLove:
        """A fresh model, its fusion module initialised from torch's current random state, on the CPU."""
        return SamLove.build(self.fusion, self.sam2, self.dims)


class Header(Origin):
    epoch: int  # counted from 1
    validation: dict[str, float]  # of the first frames of the validation split, in percent


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: str) -> None:
    """Write a safetensors file, or leave what was there: never half of one. header: the text of a JSON object."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    metadata = sealed.metadata(json.loads(header))
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, partial, metadata)
    sealed.seal(partial)
    os.replace(partial, path)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors of a file of `write_tensors`, on the CPU, and its header.

    Raises RequestError where there is no such file, SamloveError where it is not one of ours or its bytes are damaged.
    """
    with _opened(path) as file:
        tensors, header = {name: file.get_tensor(name) for name in file.keys()}, _header(path, file)
    if fault := sealed.damage(path, deep=True):
        raise SamloveError(f"{path}: damaged: {fault}; bring the file back, or delete it and: dvc repro train")
    return tensors, header


def save_checkpoint(path: Path, model: SamLove, header: Header) -> None:
    """Write the trainable parameters of `model`; atomic."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    write_tensors(path, trained, header.model_dump_json())


def read_header(path: str | Path) -> Header:
    """The header alone; raises as `load_model`."""
    path = Path(path)
    with _opened(path) as file:
        text = _header(path, file)
    try:
        return Header(**json.loads(text))
    except (ValidationError, json.JSONDecodeError, TypeError) as error:
        raise SamloveError(
            f"{path}: expected a header of schema {SCHEMA}, found another ({' '.join(str(error).split())[:200]}); "
            "train again: dvc repro train"
        ) from None


def load_model(path: str | Path) -> SamLove:
    """The model of a checkpoint, on the CPU, in evaluation mode.

    SAM2's frozen parts come from the file that the header names. Raises RequestError where one of the two files is
    missing, SamloveError where SAM2's is not the one that the model was trained with, or tensors do not fit.
    """
    path = Path(path)
    header = read_header(path)
    found = sha256_file(checkpoint_path(header.sam2.checkpoint))
    if found != header.sam2_sha256:
        raise SamloveError(
            f"{header.sam2.checkpoint}: expected the SAM2 that {path} was trained with (sha256 {header.sam2_sha256}), "
            f"found sha256 {found}; bring that file back, or train again: dvc repro train"
        )
    model = header.build()
    tensors, _ = read_tensors(path)
    frozen = {name: value for name, value in model.state_dict().items() if name.startswith("sam2.")}
    load_into(model, {**frozen, **tensors}, path, "the model of its header")
    return model.eval()


def _opened(path: Path) -> Any:
    if not path.is_file():
        raise RequestError(f"{path}: no such file; make it with: dvc repro train")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise SamloveError(f"{path}: not a whole safetensors file ({error}); delete it and: dvc repro train") from None


def _header(path: Path, file: Any) -> str:
    text = (file.metadata() or {}).get(sealed.HEADER_KEY)
    if text is None:
        raise SamloveError(f"{path}: expected a checkpoint of samlove, found a safetensors file without its header")
    return json.dumps(sealed.parse(text, path))
