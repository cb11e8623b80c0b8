"""Draws masks on frames: one colour per sentence, a legend with object scores, and contact sheets with loudness."""

from bisect import bisect
from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import maximum_filter, minimum_filter

from samlove.errors import printable
from samlove.scoring.report.clips import FRAME_WIDTH
from samlove.scoring.report.figures import font_with
from samlove.scoring.report.picture import BARS, GAP, GREY, INK, MARGIN, PAPER, STRIP, WAVE, envelope

# Okabe and Ito's palette, which colour-blind people can tell apart, without black; repeated after the seventh sentence.
COLOURS = (
    (204, 121, 167),  # reddish purple: few objects have it
    (230, 159, 0),  # orange
    (86, 180, 233),  # sky blue
    (240, 228, 66),  # yellow
    (0, 158, 115),  # bluish green
    (213, 94, 0),  # vermilion
    (0, 114, 178),  # blue
)
FILL_ALPHA = 0.45
EDGE = (20, 20, 20)  # outside the contour, which shows on bright and dark objects alike
FAINT = 0.02  # of a soft mask: not drawn
BAR, ON_BAR = "#1b1f24", "#ffffff"  # legend of a frame: background and text
SMALLEST_TEXT = 11  # pixels
WIDTH_PER_TEXT = 46  # the width of a frame in heights of its text
ASCENT = 0.93  # of the text's size: from the top of a line to its baseline
LINES = 3  # of a sentence in the legend; the rest becomes an ellipsis
WIDEST_SCORE = "-00.00"
COLUMNS = 5  # of a contact sheet
SHEET_TEXT = 17  # pixels
CAPTION = "Below each frame: loudness, time, and object score"


