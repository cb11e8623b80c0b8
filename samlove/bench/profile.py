"""What the benches that take --profile share: its choices with weights of their own, and the name of the device."""

from pathlib import Path
from typing import Any

import torch
import yaml

from samlove.config import S
from samlove.errors import RequestError

PROFILES = ("micro", "refavs")


def check_profile(profile: str) -> None:
    """Raise RequestError where there is no such profile here."""
    if profile not in PROFILES or not Path("configs", profile).is_dir():
        raise RequestError(f"--profile {profile}: expected one of {', '.join(PROFILES)}, in the repository's root")


def section(profile: str, name: str, kind: type[S], **changes: Any) -> S:
    """One section of a profile that need not be the active one, some of its values changed."""
    return kind(**{**yaml.safe_load(Path("configs", profile, f"{name}.yaml").read_text()), **changes})


def device_name(device: torch.device) -> str:
    """As the driver names a GPU, else cpu."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
