"""Full-video inference on precomputed features (section 3.3, Inference): [seg] prompts frame 0, or the frame on which
it finds the object best, then SAM 2's memory propagates the mask through the other frames.

All expressions of a video are one batch that shares the video's embeddings. Each split gives one HDF5 file of binned
masks, and one more per control. Letters: B expressions of a video, T frames, S mask size.

Each video's masks are saved in a scratch folder as soon as they are computed, under a fingerprint of everything that
determines them, so an interrupted run resumes. The split is published in one rename.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from samlove.config import CONTROLLED_SPLITS, InferConfig
from samlove.data.arrays import check_arrays
from samlove.data.dataset import RefAvsFolder, load_mask, resize_mask
from samlove.data.digest import rows_digest, source_digests
from samlove.errors import RequestError, SamloveError
from samlove.features.lock import only_run
from samlove.model.checkpoint import Header, load_model, read_header
from samlove.model.sam2 import LEVELS, LightSam2
from samlove.model.sam2_love import SamLove
from samlove.scoring.metrics import EDGES, quantise
from samlove.scoring.presence import SCORES, UNGATED
from stores import FeatureStore, PredictionReader, PredictionWriter
from stores.fingerprint import check_fingerprint, fingerprint_id, sha256_file
from stores.manifest import replace_folder

STORES = ("audio", "visual", "text", "sam2")  # also the names of their stages
Arrays = dict[str, np.ndarray]
PREDICTIONS = "predictions"  # the variant that is not a control
# The modules that determine the masks. Masks in the scratch folder that other code computed are not reused.
CODE = (
    "samlove.data.dataset",
    "samlove.data.images",
    "samlove.infer",
    "samlove.model.block",
    "samlove.model.fusion",
    "samlove.model.one_block",
    "samlove.model.sam2",
    "samlove.model.sam2_love",
    "samlove.scoring.metrics",
)


class Job(NamedTuple):
    """The inputs of the B expressions of one video, for one variant: either texts and audio, or ground-truth masks."""

    row_ids: list[str]
    texts: list[str]
    audio: str  # media_id of the video whose audio is used
    masks: list[int]  # fid of each expression's object; empty if the texts prompt


class Inputs(NamedTuple):
    """A job's arrays on the CPU: either fusion inputs, named as in samlove.data.loader, or masks of frame 0."""

    row_ids: list[str]
    fusion: dict[str, Tensor]  # (B, ...) each
    masks: Tensor | None  # (objects, H, W) bool
    objects: list[int]  # row of `masks` for each expression


@dataclass(frozen=True)
class Sources:
    """The four feature stores of an evaluation split. Text is keyed by expression, the others by media_id."""

    audio: FeatureStore
    visual: FeatureStore
    text: FeatureStore
    sam2: FeatureStore

    @classmethod
    def open(cls, features: Path) -> "Sources":
        """features: the folder with the stores `audio`, `visual`, `text` and `sam2_eval`."""
        return cls(*(FeatureStore.open(features / name) for name in ("audio", "visual", "text", "sam2_eval")))

    @property
    def fingerprints(self) -> dict[str, dict[str, Any]]:
        return {name: getattr(self, name).manifest["fingerprint"] for name in STORES}

    @property
    def frames(self) -> int:
        return self.sam2.shapes[LEVELS[-1]][0]

    def check(self, header: Header, checkpoint: Path, rows: pd.DataFrame) -> None:
        """Raise SamloveError if a store differs from what the checkpoint was trained on, or lacks an array or item."""
        for name in STORES:
            remedy = f"dvc repro {name} pack train ({checkpoint} was trained on the expected features)"
            store = getattr(self, name)
            check_fingerprint(store.manifest["fingerprint"], header.features.get(name, {}), store.path, remedy)
            check_arrays(name, store)
            missing = [key for key in rows["exp" if name == "text" else "media_id"].unique() if key not in store]
            if missing:
                known = {failure.key: f"{failure.stage} failed: {failure.error}" for failure in store.failures}
                raise SamloveError(
                    f"{store.path}: expected all items in the index, found {len(missing)} missing, first "
                    f"{missing[0]!r} ({known.get(missing[0], 'built from a different index')}); every row "
                    f"needs a prediction; run: dvc repro -f -s {name}, or drop the row by a policy in dataset.yaml"
                )
        widths = {name: getattr(self, name).shapes[name][-1] for name in ("audio", "visual", "text")}
        found = {**widths, "frames": self.visual.shapes["visual"][0], "frames of sam2": self.frames}
        wanted = {**header.dims, "frames of sam2": header.dims["frames"]}
        remedy = f"dvc repro pack train ({checkpoint} was trained on the expected sizes)"
        check_fingerprint(found, wanted, self.visual.path, remedy)


