"""Masks drawn on frames, legends and contact sheets."""

import numpy as np
import pytest
from PIL import Image

from samlove.overlay import COLOURS, COLUMNS, EDGE, FILL_ALPHA, contact_sheet, draw, paint
from samlove.scoring.report.clips import FRAME_WIDTH
from samlove.scoring.report.picture import GAP, MARGIN, STRIP
from tests.media_files import made_frames, made_sound

SENTENCES = ["the one that sounds first", "a red car"]


def disc(size: tuple[int, int], x: float, y: float, radius: float) -> np.ndarray:
    """bool (H, W); centre and radius are fractions of the height."""
    height, width = size
    rows, columns = np.mgrid[:height, :width] / height
    return (columns - x) ** 2 + (rows - y) ** 2 < radius**2


def test_fills_and_outlines_the_mask_and_nothing_else() -> None:
    frame = made_frames(1, 320, 240)[0]
    masks = np.stack([disc((240, 320), 0.4, 0.5, 0.2), disc((240, 320), 1.0, 0.5, 0.2)])
    drawn = paint(frame, masks, 2)
    far = ~(disc((240, 320), 0.4, 0.5, 0.23) | disc((240, 320), 1.0, 0.5, 0.23))
    assert np.array_equal(drawn[far], frame[far])
    for mask, colour, centre in zip(masks, COLOURS, ((120, 96), (120, 240)), strict=False):
        mixed = frame[centre] * (1 - FILL_ALPHA) + np.array(colour) * FILL_ALPHA
        assert np.abs(drawn[centre] - mixed).max() <= 1
        assert (drawn[mask] == colour).all(axis=1).sum() > 100  # the contour
    assert (drawn == EDGE).all(axis=2).sum() > 100


def test_a_hard_mask_is_the_same_as_bool_or_float_and_an_empty_one_draws_nothing() -> None:
    frame = made_frames(1, 160, 120)[0]
    mask = disc((120, 160), 0.0, 0.1, 0.4)[None]  # over two edges of the frame
    assert np.array_equal(paint(frame, mask, 1), paint(frame, mask.astype(np.float32), 1))
    assert np.array_equal(paint(frame, np.zeros_like(mask), 1), frame)
    assert np.array_equal(paint(frame, mask[:0], 1), frame)
    faint = paint(frame, 0.4 * mask.astype(np.float32), 1)
    assert not np.array_equal(faint, frame) and not (faint == EDGE).all(axis=2).any()  # no contour below 0.5


def test_the_frame_passed_in_is_not_changed() -> None:
    frame = made_frames(1)[0]
    before = frame.copy()
    draw(frame, np.ones((1, 48, 64), dtype=bool), SENTENCES[:1], [1.0])
    assert np.array_equal(frame, before)


