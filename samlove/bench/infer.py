"""How fast full-video inference is, and what its reading and writing cost.

The stage's own function predicts a generated split, from feature stores to the published file. The floor is the same
computation on data that is already on the device, without reading and writing. The stores hold random numbers in a
profile's shapes, and the weights are random: nothing is downloaded, and the masks, which are compressed when they are
written, are noisier than real ones. All expressions of a video are one batch; larger batches stand for several videos.
"""

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file

from samlove.bench.profile import check_profile, device_name, section
from samlove.bench.timing import in_turns
from samlove.config import (
    AudioConfig,
    DatasetConfig,
    FusionConfig,
    InferConfig,
    Sam2Config,
    TextConfig,
    TrainConfig,
    VisualConfig,
)
from samlove.data.dataset import RefAvsFolder
from samlove.device import default_device
from samlove.features.sizes import REF_AVS, audio_width, sam2_shape, text_width, visual_shape
from samlove.infer import PREDICTIONS, STORES, Sources, _read_ahead, infer, plan, predict
from samlove.model.checkpoint import Header, load_model, save_checkpoint
from samlove.model.sam2_build import instantiate_sam2
from samlove.scoring.metrics import EDGES, quantise
from stores import FeatureStoreWriter, PredictionWriter
from stores.fingerprint import sha256_file

EXPRESSIONS = 5  # per video, as in Ref-AVS
TOGETHER = (1, 2, 4)  # videos whose expressions are one batch
EVALUATED = sum(REF_AVS[split].rows for split in ("val", "test_s", "test_u", "test_n"))  # expressions of Ref-AVS Bench


class Split(NamedTuple):
    """A generated split and a checkpoint for it."""

    root: Path
    rows: pd.DataFrame
    checkpoint: Path
    mask_size: int

    @property
    def sources(self) -> Sources:
        return Sources.open(self.root / "features")

    @property
    def folder(self) -> RefAvsFolder:
        return RefAvsFolder(self.root / "set")  # it has no files: only controls read them


def run(profile: str, videos: int = 16, rounds: int = 3) -> dict[str, Any]:
    """Predict `videos` videos of five expressions, as the infer stage does and without reading and writing.

    Prints and returns the result. Raises RequestError if there is no such profile. For each precision (on a CPU only
    the profile's), from the median round:
    seconds: stage, the whole function; of which, by the same loop with a clock: waiting for the stores, computing,
        writing, and the rest, which is hashing, loading the model, and publishing the masks as one file.
    floor_s: the same computation alone. share: floor_s / stage.
    expressions_per_s: of the stage, and of its floor. together: of the floor, if the batch has the expressions of so
    many videos.
    """
    check_profile(profile)
    device, configured = default_device(), section(profile, InferConfig, controls=[])
    precisions = ("float32", "bfloat16") if device.type == "cuda" else (configured.precision,)
    result: dict[str, Any] = {"bench": "infer", "profile": profile, "device": device_name(device)}
    result |= {"videos": videos, "expressions": videos * EXPRESSIONS, "rounds": rounds}
    with TemporaryDirectory(prefix="samlove-bench-") as top:
        split = write_split(Path(top), profile, videos)
        result["by_precision"] = {
            precision: _measure(split, configured.model_copy(update={"precision": precision}), device, rounds)
            for precision in precisions
        }
    print(json.dumps(result))
    return result


