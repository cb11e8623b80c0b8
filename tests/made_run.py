"""A synthetic run with discs: dataset folder, index and predictions, as the stages before evaluate write them."""

import json
import math
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile
from dvclive import Live
from PIL import Image

from samlove.data.dataset import RefAvsFolder
from samlove.data.digest import folder_digest
from samlove.scoring.evaluate import CONTROLS
from samlove.scoring.metrics import EDGES, quantise
from stores import PredictionWriter

SAID = ("the red disc on the left", "the object making the loudest sound", "the first object to make a sound")
CUES = ({"sight"}, {"sound"}, {"sound", "time"})
CATEGORIES = {"test_s": ("disc", "star"), "test_u": ("ring", "kite"), "val": ("disc", "star"), "test_n": ("null",)}


def make_run(data: Path, rows: dict[str, int], frames: int = 3, size: int = 24, width: int = 40) -> pd.DataFrame:
    """Writes {data}/set (Ref-AVS layout), {data}/index and {data}/predictions; returns the index's expressions.

    rows: expressions per split, three per video. Each prediction is the ground-truth disc, shifted more for later rows;
    swapped_audio and permuted_text shift it away on rows that need them, true_mask does not shift it.
    """
    generator = np.random.default_rng(0)
    table = []
    for split, count in rows.items():
        with ExitStack() as files:
            writers = {name: files.enter_context(_writer(data, split, name, frames, size)) for name in _variants(split)}
            for i in range(count):
                row = _row(split, i, data, frames, width, generator)
                table.append(row)
                for name, logits in _predictions(row, i / count, data, frames, size, generator).items():
                    if name in writers:
                        writers[name].write([row["row_id"]], quantise(logits)[None])
    expressions = pd.DataFrame(table)
    (data / "index").mkdir(parents=True)
    expressions.to_parquet(data / "index" / "expressions.parquet")
    (data / "index" / "gt_mask.sha256").write_text(folder_digest(data / "set" / "gt_mask") + "\n")
    return expressions


def make_curves(data: Path, epochs: int = 30) -> None:
    """Write learning curves, as the trainer records them with DVCLive, and the manifest of a feature store."""
    ends = {"train/loss": (1.4, 0.2), "train/bce": (0.7, 0.1), "val/J&F": (0.0, 82.0), "lr": (1e-4, 0.0)}
    with Live(str(data / "dvclive"), save_dvc_exp=False, dvcyaml=None) as live:
        for epoch in range(epochs):
            for name, (start, end) in ends.items():
                live.log_metric(name, end + (start - end) * math.exp(-epoch / 8))
            live.next_step()
    manifest = data / "features" / "audio" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(json.dumps({"schema": 1, "fingerprint": {"encoder": "vggish", "weights": "ab" * 32}}))


def _variants(split: str) -> tuple[str, ...]:
    controls = {"test_s": CONTROLS, "test_u": CONTROLS}
    return ("predictions", *controls.get(split, ()))


def _writer(data: Path, split: str, name: str, frames: int, size: int) -> PredictionWriter:
    path = data / "predictions" / split / f"{name}.h5"
    path.parent.mkdir(parents=True, exist_ok=True)
    return PredictionWriter(path, frames, size, EDGES, {"split": split})


def _row(split: str, i: int, data: Path, frames: int, width: int, generator: np.random.Generator) -> dict:
    null = split == "test_n"
    made = ("null_m-", "null_c-")[i // 3 % 2] if null else ""
    media_id = f"{made}{split}_clip{i // 3}"
    cues = CUES[i % 3]
    uid = f"{media_id}_x_{i}"
    place = tuple(generator.uniform(0.3, 0.7, 2).tolist())
    row: dict = {
        "row_id": uid, "uid": uid, "vid": media_id, "media_id": media_id, "split": split,
        "fid": i % 3, "object": CATEGORIES[split][i % len(CATEGORIES[split])], "exp": SAID[i % 3], "null": null,
        "sight": "sight" in cues, "sound": "sound" in cues, "time": "time" in cues, "template": f"t{i % 3}",
    }  # fmt: skip
    _write_media(data / "set", media_id, frames, width, generator)
    if not null:
        masks = _discs(frames, width, place, 0.2)[:, : width * 3 // 4]
        for t, mask in enumerate(masks):
            path = data / "set" / "gt_mask" / media_id / f"fid_{row['fid']}" / f"{t:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask.astype(np.uint8) * 255).save(path)
    return row


def _write_media(root: Path, media_id: str, frames: int, width: int, generator: np.random.Generator) -> None:
    folder = root / "media" / media_id / "frames"
    if folder.exists():
        return
    folder.mkdir(parents=True)
    for t in range(frames):
        pixels = generator.integers(40, 200, (6, 8, 3)).astype(np.uint8)
        Image.fromarray(pixels).resize((width, width * 3 // 4), Image.Resampling.BICUBIC).save(folder / f"{t}.jpg")
    loudness = np.repeat(generator.uniform(0, 0.8, frames) * (generator.random(frames) < 0.7), 8000)
    sound = loudness * np.sin(np.arange(len(loudness)) * 0.3)
    soundfile.write(folder.parent / "audio.wav", sound, 8000, subtype="PCM_16")


def _predictions(
    row: dict, badness: float, data: Path, frames: int, size: int, generator: np.random.Generator
) -> dict[str, np.ndarray]:
    if row["null"]:
        return {"predictions": _logits(_discs(frames, size, (0.5, 0.5), 0.3 * badness), generator)}
    truth = RefAvsFolder(data / "set").load_masks(row["media_id"], row["fid"], frames, size)
    shift = round(size * 0.4 * badness)
    shifts = {"predictions": shift, "true_mask": 0, "permuted_text": size // 2}
    shifts["swapped_audio"] = size // 2 if row["sound"] else shift
    return {name: _logits(np.roll(truth, by, axis=2), generator) for name, by in shifts.items()}


def _discs(frames: int, size: int, place: tuple[float, ...], radius: float) -> np.ndarray:
    """A disc that drifts to the right: bool (frames, size, size); place and radius are fractions of the size."""
    y, x = np.mgrid[:size, :size] / size
    return np.stack([(x - place[0] - 0.02 * t) ** 2 + (y - place[1]) ** 2 < radius**2 for t in range(frames)])


def _logits(masks: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    return (np.where(masks, 5.0, -5.0) + generator.normal(size=masks.shape)).astype(np.float32)
