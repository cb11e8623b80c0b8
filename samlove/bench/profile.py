"""What the benchmarks with --profile share: reading the profile's settings, and naming the device."""

from pathlib import Path
from typing import Any

import torch

from samlove.config import S, load
from samlove.errors import RequestError

PROFILES = ("micro", "refavs")


def check_profile(profile: str) -> None:
    """Raise RequestError if this profile does not exist."""
    if profile not in PROFILES or not Path("configs", profile).is_dir():
        raise RequestError(f"--profile {profile}: expected one of {', '.join(PROFILES)}; run in the repository's root")


def section(profile: str, kind: type[S], **changes: Any) -> S:
    """One section of a profile, which need not be the active one, with some values changed."""
    return load(kind, profile=profile).model_copy(update=changes)


def device_name(device: torch.device) -> str:
    """The driver's name of a GPU, or cpu."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
