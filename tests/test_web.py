"""The page of `samlove web` without a browser: bounds, temporary files, plot, and what the command refuses."""

import os
import socket
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from samlove.errors import RequestError
from samlove.media import open_media
from samlove.overlay import COLOURS
from samlove.web.files import MAX_AGE, Files
from samlove.web.job import MAX_CHARACTERS, MAX_SENTENCES, check_video, parse_sentences
from samlove.web.page import serve
from samlove.web.plot import write_plot


def test_each_line_is_a_sentence_within_bounds() -> None:
    assert parse_sentences("\n the dog \n\nthe cat\r\n") == ["the dog", "the cat"]
    assert len(parse_sentences("a\n" * MAX_SENTENCES)) == MAX_SENTENCES
    for text, told in (
        (" \n\t", "at least one"),
        ("a\n" * (MAX_SENTENCES + 1), f"found {MAX_SENTENCES + 1}"),
        ("a" * (MAX_CHARACTERS + 1), f"found one of {MAX_CHARACTERS + 1}"),
    ):
        with pytest.raises(RequestError, match=told):
            parse_sentences(text)


def test_videos_that_are_too_long_or_too_large_are_refused(tmp_path: Path) -> None:
    for number in range(61):
        Image.new("RGB", (16, 16)).save(tmp_path / f"{number}.png")
    large = tmp_path / "large" / "0.png"
    large.parent.mkdir()
    Image.new("RGB", (4000, 3000)).save(large)
    with open_media(tmp_path) as media, pytest.raises(RequestError, match=r"at most 60 s, found 61 s\. Cut it"):
        check_video(media)
    with open_media(large) as media, pytest.raises(RequestError, match="at most 3840x2160 pixels, found 4000x3000"):
        check_video(media)
    (tmp_path / "60.png").unlink()
    with open_media(tmp_path) as media:
        check_video(media)


@pytest.fixture
def files(tmp_path: Path):
    made = Files(tmp_path / "page")
    yield made
    made.close()
    assert not (tmp_path / "page").exists()


def _made(files: Files, name: str) -> Path:
    path = files.root / name / "video.mp4"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    return path


def test_what_only_an_ended_session_used_is_deleted(files: Files, tmp_path: Path) -> None:
    own, shared, example = (_made(files, name) for name in ("own", "shared", "example"))
    elsewhere = tmp_path / "elsewhere" / "video.mp4"
    elsewhere.parent.mkdir()
    elsewhere.write_bytes(b"")
    files.keep(example)
    for path in (own, shared, example, elsewhere):
        files.use("first", path)
    files.use("second", shared)
    files.end("first")
    assert not own.parent.exists()
    assert shared.exists() and example.exists() and elsewhere.exists()
    files.end("second")
    assert not shared.parent.exists()


def test_what_was_not_used_for_an_hour_is_deleted(files: Files) -> None:
    old, used, new, example = (_made(files, name) for name in ("old", "used", "new", "example"))
    stray = files.root / "stray.mp4"
    stray.write_bytes(b"")
    files.keep(example)
    before = time.time() - MAX_AGE - 60
    for path in (old.parent, used.parent, example.parent, stray):
        os.utime(path, (before, before))
    files.use("session", used)
    files.delete_old()
    assert sorted(path.name for path in files.root.iterdir()) == ["example", "new", "used"]
    assert new.exists()


def test_the_plot_has_a_line_per_sentence_in_its_colour_and_the_loudness(tmp_path: Path) -> None:
    times = np.arange(10.0)
    scores = np.stack([np.full(10, 4.0), np.linspace(-3, 3, 10)])
    loudness = np.concatenate([np.zeros(100), np.full(100, 0.2)]).astype(np.float32)
    pictures = {}
    for name, sound in (("heard", loudness), ("silent", None)):
        write_plot(tmp_path / f"{name}.png", times, scores, sound, 0.0, 10.0)
        pictures[name] = np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")).astype(int)
    for colour in COLOURS[:2]:
        found = [(np.abs(picture - colour).max(axis=2) < 8) for picture in pictures.values()]
        assert all(mask.sum() > 500 for mask in found)
    assert not (np.abs(pictures["heard"] - COLOURS[2]).max(axis=2) < 8).any()
    grey = np.abs(pictures["heard"] - (0x8B, 0x94, 0x9E)).max(axis=2) < 8
    height, width = grey.shape
    left, right = grey[: height // 3, : width // 2].sum(), grey[: height // 3, width // 2 :].sum()
    assert right > 20 * left  # loud in the second half only


def test_an_address_that_cannot_be_used_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(RequestError, match=f"127.0.0.1, port {port}: cannot be used: Address already in use"):
            serve(None, "127.0.0.1", port, print)
