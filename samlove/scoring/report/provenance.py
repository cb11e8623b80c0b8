"""The provenance of a result: source revision, library versions, fingerprints of the inputs."""

import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from safetensors import safe_open

PACKAGES = tuple("samlove torch sam2 timm transformers torchvggish zarr h5py dvc dvclive numpy".split())


def source_revision() -> str:
    """The git commit of the working folder, with `+ changes` if tracked files differ from it."""
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        return commit + (" + changes" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "not a git checkout"


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=True).stdout.strip()


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that affect the numbers."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def fingerprints(data: Path) -> dict[str, dict]:
    """The fingerprint of each feature store under `data`/features, by the store's name."""
    manifests = sorted((data / "features").glob("*/manifest.json"))
    return {path.parent.name: json.loads(path.read_text(encoding="utf-8"))["fingerprint"] for path in manifests}


def checkpoint_header(path: Path) -> dict:
    """The metadata of a safetensors file, with JSON values decoded; {} if there is no such file."""
    if not path.exists():
        return {}
    with safe_open(str(path), framework="numpy") as file:
        metadata = file.metadata() or {}
    return {key: _decoded(value) for key, value in sorted(metadata.items())}


def _decoded(text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