def infer(
    split: str,
    rows: pd.DataFrame,
    checkpoint: Path,
    sources: Sources,
    folder: RefAvsFolder,
    config: InferConfig,
    mask_size: int,
    out: Path,
    scratch: Path,
    device: torch.device,
    bar: Callable[..., tqdm] = tqdm,
    stop: Event | None = None,
) -> dict[str, int]:
    """Predict all expressions of a split. Returns the number of rows in each file in `out`, by variant.

    rows: those of expressions.parquet for this split. out: the folder to write, with predictions.h5 and, for splits
    with controls, {control}.h5; each row is (T, S, S) uint8, bins of samlove.scoring.metrics. If the checkpoint has a
    threshold, the masks of expressions with a lower object score are empty, and ungated.h5 has what they would be, and
    all scores. scratch: a folder for this split only, outside every DVC output, on the file system of `out`. bar: shows
    the progress. stop: when it is set, the run ends after the current video with a KeyboardInterrupt.
    Raises RequestError if an input is missing, SamloveError if the inputs do not match each other or another run is
    predicting the same split.
    """
    with only_run(scratch.with_name(f"{scratch.name}.lock"), out):
        header = read_header(checkpoint)
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
            "prompt_frame": config.prompt_frame,
            "threshold": header.threshold,
            "mask_size": mask_size,
        }
        finished = scratch / fingerprint_id({**made_by, "videos": videos, "code": source_digests(CODE)})
        todo = {media_id: left for media_id, jobs in videos.items() if (left := _unfinished(jobs, finished / media_id))}
        frames = sources.frames
        done = len(videos) - len(todo)
        with bar(total=len(videos), initial=done, desc=split, unit="video", mininterval=2) as progress:
            model = load_model(checkpoint).to(device) if todo else None
            for media_id, embeds, inputs in _read_ahead(todo, sources, folder):
                assert model is not None
                for variant, given in inputs.items():
                    predicted = predict(model, embeds, given, mask_size, config)
                    _write_video(finished / media_id, variant, given.row_ids, predicted, header.threshold)
                progress.update()
                if stop is not None and stop.is_set():
                    raise KeyboardInterrupt
        counts = {}
        for variant in (PREDICTIONS, *controls):
            parts = [finished / media_id / f"{variant}.h5" for media_id, jobs in videos.items() if variant in jobs]
            about = {**made_by, "variant": variant}
            with PredictionWriter(finished / "published" / f"{variant}.h5", frames, mask_size, EDGES, about) as writer:
                _join(parts, writer)
            counts[variant] = sum(len(jobs[variant].row_ids) for jobs in videos.values() if variant in jobs)
        if header.threshold is not None:
            parts = [finished / media_id / f"{UNGATED}.h5" for media_id in videos]
            scores = {row_id: score for part in parts for row_id, score in PredictionReader(part).attrs[SCORES].items()}
            about = {**made_by, "variant": UNGATED, SCORES: scores}
            with PredictionWriter(finished / "published" / f"{UNGATED}.h5", frames, mask_size, EDGES, about) as writer:
                _join(parts, writer)
        replace_folder(finished / "published", out)
        shutil.rmtree(scratch)
        return counts