def _measure(split: Split, config: InferConfig, device: torch.device, rounds: int) -> dict[str, Any]:
    model = load_model(split.checkpoint).to(device)
    held = [
        ({name: array.to(device) for name, array in embeds.items()}, inputs[PREDICTIONS]._replace(fusion=fusion))
        for _, embeds, inputs in _read_ahead(plan(split.rows, []), split.sources, split.folder)
        for fusion in [{name: array.to(device) for name, array in inputs[PREDICTIONS].fusion.items()}]
    ]

    def compute(together: int) -> float:
        """Seconds for as many batches as one video each would need, if each has `together` videos' expressions."""
        start = time.perf_counter()
        for embeds, given in held[: len(held) // together]:
            many = {name: torch.cat([array] * together) for name, array in given.fusion.items()}
            quantise(predict(model, embeds, given._replace(fusion=many), split.mask_size, config).logits)
        return time.perf_counter() - start

    def stage() -> float:
        start = time.perf_counter()
        _infer(split, config, device)
        return time.perf_counter() - start

    compute(1)  # warm-up
    ways: dict[str, Callable[[], Any]] = {"stage": stage, "clocked": partial(_clocked, split, config, model)}
    found = in_turns(ways | {str(n): partial(compute, n) for n in TOGETHER if n <= len(held)}, rounds)
    clocks = {part: median(one[part] for one in found["clocked"]) for part in found["clocked"][0]}
    whole, floor, count = median(found["stage"]), median(found["1"]), len(split.rows)
    together = {n: EXPRESSIONS * n * max(1, len(held) // n) / median(found[str(n)]) for n in TOGETHER if n <= len(held)}
    print(
        f"{config.precision}: {count / whole:.1f} expressions/s as a stage, {count / floor:.1f} without reading and "
        f"writing: {floor / whole:.0%} of the time; all {EVALUATED:,} of Ref-AVS Bench: "
        f"{EVALUATED * whole / count / 60:.1f} minutes"
    )
    parts = clocks | {"rest": max(0.0, whole - sum(clocks.values()))}
    print("the stage: " + ", ".join(f"{part} {seconds:.2f} s" for part, seconds in parts.items()))
    print(
        "without reading and writing: "
        + ", ".join(f"{rate:.1f} expressions/s with {n} videos in a batch" for n, rate in together.items()),
        flush=True,
    )
    return {
        "seconds": {"stage": round(whole, 3), **{part: round(seconds, 3) for part, seconds in parts.items()}},
        "floor_s": round(floor, 3),
        "share": round(floor / whole, 3),
        "expressions_per_s": {"stage": round(count / whole, 2), "floor": round(count / floor, 2)},
        "together": {str(n): round(rate, 2) for n, rate in together.items()},
    }


def _infer(split: Split, config: InferConfig, device: torch.device) -> None:
    out, scratch = split.root / "predictions" / "split", split.root / ".scratch" / "split"
    rows, checkpoint = split.rows, split.checkpoint
    quiet: Any = _NoBar
    infer("split", rows, checkpoint, split.sources, split.folder, config, split.mask_size, out, scratch, device, quiet)


class _NoBar:
    """A progress bar that shows nothing."""

    def __init__(self, **settings: Any) -> None:
        pass

    def __enter__(self) -> "_NoBar":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update(self) -> None:
        pass


def _clocked(split: Split, config: InferConfig, model: Any) -> dict[str, float]:
    """Seconds of each part of the loop over videos in `samlove.infer.infer`."""
    spent = dict.fromkeys(("waiting", "computing", "writing"), 0.0)
    sources, now = split.sources, time.perf_counter()

    def clock(part: str) -> None:
        nonlocal now
        before, now = now, time.perf_counter()
        spent[part] += now - before

    with TemporaryDirectory(dir=split.root) as scratch:
        for media_id, embeds, inputs in _read_ahead(plan(split.rows, []), sources, split.folder):
            clock("waiting")
            given = inputs[PREDICTIONS]
            bins = quantise(predict(model, embeds, given, split.mask_size, config).logits)
            clock("computing")
            path = Path(scratch) / media_id / f"{PREDICTIONS}.h5"
            with PredictionWriter(path, sources.frames, split.mask_size, EDGES) as writer:
                writer.write(given.row_ids, bins)
            clock("writing")
    return spent


def write_split(root: Path, profile: str, videos: int) -> Split:
    """Write feature stores of random numbers, all different, and a checkpoint of random weights.

    SAM 2 finds every object, as an untrained object score would not, so that there is a mask to write.
    """
    dataset, visual, text = (
        section(profile, DatasetConfig),
        section(profile, VisualConfig),
        section(profile, TextConfig),
    )
    weights = root / "sam2.safetensors"
    sam2 = section(profile, Sam2Config, checkpoint=str(weights))
    media = [f"video_{n}" for n in range(videos)]
    rows = pd.DataFrame(
        [
            {"row_id": f"{m}.{i}", "media_id": m, "vid": m, "fid": 1, "exp": f"{m}, expression {i}", "null": False}
            for m in media
            for i in range(EXPRESSIONS)
        ]
    )
    tokens, width = visual_shape(visual)
    heard = audio_width(section(profile, AudioConfig))
    size, channels = sam2_shape(sam2)
    grid, fine = size // 16, sam2.cache_point == "pre_conv"
    frames = dataset.frames
    shapes: dict[str, dict[str, tuple[int, ...]]] = {
        "audio": {"audio": (frames, heard)},
        "visual": {"visual": (frames, tokens, width)},
        "text": {"text": (text.max_tokens, text_width(text))},
        "sam2_eval": {
            "sam2_image_embed": (frames, channels, grid, grid),
            "sam2_high_res_0": (frames, channels if fine else channels // 8, 4 * grid, 4 * grid),
            "sam2_high_res_1": (frames, channels if fine else channels // 4, 2 * grid, 2 * grid),
        },
    }
    valid = {"audio": ("audio_valid", np.ones(frames, bool)), "text": ("text_mask", np.arange(text.max_tokens) < 10)}
    random = np.random.default_rng(0)
    for name, arrays in shapes.items():
        keys = rows["exp"].tolist() if name == "text" else media
        fingerprint = {"encoder": name.removesuffix("_eval")}
        chunk_rows = 1 if name == "sam2_eval" else None
        writer = FeatureStoreWriter(
            root / "features" / name, root / ".scratch" / name, fingerprint, keys, 16, chunk_rows=chunk_rows
        )
        numbers = {array: random.standard_normal(shape, np.float32) for array, shape in arrays.items()}
        for number, planned in writer.plan():
            items = {}
            for key in planned:
                shift = random.normal()
                items[key] = {array: (values + shift).astype(np.float16) for array, values in numbers.items()}
                items[key] |= dict([valid[name]] if name in valid else [])
            writer.write_shard(number, items)
        writer.publish()
    full = instantiate_sam2(sam2.config, image_encoder=False)
    save_file(full.state_dict(), weights)
    header = Header(
        fusion=section(profile, FusionConfig),
        train=section(profile, TrainConfig),
        sam2=sam2,
        sam2_sha256=sha256_file(weights),
        dims={"audio": heard, "visual": width, "text": text_width(text), "frames": frames},
        features={name: {"encoder": name} for name in STORES},
        epoch=1,
        validation={},
    )
    torch.manual_seed(0)
    model = header.build()
    model.sam2.set_trainable(True, True)
    model.sam2.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.data.fill_(10)
    checkpoint = root / "best.safetensors"
    save_checkpoint(checkpoint, model, header)
    return Split(root, rows, checkpoint, dataset.mask_size)