def draw(
    frame: np.ndarray, masks: np.ndarray, sentences: Sequence[str], scores: Sequence[float] | np.ndarray
) -> np.ndarray:
    """The frame with its masks, and a legend below it: uint8 (H + legend, W, 3).

    frame: uint8 (H,W,3). masks: (K,H,W), bool, or float in 0..1, with the contour at 0.5 and a fill as dense as the
    value. sentences, scores: K each; object scores are shown with two decimals, NaN not at all. The height of the
    legend depends on the sentences and W only, so all frames of a video get the same.
    """
    height, width = frame.shape[:2]
    size = max(SMALLEST_TEXT, width // WIDTH_PER_TEXT)
    legend, rows = _legend(tuple(sentences), width, size)
    bar = legend.copy()
    pen = ImageDraw.Draw(bar)
    for row, score in zip(rows, scores, strict=True):
        _write_right(pen, (width - size // 2, row), _score(float(score)), size, ON_BAR)
    return np.concatenate([paint(frame, masks, max(1, min(height, width) // 240)), np.asarray(bar)])


def paint(frame: np.ndarray, masks: np.ndarray, thickness: int) -> np.ndarray:
    """The frame uint8 (H,W,3) with masks (K,H,W), as in `draw`, filled and outlined `thickness` pixels wide."""
    painted = frame.copy()
    for mask, colour in zip(masks, _colours(len(masks)), strict=True):
        rows, columns = (np.flatnonzero((mask > FAINT).any(axis)) for axis in (1, 0))
        if not len(rows):
            continue
        margin = thickness + 1
        box = tuple(slice(max(side[0] - margin, 0), side[-1] + 1 + margin) for side in (rows, columns))
        part = mask[box].astype(np.float32)
        region = painted[box] + (np.array(colour, np.float32) - painted[box]) * (FILL_ALPHA * part[..., None])
        inside = (part >= 0.5).astype(np.uint8)
        inner = minimum_filter(inside, 2 * thickness + 1, mode="nearest")
        outer = maximum_filter(inside, 2 * ((thickness + 1) // 2) + 1, mode="nearest")
        region[outer > inside] = EDGE
        region[inside > inner] = colour
        painted[box] = region.round().astype(np.uint8)
    return painted


def contact_sheet(
    frames: np.ndarray,
    masks: np.ndarray,
    times: Sequence[float] | np.ndarray,
    sound: np.ndarray | None,
    sentences: Sequence[str],
    scores: np.ndarray,
    rate: int = 16_000,
) -> Image.Image:
    """All frames in rows of COLUMNS, each with the loudness from its time to the next one's below it, as in Figure 5.

    frames: uint8 (T,H,W,3), at most a few dozen. masks: (K,T,H,W) as in `draw`. times: (T,) seconds, ascending.
    sound: (S,) float32, `rate` a second, from times[0] on; None if there is none. sentences: K. scores: (K,T).
    """
    count, (height, width) = len(frames), frames.shape[1:3]
    size = (FRAME_WIDTH, max(round(FRAME_WIDTH * height / width), 1))
    columns = max(min(count, COLUMNS), 3)  # room for the sentences
    sheet_width = 2 * MARGIN + columns * FRAME_WIDTH + (columns - 1) * GAP
    legend, _ = _legend(tuple(sentences), sheet_width - 2 * MARGIN, SHEET_TEXT, "#ffffff", INK, scores=False)
    score_rows = -(-len(sentences) // 3)
    cell = size[1] + GAP + STRIP + (1 + score_rows) * SHEET_TEXT * 3 // 2 + GAP
    top = MARGIN + legend.height + 2 * SHEET_TEXT + GAP
    sheet = Image.new("RGB", (sheet_width, top + -(-count // COLUMNS) * cell + GAP), "white")
    sheet.paste(legend, (MARGIN, MARGIN))
    pen = ImageDraw.Draw(sheet)
    _write(pen, (MARGIN, top - 2 * SHEET_TEXT), CAPTION, SHEET_TEXT, GREY)
    ends = _ends(np.asarray(times, dtype=np.float64), sound, rate)
    peak = 1.0 if sound is None else max(float(np.abs(sound).max(initial=0)), 1e-4)
    for t in range(count):
        x, y = MARGIN + t % COLUMNS * (FRAME_WIDTH + GAP), top + t // COLUMNS * cell
        image = np.asarray(Image.fromarray(frames[t]).resize(size, Image.Resampling.LANCZOS))
        small = [_resize(mask, size) for mask in masks[:, t]]
        sheet.paste(Image.fromarray(paint(image, np.stack(small) if small else masks[:, t], 2)), (x, y))
        y += size[1] + GAP
        if sound is not None:
            first, last = (round((time - times[0]) * rate) for time in (times[t], ends[t]))
            _draw_loudness(pen, x, y, envelope(sound[first:last] / peak, max(last - first, 1)))
        else:
            pen.rectangle((x, y, x + FRAME_WIDTH - 1, y + STRIP - 1), fill=PAPER)
            _write(pen, (x + GAP, y + (STRIP - SHEET_TEXT) // 2), "no sound", SHEET_TEXT, GREY)
        y += STRIP + GAP // 2
        _write(pen, (x, y), f"{times[t]:.4g} s", SHEET_TEXT, GREY)
        for k, colour in enumerate(_colours(len(sentences))):
            at = x + k % 3 * FRAME_WIDTH // 3, y + (1 + k // 3) * SHEET_TEXT * 3 // 2
            if text := _score(float(scores[k][t])):
                pen.rectangle((at[0], at[1] + 3, at[0] + SHEET_TEXT - 5, at[1] + SHEET_TEXT - 2), fill=colour)
                _write(pen, (at[0] + SHEET_TEXT, at[1]), text, SHEET_TEXT, INK)
    return sheet


def _ends(times: np.ndarray, sound: np.ndarray | None, rate: int) -> np.ndarray:
    """The second at which the sound below each frame ends: the next frame's; the last one is as long as the others."""
    if len(times) > 1:
        return np.append(times[1:], times[-1] + np.median(np.diff(times)))
    return times + (1.0 if sound is None else len(sound) / rate)


def _draw_loudness(pen: ImageDraw.ImageDraw, x: int, y: int, heights: list[float]) -> None:
    pen.rectangle((x, y, x + FRAME_WIDTH - 1, y + STRIP - 1), fill=PAPER)
    middle, step = y + STRIP // 2, FRAME_WIDTH / BARS
    for bar, height in enumerate(heights):
        left, half = x + round(bar * step), round(height * (STRIP // 2 - 3))
        pen.rectangle((left, middle - half, left + round(0.62 * step) - 1, middle + half), fill=WAVE)


def _resize(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    image = Image.fromarray(mask.astype(np.float32))
    return np.asarray(image.resize(size, Image.Resampling.BILINEAR))


def _colours(count: int) -> list[tuple[int, int, int]]:
    return [COLOURS[k % len(COLOURS)] for k in range(count)]


def _score(score: float) -> str:
    return "" if np.isnan(score) else f"{score:.2f}"


@lru_cache(maxsize=8)
def _legend(
    sentences: tuple[str, ...], width: int, size: int, paper: str = BAR, ink: str = ON_BAR, scores: bool = True
) -> tuple[Image.Image, list[int]]:
    """Swatch and sentence, a block of lines each, and the heights at which their scores go. size: of the text."""
    left, line = 2 * size, round(1.3 * size)
    room = width - left - (round(_length(WIDEST_SCORE, size)) + size if scores else 0)
    plain = [printable(" ".join(text.split())).encode("utf-8", "replace").decode() for text in sentences]
    blocks = [_wrapped(sentence, room, size) for sentence in plain]
    height = sum(map(len, blocks)) * line + (len(blocks) + 1) * (size // 3)
    bar = Image.new("RGB", (width, height), paper)
    pen = ImageDraw.Draw(bar)
    y, rows = size // 3, []
    for block, colour in zip(blocks, _colours(len(blocks)), strict=True):
        pen.rectangle((size // 2, y + size // 6, size // 2 + size - 1, y + size // 6 + size - 1), fill=colour)
        rows.append(y)
        for text in block:
            _write(pen, (left, y), text, size, ink)
            y += line
        y += size // 3
    return bar, rows


def _wrapped(text: str, room: float, size: int) -> list[str]:
    """At most LINES lines, each at most `room` pixels long; the rest of a longer text becomes an ellipsis."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if _length(longer, size) <= room or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > LINES:
        lines[LINES - 1 :] = [" ".join(lines[LINES - 1 :])]
    return [_shortened(line, room, size) for line in lines]


def _shortened(text: str, room: float, size: int) -> str:
    if _length(text, size) <= room:
        return text
    kept = bisect(range(len(text)), room, key=lambda end: _length(text[:end] + "…", size)) - 1
    return text[: max(kept, 0)].rstrip() + "…"


def _write(pen: ImageDraw.ImageDraw, corner: tuple[int, int], text: str, size: int, ink: str) -> None:
    """Write a line with its top left corner at `corner`."""
    x: float = corner[0]
    for font, part in _runs(text, size):
        pen.text((x, corner[1] + round(ASCENT * size)), part, fill=ink, font=font, anchor="ls")
        x += font.getlength(part)


def _write_right(pen: ImageDraw.ImageDraw, corner: tuple[int, int], text: str, size: int, ink: str) -> None:
    _write(pen, (corner[0] - round(_length(text, size)), corner[1]), text, size, ink)


def _length(text: str, size: int) -> float:
    return sum(font.getlength(part) for font, part in _runs(text, size))


def _runs(text: str, size: int) -> list[tuple[ImageFont.FreeTypeFont, str]]:
    """The text in parts of one font each."""
    return [(_font(path, size), "".join(part)) for path, part in groupby(text, font_with)]


@lru_cache(maxsize=64)
def _font(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)
