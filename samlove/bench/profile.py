"""What the benchmarks with --profile share: reading the profile's settings, and naming the device."""

from pathlib import Path
from typing import Any

import torch
import yaml

from samlove.config import S
from samlove.errors import RequestError

PROFILES = ("micro", "refavs")


def check_profile(profile: str) -> None:
    """Raise RequestError if this profile does not exist."""
    if profile not in PROFILES or not Path("configs", profile).is_dir():
        raise RequestError(f"--profile {profile}: expected one of {', '.join(PROFILES)}; run in the repository's root")


def section(profile: str, name: str, kind: type[S], **changes: Any) -> S:
    """One section of a profile, which need not be the active one, with some values changed."""
    return kind(**{**yaml.safe_load(Path("configs", profile, f"{name}.yaml").read_text(encoding="utf-8")), **changes})


def device_name(device: torch.device) -> str:
    """The driver's name of a GPU, or cpu."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
