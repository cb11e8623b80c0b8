"""One expression of a run as a picture: frames with the predicted mask, and the audio below them."""

from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from samlove.data.dataset import RefAvsFolder, load_audio, load_frame, load_mask
from samlove.errors import RequestError
from samlove.scoring.report.clips import DASHES, FILL, FILL_ALPHA, FRAME_WIDTH, draw_frame
from samlove.scoring.report.figures import Axes, Figure, FigureCanvasAgg, Rectangle, plain_style
from stores import PredictionReader

SHOWN = 5  # frames, evenly spaced; each stands above the audio from its own second to the next shown one
AREA = (0.02, 0.25)  # of the frame: the default expression's ground-truth mask is neither tiny nor huge
SUFFIXES = (".png", ".jpg", ".jpeg")
MARGIN, GAP, HEADER, STRIP, FOOTER = 28, 10, 96, 74, 32  # pixels
DPI = 100
BARS = 64  # below one frame
INK, GREY, WAVE, PAPER = "#1b1f24", "#59636e", "#2b62c4", "#f3f5f8"


def choose_row(rows: pd.DataFrame, folder: RefAvsFolder, frames: int) -> dict:
    """The expression that the picture shows by default; the same run gives the same one.

    rows: of rows.parquet. Of the seen expressions that need sound but not sight (all seen ones if cues are not known),
    in landscape videos with at least two objects, the one with the highest J&F whose ground-truth mask covers AREA of
    the frame on average. If there is none, the expression with the highest J&F. Raises RequestError if no expression
    has a J&F.
    """
    scored = rows[rows["JF"].notna()].sort_values(["JF", "row_id"], ascending=[False, True])
    if scored.empty:
        raise RequestError("no expression of this run has a J&F: the test splits have no objects")
    wanted = scored[(scored["split"] == "test_s") & (scored.groupby("media_id")["fid"].transform("nunique") > 1)]
    if "sound" in wanted:
        wanted = wanted[wanted["sound"].astype(bool) & ~wanted["sight"].astype(bool)]
    for row in wanted.to_dict("records"):
        masks = [load_mask(path) for path in folder.mask_paths(row["media_id"], int(row["fid"]), frames)]  # (H, W) each
        area, (height, width) = np.mean([mask.mean() for mask in masks]), masks[0].shape
        if AREA[0] <= area <= AREA[1] and width > height:
            return {str(key): value for key, value in row.items()}
    return {str(key): value for key, value in scored.iloc[0].to_dict().items()}


def draw_picture(row: dict, folder: RefAvsFolder, reader: PredictionReader) -> Image.Image:
    """The picture of one row of rows.parquet: title, SHOWN frames, loudness; RGB on white.

    A null expression has no ground-truth mask to outline.
    """
    bins = reader.read(row["row_id"])  # (T, H, W)
    frames = len(bins)
    paths = folder.frame_paths(row["media_id"], frames)
    masks = None if row["null"] else folder.mask_paths(row["media_id"], int(row["fid"]), frames)
    times = np.unique(np.linspace(0, frames, SHOWN, endpoint=False).round().astype(int)).tolist()
    images = [draw_frame(load_frame(paths[t]), bins[t], None if masks is None else load_mask(masks[t])) for t in times]
    samples, rate = load_audio(folder.audio_path(row["media_id"]))

    columns, height = len(times), images[0].height
    size = (2 * MARGIN + columns * FRAME_WIDTH + (columns - 1) * GAP, HEADER + height + GAP + STRIP + FOOTER)
    with plain_style({"font.family": "DejaVu Sans", "font.size": 13}):
        figure = Figure(figsize=(size[0] / DPI, size[1] / DPI), dpi=DPI, facecolor="white")
        canvas = FigureCanvasAgg(figure)
        _draw_header(figure, size, row)
        peak = max(float(np.abs(samples[: frames * rate]).max(initial=0)), 1e-4)
        for column, (t, image, end) in enumerate(zip(times, images, [*times[1:], frames], strict=True)):
            left = MARGIN + column * (FRAME_WIDTH + GAP)
            axis = _axes(figure, size, left, HEADER, FRAME_WIDTH, height)
            axis.imshow(np.asarray(image), interpolation="none", aspect="auto")
            axis = _axes(figure, size, left, HEADER + height + GAP, FRAME_WIDTH, STRIP)
            _draw_wave(axis, samples[t * rate : end * rate] / peak, (end - t) * rate)
            axis.text(0, -0.12, f"{t} s", transform=axis.transAxes, va="top", color=GREY)
            if end == frames:
                axis.text(1, -0.12, f"{end} s", transform=axis.transAxes, va="top", ha="right", color=GREY)
        canvas.draw()
        pixels = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    return Image.fromarray(pixels)


