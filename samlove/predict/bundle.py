"""A bundle: a checkpoint and everything that `predict` needs to find for it, as one folder that works on any machine.

    bundle.json              the settings of the encoders, and the hashes of checkpoint and weights
    checkpoint.safetensors   the trained parameters
    weights/KIND/...         weights of the frozen encoders (audio, visual, text, sam2), if they are included

Paths in bundle.json are relative to the folder. Weights that are not included are put there by hand.
"""

import json
import shutil
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from pydantic import ValidationError

from samlove import __version__
from samlove.config import AudioConfig, InferConfig, Sam2Config, Section, TextConfig, VisualConfig
from samlove.errors import RequestError, SamloveError, absence
from samlove.features.encoders.transformers_folder import model_files
from samlove.model.weights import HUB
from samlove.predict.setup import Setup
from stores.fingerprint import parse_json, sha256_file
from stores.manifest import existing_parent, refuse_existing
from stores.remote import regular

SCHEMA = 1
DESCRIPTION, CHECKPOINT, WEIGHTS = "bundle.json", "checkpoint.safetensors", "weights"
S = TypeVar("S", bound=Section)


def write_bundle(setup: Setup, out: Path, with_weights: bool) -> dict[str, str]:
    """Write the bundle of a checkpoint to `out`, which must not exist.

    Returns, for each file of weights that is not included, its path in the bundle and its sha256.
    Raises RequestError if `out` exists or weights are missing, SamloveError if weights are not those that the
    checkpoint was trained with. Then nothing is written.
    """
    refuse_existing(out)
    with TemporaryDirectory(prefix=".samlove-", dir=existing_parent(out)) as scratch:
        folder = Path(scratch) / "bundle"
        folder.mkdir()
        settings = {
            name: getattr(setup, name).model_dump(mode="json") for name in ("audio", "visual", "text", "sam2", "infer")
        }
        hashes: dict[str, str] = {}
        for kind, make in setup.encoders(torch.device("cpu")).items():
            encoder = make()
            setup.check(kind, encoder.fingerprint(), kind, "bundle the weights and settings that it was trained with")
            key = "checkpoint" if kind == "sam2" else "weights"
            if with_weights or not settings[kind][key].startswith(HUB):
                source = _source(encoder)
                settings[kind][key] = f"{WEIGHTS}/{kind}/{source.name}"
                for file in _files(encoder, source):
                    name = f"{WEIGHTS}/{kind}/{file.relative_to(source.parent)}"
                    hashes[name] = sha256_file(file)
                    if with_weights:
                        _copy(file, folder / name)
        config_sha256 = None
        if (config := Path(setup.sam2.config)).is_file():  # otherwise a name inside the sam2 package
            settings["sam2"]["config"] = f"{WEIGHTS}/sam2/{config.name}"
            _copy(config, folder / settings["sam2"]["config"])
            config_sha256 = sha256_file(config)
        _copy(setup.checkpoint, folder / CHECKPOINT)
        description = {
            "schema": SCHEMA,
            "samlove": __version__,
            "checkpoint_sha256": setup.sha256,
            "config_sha256": config_sha256,
            "settings": settings,
            "weights_sha256": hashes,
        }
        (folder / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
        out.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(out)
    return {} if with_weights else hashes


def read_bundle(folder: Path) -> Setup:
    """The setup in a bundle. Raises RequestError if `folder` is none, SamloveError if it is damaged."""
    path = folder / DESCRIPTION
    try:
        found = parse_json(regular(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RequestError(f"{folder}: expected a checkpoint or a bundle, found a folder without {path.name}") from None
    except (OSError, ValueError) as error:
        raise SamloveError(f"{path}: cannot be read ({error}); copy the bundle again") from None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA or not isinstance(found.get("settings"), dict):
        raise SamloveError(f"{path}: expected a bundle of schema {SCHEMA}, found something else; update samlove")
    _check(folder / CHECKPOINT, found.get("checkpoint_sha256"))
    settings = found["settings"]
    setup = Setup(
        folder / CHECKPOINT,
        _section(AudioConfig, settings, "audio", path),
        _section(VisualConfig, settings, "visual", path),
        _section(TextConfig, settings, "text", path),
        _section(Sam2Config, settings, "sam2", path),
        _section(InferConfig, settings, "infer", path),
    )
    weights = (setup.audio.weights, setup.visual.weights, setup.text.weights, setup.sam2.checkpoint)
    for setting in (*weights, setup.sam2.config):
        if not setting.startswith(HUB) and (".." in (parts := PurePosixPath(setting)).parts or parts.is_absolute()):
            raise SamloveError(f"{path}: expected paths inside the bundle, found {setting!r}")
    if found.get("config_sha256") is not None:  # the fingerprints have only the part about the image encoder
        _check(folder / setup.sam2.config, found["config_sha256"])
    return setup.located(folder)


def _check(file: Path, expected: object) -> None:
    found = f"sha256 {sha256_file(file)}" if file.is_file() else absence(file)
    if found != f"sha256 {expected}":
        raise SamloveError(
            f"{file}: expected sha256 {expected}, found {found.removeprefix('sha256 ')}; copy the bundle again"
        )


def _section(section: type[S], settings: dict[str, Any], name: str, path: Path) -> S:
    try:
        return section.model_validate(settings.get(name, {}))
    except ValidationError as error:
        raise SamloveError(
            f"{path}: {name}: {' '.join(str(error).split())[:200]}; bundle the checkpoint again"
        ) from None


def _source(encoder: Any) -> Path:
    """The file or folder of an encoder's weights."""
    return next(getattr(encoder, name) for name in ("folder", "weights", "checkpoint") if hasattr(encoder, name))


def _files(encoder: Any, source: Path) -> list[Path]:
    if source.is_dir():
        return model_files(source)
    return [source, *([encoder.pca] if getattr(encoder, "pca", None) else [])]


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
