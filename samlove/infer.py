"""Full-video inference over cached features: [seg] prompts frame 0, SAM2's memory carries the mask through the rest.

Section 3.3, Inference. All expressions of a video are one batch that shares its embeddings. A split becomes one HDF5
file of binned masks, and one more for each control. Letters: B expressions of a video, T frames, S mask size.

Every video's masks are kept in a scratch folder as soon as they are known, under a fingerprint of all that determines
them, so that an interrupted run goes on where it stopped; the split is published whole, by one rename.
"""

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from sam2.modeling.sam2_base import NO_OBJ_SCORE
from torch import Tensor
from tqdm import tqdm

from samlove.config import CONTROLLED_SPLITS, InferConfig
from samlove.data.dataset import RefAvsFolder, load_mask
from samlove.data.digest import rows_digest
from samlove.errors import RequestError, SamloveError
from samlove.model.checkpoint import Header, load_model, read_header
from samlove.model.sam2 import LEVELS
from samlove.model.sam2_love import SamLove
from samlove.scoring.metrics import EDGES, quantise
from stores import FeatureStore, PredictionReader, PredictionWriter
from stores.fingerprint import check_fingerprint, fingerprint_id, sha256_file
from stores.manifest import replace_folder

PREDICTIONS = "predictions"  # the variant that is no control
STAGES = {"audio": "audio", "visual": "visual", "text": "text", "sam2": "sam2@train sam2@eval"}
# Masks left in the scratch folder by other code must not be taken up: these files decide what a mask is.
CODE = ("infer.py", "model/fusion.py", "model/sam2.py", "model/sam2_love.py", "scoring/metrics.py")


class Job(NamedTuple):
    """One variant of one video: what each of its B expressions is given. Either texts and a sound, or true masks."""

    row_ids: list[str]
    texts: list[str]
    audio: str  # media_id
    masks: list[int]  # fid of each expression's object; empty where texts prompt


class Inputs(NamedTuple):
    """A job's arrays, on the CPU: fusion inputs by the names of samlove.data.loader, or masks of frame 0."""

    row_ids: list[str]
    fusion: dict[str, Tensor]
    masks: Tensor | None  # (objects, H, W) bool
    objects: list[int]  # row of `masks` for each expression


@dataclass(frozen=True)
class Sources:
    """The four feature stores of an evaluation split; text is keyed by expression, the others by media_id."""

    audio: FeatureStore
    visual: FeatureStore
    text: FeatureStore
    sam2: FeatureStore

    @classmethod
    def open(cls, features: Path) -> "Sources":
        """features: the folder of the stores `audio`, `visual`, `text` and `sam2_eval`."""
        return cls(*(FeatureStore.open(features / name) for name in ("audio", "visual", "text", "sam2_eval")))

    @property
    def fingerprints(self) -> dict[str, dict[str, Any]]:
        return {name: getattr(self, name).manifest["fingerprint"] for name in STAGES}

    @property
    def frames(self) -> int:
        return self.sam2.shapes[LEVELS[-1]][0]

    def check(self, header: Header, checkpoint: Path, rows: pd.DataFrame) -> None:
        """Raise SamloveError where a store is not of the kind that the checkpoint was trained on, or lacks an item."""
        widths = {name: getattr(self, name).shapes[name][-1] for name in ("audio", "visual", "text")}
        found = {**widths, "frames": self.visual.shapes["visual"][0], "frames of sam2": self.frames}
        for name, stages in STAGES.items():
            remedy = f"dvc repro {stages} pack train, as {checkpoint} was trained on the features expected here"
            store = getattr(self, name)
            check_fingerprint(store.manifest["fingerprint"], header.features.get(name, {}), store.path, remedy)
            missing = [key for key in rows["exp" if name == "text" else "media_id"].unique() if key not in store]
            if missing:
                known = {failure.key: f"{failure.stage} failed: {failure.error}" for failure in store.failures}
                raise SamloveError(
                    f"{store.path}: expected all items that the index lists, found {len(missing)} missing, first "
                    f"{missing[0]!r} ({known.get(missing[0], 'of another index')}); each row must be predicted: "
                    f"dvc repro -f {stages.split()[-1]}, or leave the row out by a policy in dataset.yaml"
                )
        wanted = {**header.dims, "frames of sam2": header.dims["frames"]}
        remedy = f"dvc repro pack train, as {checkpoint} was trained on the sizes expected here"
        check_fingerprint(found, wanted, self.visual.path, remedy)


