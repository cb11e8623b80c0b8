"""One request of the page: check the bounds, segment the video, and write what the page shows."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import cast
from zipfile import ZIP_STORED, ZipFile

import numpy as np

from samlove.errors import RequestError
from samlove.media import Media, open_media
from samlove.predict import Segmenter
from samlove.predict.clip import Clip, sound_blocks
from samlove.predict.features import Bar
from samlove.predict.output import COCO, DESCRIPTION, MASKS, OVERLAY, write_run
from samlove.web.plot import STEP, write_plot

MAX_MB = 100  # of an uploaded file
MAX_SECONDS = 60.0  # of a video
MAX_PIXELS = 3840 * 2160  # of a frame
MAX_SENTENCES = 5
MAX_CHARACTERS = 300  # of a sentence
RATES = (1, 2, 5, 10)  # tracked frames per second that the page offers
PLOT, ARCHIVE = "plot.png", "masks.zip"
RATE = 16_000  # samples per second, for the loudness
STEPS = {  # the progress bars of `Segmenter.run`, in order
    "audio": "Listening",
    "visual": "Looking",
    "text": "Reading the sentences",
    "sam2": "Encoding frames for SAM 2",
    "track": "Tracking",
}


class Stopped(Exception):
    """Nobody waits for the result any more."""


@dataclass(frozen=True)
class Result:
    """The files of a request. found: for each sentence where it was seen, such as "in 8 of 10 frames"."""

    overlay: Path
    plot: Path
    archive: Path
    sentences: tuple[str, ...]
    found: tuple[str, ...]
    has_sound: bool


def parse_sentences(text: str) -> list[str]:
    """One sentence per line; empty lines are skipped. Raises RequestError if there are none, or too many."""
    sentences = [line.strip() for line in text.splitlines() if line.strip()]
    if not sentences:
        raise RequestError("Type at least one sentence.")
    if len(sentences) > MAX_SENTENCES:
        raise RequestError(f"Expected at most {MAX_SENTENCES} sentences, found {len(sentences)}.")
    if long := next((line for line in sentences if len(line) > MAX_CHARACTERS), None):
        raise RequestError(f"Expected sentences of at most {MAX_CHARACTERS} characters, found one of {len(long):,}.")
    return sentences


def check_video(media: Media, limit: float = MAX_SECONDS) -> None:
    """Raise RequestError if a video is too long, in seconds, or its frames are too large."""
    if media.duration > limit + 0.5:
        raise RequestError(
            f"{media.path}: expected a video of at most {limit:g} s, found {media.duration:.0f} s. "
            "Cut it, or use samlove predict, which takes videos of any length."
        )
    if media.size[0] * media.size[1] > MAX_PIXELS:
        raise RequestError(
            f"{media.path}: expected frames of at most 3840x2160 pixels, found {media.size[0]}x{media.size[1]}. "
            "Scale the video down, or use samlove predict."
        )


def run_job(
    segmenter: Segmenter,
    video: Path,
    text: str,
    fps: float,
    out: Path,
    report: Callable[[float, str], None],
    stopped: Callable[[], bool],
) -> Result:
    """Segment what `text` asks for, and write the results into `out`, a new folder.

    report: is called with the fraction of the work that is done, 0..1, and what is being done. stopped: is asked often;
    True ends the work with `Stopped`.
    Raises RequestError if the request is wrong or out of bounds, SamloveError if the video cannot be decoded.
    """
    sentences = parse_sentences(text)
    with open_media(video) as media:
        check_video(media)
    out.mkdir(parents=True)
    with segmenter.run(video, sentences, fps=fps, scratch=out, bar=_bar(report, stopped)) as run:
        lines = write_run(run, segmenter.setup, out)
        loudness, clip = _loudness(run.media, run.clip), run.clip
        has_sound = run.media.has_sound
    said = json.loads((out / DESCRIPTION).read_text(encoding="utf-8"))
    times, scores = np.array(said["times"]), np.array(said["object_scores"])
    write_plot(out / PLOT, times, scores, loudness, clip.start, clip.end)
    folders = [sorted((out / MASKS / str(number + 1)).iterdir()) for number in range(len(run.sentences))]
    with ZipFile(out / ARCHIVE, "w", ZIP_STORED) as archive:  # PNG is compressed already
        for path in (*(path for folder in folders for path in folder), out / COCO, out / DESCRIPTION):
            archive.write(path, path.relative_to(out))
    found = tuple(line.rpartition(": ")[2] for line in lines)
    return Result(out / OVERLAY, out / PLOT, out / ARCHIVE, run.sentences, found, has_sound)


def _loudness(media: Media, clip: Clip) -> np.ndarray | None:
    """(S,) float32: the root mean square of every STEP seconds of a clip; None for a video without sound."""
    blocks = sound_blocks(media, clip, RATE, round(STEP * RATE))
    parts = [np.sqrt(np.square(block).mean(axis=1)) for block in blocks]
    return np.concatenate(parts) if parts else None


def _bar(report: Callable[[float, str], None], stopped: Callable[[], bool]) -> Bar:
    def bar(total: int, desc: str, unit: str) -> "_Step":
        return _Step(report, stopped, total, desc, unit)

    return cast(Bar, bar)


class _Step:
    """What `Segmenter.run` uses of tqdm: reports the progress of one step, as a part of the whole."""

    def __init__(
        self, report: Callable[[float, str], None], stopped: Callable[[], bool], total: int, desc: str, unit: str
    ) -> None:
        self._report, self._stopped, self._total, self._unit = report, stopped, total, unit
        self._step, self._done, self._name = list(STEPS).index(desc), 0, STEPS[desc]
        self.update(0)

    def update(self, n: int = 1) -> None:
        if self._stopped():
            raise Stopped
        self._done += n
        part = self._done / max(self._total, 1)
        self._report((self._step + part) / len(STEPS), f"{self._name}: {self._done} of {self._total} {self._unit}s")

    def __enter__(self) -> "_Step":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing is open."""
