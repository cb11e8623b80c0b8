"""Which feature stage makes a store: the way from a path back to its encoder and its media."""

from importlib import import_module
from pathlib import Path

from samlove.errors import RequestError
from samlove.features.extract import Job

STAGES = {  # stage, as DVC names it -> its script, and what that is called with
    "audio": ("pipelines.audio", ()),
    "visual": ("pipelines.visual", ()),
    "text": ("pipelines.text", ()),
    "sam2@train": ("pipelines.sam2", ("train",)),
    "sam2@eval": ("pipelines.sam2", ("eval",)),
}


def stage_of(path: Path) -> str:
    """The stage that makes the store at `path`; RequestError where none does."""
    for stage in STAGES:
        if (Path("data/features") / stage.replace("@", "_")).resolve() == path.resolve():
            return stage
    known = ", ".join(f"data/features/{stage.replace('@', '_')}" for stage in STAGES)
    raise RequestError(f"{path}: expected a store that a stage of this project makes ({known}); run from its root")


def job_of(stage: str) -> Job:
    """All that a stage computes, from the index and the active profile."""
    script, arguments = STAGES[stage]
    job: Job = import_module(script).job(*arguments)
    return job
