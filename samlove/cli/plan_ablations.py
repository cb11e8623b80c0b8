"""`samlove plan --ablations`: time, device hours and disk of all runs of configs/<profile>/ablations.yaml."""

import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from samlove.ablations.run import TESTS
from samlove.ablations.runs import ENCODERS, STORES, Run, plan_runs
from samlove.bench.profile import device_name
from samlove.cli.plan import gib, measured
from samlove.config import AblationsConfig, active_profile, load
from samlove.data.layout import layout
from samlove.device import default_device
from samlove.features.cluster import chosen_cluster, count_asked
from samlove.features.sizes import (
    Counts,
    Settings,
    array_shapes,
    audio_width,
    bytes_there,
    count,
    free_bytes,
    planned,
    read_settings,
    text_width,
    visual_shape,
)
from samlove.infer import Inputs, predict
from samlove.model.fusion import Fusion
from samlove.model.loss import mask_loss
from samlove.model.optimizer import build_optimizer
from samlove.model.sam2 import LEVELS, LightSam2
from samlove.model.sam2_love import SamLove
from samlove.scoring.metrics import scores_from_bins

SECONDS = 1.0  # a measurement goes on for so long after its first, unmeasured round
SLOW_S = 5.0  # a first round that takes so long is itself the measurement
EXPRESSIONS = 5  # of a video, as in Ref-AVS


class Speed(NamedTuple):
    """What was measured of one run."""

    sample_s: float  # to train on one sample
    expression_s: float  # to predict one expression
    row_s: float  # to score one expression
    parameters: int  # trained


class Estimate(NamedTuple):
    """Of one run, for each seed."""

    train_s: float
    infer_s: float
    evaluate_s: float
    checkpoint: int  # bytes

    @property
    def seconds(self) -> float:
        return self.train_s + self.infer_s + self.evaluate_s