class Predicted(NamedTuple):
    """The masks of B expressions of a video."""

    logits: Tensor  # (B, T, S, S) float32
    object_scores: Tensor | None  # (B,) float32, of the prompted frames; None for ground-truth masks as prompts


@torch.no_grad()
def predict(model: SamLove, embeds: dict[str, Tensor], given: Inputs, mask_size: int, config: InferConfig) -> Predicted:
    """The masks of one job.

    embeds: sam2_image_embed (T, C, h, w) and its finer levels, on any device. The model is in evaluation mode.
    config.prompt_frame: a token prompts frame 0, or the frame on which SAM 2 gives it the highest object score.
    Ground-truth masks always prompt frame 0. An object that SAM 2 judges absent in the prompted frame is tracked
    nevertheless, as in the official predictor, because it may appear later.
    """
    device = model.sam2.device
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
        if given.masks is None:
            token = model.token({name: array.to(device) for name, array in given.fusion.items()})
            scores, prompted = prompt_frames(model.sam2, embeds, token, config)
            logits = _track(model.sam2, embeds, token, prompted)
        else:
            scores, logits = None, model.sam2.track(embeds, masks=given.masks)[given.objects]
    size = (mask_size, mask_size)
    return Predicted(F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False), scores)


def prompt_frames(
    sam2: LightSam2, embeds: dict[str, Tensor], token: Tensor, config: InferConfig
) -> tuple[Tensor, list[int]]:
    """The object score (B,) of each token on the frame that it prompts, and these frames."""
    if config.prompt_frame == "first":
        embeds = {name: embeds[name][:1] for name in LEVELS}
    best = sam2.object_scores(embeds, token).max(1)  # of equal scores, that of the earlier frame
    return best.values, best.indices.tolist()


def _track(sam2: LightSam2, embeds: dict[str, Tensor], token: Tensor, prompted: list[int]) -> Tensor:
    """Logits (B, T, 4h, 4w). The expressions that prompt the same frame are one batch."""
    parts: dict[int, Tensor] = {}  # expression -> logits (T, 4h, 4w)
    for frame in sorted(set(prompted)):
        rows = [row for row, own in enumerate(prompted) if own == frame]
        parts |= dict(zip(rows, sam2.track(embeds, token=token[rows], frame=frame), strict=True))
    return torch.stack([parts[row] for row in range(len(token))])


def _write_video(folder: Path, variant: str, row_ids: list[str], predicted: Predicted, threshold: float | None) -> None:
    """Write the masks of one video, with those below the threshold empty; these also go to a file of their own."""
    bins = quantise(predicted.logits)
    frames, size = bins.shape[1:3]
    if threshold is not None and predicted.object_scores is not None:
        scores = predicted.object_scores.tolist()
        hidden = [row for row, score in enumerate(scores) if score < threshold]
        if variant == PREDICTIONS:
            about = {SCORES: dict(zip(row_ids, scores, strict=True))}
            with PredictionWriter(folder / f"{UNGATED}.h5", frames, size, EDGES, about) as writer:
                writer.write([row_ids[row] for row in hidden], bins[hidden])
        bins[hidden] = 0
    with PredictionWriter(folder / f"{variant}.h5", frames, size, EDGES) as writer:
        writer.write(row_ids, bins)


def _join(parts: list[Path], writer: PredictionWriter) -> None:
    """Append the rows of several predictions files."""
    for path in parts:
        part = PredictionReader(path)
        if part.row_ids:
            writer.write(part.row_ids, np.stack([part.read(row_id) for row_id in part.row_ids]))


# --- inputs of each expression ---------------------------------------------------------------------------------------


