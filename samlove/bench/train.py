"""How fast training steps are, what the loader costs, how a GPU executes them best, and what online features cost.

First, steps that read their batches are compared with steps that reuse one batch. Then, on a GPU, the ways of
samlove.bench.steps are compared on one batch. Last, the same steps run online (samlove.bench.online): frames and audio
are decoded and encoded for every step. The shards hold random numbers in a profile's shapes, and its architectures have
random weights: speed does not depend on the values, and nothing is downloaded. The steps are the trainer's own, with
`accumulate` batches each.
"""

import json
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from safetensors.torch import save_file

from samlove.bench.media import SIZES, sam2_encoder, vggish_encoder, vit_encoder, write_clips
from samlove.bench.online import EXPRESSIONS, PARTS, Encoders, OnlineItems, OnlineTrainer, online_samples
from samlove.bench.profile import check_profile, device_name, section
from samlove.bench.steps import WAYS, WayTrainer, matmul_rate, static, step_operations
from samlove.bench.timing import in_turns
from samlove.config import (
    AudioConfig,
    DatasetConfig,
    FusionConfig,
    Resident,
    Sam2Config,
    TextConfig,
    TrainConfig,
    VisualConfig,
)
from samlove.data.batches import AHEAD
from samlove.data.dataset import RefAvsFolder
from samlove.data.loader import FEATURES, ExpressionDataset, PoolSampler, collate, make_resident
from samlove.device import default_device
from samlove.features.sizes import array_shapes
from samlove.model.checkpoint import Origin
from samlove.model.sam2 import LEVELS
from samlove.model.sam2_build import instantiate_sam2
from samlove.train import Batch, Samples, Trainer
from stores import ShardWriter
from stores.fingerprint import sha256_file

WARM_UP = 3  # steps before the clock starts: they start workers, allocate memory and select kernels
ONLINE_WARM_UP = 1  # encoders have run before
PART = 4  # the ways and the online steps are timed for a PART-th of the steps
CLIPS = 8  # videos whose media are decoded online; all others have the same
PATIENCE_S = 300  # online steps are left out if they would take longer on a CPU
# What an ablation changes. The encoders are frozen in both, so what online steps can share between the expressions of a
# video is the same: decoded media, ViT's and VGGish's output, SAM 2's embedding of frame 0.
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "fusion changed": {"fusion": {"accumulate_cls": False}},  # as in Tables 3 to 5
    "decoder changed": {"train": {"train_prompt_encoder": False, "train_mask_decoder": False}},  # as in Table 6
}
T = TypeVar("T", bound=Trainer)


class Pass(NamedTuple):
    """Some timed steps."""

    seconds: float
    waiting: float  # seconds of them in which the step waited for its batches


