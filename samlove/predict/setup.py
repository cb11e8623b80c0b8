"""A checkpoint together with what is needed to encode a video for it: settings and weights of the frozen encoders.

The header of a checkpoint says what its features were made with, but not where those weights are. The settings of a
profile say that, or a bundle does. Whether they are the same weights is checked against the header.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from samlove.config import AudioConfig, InferConfig, Sam2Config, TextConfig, VisualConfig, active_profile, load
from samlove.errors import RequestError, SamloveError, absence
from samlove.features.encoders.audio import ENCODERS as AUDIO
from samlove.features.encoders.sam2_image import Sam2ImageEncoder
from samlove.features.encoders.text import TextEncoder
from samlove.features.encoders.visual import ENCODERS as VISUAL
from samlove.model.checkpoint import Header, read_header
from samlove.model.weights import HUB
from samlove.resources import shipped
from stores.fingerprint import differing, sha256_file

MICRO = "weights/micro/samlove.safetensors"  # comes with samlove: trained on LAVS-synth
PROFILE = "micro"
LIBRARIES = "libraries"  # the field of a fingerprint that may differ: other versions change features by rounding only


@dataclass(frozen=True)
class Setup:
    """A checkpoint, and the settings with which videos are encoded for it; their paths are valid from here."""

    checkpoint: Path
    audio: AudioConfig
    visual: VisualConfig
    text: TextConfig
    sam2: Sam2Config
    infer: InferConfig

    @cached_property
    def header(self) -> Header:
        return read_header(self.checkpoint)

    @cached_property
    def sha256(self) -> str:
        """Of the checkpoint."""
        return sha256_file(self.checkpoint)

    def located(self, root: Path) -> "Setup":
        """With paths that were relative to `root` as they are from here. "hub:NAME" stays."""
        sam2 = {"config": _located_config(self.sam2.config, root), "checkpoint": _located(self.sam2.checkpoint, root)}
        return replace(
            self,
            audio=self.audio.model_copy(update={"weights": _located(self.audio.weights, root)}),
            visual=self.visual.model_copy(update={"weights": _located(self.visual.weights, root)}),
            text=self.text.model_copy(update={"weights": _located(self.text.weights, root)}),
            sam2=self.sam2.model_copy(update=sam2),
        )

    def encoders(self, device: torch.device) -> dict[str, Callable[[], Any]]:
        """For each kind of feature, what makes its encoder. Making one raises RequestError if weights are missing."""
        seconds = self.header.dims["frames"]
        return {
            "audio": lambda: AUDIO[self.audio.encoder](self.audio, seconds, device),
            "visual": lambda: VISUAL[self.visual.encoder](self.visual, device),
            "text": lambda: TextEncoder(self.text, device),
            "sam2": lambda: Sam2ImageEncoder(self.sam2, device),
        }

    def check(self, name: str, fingerprint: Mapping[str, Any], where: object, remedy: str) -> None:
        """Raise SamloveError if features of this fingerprint are not what the checkpoint was trained on.

        name: audio, visual, text or sam2. Versions of libraries may differ.
        """
        found, wanted = ({**f, LIBRARIES: None} for f in (fingerprint, self.header.features.get(name, {})))
        if faults := differing(wanted, found):
            told = "; ".join(f"{key}: expected {one!r}, found {other!r}" for key, (one, other) in faults.items())
            raise SamloveError(
                f"{where}: not the {name} features that {self.checkpoint} was trained on ({told}); {remedy}"
            )


def find_setup(checkpoint: str | Path | None = None) -> Setup:
    """The setup of a checkpoint: a file, or a folder of `samlove bundle`; None: the one that comes with samlove.

    A file below data/PROFILE belongs to that profile, any other to the active one or, where there is no
    configs/profile.yaml, to micro. Raises RequestError if a file is missing, SamloveError if one is damaged.
    """
    if checkpoint is None:
        return _of_profile(shipped(MICRO), shipped(f"configs/{PROFILE}").parents[1], PROFILE)
    path = Path(checkpoint).expanduser()
    if path.is_dir():
        from samlove.predict.bundle import read_bundle

        return read_bundle(path)
    if not path.is_file():
        raise RequestError(f"{path}: {absence(path)}; expected a checkpoint, or a folder that samlove bundle wrote")
    root, profile = _profile_of(path)
    return _of_profile(path, root, profile)


def _profile_of(checkpoint: Path) -> tuple[Path, str]:
    """The root of the project that a checkpoint belongs to, and its profile."""
    for folder in checkpoint.resolve().parents:
        root = folder.parent.parent
        if folder.parent.name == "data" and (root / "configs" / folder.name).is_dir():
            return root, folder.name
    if Path("configs/profile.yaml").exists():
        return Path(), active_profile()
    return shipped(f"configs/{PROFILE}").parents[1], PROFILE


def _of_profile(checkpoint: Path, root: Path, profile: str) -> Setup:
    configs = root / "configs"
    return Setup(
        checkpoint,
        load(AudioConfig, configs, profile),
        load(VisualConfig, configs, profile),
        load(TextConfig, configs, profile),
        read_header(checkpoint).sam2,
        load(InferConfig, configs, profile),
    ).located(root)


def _located(setting: str, root: Path) -> str:
    return setting if setting.startswith(HUB) else str(root / Path(setting).expanduser())


def _located_config(name: str, root: Path) -> str:
    """SAM 2's yaml: below `root`, or one that comes with samlove, or a name inside the sam2 package."""
    try:
        return str(root / name if (root / name).exists() else shipped(name))
    except RequestError:
        return name
