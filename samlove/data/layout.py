"""Where a profile keeps what it makes: everything lies below data/<profile>/, so that no profile touches another."""

from dataclasses import dataclass
from pathlib import Path

from samlove.config import active_profile

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
    def scratch(self) -> Path:
        """Unfinished work; a folder for each stage. Deleting it is safe and costs only time."""
        return self.root / ".scratch"

    def other_stores(self, name: str) -> list[Path]:
        """The feature stores called `name` of all other profiles; a stage reuses their rows."""
        return [store for store in sorted(self.root.parent.glob(f"*/features/{name}")) if store.parents[1] != self.root]


def layout(configs: Path = Path("configs")) -> Layout:
    """The active profile's paths, relative to the root of the repository."""
    return Layout(DATA / active_profile(configs))
