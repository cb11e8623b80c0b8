"""The examples in the report: their choice, and their frames, masks and loudness (modelled on Figure 5)."""

import base64
import io
from typing import NamedTuple

import numpy as np
import pandas as pd
from PIL import Image
from scipy.ndimage import binary_dilation

from samlove.data.dataset import RefAvsFolder, load_audio, load_frame, load_mask
from samlove.scoring.evaluate import CONTROLS, CUES
from samlove.scoring.metrics import JACCARD_BIN, histogram, jaccard_of
from stores import PredictionReader

FRAME_WIDTH = 256  # pixels of an embedded frame: twice its width in a ten-column strip, so that the zoom is sharp
MAX_HEIGHT = 2048  # pixels of an embedded frame; a higher one is compressed
FILL = (255, 30, 130)  # predicted mask
FILL_ALPHA = 0.5
OUTLINE = 4  # pixels around the ground-truth mask
DASHES = ((255, 230, 0), (0, 0, 0))  # of the outline: no object or background has such stripes
DASH = 12  # pixels
FLOOR_DB = -60.0  # counts as silence
NULL_SHARE = 4  # one example in 4 is a null expression


class Frame(NamedTuple):
    time: int  # seconds
    image: str  # data URI
    jaccard: float | None  # J of this frame; None for a null expression
    loudness: float  # dBFS of this second, FLOOR_DB if silent
    height: float  # of the loudness bar: amplitude in percent of the video's loudest second


class Clip(NamedTuple):
    row: dict  # a row of rows.parquet
    rank: str  # such as "median of 80"
    cues: str
    controls: dict[str, float]  # {control: its J&F, or J for true_mask}, fractions
    frames: list[Frame]


def choose(rows: pd.DataFrame, clips: int) -> list[tuple[dict, str]]:
    """Rows of each test split from best to worst, evenly spaced by rank, each with its rank in words.

    rows: from rows.parquet. A quarter are null expressions; seen and unseen share the rest.
    """
    null = min(max(clips // NULL_SHARE, 1), clips)
    shares = {"test_s": (clips - null + 1) // 2, "test_u": (clips - null) // 2, "test_n": null}
    chosen = []
    for split, share in shares.items():
        score = "S" if split == "test_n" else "JF"
        ranked = rows[(rows["split"] == split) & rows[score].notna()]
        ranked = ranked.sort_values([score, "row_id"], ascending=[split == "test_n", True])
        places = sorted({round(place) for place in np.linspace(0, len(ranked) - 1, share)}) if len(ranked) else []
        for place in places:
            row = {str(key): value for key, value in ranked.iloc[place].to_dict().items()}
            chosen.append((row, _rank(place, len(ranked))))
    return chosen


def _rank(place: int, count: int) -> str:
    named = {0: "best", count - 1: "worst", round((count - 1) / 2): "median"}
    return f"{named.get(place, f'rank {place + 1}')} of {count}"


def draw_clip(row: dict, rank: str, folder: RefAvsFolder, reader: PredictionReader) -> Clip:
    """A row with its frames drawn: predicted mask filled, ground-truth mask outlined, loudness per second."""
    bins = reader.read(row["row_id"])  # (T, H, W)
    frames, _, size = bins.shape
    images = [load_frame(path) for path in folder.frame_paths(row["media_id"], frames)]
    object_ = (row["media_id"], int(row["fid"]), frames)
    own_size = None if row["null"] else [load_mask(path) for path in folder.mask_paths(*object_)]
    truth = None if row["null"] else folder.load_masks(*object_, size)
    loudness = second_loudness(*load_audio(folder.audio_path(row["media_id"])), frames)
    bars = [0.0 if level <= FLOOR_DB else 100 * 10 ** ((level - max(loudness)) / 20) for level in loudness]
    drawn = []
    for t in range(frames):
        image = draw_frame(images[t], bins[t], None if own_size is None else own_size[t])
        score = None if truth is None else jaccard_of(histogram(bins[t : t + 1], truth[t : t + 1]))
        drawn.append(Frame(t, _data_uri(image), score, loudness[t], bars[t]))
    cues = "+".join(c for c in CUES if row.get(c))
    names = {c: f"J_{c}" if c == "true_mask" else f"JF_{c}" for c in CONTROLS}
    controls = {c: row[name] for c, name in names.items() if not pd.isna(row.get(name))}
    return Clip(row, rank, cues, controls, drawn)


def second_loudness(samples: np.ndarray, rate: int, seconds: int) -> list[float]:
    """Root mean square of each second in dBFS, at least FLOOR_DB; silence after the end of the audio."""
    padded = np.zeros(seconds * rate, dtype=np.float64)
    padded[: len(samples)] = samples[: len(padded)]
    power = (padded.reshape(seconds, rate) ** 2).mean(1)  # (seconds,)
    return np.maximum(10 * np.log10(np.maximum(power, 1e-12)), FLOOR_DB).tolist()


def draw_frame(frame: np.ndarray, bins: np.ndarray, truth: np.ndarray | None) -> Image.Image:
    """Draw on a frame uint8 (H, W, 3): predicted bins uint8 (h, w) filled, ground-truth mask bool (H', W') outlined."""
    height = round(frame.shape[0] * FRAME_WIDTH / frame.shape[1])
    size = (FRAME_WIDTH, min(max(height, 1), MAX_HEIGHT))
    canvas = np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS)).astype(np.float32)
    smooth = Image.fromarray(bins).resize(size, Image.Resampling.BILINEAR)
    predicted = np.asarray(smooth) >= JACCARD_BIN
    canvas[predicted] = canvas[predicted] * (1 - FILL_ALPHA) + np.array(FILL, dtype=np.float32) * FILL_ALPHA
    if truth is not None:
        resized = Image.fromarray(truth.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
        shape = np.asarray(resized) > 0
        line = binary_dilation(shape, iterations=OUTLINE) & ~shape
        y, x = np.nonzero(line)
        canvas[y, x] = np.array(DASHES)[(x + y) // DASH % 2]
    return Image.fromarray(canvas.round().astype(np.uint8))


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
