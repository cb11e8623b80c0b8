"""Where a profile keeps what it makes: everything lies below data/<profile>/, so that no profile touches another."""

import os
from dataclasses import dataclass
from pathlib import Path

from samlove.config import active_profile
from samlove.errors import RequestError

DATA = Path("data")


@dataclass(frozen=True)
class Layout:
    """The paths below `root`, the folder of one profile."""

    root: Path

    @property
    def index(self) -> Path:
        return self.root / "index"

    @property
    def videos(self) -> Path:
        return self.index / "videos.parquet"

    @property
    def expressions(self) -> Path:
        return self.index / "expressions.parquet"

    @property
    def mask_digest(self) -> Path:
        """One line that stands for all ground-truth masks; see samlove.data.digest."""
        return self.index / "gt_mask.sha256"

    @property
    def features(self) -> Path:
        return self.root / "features"

    @property
    def shards(self) -> Path:
        return self.root / "shards"

    @property
    def checkpoint(self) -> Path:
        """The best epoch of the last training."""
        return self.root / "model" / "best.safetensors"

    @property
    def live(self) -> Path:
        """DVCLive's folder: learning curves."""
        return self.root / "dvclive"

    @property
    def predictions(self) -> Path:
        return self.root / "predictions"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.json"

    @property
    def evaluation(self) -> Path:
        return self.root / "evaluation"

    @property
    def details(self) -> Path:
        return self.evaluation / "details.json"

    @property
    def report(self) -> Path:
        return self.root / "report" / "index.html"

    @property
    def ablations(self) -> Path:
        return self.root / "ablations"

    @property
    def ablation_features(self) -> Path:
        """Feature stores of encoders that only some runs use."""
        return self.ablations / "features"

    @property
    def ablation_shards(self) -> Path:
        """Training shards made from such stores."""
        return self.ablations / "shards"

    @property
    def ablation_runs(self) -> Path:
        """{run}/seed{seed}: a folder per run and seed of configs/<profile>/ablations.yaml."""
        return self.ablations / "runs"

    @property
    def ablation_metrics(self) -> Path:
        """{run}.json: mean scores, in the form in which `dvc metrics show` shows a row per run."""
        return self.ablations / "metrics"

    @property
    def ablation_tables(self) -> Path:
        """tables.md, a CSV file per table, the page and the learning curves."""
        return self.ablations / "tables"

    @property
    def scratch(self) -> Path:
        """Unfinished work; a folder for each stage. Deleting it is safe and costs only time."""
        return self.root / ".scratch"

    @property
    def hashes(self) -> Path:
        """The cache of file hashes (samlove.data.hashes), which the stages share."""
        return self.scratch / "hashes.sqlite"

    def check_folders(self) -> None:
        """Raise RequestError if a folder of the outputs is a link, or on another disk than the profile's folder.

        DVC refuses an output behind a link, but only after its stage has run. A rename does not reach another disk.
        """
        remedy = f"clone this repository onto that disk and run there, or mount the disk at {self.root.parent}"
        outputs = [self.root.parent, self.root, self.index, self.shards, self.checkpoint.parent, self.live]
        outputs += [self.evaluation, self.report.parent, self.ablations, self.ablation_features, self.ablation_shards]
        outputs += [self.ablation_runs, self.ablation_tables]
        for folder in (self.features, self.predictions):
            outputs += [folder, *(sorted(folder.iterdir()) if folder.is_dir() else ())]
        for folder in outputs:
            if folder.is_symlink():
                raise RequestError(f"{folder}: link to {os.readlink(folder)}, which DVC refuses for outputs; {remedy}")
        for folder in (*outputs, self.scratch):
            if self.root in folder.parents and folder.exists() and folder.stat().st_dev != self.root.stat().st_dev:
                raise RequestError(f"{folder}: expected it on the same disk as {self.root}, found another; {remedy}")

    def other_stores(self, name: str) -> list[Path]:
        """The feature stores called `name` of all other profiles; a stage reuses their rows."""
        return [store for store in sorted(self.root.parent.glob(f"*/features/{name}")) if store.parents[1] != self.root]


def layout(configs: Path = Path("configs")) -> Layout:
    """The active profile's paths, relative to the root of the repository."""
    return Layout(DATA / active_profile(configs))