def infer(
    split: str,
    rows: pd.DataFrame,
    checkpoint: Path,
    features: Path,
    folder: RefAvsFolder,
    config: InferConfig,
    mask_size: int,
    out: Path,
    scratch: Path,
    device: torch.device,
) -> dict[str, int]:
    """Predict all expressions of a split; returns how many rows each file in `out` has.

    rows: of expressions.parquet, this split's. features: as for `Sources.open`. out: the folder to make, with
    predictions.h5 and, for the splits that have controls, {control}.h5; each row (T, S, S) uint8 bins of
    samlove.scoring.metrics. scratch: a folder of this split's own, outside every DVC out, on the file system of `out`.
    Raises RequestError where an input is missing, SamloveError where inputs do not belong together.
    """
    header, sources = read_header(checkpoint), Sources.open(features)
    sources.check(header, checkpoint, rows)
    controls = config.controls if split in CONTROLLED_SPLITS else []
    videos = plan(rows, controls)
    made_by = {
        "split": split,
        "rows_sha256": rows_digest(rows),
        "checkpoint_sha256": sha256_file(checkpoint),
        "sam2_sha256": header.sam2_sha256,
        "features": sources.fingerprints,
        "precision": config.precision,
        "absent": config.absent,
        "mask_size": mask_size,
    }
    kept = scratch / fingerprint_id({**made_by, "videos": videos, "code": _code_sha256()})
    todo = {media_id: left for media_id, jobs in videos.items() if (left := _left(jobs, kept / media_id))}
    frames = sources.frames
    with tqdm(total=len(videos), initial=len(videos) - len(todo), desc=split, unit="video", mininterval=2) as bar:
        model = load_model(checkpoint).to(device) if todo else None
        for media_id, embeds, inputs in _read_ahead(todo, sources, folder):
            assert model is not None
            for variant, given in inputs.items():
                bins = quantise(predict(model, embeds, given, mask_size, config))
                with PredictionWriter(kept / media_id / f"{variant}.h5", frames, mask_size, EDGES) as writer:
                    writer.write(given.row_ids, bins)
            bar.update()
    counts = {}
    for variant in (PREDICTIONS, *controls):
        path = kept / "published" / f"{variant}.h5"
        with PredictionWriter(path, frames, mask_size, EDGES, {**made_by, "variant": variant}) as writer:
            for media_id, jobs in videos.items():
                if variant in jobs:
                    part = PredictionReader(kept / media_id / f"{variant}.h5")
                    writer.write(part.row_ids, np.stack([part.read(row_id) for row_id in part.row_ids]))
        counts[variant] = sum(len(jobs[variant].row_ids) for jobs in videos.values() if variant in jobs)
    replace_folder(kept / "published", out)
    shutil.rmtree(scratch)
    return counts


@torch.no_grad()
def predict(model: SamLove, embeds: dict[str, Tensor], given: Inputs, mask_size: int, config: InferConfig) -> Tensor:
    """Mask logits (B, T, S, S) float32 of one job.

    embeds: sam2_image_embed (T, C, h, w) and its finer levels, on any device. The model is in evaluation mode.
    An object that SAM2 finds absent on frame 0 is tracked all the same, as the official predictor does ("track"): it
    may yet appear. But a memory of nothing may drift onto anything; where expressions may refer to nothing, and the
    object score was trained to say so, "empty" keeps what was absent on frame 0 absent throughout.
    """
    device = model.sam2.device
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
        if given.masks is None:
            token = model.token({name: array.to(device) for name, array in given.fusion.items()})
            logits = model.sam2.track(embeds, token=token)  # (B, T, 4h, 4w)
            if config.absent == "empty":
                absent = (logits[:, 0] == NO_OBJ_SCORE).flatten(1).all(1)
                logits[absent] = NO_OBJ_SCORE
        else:
            logits = model.sam2.track(embeds, masks=given.masks)[given.objects]
    size = (mask_size, mask_size)
    return F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)  # (B, T, S, S)


# --- what each expression is given -----------------------------------------------------------------------------------


def plan(rows: pd.DataFrame, controls: Sequence[str]) -> dict[str, dict[str, Job]]:
    """{media_id: {variant: job}} for a split, in the order of `rows`; the same for the same rows, always.

    rows: row_id, media_id, vid, fid, exp, null. Controls:
    swapped_audio: the sound of another clip of the split (another vid: null clips share a vid's picture or sound).
    permuted_text: within a video each expression gets the text of the next one that means another object; in a
        video that has but one object, the text of another video.
    true_mask: SAM2 alone, from the true mask of frame 0; rows without an object are left out.
    Raises RequestError where a control needs a second video and the split has none.
    """
    videos: dict[str, pd.DataFrame] = {str(key): group for key, group in rows.groupby("media_id", sort=False)}
    others = _other_videos(videos) if set(controls) & {"swapped_audio", "permuted_text"} else {}
    planned: dict[str, dict[str, Job]] = {}
    for media_id, group in videos.items():
        row_ids, texts = group["row_id"].tolist(), group["exp"].tolist()
        jobs = {PREDICTIONS: Job(row_ids, texts, media_id, [])}
        if "swapped_audio" in controls:
            jobs["swapped_audio"] = Job(row_ids, texts, others[media_id], [])
        if "permuted_text" in controls:
            elsewhere = videos[others[media_id]]["exp"].tolist()
            jobs["permuted_text"] = Job(row_ids, _permuted(group, elsewhere), media_id, [])
        seen = group[~group["null"].astype(bool)]
        if "true_mask" in controls and len(seen):
            jobs["true_mask"] = Job(seen["row_id"].tolist(), [], media_id, seen["fid"].astype(int).tolist())
        planned[media_id] = jobs
    return planned


