"""`make demo`: prints what will run and about how long it takes, runs it, prints the result and what to try next."""

import subprocess
import sys
import time
from collections import Counter
from typing import NamedTuple

from samlove.cli.results import render_results
from samlove.config import active_profile
from samlove.data.layout import layout
from samlove.environment import check_git, check_repository, check_user
from samlove.errors import RequestError, SamloveError, one_line_errors

PROFILE = "micro"
DVC = [sys.executable, "-m", "dvc", "repro"]  # the script `dvc` of a copied environment runs the original's Python


class Part(NamedTuple):
    """Stages shown as one line of the plan."""

    title: str
    meaning: str
    seconds: dict[str, float]  # per stage, without the profile in its name: time on the reference machine


# Times of `make demo` on the reference machine, 2 cores of an AMD EPYC (Zen 4), from the rates in docs/benchmarks.md.
PARTS = (
    Part("dataset", "generate LAVS-synth, audit and index it", {"dataset": 40, "index": 38}),
    Part(
        "features",
        "run the frozen encoders once: audio, visual, text, SAM 2",
        {"audio": 34, "visual": 40, "text": 10, "sam2": 66},
    ),
    Part("packing", "write training shards", {"pack": 20}),
    Part("training", "fusion transformer, SAM 2's prompt encoder and mask decoder", {"train": 170}),
    Part("inference", "masks of all frames, also with swapped audio and text", {"infer": 200}),
    Part("report", "scores and one HTML page", {"evaluate": 38, "report": 6}),
)
REFERENCE_S = 0.0012  # the fastest round of `machine_speed` on the reference machine, idle; the best of five tests

NEXT = """Worth trying next (first: . .venv/bin/activate):

  samlove picture data/micro/picture.png
      draw a test video with its predicted mask, ground truth and loudness
  dvc exp run -S configs/micro/fusion.yaml:accumulate_cls=false
      an ablation: without [cls] accumulation; runs training and the stages after it (undo: git restore -SW configs)
  echo "profile: refavs" > configs/profile.yaml; samlove doctor
      what is missing for a run of the paper's configuration on your Ref-AVS folder"""


@one_line_errors
def main() -> None:
    if active_profile() != PROFILE:
        raise RequestError(
            f"configs/profile.yaml selects {active_profile()!r}, but make demo runs {PROFILE!r}; "
            f"write 'profile: {PROFILE}' there, or run: dvc repro"
        )
    for check in (check_user, check_git, check_repository, layout().check_folders):
        check()
    pending = stages_to_run()
    if pending:
        print(render_plan(pending, machine_speed()), flush=True)
        if subprocess.run(DVC).returncode:
            raise SamloveError("the pipeline failed, see above; fix the cause and repeat: make demo")
    else:
        print("everything is up to date: no stage needs to run")
    print(f"\n{render_results()}\n\n{NEXT}")


def stages_to_run() -> dict[str, float]:
    """{stage of dvc.yaml, without profile: share of its items that `dvc repro` would run}, without those at 0.

    A stage is listed if its code, settings or inputs changed, if outputs are missing, or if a stage before it is
    listed. DVC may still restore its outputs from the cache instead.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo() as repo:
            graph, changed = repo.index.graph, repo.status()
    except DvcException as error:
        raise SamloveError(f"dvc status: {' '.join(str(error).split())}") from error
    running: set[str] = set()
    graph = graph.subgraph(stage for stage in graph if ":" not in stage.addressing)  # without those of other dvc.yaml
    ahead = [stage for stage in graph if stage.addressing in changed]
    while ahead:
        stage = ahead.pop()
        if stage.addressing not in running:
            running.add(stage.addressing)
            ahead += graph.predecessors(stage)  # the stages that depend on it
    every = [stage.addressing for stage in graph]
    total, runs = (Counter(name.split("@")[0] for name in names) for names in (every, running))
    return {name: runs[name] / total[name] for name in runs}


def render_plan(pending: dict[str, float], speed: float) -> str:
    """One line for each part that will run. speed: of this machine, 1 for the reference machine."""
    times = [sum(pending.get(stage, 0) * s for stage, s in part.seconds.items()) / speed for part in PARTS]
    extent = "the whole pipeline" if all(times) else "the parts of the pipeline that are not up to date"
    lines = [f"This runs {extent}, on the generated dataset LAVS-synth (profile {PROFILE}):", ""]
    for part, seconds in zip(PARTS, times, strict=True):
        if seconds:
            lines.append(f"  {part.title:<11}{_duration(seconds):>7}  {part.meaning}")
    lines += [
        f"  {'total':<11}{_duration(sum(times)):>7}",
        "",
        "Times are estimates: measured on 2 cores of a server, scaled by a one-second speed test of this CPU",
        f"(speed {speed:.1f}). If you interrupt the run, make demo resumes it.",
        "",
    ]
    return "\n".join(lines)


def machine_speed() -> float:
    """Speed of this CPU relative to the reference machine, measured in a second.

    Convolutions and products in the micro profile's sizes: many cores help them as little as they help its training.
    The fastest round counts, with all threads or with one, because other load on the machine delays single rounds.
    """
    import torch

    images, kernels = torch.ones(8, 32, 32, 32), torch.ones(32, 32, 3, 3)
    tokens, weights = torch.ones(8 * 120, 128), torch.ones(128, 256)
    times = []
    for threads in (torch.get_num_threads(), 1):
        torch.set_num_threads(threads)
        end = time.perf_counter() + 0.5
        while time.perf_counter() < end:
            began = time.perf_counter()
            torch.nn.functional.conv2d(images, kernels, padding=1)
            torch.nn.functional.gelu(tokens @ weights)
            times.append(time.perf_counter() - began)
    return REFERENCE_S / min(times)


def _duration(seconds: float) -> str:
    return f"{max(5, 5 * round(seconds / 5))} s" if seconds < 90 else f"{seconds / 60:.0f} min"


if __name__ == "__main__":
    main()
