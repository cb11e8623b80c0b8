"""Writes what `samlove predict` found into a folder: video, contact sheet, masks and a description, frame by frame.

overlay.mp4            the frames with masks and legend, and the original sound
contact_sheet.png      up to ten frames with masks and loudness
masks/1/00000.png      the mask of sentence 1 on frame 0: 255 on the object, 0 elsewhere; at the video's size
masks.json             all masks as COCO results: image_id is the frame, category_id the sentence
prediction.json        times, object scores, windows, and what the masks were made with
"""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from samlove import __version__
from samlove.data.rle import encode_rle
from samlove.errors import RequestError, absence, path_text
from samlove.media import write_video
from samlove.overlay import contact_sheet, draw
from samlove.predict.clip import sound_blocks
from samlove.predict.segment import Run, masks_of
from samlove.predict.setup import Setup
from samlove.predict.tracking import TrackedWindow

SCHEMA = 1
DESCRIPTION = "prediction.json"
OVERLAY, SHEET, MASKS, COCO = "overlay.mp4", "contact_sheet.png", "masks", "masks.json"
OURS = {DESCRIPTION, OVERLAY, SHEET, MASKS, COCO, "video.mp4"}  # the last one is the example's
SHOWN = 10  # frames of the contact sheet
RATE, STEP = 16_000, 160  # of the sound below it: samples a second, and samples of which one is drawn


def check_out(out: Path, inputs: Iterable[Path]) -> None:
    """Raise RequestError unless `out` can be replaced without loss: it is not there, or empty, or has an earlier
    prediction and nothing else, and none of the inputs is in it."""
    special = "a link" if out.is_symlink() else "a mount point" if os.path.ismount(out) else None
    if special or (out.exists() and not out.is_dir()):
        raise RequestError(
            f"{out}: {special or absence(out)}; expected a new folder, or an earlier prediction; choose another --out"
        )
    whole = os.path.realpath(out)
    if other := next((path for path in inputs if Path(os.path.realpath(path)).is_relative_to(whole)), None):
        raise RequestError(f"{out}: would be replaced, but has {other} in it; choose another --out")
    if Path.cwd().is_relative_to(whole):
        raise RequestError(f"{out}: is the current folder, or has it in it; choose another --out")
    names = {path.name for path in out.iterdir()} if out.exists() else set()
    if names and (DESCRIPTION not in names or names - OURS):
        found = ", ".join(sorted(names - OURS)[:3]) or f"no {DESCRIPTION}"
        raise RequestError(f"{out}: expected an earlier prediction alone, found {found}; choose another --out")


def write_run(run: Run, setup: Setup, folder: Path) -> list[str]:
    """Track the clip of `run`, and write everything into the existing `folder`, in constant memory.

    Returns a line about each sentence.
    """
    writer = _Writer(run, folder)
    seconds = run.clip.end - run.clip.start
    write_video(folder / OVERLAY, writer.frames(), run.clip.fps, run.media, run.clip.start, seconds)
    writer.write_sheet()
    description = {**_describe(run, setup), **writer.found()}
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return writer.summary()


