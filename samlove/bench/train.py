"""How fast training steps are, and how much of that time the loader costs.

Compares steps that read their batches with steps that reuse one batch. The shards hold random numbers in a profile's
shapes, and its architectures have random weights: speed does not depend on the values, and nothing is downloaded. The
steps are the trainer's own, with `accumulate` batches each.
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
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from samlove.bench.profile import check_profile, device_name, section
from samlove.bench.timing import in_turns
from samlove.config import DatasetConfig, FusionConfig, Resident, Sam2Config, TextConfig, TrainConfig, VisualConfig
from samlove.data.loader import FEATURES, ExpressionDataset, PoolSampler, collate, make_resident
from samlove.data.sizes import VGGISH_CHANNELS, sam2_shape, text_width, vit_shape
from samlove.device import default_device
from samlove.model.checkpoint import Origin
from samlove.model.sam2_build import instantiate_sam2
from samlove.train import Batch, Samples, Trainer
from stores import ShardWriter
from stores.fingerprint import sha256_file

EXPRESSIONS = 5  # per video, as in Ref-AVS
WARM_UP = 3  # steps before the clock starts: they start workers, allocate memory and select kernels


def run(profile: str, videos: int = 32, steps: int = 20, rounds: int = 3) -> dict[str, Any]:
    """Time `steps` steps with every possible residency, and with one batch reused. Prints and returns the result.

    expressions_per_s: of the median round. over_reused: the time of a step divided by that of a step with one batch
    reused on the device; the excess over 1 is the loader's cost. Raises RequestError if there is no such profile.
    """
    check_profile(profile)
    device = default_device()
    places: tuple[Resident, ...] = ("off", "ram", "gpu") if device.type == "cuda" else ("off", "ram")
    with TemporaryDirectory(prefix="samlove-bench-") as top:
        root = Path(top)
        _write_shards(root / "shards", profile, videos)
        passes: dict[str, Callable[[], float]] = {}
        workers = 0
        for place in places:
            dataset = ExpressionDataset(root / "shards")
            make_resident([dataset], place, device)
            trainer = _trainer(profile, dataset, device, root, on_gpu=place == "gpu")
            workers = max(workers, trainer.workers)  # 0 if the shards are on the GPU
            passes.setdefault("reused", partial(_reused, trainer, steps))
            passes[place] = partial(_read, trainer, steps)
        times = in_turns(passes, rounds)
    spent, config = {name: median(seconds) for name, seconds in times.items()}, trainer.config
    size = config.batch_size * config.accumulate
    result = {
        "bench": "train",
        "profile": profile,
        "device": device_name(device),
        "precision": config.precision,
        "samples_a_step": size,
        "workers": workers,
        "steps": steps,
        "rounds": rounds,
        "expressions_per_s": {name: round(steps * size / seconds, 2) for name, seconds in spent.items()},
        "over_reused": {
            name: round(seconds / spent["reused"], 3) for name, seconds in spent.items() if name != "reused"
        },
    }
    for name, seconds in spent.items():
        print(f"{name:8}{1e3 * seconds / steps:10.1f} ms per step{steps * size / seconds:10.1f} expressions/s")
    print(json.dumps(result))
    return result


def _read(trainer: Trainer, steps: int) -> float:
    """Seconds for `steps` steps on batches from the loader."""
    accumulate, size = trainer.config.accumulate, trainer.config.batch_size * trainer.config.accumulate
    wanted = (WARM_UP + steps) * size
    epochs = -(-wanted // len(trainer.samples.train))
    order = np.concatenate([trainer.samples.order(epoch) for epoch in range(epochs)])[:wanted]
    with closing(trainer._batches(trainer.samples.train, order)) as batches:
        return _seconds(trainer, lambda: list(islice(batches, accumulate)), steps)


def _reused(trainer: Trainer, steps: int) -> float:
    """Seconds for `steps` steps on one batch that is already on the device."""
    size = trainer.config.batch_size
    (batch,) = trainer._batches(trainer.samples.train, trainer.samples.order(0)[:size])
    batch = {
        **trainer._on_device(batch),
        "text_mask": batch["text_mask"],
    }  # text_mask stays on the CPU, as in `ExpressionDataset.to`
    return _seconds(trainer, lambda: [batch] * trainer.config.accumulate, steps)


def _seconds(trainer: Trainer, batches: Callable[[], list[Batch]], steps: int) -> float:
    """Every step waits for its losses, so the clock starts and stops at the same point of a step, also on a GPU."""
    ended = []
    for _ in range(WARM_UP + steps):
        trainer._step(batches(), trainer.config.batch_size * trainer.config.accumulate)
        ended.append(time.perf_counter())
    return ended[-1] - ended[WARM_UP - 1]


def _write_shards(root: Path, profile: str, videos: int) -> None:
    """Write videos of random numbers, all different, each with EXPRESSIONS expressions for two objects."""
    dataset = section(profile, DatasetConfig)
    text, sam2 = section(profile, TextConfig), section(profile, Sam2Config)
    tokens, width = vit_shape(section(profile, VisualConfig))
    size, channels = sam2_shape(sam2)
    grid, fine = size // 16, sam2.cache_point == "pre_conv"
    shapes = {
        "audio": (dataset.frames, VGGISH_CHANNELS),
        "visual": (dataset.frames, tokens, width),
        "sam2_image_embed": (channels, grid, grid),
        "sam2_high_res_0": (channels if fine else channels // 8, 4 * grid, 4 * grid),
        "sam2_high_res_1": (channels if fine else channels // 4, 2 * grid, 2 * grid),
        "text": (EXPRESSIONS, text.max_tokens, text_width(text)),
    }
    random = np.random.default_rng(0)
    numbers = {name: random.standard_normal(shape, np.float32).astype(np.float16) for name, shape in shapes.items()}
    masks = np.zeros((2, dataset.mask_size, dataset.mask_size), np.uint8)
    masks[0, : dataset.mask_size // 2] = masks[1, dataset.mask_size // 2 :] = 1
    with ShardWriter(root, fingerprint={name: {} for name in FEATURES}) as writer:
        for video in range(videos):
            sample: dict[str, Any] = {name: array + np.float16(video / videos) for name, array in numbers.items()}
            sample["audio_valid"] = np.ones(dataset.frames, bool)
            sample["text_mask"] = np.arange(text.max_tokens) < 6 + np.arange(EXPRESSIONS)[:, None]  # tokens per text
            sample["masks"] = masks
            sample["rows"] = [{"row_id": f"{video}.{i}", "text": i, "mask": i % 2} for i in range(EXPRESSIONS)]
            writer.write(str(video), sample)


def _trainer(profile: str, dataset: ExpressionDataset, device: torch.device, root: Path, on_gpu: bool) -> Trainer:
    checkpoint = root / "sam2.safetensors"
    sam2 = section(profile, Sam2Config, checkpoint=str(checkpoint))
    if not checkpoint.exists():
        save_file(instantiate_sam2(sam2.config, image_encoder=False).state_dict(), checkpoint)
    config, videos = section(profile, TrainConfig), dataset.videos
    origin = Origin(
        fusion=section(profile, FusionConfig),
        train=config,
        sam2=sam2,
        sam2_sha256=sha256_file(checkpoint),
        dims=dataset.dims,
        features=dataset.features,
    )
    samples = Samples(
        dataset, dataset, collate, lambda epoch: PoolSampler(videos, config.pool, config.seed, epoch).order(), on_gpu
    )
    return Trainer(origin.build(), origin, samples, device, root / "scratch")