def save(image: Image.Image, path: Path) -> None:
    """PNG or JPEG by suffix, small enough for a README; replaces an existing file, by a rename."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        if path.suffix.lower() == ".png":
            # 256 colours: a third of the bytes. Dithering would undo that.
            small = image.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
            small.save(partial, "PNG", optimize=True)
        else:
            image.save(partial, "JPEG", quality=88, optimize=True)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _draw_header(figure: Figure, size: tuple[int, int], row: dict) -> None:
    """The expression in quotes, a legend below it, the scores at the right."""
    axis = _axes(figure, size, MARGIN, 0, size[0] - 2 * MARGIN, HEADER)
    axis.set(xlim=(0, size[0] - 2 * MARGIN), ylim=(HEADER, 0))
    title = f"“{row['exp']}”"
    fontsize = min(21.0, 0.021 * size[0] * 48 / len(title))  # a longer one in smaller type, on one line
    axis.text(0, 34, title, fontsize=fontsize, fontweight="bold", color=INK, va="center")
    fill = tuple(part / 255 * FILL_ALPHA + 1 - FILL_ALPHA for part in FILL)
    axis.add_patch(Rectangle((0, 66), 22, 14, color=fill))
    axis.text(30, 74, "predicted mask", color=GREY, va="center")
    for i, rise in enumerate((4, 8, 6, 3)):
        axis.add_patch(Rectangle((200 + 6 * i, 73 - rise), 3, 2 * rise, color=WAVE))
    axis.text(230, 74, "loudness", color=GREY, va="center")
    if row["null"]:
        axis.text(size[0] - 2 * MARGIN, 74, "nothing in the video matches", color=GREY, va="center", ha="right")
        return
    for i in range(4):
        axis.add_patch(Rectangle((342 + 6 * i, 71), 6, 5, color=[part / 255 for part in DASHES[i % 2]]))
    axis.text(374, 74, "ground truth", color=GREY, va="center")
    scores = f"J {100 * row['J']:.0f}%   F {100 * row['F']:.0f}%"
    axis.text(size[0] - 2 * MARGIN, 74, scores, color=GREY, va="center", ha="right")


def envelope(samples: np.ndarray, count: int) -> list[float]:
    """BARS heights in 0..1 of `count` samples in -1..1; silence if `samples` ends before.

    Heights are square roots of amplitudes, so that quiet sounds show beside loud ones.
    """
    padded = np.zeros(count, dtype=np.float32)
    padded[: len(samples)] = samples[:count]
    return [float(np.abs(part).max(initial=0)) ** 0.5 for part in np.array_split(padded, BARS)]


def _draw_wave(axis: Axes, samples: np.ndarray, count: int) -> None:
    """The envelope of `samples` in -1..1, mirrored."""
    heights = envelope(samples, count)
    axis.set_facecolor(PAPER)
    axis.patch.set_visible(True)
    axis.set_axis_on()
    axis.tick_params(left=False, bottom=False, labelleft=False, labelbottom=False)
    axis.spines[:].set_visible(False)
    axis.axhline(0, color=WAVE, lw=1)
    axis.bar(np.arange(BARS), np.multiply(heights, 2), bottom=np.negative(heights), width=0.62, color=WAVE, lw=0)
    axis.set(xlim=(-0.5, BARS - 0.5), ylim=(-1.12, 1.12))


def _axes(figure: Figure, size: tuple[int, int], left: int, top: int, width: int, height: int) -> Axes:
    """Bare axes at a place in pixels from the top left corner."""
    bottom = size[1] - top - height
    axis = figure.add_axes((left / size[0], bottom / size[1], width / size[0], height / size[1]))
    axis.set_axis_off()
    return axis