def plan(rows: pd.DataFrame, controls: Sequence[str]) -> dict[str, dict[str, Job]]:
    """{media_id: {variant: job}} for a split, in the order of `rows`; deterministic.

    rows: row_id, media_id, vid, fid, exp, null. Controls:
    swapped_audio: the audio of another video of the split, with a different vid, because videos of null expressions
        share frames or audio with other videos of their vid.
    permuted_text: each expression gets the text of the next expression of its video that refers to a different object;
        if the video has only one object, a text of another video.
    true_mask: SAM 2 alone, prompted with the ground-truth mask of frame 0; rows without an object are left out.
    Raises RequestError if a control needs a second video and the split has none.
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
    """For each video the next one with a different vid, in an order that does not depend on their content."""
    order = sorted(videos, key=lambda media_id: hashlib.sha256(media_id.encode()).digest())
    vid = {media_id: group["vid"].iloc[0] for media_id, group in videos.items()}
    others = {}
    for place, media_id in enumerate(order):
        following = order[place + 1 :] + order[:place]
        found = next((other for other in following if vid[other] != vid[media_id]), None)
        if found is None:
            raise RequestError(
                f"infer.yaml: controls: swapped_audio and permuted_text need two videos with different vids in a "
                f"split, found only {vid}; remove these controls"
            )
        others[media_id] = found
    return others


def _permuted(group: pd.DataFrame, elsewhere: list[str]) -> list[str]:
    """For each row of a video, the text of the next row (cyclically) with a different object and a different text.

    elsewhere: the texts of another video, used if there is no such row.
    """
    texts, objects = group["exp"].tolist(), group["fid"].tolist()
    count = len(texts)
    permuted = []
    for row in range(count):
        following = [(row + step) % count for step in range(1, count)]
        found = (texts[i] for i in following if objects[i] != objects[row] and texts[i] != texts[row])
        permuted.append(next(found, elsewhere[row % len(elsewhere)]))
    return permuted


def _unfinished(jobs: dict[str, Job], finished: Path) -> dict[str, Job]:
    """The jobs of a video whose masks are not yet in its scratch folder. A file with its final name is complete."""
    return {variant: job for variant, job in jobs.items() if not (finished / f"{variant}.h5").is_file()}


# --- reading ---------------------------------------------------------------------------------------------------------


def _read_ahead(
    todo: dict[str, dict[str, Job]], sources: Sources, folder: RefAvsFolder
) -> Iterator[tuple[str, dict[str, Tensor], dict[str, Inputs]]]:
    """Each video's media_id, embeddings and inputs. Reads the next video while the caller processes the current one."""
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
    visual = sources.visual.read(media_id)
    inputs = {}
    for variant, job in jobs.items():
        if job.masks:
            objects = list(dict.fromkeys(job.masks))
            masks = [load_mask(folder.mask_path(media_id, fid, 0)) for fid in objects]  # (H, W) each
            if len({mask.shape for mask in masks}) > 1:
                side = max(max(mask.shape) for mask in masks)
                masks = [resize_mask(mask, side) for mask in masks]
            prompts = torch.from_numpy(np.stack(masks))  # (objects, H, W)
            given = Inputs(job.row_ids, {}, prompts, [objects.index(fid) for fid in job.masks])
        else:
            words = [sources.text.read(text) for text in job.texts]
            given = Inputs(job.row_ids, fusion_inputs(sources.audio.read(job.audio), visual, words), None, [])
        inputs[variant] = given
    return media_id, embeds, inputs


def fusion_inputs(audio: Arrays, visual: Arrays, words: Sequence[Arrays]) -> dict[str, Tensor]:
    """The fusion module's inputs for B expressions of one video, (B, ...) each, from the items of the feature stores.

    audio: audio (N, dA), audio_valid (N,). visual: visual (N, 1+P, dV). words: text (L, dT), text_mask (L,) of each
    expression.
    """
    shared = {name: _as_input(array) for name, array in (audio | visual).items()}
    fusion = {name: array.expand(len(words), *array.shape) for name, array in shared.items()}
    return fusion | {name: _as_input(np.stack([word[name] for word in words])) for name in ("text", "text_mask")}


def _as_input(array: np.ndarray) -> Tensor:
    """As in training: bool unchanged, all else float32."""
    tensor = torch.from_numpy(array)
    return tensor if tensor.dtype == torch.bool else tensor.float()
