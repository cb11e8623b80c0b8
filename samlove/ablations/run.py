"""One run of an ablation: training, inference and scoring, into a folder of its own. Resumes where it was interrupted.

{runs}/{name}/seed{seed}/
  run.json            what the run is, its settings that differ, its time and cost
  metrics.json, evaluation/     as the evaluate stage writes them
  dvclive/            learning curves
  best.safetensors    the checkpoint of the best epoch
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from threading import Event
from typing import Any

import pandas as pd
import torch
from safetensors import safe_open
from tqdm import tqdm

from samlove import infer as inference
from samlove import train as training
from samlove.ablations.runs import STORES, Run
from samlove.config import DatasetConfig, EvaluateConfig
from samlove.data.dataset import RefAvsFolder
from samlove.data.digest import rows_digest, source_digests
from samlove.data.layout import Layout
from samlove.data.targets import Targets
from samlove.device import default_device
from samlove.model.checkpoint import read_header
from samlove.model.sam2_build import checkpoint_path
from samlove.scoring.evaluate import SPLITS, evaluate, write
from stores import FeatureStore, ShardReader
from stores.fingerprint import fingerprint_id, sha256_file
from stores.manifest import replace_folder, write_json

TESTS = SPLITS[1:]  # val is scored on single frames only, in training
SCORING = (
    "samlove.data.targets",
    "samlove.scoring.counts",
    "samlove.scoring.evaluate",
    "samlove.scoring.metrics",
    "samlove.scoring.protocols",
)
RECORD = "run.json"


@dataclass(frozen=True)
class Task:
    """A run with everything that a worker needs to know about it."""

    run: Run
    id: str  # of all that its result depends on
    paths: Layout
    dataset: DatasetConfig
    protocol: str  # of EvaluateConfig

    @property
    def out(self) -> Path:
        return self.paths.ablation_runs / self.run.name / f"seed{self.run.seed}"

    @property
    def work(self) -> Path:
        """The folder of the unfinished run."""
        return self.paths.scratch / "ablations" / self.id


def make_tasks(runs: list[Run], paths: Layout, dataset: DatasetConfig, evaluating: EvaluateConfig) -> list[Task]:
    """Raises RequestError or SamloveError if features, shards or weights of a run are missing or damaged."""
    shared = _shared(paths, dataset, evaluating)
    sha256 = cache(sha256_file)  # most runs have the same SAM 2
    ids = [fingerprint_id({**_own(run, paths, sha256), **shared}) for run in runs]
    return [Task(run, id, paths, dataset, evaluating.protocol) for run, id in zip(runs, ids, strict=True)]


def _own(run: Run, paths: Layout, sha256: Callable[[Path], str]) -> dict[str, Any]:
    """What the result of this run depends on, besides `_shared`."""
    shards = run.shards(paths)
    sections = {name: run.sections[name].model_dump(mode="json") for name in ("fusion", "train", "sam2", "infer")}
    for setting in training.SPEED:
        del sections["train"][setting]
    return {
        **sections,
        "sam2_sha256": sha256(checkpoint_path(run.sections["sam2"].checkpoint)),
        "shards": {split: fingerprint_id(ShardReader(shards / split).manifest) for split in ("train", "val")},
        "features": {
            name: FeatureStore.open(run.store(name, paths)).manifest["fingerprint"]
            for name in STORES
            if name != "sam2_train"  # in the fingerprint of the shards
        },
    }


def _shared(paths: Layout, dataset: DatasetConfig, evaluating: EvaluateConfig) -> dict[str, Any]:
    """What the results of all runs depend on."""
    rows = pd.read_parquet(paths.expressions)
    return {
        "rows": {split: rows_digest(rows[rows["split"] == split]) for split in TESTS},
        "gt_mask_sha256": paths.mask_digest.read_text(encoding="utf-8").strip(),
        "mask_size": dataset.mask_size,
        "protocol": evaluating.protocol,
        "code": source_digests((*training.CODE, *inference.CODE, *SCORING)),
        "torch": torch.__version__,
    }


def targets_of(task: Task) -> Targets:
    """The ground-truth masks that all runs are scored against."""
    rows = pd.read_parquet(task.paths.expressions)
    digest = task.paths.mask_digest.read_text(encoding="utf-8").strip()
    folder = RefAvsFolder(task.dataset.root)
    return Targets(folder, rows[rows["split"].isin(SPLITS)], digest, task.paths.scratch / "targets")


def execute(task: Task, bar: Callable[..., tqdm], stop: Event) -> None:
    """Train, predict and score, and publish the folder `task.out`.

    bar: shows the progress of each step. stop: when it is set, the run saves its state and raises KeyboardInterrupt.
    Raises what training, inference and scoring raise.
    """
    run, work, device = task.run, task.work, default_device()
    new, rows, folder = work / "new", pd.read_parquet(task.paths.expressions), RefAvsFolder(task.dataset.root)
    checkpoint, curves = new / "best.safetensors", new / "dvclive"
    with _timed(work, "train"):
        if not (checkpoint.exists() and curves.exists()):
            sections = run.sections
            origin, samples = training.prepare(
                run.shards(task.paths), sections["fusion"], sections["train"], sections["sam2"], device, _say_nothing
            )
            training.train(origin, samples, device, checkpoint, curves, work / "train", bar, stop)
    with _timed(work, "infer"):
        stores = {section: run.store(name, task.paths) for name, section in STORES.items()}  # sam2_eval is the last
        sources = inference.Sources(**{section: FeatureStore.open(path) for section, path in stores.items()})
        for split in TESTS:
            of_split, out = rows[rows["split"] == split], work / "predictions" / split
            if out.exists() or of_split.empty:
                continue
            scratch = work / "infer" / split
            inference.infer(
                split,
                of_split,
                checkpoint,
                sources,
                folder,
                run.sections["infer"],
                task.dataset.mask_size,
                out,
                scratch,
                device,
                bar,
                stop,
            )
    with _timed(work, "evaluate"):
        evaluation = evaluate(rows, targets_of(task), work / "predictions", task.protocol, bar)
        write(evaluation, new / "metrics.json", new / "evaluation")
    write_json(new / RECORD, _record(task, checkpoint, device))
    replace_folder(new, task.out)
    shutil.rmtree(work)


def read_record(path: Path) -> dict[str, Any] | None:
    """The content of a run.json; None if there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "id" in found else None


