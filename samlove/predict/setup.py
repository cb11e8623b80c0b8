"""A checkpoint together with what is needed to encode a video for it: settings and weights of the frozen encoders.

The header of a checkpoint says what its features were made with, but not where those weights are. The settings of a
profile say that, or a bundle does. Whether they are the same weights is checked against the header.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
    header, configs = read_header(checkpoint), root / "configs"
    audio, visual, text = (load(section, configs, profile) for section in (AudioConfig, VisualConfig, TextConfig))
    return Setup(
        checkpoint,
        audio.model_copy(update={"weights": located(audio.weights, root)}),
        visual.model_copy(update={"weights": located(visual.weights, root)}),
        text.model_copy(update={"weights": located(text.weights, root)}),
        located_sam2(header.sam2, root),
        load(InferConfig, configs, profile),
    )


def located(setting: str, root: Path) -> str:
    """A path in a setting, relative to `root`, as it is from here. "hub:NAME" stays."""
    return setting if setting.startswith(HUB) else str(root / Path(setting).expanduser())


def located_sam2(sam2: Sam2Config, root: Path) -> Sam2Config:
    """SAM 2's settings with both paths as in `located`. `config` may also be a name inside the sam2 package."""
    config = root / Path(sam2.config).expanduser()
    if not config.exists():
        config = _shipped_or_same(sam2.config)
    return sam2.model_copy(update={"config": str(config), "checkpoint": located(sam2.checkpoint, root)})


def _shipped_or_same(name: str) -> Path:
    try:
        return shipped(name)
    except RequestError:
        return Path(name)