def _other_videos(videos: dict[str, pd.DataFrame]) -> dict[str, str]:
    """For each video the next one of another vid, in an order that has nothing to do with what they show."""
    order = sorted(videos, key=lambda media_id: hashlib.sha256(media_id.encode()).digest())
    vid = {media_id: group["vid"].iloc[0] for media_id, group in videos.items()}
    others = {}
    for place, media_id in enumerate(order):
        following = order[place + 1 :] + order[:place]
        found = next((other for other in following if vid[other] != vid[media_id]), None)
        if found is None:
            raise RequestError(
                f"infer.yaml: controls: swapped_audio and permuted_text need two videos in a split, found only {vid}; "
                "take them out of controls"
            )
        others[media_id] = found
    return others


def _permuted(group: pd.DataFrame, elsewhere: list[str]) -> list[str]:
    """For each row of a video the text of the next row, cyclically, of another object and other words."""
    texts, objects = group["exp"].tolist(), group["fid"].tolist()
    count = len(texts)
    permuted = []
    for row in range(count):
        following = [(row + step) % count for step in range(1, count)]
        found = (texts[i] for i in following if objects[i] != objects[row] and texts[i] != texts[row])
        permuted.append(next(found, elsewhere[row % len(elsewhere)]))
    return permuted


def _code_sha256() -> str:
    return hashlib.sha256("".join(sha256_file(Path(__file__).parent / name) for name in CODE).encode()).hexdigest()


def _left(jobs: dict[str, Job], kept: Path) -> dict[str, Job]:
    """The jobs of a video whose masks are not in the scratch folder; a file there under its own name is whole."""
    return {variant: job for variant, job in jobs.items() if not (kept / f"{variant}.h5").is_file()}


# --- reading ---------------------------------------------------------------------------------------------------------


def _read_ahead(
    todo: dict[str, dict[str, Job]], sources: Sources, folder: RefAvsFolder
) -> Iterator[tuple[str, dict[str, Tensor], dict[str, Inputs]]]:
    """Each video's embeddings and inputs, the next one being read while the caller works on one."""
    with ThreadPoolExecutor(1) as reader:
        pending = None
        for media_id, jobs in todo.items():
            upcoming = reader.submit(_read, media_id, jobs, sources, folder)
            if pending is not None:
                yield pending.result()
            pending = upcoming
        if pending is not None:
            yield pending.result()


def _read(
    media_id: str, jobs: dict[str, Job], sources: Sources, folder: RefAvsFolder
) -> tuple[str, dict[str, Tensor], dict[str, Inputs]]:
    embeds = {name: torch.from_numpy(array) for name, array in sources.sam2.read(media_id).items()}
    visual = torch.from_numpy(sources.visual.read(media_id)["visual"]).float()  # (N, 1+P, dV)
    inputs = {}
    for variant, job in jobs.items():
        if job.masks:
            objects = list(dict.fromkeys(job.masks))
            masks = np.stack([load_mask(folder.mask_path(media_id, fid, 0)) for fid in objects])  # (objects, H, W)
            given = Inputs(job.row_ids, {}, torch.from_numpy(masks), [objects.index(fid) for fid in job.masks])
        else:
            words = [sources.text.read(text) for text in job.texts]
            sound = sources.audio.read(job.audio)
            once = {"audio": sound["audio"], "audio_valid": sound["audio_valid"]}
            shared = {name: _as_input(array) for name, array in once.items()} | {"visual": visual}
            count = len(words)
            fusion = {name: array.expand(count, *array.shape) for name, array in shared.items()}  # (B, ...)
            fusion |= {name: _as_input(np.stack([word[name] for word in words])) for name in ("text", "text_mask")}
            given = Inputs(job.row_ids, fusion, None, [])
        inputs[variant] = given
    return media_id, embeds, inputs


def _as_input(array: np.ndarray) -> Tensor:
    """As the trainer's: bool as it is, all else float32."""
    tensor = torch.from_numpy(array)
    return tensor if tensor.dtype == torch.bool else tensor.float()