def run() -> bool:
    """Print the plan of the active profile's ablations. Returns whether the disk has enough free space for it."""
    settings, paths, config = read_settings(), layout(), load(AblationsConfig)
    counts, source = count(settings, paths)
    runs = [run for run in plan_runs(config, active_profile()) if run.seed == config.seeds[0]]
    device, seeds = default_device(), len(config.seeds)
    workers = count_asked(chosen_cluster(), cores=1)
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(max(1, threads // workers))  # as each worker
    try:
        measured_runs = [_measure(run, settings, device) for run in tqdm(runs, desc="measure", unit="run")]
    finally:
        torch.set_num_threads(threads)
    estimates = [estimate(run, speed, counts) for run, speed in zip(runs, measured_runs, strict=True)]
    features = _features(runs, settings, counts)
    print(f"profile {active_profile()}, {seeds} seed(s); counted from: {source}; measured on: {device_name(device)}\n")
    print(render(runs, estimates, seeds, features))
    total = seeds * sum(each.seconds for each in estimates)
    longest = max(each.seconds for each in estimates)
    extraction = sum(spent for spent, _ in features.values() if spent is not None)
    wall = max(total / workers, longest) + extraction
    print(f"\n{total / 3600:.2f} device hours; with {workers} worker(s) about {timedelta(seconds=round(wall))}")
    needed = seeds * sum(each.checkpoint for each in estimates) + sum(size for _, size in features.values())
    rows, frames, mask = sum(counts[split].rows for split in TESTS), settings.dataset.frames, settings.dataset.mask_size
    passing = workers * rows * frames * mask**2  # predictions, until they are scored
    there = bytes_there(paths, ("ablations",))
    missing = needed + passing - there - free_bytes(paths)
    print(
        f"disk: {gib(needed)} GiB for checkpoints, features and shards, at most {gib(passing)} GiB for predictions "
        f"that are deleted once scored; {gib(there)} GiB present, {gib(free_bytes(paths))} GiB free"
    )
    if missing > 0:
        print(f"MISSING {gib(missing)} GiB: free some")
    return missing <= 0


def render(
    runs: list[Run], estimates: list[Estimate], seeds: int, features: dict[str, tuple[float | None, int]]
) -> str:
    """The table of runs, then of the feature stores and shards that only some of them need."""
    lines = [f"{'run':24}{'training':>10}{'inference':>11}{'scoring':>9}{'GiB':>9}  differs in"]
    for each, cost in zip(runs, estimates, strict=True):
        times = [timedelta(seconds=round(value)) for value in (cost.train_s, cost.infer_s, cost.evaluate_s)]
        size = gib(seeds * cost.checkpoint)
        changes = ", ".join(f"{name}={after}" for name, (_, after) in each.changes.items())
        lines.append(f"{each.name:24}{times[0]!s:>10}{times[1]!s:>11}{times[2]!s:>9}{size:>9}  {changes}".rstrip())
    for name, (seconds, of_store) in features.items():
        spent = "unknown" if seconds is None else str(timedelta(seconds=round(seconds)))
        lines.append(f"{name:24}{spent:>10}{'':20}{gib(of_store):>9}")
    return "\n".join(lines)


def _features(runs: list[Run], settings: Settings, counts: Counts) -> dict[str, tuple[float | None, int]]:
    """Seconds (None: unknown) and bytes of the stores and shards that only some runs need, by folder name."""
    found: dict[str, tuple[float | None, int]] = {}
    paths = layout()
    for each in runs:
        own = [section for section in ENCODERS if each.own(section)]
        if not own:
            continue
        varied = settings._replace(**{section: each.sections[section] for section in ENCODERS})
        made = planned(varied, counts)
        sizes = {entry.path.removeprefix("features/"): sum(entry.bytes.values()) for entry in made}
        stores = {name: each.store(name, paths).name for name in STORES if each.owns(name)}
        if not stores.keys() <= found.keys():
            times = measured(varied, made, own)
            for name, folder in stores.items():
                spent = times[name]
                found[folder] = (spent if isinstance(spent, float) else None, sizes[name])
        found[f"shards {each.shards(paths).name}"] = (0.0, sizes["shards/train"] + sizes["shards/val"])
    return found


def estimate(run: Run, speed: Speed, counts: Counts) -> Estimate:
    """The times of a run with one seed."""
    rows = sum(counts[split].rows for split in TESTS) * (1 + len(run.sections["infer"].controls))
    frames = run.sections["sam2"].train_frames if run.sections["train"].supervise == "any" else 1
    samples = counts["train"].rows + frames * counts["val"].rows / 3  # validation computes no gradient
    return Estimate(
        train_s=run.sections["train"].epochs * samples * speed.sample_s,
        infer_s=rows * speed.expression_s,
        evaluate_s=rows * speed.row_s,
        checkpoint=4 * speed.parameters,
    )


def _measure(run: Run, settings: Settings, device: torch.device) -> Speed:
    """Time the steps of a run with random weights and inputs: their speed does not depend on the values."""
    model, inputs = _model(run, settings, device), _inputs(run, settings, device)
    config = run.sections["train"]
    model.sam2.set_trainable(config.train_prompt_encoder, config.train_mask_decoder)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = build_optimizer(parameters, config)

    def step(batch: dict[str, Any]) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            answer = model(batch)
        mask_loss(answer, batch["mask"], config.loss).total.mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    batches = [{name: value[:size] for name, value in inputs.items()} for size in (1, config.batch_size)]
    per_sample = _seconds([partial(step, batch) for batch in batches], device, [1, config.batch_size])
    model.eval()
    shared = {name: inputs[name][:1].expand(EXPRESSIONS, *inputs[name].shape[1:]) for name in inputs}
    frames, size = settings.dataset.frames, settings.dataset.mask_size
    embeds = {name: inputs[name][:1].expand(frames, -1, -1, -1) for name in LEVELS}

    def track(objects: int) -> None:
        given = Inputs([], {name: value[:objects] for name, value in shared.items()}, None, [])
        predict(model, embeds, given, size, run.sections["infer"])

    per_expression = _seconds([partial(track, n) for n in (1, EXPRESSIONS)], device, [1, EXPRESSIONS])
    bins = torch.randint(0, 256, (frames, size, size), dtype=torch.uint8).numpy()
    per_row = _seconds([partial(scores_from_bins, bins, bins > 127)], torch.device("cpu"), [1])
    return Speed(per_sample, per_expression, per_row, sum(parameter.numel() for parameter in parameters.values()))


def _model(run: Run, settings: Settings, device: torch.device) -> SamLove:
    sam2, fusion = run.sections["sam2"], run.sections["fusion"]
    light = LightSam2.build(sam2.config, sam2.cache_point)
    light.best_of_three = fusion.masks == "best_of_three"
    dims = {
        "audio": audio_width(run.sections["audio"]),
        "visual": visual_shape(run.sections["visual"])[1],
        "text": text_width(run.sections["text"]),
        "frames": settings.dataset.frames,
    }
    return SamLove(Fusion(fusion, dims, light.prompt_dim), light).to(device)


def _inputs(run: Run, settings: Settings, device: torch.device) -> dict[str, torch.Tensor]:
    """A batch of random numbers, float32, as the trainer's."""
    text, frames = run.sections["text"], settings.dataset.frames
    batch = max(EXPRESSIONS, run.sections["train"].batch_size)
    shapes = array_shapes(frames, run.sections["audio"], run.sections["visual"], text, run.sections["sam2"])
    inputs = {name: torch.randn(batch, *shape, device=device) for name, shape in shapes.items()}
    inputs["audio_valid"] = torch.ones(batch, frames, dtype=torch.bool, device=device)
    inputs["text_mask"] = torch.ones(batch, text.max_tokens, dtype=torch.bool, device=device)
    inputs["mask"] = torch.zeros(batch, settings.dataset.mask_size, settings.dataset.mask_size, device=device)
    return inputs


def _seconds(works: Iterable[Callable[[], object]], device: torch.device, items: list[int]) -> float:
    """Seconds per item of the last of `works`, or of an earlier one if it is too slow for more. items: of each."""
    each = 0.0
    for work, count_ in zip(works, items, strict=True):
        first = _timed(work, device)
        each = first / count_
        if first > SLOW_S:
            return each
    done, spent = 0, 0.0
    while spent < SECONDS:
        spent, done = spent + _timed(work, device), done + 1
    return spent / done / count_


def _timed(work: Callable[[], object], device: torch.device) -> float:
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
