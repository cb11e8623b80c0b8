"""Reading a Ref-AVS folder: values, padding, and damaged files."""

import io
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from samlove.data.dataset import RefAvsFolder, image_size, load_audio, load_frame, load_mask, read_table, resize_mask
from samlove.errors import RequestError, SamloveError

RATE = 8000


def picture(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size)


def encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> RefAvsFolder:
    """One video, v, with three frames and an object 0 that moves to the right in each."""
    folder = RefAvsFolder(tmp_path)
    folder.frame_path("v", 0).parent.mkdir(parents=True)
    folder.mask_path("v", 0, 0).parent.mkdir(parents=True)
    for t in range(3):
        picture(t).save(folder.frame_path("v", t))
        mask = np.zeros((30, 40), np.uint8)
        mask[:, 10 * t : 10 * t + 10] = 1
        Image.fromarray(mask).save(folder.mask_path("v", 0, t))
    return folder


def test_frame_paths_are_cut_or_repeat_the_last(folder: RefAvsFolder) -> None:
    assert [p.name for p in folder.frame_paths("v", 2)] == ["0.jpg", "1.jpg"]
    assert [p.name for p in folder.frame_paths("v", 5)] == ["0.jpg", "1.jpg", "2.jpg", "2.jpg", "2.jpg"]
    with pytest.raises(SamloveError, match="media/w/frames: expected frames"):
        folder.frame_paths("w", 2)


def test_a_gap_counts_as_a_frame_and_is_reported_when_read(folder: RefAvsFolder) -> None:
    folder.frame_path("v", 1).unlink()
    assert folder.frame_count("v") == 3
    with pytest.raises(SamloveError, match="frames/1.jpg: no such file"):
        load_frame(folder.frame_paths("v", 3)[1])


def test_load_masks_pads_trims_and_resizes(folder: RefAvsFolder) -> None:
    masks = folder.load_masks("v", 0, 5, size=8)
    assert masks.shape == (5, 8, 8) and masks.dtype == bool
    assert [list(np.flatnonzero(m[0])) for m in masks] == [[0, 1], [2, 3], [4, 5], [4, 5], [4, 5]]
    assert (folder.load_masks("v", 0, 1, size=8) == masks[:1]).all()


def test_masks_of_one_object_may_differ_in_size(folder: RefAvsFolder) -> None:
    path = folder.mask_path("v", 0, 1)
    Image.open(path).resize((20, 15), Image.Resampling.NEAREST).save(path)
    assert [load_mask(path).shape for path in folder.mask_paths("v", 0, 4)] == [(30, 40), (15, 20), (30, 40), (30, 40)]
    masks = folder.load_masks("v", 0, 3, size=8)
    assert [list(np.flatnonzero(m[0])) for m in masks] == [[0, 1], [2, 3], [4, 5]]


def test_only_the_names_of_the_layout_count_as_frames(folder: RefAvsFolder) -> None:
    for name in ("03.jpg", "4.JPG", "5.jpeg", "6.png", "٧.jpg", "-8.jpg", "9 (1).jpg", "Thumbs.db"):
        (folder.frame_path("v", 0).parent / name).write_bytes(b"")
    assert folder.frame_count("v") == 3


def test_a_file_in_place_of_a_folder_is_named(folder: RefAvsFolder) -> None:
    folder.frame_path("w", 0).parent.parent.mkdir()
    folder.frame_path("w", 0).parent.write_bytes(b"")
    with pytest.raises(SamloveError, match="media/w/frames: expected a folder, found a file in its place"):
        folder.frame_count("w")


def test_load_masks_names_the_mask_that_is_missing(folder: RefAvsFolder) -> None:
    folder.mask_path("v", 0, 1).unlink()
    with pytest.raises(SamloveError, match="gt_mask/v/fid_0/00001.png: no such file"):
        folder.load_masks("v", 0, 3, size=8)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "I;16"])
def test_any_mode_of_mask_reads_the_same(tmp_path: Path, mode: str) -> None:
    expected = np.zeros((6, 9), bool)
    expected[2:4, 3:8] = True
    image = Image.fromarray(expected.astype(np.uint16)) if mode == "I;16" else Image.fromarray(expected).convert(mode)
    image.save(tmp_path / "m.png")
    assert Image.open(tmp_path / "m.png").mode == mode
    assert (load_mask(tmp_path / "m.png") == expected).all()


def test_a_faint_colour_belongs_to_the_object(tmp_path: Path) -> None:
    faint = np.zeros((2, 2, 3), np.uint8)
    faint[0, 1, 2] = 1
    Image.fromarray(faint).save(tmp_path / "faint.png")
    assert load_mask(tmp_path / "faint.png").tolist() == [[False, True], [False, False]]


def test_resize_mask_of_the_same_size_changes_nothing() -> None:
    mask = np.random.default_rng(0).random((16, 16)) > 0.5
    assert (resize_mask(mask, 16) == mask).all()


