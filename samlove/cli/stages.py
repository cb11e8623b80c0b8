"""The feature stages by the name of their store: the way from a path back to its encoder and its sources."""

from importlib import import_module
from pathlib import Path

from samlove.data.layout import layout
from samlove.errors import RequestError
from samlove.features.extract import Job

SCRIPTS = {  # store -> the script of its stage, and the script's arguments
    "audio": ("pipelines.audio", ()),
    "visual": ("pipelines.visual", ()),
    "text": ("pipelines.text", ()),
    "sam2_train": ("pipelines.sam2", ("train",)),
    "sam2_eval": ("pipelines.sam2", ("eval",)),
}


def store_name(path: Path) -> str:
    """The name of the active profile's feature store at `path`. Raises RequestError if there is none."""
    features = layout().features
    for name in SCRIPTS:
        if (features / name).resolve() == path.resolve():
            return name
    known = ", ".join(str(features / name) for name in SCRIPTS)
    raise RequestError(f"{path}: expected a feature store of the active profile ({known}); run from the project's root")


def stage_of(name: str) -> str:
    """The stage that writes a feature store, as `dvc repro` takes it."""
    return SCRIPTS[name][0].removeprefix("pipelines.")


def job_of(name: str) -> Job:
    """What the stage of a feature store computes, from the index and the active profile."""
    script, arguments = SCRIPTS[name]
    job: Job = import_module(script).job(*arguments)
    return job
