"""Stage `ablation_features`: features and shards of encoders that only some runs of the ablations use
-> data/<profile>/ablations/features and data/<profile>/ablations/shards."""

import shutil
from collections.abc import Callable

from pipelines import audio, pack, sam2, stage, text, visual
from samlove.ablations.runs import ENCODERS, STORES, Run, plan_runs
from samlove.config import AblationsConfig, active_profile, load
from samlove.data.layout import Layout, layout
from samlove.features.cluster import chosen_cluster
from samlove.features.extract import Job, extract


@stage
def main() -> None:
    paths = layout()
    runs = [run for run in plan_runs(load(AblationsConfig), active_profile()) if any(map(run.own, ENCODERS))]
    wanted = {run.store(name, paths) for run in runs for name in STORES} | {run.shards(paths) for run in runs}
    for folder in (paths.ablation_features, paths.ablation_shards):
        folder.mkdir(parents=True, exist_ok=True)
        for unused in set(folder.iterdir()) - wanted:
            shutil.rmtree(unused)
    done: set = set()
    for run in runs:
        for name in STORES:
            out = run.store(name, paths)
            if run.owns(name) and out not in done:
                print(f"{out.name}: {extract(_job(run, name, paths), chosen_cluster())}")
                done.add(out)
        if run.shards(paths) not in done:
            stores = {name: run.store(name, paths) for name in STORES}
            pack.write(stores, {section: run.sections[section] for section in ENCODERS}, run.shards(paths), reuse=True)
            done.add(run.shards(paths))


def _job(run: Run, name: str, paths: Layout) -> Job:
    section, out = run.sections[STORES[name]], run.store(name, paths)
    if name.startswith("sam2"):
        return sam2.job(name.removeprefix("sam2_"), section, out)
    jobs: dict[str, Callable[..., Job]] = {"audio": audio.job, "visual": visual.job, "text": text.job}
    return jobs[name](section, out)


if __name__ == "__main__":
    main()
