"""Stage `ablation_runs`: train, predict and score every run of configs/<profile>/ablations.yaml that has no result yet
-> data/<profile>/ablations/runs."""

from pathlib import Path

from pipelines import stage
from samlove.ablations.driver import execute_missing
from samlove.ablations.run import make_tasks
from samlove.ablations.runs import plan_runs
from samlove.config import AblationsConfig, DatasetConfig, EvaluateConfig, active_profile, load
from samlove.data.layout import layout
from samlove.environment import check_repository
from samlove.features.cluster import chosen_cluster


@stage
def main() -> None:
    if Path(".dvc").is_dir():
        check_repository()  # DVCLive reads the commit
    paths = layout()
    runs = plan_runs(load(AblationsConfig), active_profile())
    execute_missing(make_tasks(runs, paths, load(DatasetConfig), load(EvaluateConfig)), paths, chosen_cluster())


if __name__ == "__main__":
    main()