def _say_nothing(text: str) -> None:
    """Each of many runs would say the same about its shards."""


@contextmanager
def _timed(work: Path, step: str) -> Iterator[None]:
    """Add the seconds of the block to those of `step` in work/seconds.json, also if it is interrupted."""
    work.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    try:
        yield
    finally:
        seconds = _seconds(work)
        write_json(work / "seconds.json", seconds | {step: seconds.get(step, 0.0) + time.monotonic() - began})


def _seconds(work: Path) -> dict[str, float]:
    path = work / "seconds.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _record(task: Task, checkpoint: Path, device: torch.device) -> dict[str, Any]:
    header, seconds = read_header(checkpoint), _seconds(task.work)
    with safe_open(checkpoint, framework="pt") as file:
        parameters = sum(prod(file.get_slice(name).get_shape()) for name in file.keys())
    threads = torch.get_num_threads()
    of_cpu = f"cpu, {threads} thread{'s' * (threads > 1)}"
    samples = header.train.epochs * training.ExpressionDataset(task.run.shards(task.paths) / "train").expressions
    return {
        "id": task.id,
        "run": task.run.name,
        "seed": task.run.seed,
        "changes": task.run.changes,
        "seconds": {step: round(value, 2) for step, value in seconds.items()},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else of_cpu,
        "devices": 1,
        "parameters": parameters,
        "epochs": header.train.epochs,
        "best_epoch": header.epoch,
        "expressions_per_s": round(samples / seconds["train"], 2),  # validation included
    }