@pytest.mark.parametrize(
    ("kind", "read"),
    [("JPEG", load_frame), ("JPEG", image_size), ("PNG", load_frame), ("PNG", image_size), ("PNG", load_mask)],
)
def test_truncated_images_raise_wherever_they_are_cut(
    tmp_path: Path, kind: str, read: Callable[[Path], np.ndarray | tuple[int, int]]
) -> None:
    path, whole = tmp_path / f"image.{kind.lower()}", encoded(picture(0), kind)
    path.write_bytes(whole)
    read(path)
    end = len(whole) - (4 if kind == "PNG" else 0)  # no pixel depends on the checksum of the last chunk
    for length in [*range(0, end - 40, 19), *range(end - 40, end)]:
        path.write_bytes(whole[:length])
        with pytest.raises(SamloveError, match=path.name):
            read(path)
        path.write_bytes(whole[:length] + bytes(len(whole) - length))  # like an interrupted download
        if length < len(whole) - 20:
            with pytest.raises(SamloveError, match=path.name):
                read(path)


def test_image_size_is_the_size_of_the_full_image(tmp_path: Path) -> None:
    picture(0, (320, 200)).save(tmp_path / "a.jpg")
    assert image_size(tmp_path / "a.jpg") == (320, 200)
    assert load_frame(tmp_path / "a.jpg").shape == (200, 320, 3)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_frames_of_other_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    picture(0).convert(mode).save(tmp_path / "a.jpg")
    assert load_frame(tmp_path / "a.jpg").shape == (30, 40, 3)


def test_audio_is_the_mean_of_its_channels(tmp_path: Path) -> None:
    samples = np.stack([np.full(RATE, 0.5), np.full(RATE, -0.25)], axis=1)
    soundfile.write(tmp_path / "a.wav", samples, RATE, subtype="FLOAT")
    sound, rate = load_audio(tmp_path / "a.wav")
    assert rate == RATE and sound.shape == (RATE,) and sound.dtype == np.float32
    assert np.allclose(sound, 0.125)


def test_truncated_audio_raises_wherever_it_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, np.zeros(500), RATE)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(SamloveError, match="a.wav"):
            load_audio(path)


def test_a_wav_from_a_pipe_that_does_not_know_its_length_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, np.zeros(500), RATE)
    whole = path.read_bytes()
    at = whole.index(b"data") + 4
    path.write_bytes(whole[:at] + struct.pack("<I", 0xFFFFFFFF) + whole[at + 4 :])
    assert load_audio(path)[0].shape == (500,)


def test_a_file_that_is_no_audio_is_reported(tmp_path: Path) -> None:
    with pytest.raises(SamloveError, match="absent.wav: no such file"):
        load_audio(tmp_path / "absent.wav")
    (tmp_path / "text.wav").write_text("not a sound")
    with pytest.raises(SamloveError, match="text.wav: expected one of the formats WAV, .*, found something else"):
        load_audio(tmp_path / "text.wav")
    soundfile.write(tmp_path / "nan.wav", np.array([0.0, np.nan]), RATE, subtype="FLOAT")
    with pytest.raises(SamloveError, match="nan.wav: expected finite samples"):
        load_audio(tmp_path / "nan.wav")


def test_metadata_keeps_every_value_as_text(tmp_path: Path) -> None:
    table = 'vid,uid,split,fid,exp\nNA,NA_cat_1,null,007," a, ""b""\nc "\n\nnan,nan_dog_1,train,0,\n'
    (tmp_path / "metadata.csv").write_text("\ufeff" + table)
    rows = RefAvsFolder(tmp_path).metadata()
    assert list(rows.index) == [2, 5]
    assert list(rows.loc[2]) == ["NA", "NA_cat_1", "null", "007", ' a, "b"\nc ']
    assert list(rows.loc[5]) == ["nan", "nan_dog_1", "train", "0", ""]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"vid,uid,split,exp\na,b,c,d\n", "expected the columns vid,uid,split,fid,exp, found vid,uid,split,exp"),
        (b"", "expected the columns"),
        (b"vid,uid,split,fid,exp\n", "found none"),
        (b"vid,uid,split,fid,exp\na,b,c,0,e\na,b,c,0\n", r"t.csv:3: expected 5 fields, found 4"),
        (b"vid,uid,split,fid,exp\na,b,c,0,e,f\n", r"t.csv:2: expected 5 fields, found 6"),
        (b'vid,uid,split,fid,exp\na,b,c,0,"e\n', "not a UTF-8 csv file"),
        (b"vid,uid,split,fid,exp\na,b,c,0,\xff\n", "not a UTF-8 csv file"),
        (b"vid,uid,split,fid,exp,exp\na,b,c,0,e,f\n", "expected the columns"),
    ],
)
def test_invalid_tables_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(SamloveError, match=message):
        read_table(tmp_path / "t.csv", ("vid", "uid", "split", "fid", "exp"))


def test_a_folder_without_metadata_is_an_invalid_request(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="metadata.csv: no such file"):
        RefAvsFolder(tmp_path / "nowhere").metadata()
    assert RefAvsFolder(tmp_path).cues() is None