@pytest.mark.parametrize(("width", "height"), [(128, 96), (1280, 720), (720, 1280), (3840, 2160)])
def test_the_legend_is_the_same_size_whatever_the_scores(width: int, height: int) -> None:
    frame, masks = np.zeros((height, width, 3), dtype=np.uint8), np.zeros((2, height, width), dtype=bool)
    drawn = [draw(frame, masks, SENTENCES, scores) for scores in ([1.0, -20.0], [np.nan, 31.5], [0.0, 0.0])]
    assert len({image.shape for image in drawn}) == 1 and drawn[0].shape[1:] == (width, 3)
    legends = [image[height:] for image in drawn]
    assert 2 * 11 < len(legends[0]) < height
    assert not np.array_equal(legends[0], legends[1])
    for colour in COLOURS[:2]:  # swatches
        assert (legends[0] == colour).all(axis=2).sum() >= 9 * 9
    assert not np.array_equal(legends[1][:, width // 2 :], legends[2][:, width // 2 :])


def test_long_sentences_wrap_and_then_end_in_an_ellipsis() -> None:
    frame, mask = np.zeros((96, 128, 3), dtype=np.uint8), np.zeros((1, 96, 128), dtype=bool)
    heights = [len(draw(frame, mask, [("word " * count).strip()], [1.0])) for count in (1, 4, 8, 60, 600)]
    assert heights[0] < heights[1] < heights[2] <= heights[3] == heights[4]
    assert len(draw(frame, mask, ["x" * 1000], [1.0])) == heights[0]  # no place to break it


def test_any_text_can_be_written() -> None:
    frame, mask = np.zeros((96, 640, 3), dtype=np.uint8), np.zeros((1, 96, 640), dtype=bool)
    plain = draw(frame, mask, ["?"], [1.0])
    for text in (
        "",
        " ",
        "line\nbreak",
        "\x00\x1b[31m",
        "\ud800",
        "日本語の文",
        "שלום العربية",
        "e\u0301",
        "🎺",
        "$x^2$",
    ):
        assert draw(frame, mask, [text], [1.0]).shape == plain.shape


def test_more_sentences_than_colours() -> None:
    frame = made_frames(1, 640, 360)[0]
    masks = np.stack([disc((360, 640), 0.1 + 0.15 * k, 0.5, 0.1) for k in range(9)])
    assert draw(frame, masks, [f"number {k}" for k in range(9)], np.arange(9.0)).shape[0] > 360 + 9 * 13


def sheet(count: int, sound: np.ndarray | None, sentences: int = 2, size: tuple[int, int] = (96, 128)) -> Image.Image:
    frames = made_frames(count, size[1], size[0])
    masks = np.stack([[disc(size, 0.4 + 0.2 * k, 0.5, 0.1)] * count for k in range(sentences)])
    scores = np.arange(sentences * count, dtype=np.float64).reshape(sentences, count)
    return contact_sheet(frames, masks, np.arange(count), sound, [f"sentence {k}" for k in range(sentences)], scores)


def below(image: Image.Image, column: int, top: int) -> np.ndarray:
    """The strip below the frame of this column of the first row; top: of the frame."""
    left = MARGIN + column * (FRAME_WIDTH + GAP)
    y = top + 192 + GAP
    return np.asarray(image)[y : y + STRIP, left : left + FRAME_WIDTH]


def test_a_contact_sheet_shows_frames_and_loudness() -> None:
    sound = made_sound(10)[:, 0] / np.float32(32768)
    sound[3 * 16_000 : 4 * 16_000] = 0  # second 3 is silent
    sound[:16_000] *= 0.25
    image = sheet(10, sound)
    assert image.width == 2 * MARGIN + COLUMNS * FRAME_WIDTH + (COLUMNS - 1) * GAP
    corner = np.abs(np.asarray(image)[:, MARGIN + 1].astype(int) - 250).max(axis=1) < 3  # bright in all frames
    top = int(np.flatnonzero([corner[y : y + 30].all() for y in range(len(corner))])[0])
    blue = [(np.abs(below(image, t, top).astype(int) - (43, 98, 196)).max(axis=2) < 3).sum() for t in range(5)]
    assert blue[3] < blue[0] < blue[1] and blue[3] <= 64 * 3  # the line of silence
    assert blue[0] == pytest.approx(blue[1] / 2, rel=0.25)  # a quarter of the amplitude is half the height


@pytest.mark.parametrize(("count", "sentences"), [(1, 1), (2, 7), (5, 1), (12, 3)])
def test_a_contact_sheet_of_any_number(count: int, sentences: int) -> None:
    silent, heard = sheet(count, None, sentences), sheet(count, np.zeros(16_000, np.float32), sentences)
    assert silent.size == heard.size and not np.array_equal(np.asarray(silent), np.asarray(heard))
    assert (silent.width, silent.height) > (3 * FRAME_WIDTH, -(-count // COLUMNS) * 192)


def test_a_contact_sheet_of_an_upright_video_and_of_soft_masks() -> None:
    frames = made_frames(3, 90, 160)
    masks = np.full((1, 3, 160, 90), 0.3, dtype=np.float32)
    image = contact_sheet(frames, masks, [10.0, 10.5, 11.0], np.ones(8_000, np.float32), ["x"], np.full((1, 3), np.nan))
    assert image.height > FRAME_WIDTH * 160 // 90