class _Writer:
    """Writes masks while it gives the frames of the overlay."""

    def __init__(self, run: Run, folder: Path) -> None:
        self._run, self._folder = run, folder
        self._scores: list[np.ndarray] = []  # (K, n) of each window
        self._windows: list[dict[str, Any]] = []
        shown = np.linspace(0, run.clip.frames - 1, min(SHOWN, run.clip.frames))
        self._seen = np.zeros(len(run.sentences), int)  # frames with a mask
        self._sheet: dict[int, tuple[np.ndarray, np.ndarray] | None] = dict.fromkeys(shown.round().astype(int).tolist())

    def frames(self) -> Iterator[np.ndarray]:
        """The drawn frames in order. Masks are written before their frame is given."""
        run, folders = self._run, []
        for number in range(1, len(run.sentences) + 1):
            folders.append(self._folder / MASKS / str(number))
            folders[-1].mkdir(parents=True)
        with (self._folder / COCO).open("w", encoding="utf-8") as file:
            before = "["
            for window in run.windows:
                self._note(window)
                for number, frame, masks, scores in self._decoded(window):
                    self._seen += masks.any(axis=(1, 2))
                    for sentence, (mask, score, folder) in enumerate(zip(masks, scores, folders, strict=True), start=1):
                        Image.fromarray(mask.astype(np.uint8) * 255).save(folder / f"{number:05d}.png")
                        chance = 1 / (1 + float(np.exp(-np.float64(score))))
                        row = {"image_id": number, "category_id": sentence, "score": round(chance, 6)}
                        file.write(f"{before}\n{json.dumps({**row, 'segmentation': encode_rle(mask)})}")
                        before = ","
                    yield draw(frame, masks, run.sentences, scores)
            file.write("\n]\n")

    def _decoded(self, window: TrackedWindow) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
        """Number, frame (H,W,3), masks (K,H,W) and scores (K,) of each frame of a window."""
        run, times = self._run, self._run.clip.times
        first, count = window.window.first, window.logits.shape[1]
        for at in range(0, count, run.clip.N):
            rows = range(at, min(at + run.clip.N, count))
            frames = run.media.frames_at(times[first + rows.start : first + rows.stop].tolist())
            for frame, row in zip(frames, rows, strict=True):
                masks = masks_of(window.logits[:, row], frame.shape[:2])
                if first + row in self._sheet:
                    self._sheet[first + row] = frame, masks
                yield first + row, frame, masks, window.scores[:, row]

    def _note(self, window: TrackedWindow) -> None:
        self._scores.append(window.scores)
        prompts = [None if prompt is None else asdict(prompt) for prompt in window.prompts]
        self._windows.append({"start": window.window.start, "end": window.window.end, "prompts": prompts})

    def write_sheet(self) -> None:
        """The contact sheet, of frames that were given before."""
        run, numbers = self._run, list(self._sheet)
        frames, masks = zip(*(pair for pair in self._sheet.values() if pair), strict=True)
        scores = np.concatenate(self._scores, axis=1)[:, numbers]
        times, sound = run.clip.times[numbers], self._loudness()
        sheet = contact_sheet(
            np.stack(frames), np.stack(masks, axis=1), times, sound, run.sentences, scores, RATE // STEP
        )
        sheet.save(self._folder / SHEET)

    def _loudness(self) -> np.ndarray | None:
        """(S,) float32: the largest amplitude of every STEP samples; None for a video without sound."""
        blocks = sound_blocks(self._run.media, self._run.clip, RATE, STEP)
        parts = [np.abs(block).max(axis=1) for block in blocks]
        return np.concatenate(parts) if parts else None

    def summary(self) -> list[str]:
        total = self._run.clip.frames
        return [
            f"{number}  {sentence}: in {seen} of {total} frames" if seen else f"{number}  {sentence}: not found"
            for number, (sentence, seen) in enumerate(zip(self._run.sentences, self._seen, strict=True), start=1)
        ]

    def found(self) -> dict[str, Any]:
        scores = np.concatenate(self._scores, axis=1)
        return {
            "times": [round(float(time), 6) for time in self._run.clip.times],
            "object_scores": [[round(float(score), 4) for score in row] for row in scores],
            "windows": self._windows,
        }


def _describe(run: Run, setup: Setup) -> dict[str, Any]:
    media, clip, header = run.media, run.clip, setup.header
    return {
        "schema": SCHEMA,
        "samlove": __version__,
        "video": {
            "name": path_text(media.path.name),
            "digest": run.digest,
            "size": list(media.size),
            "seconds": media.duration,
            "fps": media.fps,
            "sound": media.has_sound,
        },
        "clip": {"start": clip.start, "end": clip.end, "fps": clip.fps, "frames": clip.frames},
        "sentences": list(run.sentences),
        "checkpoint": {
            "name": path_text(setup.checkpoint.name),
            "sha256": setup.sha256,
            "sam2_sha256": header.sam2_sha256,
        },
        "settings": {**setup.infer.model_dump(include={"precision", "prompt_frame"}), "threshold": header.threshold},
        "features": run.fingerprints,
    }