def run(profile: str, videos: int = 32, steps: int = 20, rounds: int = 3) -> dict[str, Any]:
    """Time `steps` steps with every possible residency, with one batch reused, in all ways, and online.

    Prints and returns the result. Raises RequestError if there is no such profile.
    expressions_per_s: of the median round. over_reused: the time of a step divided by that of a step with one batch
    reused on the device; the excess over 1 is the loader's cost. waiting: the part of the time that steps wait for
    their batches. floor: the matrix products of a batch, how fast the device multiplies, and the part of the time of a
    step with one batch reused that the products alone would take. ways, online: see `_ways` and `_online`; null if they
    were not measured.
    """
    check_profile(profile)
    device = default_device()
    with TemporaryDirectory(prefix="samlove-bench-") as top:
        root = Path(top)
        _write_shards(root / "shards", profile, videos)
        config = section(profile, TrainConfig)
        result: dict[str, Any] = {
            "bench": "train",
            "profile": profile,
            "device": device_name(device),
            "precision": config.precision,
            "samples_a_step": config.batch_size * config.accumulate,
            "steps": steps,
            "rounds": rounds,
        }
        result |= _reading(profile, root, device, steps, rounds)
        some = max(1, steps // PART)
        result["ways"] = _ways(profile, root, device, some, rounds, result["floor"])
        result["online"] = _online(profile, root, device, some, rounds, result["floor"]["tflop_a_batch"])
    print(json.dumps(result))
    return result


def _reading(profile: str, root: Path, device: torch.device, steps: int, rounds: int) -> dict[str, Any]:
    places: tuple[Resident, ...] = ("off", "ram", "gpu") if device.type == "cuda" else ("off", "ram")
    passes: dict[str, Callable[[], Pass]] = {}
    workers = 0
    for place in places:
        dataset = ExpressionDataset(root / "shards")
        make_resident([dataset], place, device)
        trainer = _trainer(Trainer, profile, _samples(dataset, profile, place == "gpu"), dataset, device, root)
        workers = max(workers, trainer.workers)  # 0 if the shards are on the GPU
        if not passes:
            batch = _on_device(trainer)
            floor = _floor(trainer, batch)
            passes["reused"] = partial(_repeat, trainer, batch, steps)
        passes[place] = partial(_read, trainer, steps)
    found = in_turns(passes, rounds)
    spent = {name: median(one.seconds for one in times) for name, times in found.items()}
    waiting = {name: median(one.waiting / one.seconds for one in times) for name, times in found.items()}
    size = trainer.config.batch_size * trainer.config.accumulate
    for name, seconds in spent.items():
        print(
            f"{name:16}{1e3 * seconds / steps:10.1f} ms per step{steps * size / seconds:10.1f} expressions/s, "
            f"{waiting[name]:.0%} of it waiting for data",
            flush=True,
        )
    least = trainer.config.accumulate * floor["tflop_a_batch"] / floor["tflop_per_s"]
    floor["share"] = round(least * steps / spent["reused"], 3)
    print(
        f"floor: {floor['tflop_a_batch']:.4g} TFLOP per batch of {trainer.config.batch_size}, matrix products at "
        f"{floor['tflop_per_s']:.4g} TFLOP/s (large) and {floor['tflop_per_s_step']:.4g} (of the MLPs' shape): "
        f"{floor['share']:.1%} of the time of a step with one batch reused",
        flush=True,
    )
    return {
        "workers": workers,
        "expressions_per_s": {name: round(steps * size / seconds, 2) for name, seconds in spent.items()},
        "over_reused": {
            name: round(seconds / spent["reused"], 3) for name, seconds in spent.items() if name != "reused"
        },
        "waiting": {name: round(value, 3) for name, value in waiting.items() if name != "reused"},
        "floor": floor,
    }


def _floor(trainer: Trainer, batch: Batch) -> dict[str, float]:
    """tflop_a_batch; tflop_per_s of large products, and of those of the fusion's MLPs, in the step's precision."""
    dtype = torch.bfloat16 if trainer.config.precision == "bfloat16" else torch.float32
    fusion = trainer.origin.fusion
    tokens = trainer.config.batch_size * (batch["visual"].shape[2] + batch["text"].shape[1] + batch["audio"].shape[1])
    shape = (tokens, fusion.dim, fusion.mlp_ratio * fusion.dim)
    return {
        "tflop_a_batch": float(f"{step_operations(trainer, trainer._on_device(batch)) / 1e12:.4g}"),
        "tflop_per_s": float(f"{matmul_rate(trainer.device, dtype) / 1e12:.4g}"),
        "tflop_per_s_step": float(f"{matmul_rate(trainer.device, dtype, shape) / 1e12:.4g}"),
    }


def _ways(
    profile: str, root: Path, device: torch.device, steps: int, rounds: int, floor: dict[str, float]
) -> dict[str, Any] | None:
    """Each way of samlove.bench.steps in turns with the plain one ("eager"), on one batch in the GPU's memory.

    expressions_per_s; over_eager: the time of a step divided by that of the plain step; share: of the floor;
    peak_gb: memory of weights, optimiser, activations and graphs; prepare_s: seconds to compile and record. A way that
    fails has only `error`.
    """
    if device.type != "cuda":
        print("not measured without a GPU: compiled and recorded steps, recomputed activations, memory", flush=True)
        return None
    dataset = ExpressionDataset(root / "shards")
    samples = _samples(dataset, profile)
    found: dict[str, Any] = {}
    for way in WAYS:
        try:
            found[way] = _way(profile, root, device, steps, rounds, way, samples, dataset)
        except Exception as error:  # one way that fails must not cost the others' measurements
            found[way] = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
            print(f"{way}: not measured: {found[way]['error']}", flush=True)
            continue
        step_s = found[way].pop("step_s")
        config = section(profile, TrainConfig)
        found[way]["expressions_per_s"] = round(config.batch_size * config.accumulate / step_s, 2)
        found[way]["share"] = round(config.accumulate * floor["tflop_a_batch"] / floor["tflop_per_s"] / step_s, 3)
        print(f"{way:16}{1e3 * step_s:10.1f} ms per step: " + json.dumps(found[way]), flush=True)
    return found


def _way(
    profile: str,
    root: Path,
    device: torch.device,
    steps: int,
    rounds: int,
    way: str,
    samples: Samples,
    dataset: ExpressionDataset,
) -> dict[str, float]:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before, start = torch.cuda.memory_allocated(device), time.perf_counter()
    trainer = _trainer(WayTrainer, profile, samples, dataset, device, root)
    batch = static(_on_device(trainer))
    trainer.use(way, trainer._on_device(batch))
    _repeat(trainer, batch, 1)
    prepared, peak = time.perf_counter() - start, torch.cuda.max_memory_allocated(device) - before
    plain = trainer if way == "eager" else _trainer(WayTrainer, profile, samples, dataset, device, root)
    found = in_turns({one: partial(_repeat, one, batch, steps) for one in dict.fromkeys((plain, trainer))}, rounds)
    seconds = {one: median(times.seconds for times in passes) for one, passes in found.items()}
    return {
        "step_s": seconds[trainer] / steps,
        "over_eager": round(seconds[trainer] / seconds[plain], 3),
        "peak_gb": round(peak / 1e9, 2),
        "prepare_s": round(prepared, 1),
    }


def _online(
    profile: str, root: Path, device: torch.device, steps: int, rounds: int, tflop_a_batch: float
) -> dict[str, Any]:
    """What a video's media cost online, and steps with them: see `_cases`, which is null if it was not measured.

    ms_a_video: time of each part for one video by itself. tflop_a_video: operations of each encoder.
    ratio_of_operations: those of an online step divided by those of a cached one.
    """
    folder, config = RefAvsFolder(root / "clips"), section(profile, TrainConfig)
    names = write_clips(folder, CLIPS, SIZES[profile], audio=True)
    encoders = Encoders(vggish_encoder(profile, root), vit_encoder(profile, root), sam2_encoder(profile, root))
    parts = _parts_s(encoders, folder, names, config.precision)
    decoded = {array: value[None] for array, value in encoders.decode(folder, names[0]).items()}
    tflop = {name: count / 1e12 for name, count in encoders.operations(decoded).items()}
    found: dict[str, Any] = {
        "ms_a_video": {name: round(1e3 * seconds, 1) for name, seconds in parts.items()},
        "tflop_a_video": {name: float(f"{value:.3g}") for name, value in tflop.items()},
        "ratio_of_operations": round(1 + sum(tflop.values()) * config.batch_size / tflop_a_batch, 2),
        "cases": None,
    }
    print("online, for one video: " + ", ".join(f"{part} {ms} ms" for part, ms in found["ms_a_video"].items()))
    print(
        f"online / cached by operations alone: {found['ratio_of_operations']}; {found['tflop_a_video']} TFLOP a video"
    )
    samples = len(CASES) * rounds * (ONLINE_WARM_UP + steps) * config.batch_size * config.accumulate
    needed = samples * (1 + 1 / EXPRESSIONS) * sum(parts.values())
    if device.type == "cpu" and needed > PATIENCE_S:
        print(
            f"not measured: online steps, which would take about {needed / 60:.0f} minutes here: "
            f"{sum(parts.values()):.1f} s for each expression; use a GPU, or fewer --steps and --rounds"
        )
        return found

    def make_items(dataset: ExpressionDataset, shared: bool) -> OnlineItems:
        return OnlineItems(dataset, folder, names[: len(dataset.reader)], encoders, shared)

    return found | {"cases": _cases(profile, root, device, steps, rounds, make_items)}


def _cases(
    profile: str,
    root: Path,
    device: torch.device,
    steps: int,
    rounds: int,
    make_items: Callable[[ExpressionDataset, bool], OnlineItems],
) -> dict[str, Any]:
    """For each of CASES: expressions_per_s cached (from the shards), online, and online_shared; ratio: cached / online.

    online: every expression decodes and encodes its video. online_shared: the five expressions of a video follow each
    other and share that work.
    """
    dataset, config = ExpressionDataset(root / "shards"), section(profile, TrainConfig)
    cases: dict[str, Any] = {}
    for case, changes in CASES.items():
        trainer = _trainer(Trainer, profile, _samples(dataset, profile), dataset, device, root, changes)
        passes = {"cached": partial(_read, trainer, steps, ONLINE_WARM_UP)}
        for name in ("online", "online_shared"):
            items = make_items(dataset, name == "online_shared")
            online = _trainer(OnlineTrainer, profile, online_samples(items), dataset, device, root, changes)
            online.encoders = items.encoders
            passes[name] = partial(_read, online, steps, ONLINE_WARM_UP)
        spent = in_turns(passes, rounds)
        seconds = {name: median(one.seconds for one in times) for name, times in spent.items()}
        samples = steps * config.batch_size * config.accumulate
        cases[case] = {
            "expressions_per_s": {name: round(samples / each, 2) for name, each in seconds.items()},
            "ratio": {name: round(each / seconds["cached"], 2) for name, each in seconds.items() if name != "cached"},
        }
        shown = ", ".join(f"{name} {rate}" for name, rate in cases[case]["expressions_per_s"].items())
        print(f"{case}: {shown} expressions/s; cached / online {cases[case]['ratio']}", flush=True)
    return cases


def _parts_s(encoders: Encoders, folder: RefAvsFolder, names: list[str], precision: str) -> dict[str, float]:
    """Seconds in which one thread decodes a video, and the device runs each encoder: the median of a few."""
    found: dict[str, list[float]] = {}
    for name in (names[0], *names[:3]):
        start = time.perf_counter()
        decoded = {array: value[None] for array, value in encoders.decode(folder, name).items()}
        found.setdefault("decode", []).append(time.perf_counter() - start)
        for part in PARTS:
            start = time.perf_counter()
            for array in encoders.part(part, decoded, precision).values():
                array.flatten()[0].item()  # waits for the device
            found.setdefault(part, []).append(time.perf_counter() - start)
    return {part: median(seconds[1:]) for part, seconds in found.items()}  # the first loads the network


# --- steps -----------------------------------------------------------------------------------------------------------


def _read(trainer: Trainer, steps: int, warm_up: int = WARM_UP) -> Pass:
    """`steps` steps on batches from the loader, which goes on reading ahead until the last of them ends."""
    accumulate, size = trainer.config.accumulate, trainer.config.batch_size
    wanted = ((warm_up + steps) * accumulate + AHEAD * trainer.workers) * size
    epochs = -(-wanted // trainer.samples_per_epoch)
    order = np.concatenate([trainer.samples.order(epoch) for epoch in range(epochs)])[:wanted]
    with closing(trainer._batches(trainer.samples.train, order)) as batches:
        return _time(trainer, lambda: list(islice(batches, accumulate)), steps, warm_up)


def _on_device(trainer: Trainer) -> Batch:
    """The first batch, on the device but for text_mask, as in `ExpressionDataset.to`."""
    size = trainer.config.batch_size
    (batch,) = trainer._batches(trainer.samples.train, trainer.samples.order(0)[:size])
    full = {**batch, "text_mask": torch.ones_like(batch["text_mask"])}  # keeps all positions of the texts
    return {**trainer._on_device(full), "text_mask": batch["text_mask"]}


def _repeat(trainer: Trainer, batch: Batch, steps: int) -> Pass:
    """`steps` steps on one batch, from `_on_device`."""
    return _time(trainer, lambda: [batch] * trainer.config.accumulate, steps)


def _time(trainer: Trainer, batches: Callable[[], list[Batch]], steps: int, warm_up: int = WARM_UP) -> Pass:
    """Every step waits for its losses, so the clock starts and stops at the same point of a step, also on a GPU."""
    ended, waited = [], []
    for _ in range(warm_up + steps):
        start = time.perf_counter()
        given = batches()
        waited.append(time.perf_counter() - start)
        trainer._step(given, trainer.config.batch_size * trainer.config.accumulate)
        ended.append(time.perf_counter())
    return Pass(ended[-1] - ended[warm_up - 1], sum(waited[warm_up:]))


def _write_shards(root: Path, profile: str, videos: int) -> None:
    """Write videos of random numbers, all different, each with EXPRESSIONS expressions for two objects."""
    dataset = section(profile, DatasetConfig)
    text, sam2 = section(profile, TextConfig), section(profile, Sam2Config)
    shapes = array_shapes(dataset.frames, section(profile, AudioConfig), section(profile, VisualConfig), text, sam2)
    shapes["text"] = (EXPRESSIONS, *shapes["text"])
    random = np.random.default_rng(0)
    numbers = {name: random.standard_normal(shape, np.float32).astype(np.float16) for name, shape in shapes.items()}
    numbers |= {name: numbers[name][None] for name in LEVELS}  # one frame
    masks = np.zeros((2, 1, dataset.mask_size, dataset.mask_size), np.uint8)
    masks[0, :, : dataset.mask_size // 2] = masks[1, :, dataset.mask_size // 2 :] = 1
    with ShardWriter(root, fingerprint={name: {} for name in FEATURES}) as writer:
        for video in range(videos):
            sample: dict[str, Any] = {name: array + np.float16(video / videos) for name, array in numbers.items()}
            sample["audio_valid"] = np.ones(dataset.frames, bool)
            sample["text_mask"] = np.arange(text.max_tokens) < 6 + np.arange(EXPRESSIONS)[:, None]  # tokens per text
            sample["masks"] = masks
            sample["rows"] = [{"row_id": f"{video}.{i}", "text": i, "mask": i % 2} for i in range(EXPRESSIONS)]
            writer.write(str(video), sample)


def _samples(dataset: ExpressionDataset, profile: str, on_gpu: bool = False) -> Samples:
    config, videos = section(profile, TrainConfig), dataset.videos
    order = lambda epoch: PoolSampler(videos, config.pool, config.seed, epoch).order()  # noqa: E731
    return Samples(dataset, dataset, collate, order, on_gpu)


def _trainer(
    kind: type[T],
    profile: str,
    samples: Samples,
    dataset: ExpressionDataset,
    device: torch.device,
    root: Path,
    changes: dict[str, dict[str, Any]] | None = None,
) -> T:
    """changes: section -> setting -> value, of fusion and train."""
    checkpoint, changes = root / "sam2.safetensors", changes or {}
    sam2 = section(profile, Sam2Config, checkpoint=str(checkpoint))
    if not checkpoint.exists():
        save_file(instantiate_sam2(sam2.config, image_encoder=False).state_dict(), checkpoint)
    origin = Origin(
        fusion=section(profile, FusionConfig, **changes.get("fusion", {})),
        train=section(profile, TrainConfig, **changes.get("train", {})),
        sam2=sam2,
        sam2_sha256=sha256_file(checkpoint),
        dims=dataset.dims,
        features=dataset.features,
    )
    return kind(origin.build(), origin, samples, device, root / "scratch")
