"""Masks in every format and with every kind of values score the same, or are refused."""

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from samlove.data.dataset import RefAvsFolder
from samlove.errors import RequestError, SamloveError
from samlove.scoring.mask_formats import open_masks
from samlove.scoring.masks import grey_logits
from samlove.scoring.metrics import EDGES
from samlove.scoring.splits import read_rows
from stores import PredictionWriter
from tests.mask_files import FRAMES, SHAPE, SPLITS, Made, expected, make_dataset, save, scored, write


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    return make_dataset(tmp_path_factory.mktemp("set"))


KINDS = ["png", "zero and one", "flat", "by video", "palette", "colour", "arrays", "frames", "archive", "rle",
         "rle text", "rle list", "rle list from 1"]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_binary_mask_scores_the_same_in_every_format(made, tmp_path, kind):
    root, logits, _ = made
    masks = {uid: of > 0 for uid, of in logits.items()}
    found = scored(root, write(kind, tmp_path, masks))
    binary = {uid: grey_logits(mask * 255, 255) for uid, mask in masks.items()}
    for split in SPLITS:
        for name in ("crab_plus", "omniavs"):
            assert found.protocols[name][split] == expected(made, binary, split, name)
        of_curve = expected(made, binary, split, "simtoken") | {"F": None, "J&F": None}  # no curve
        assert found.protocols["simtoken"][split] == of_curve
    assert not any(found.counts[split][key] for split in SPLITS for key in ("missing", "incomplete", "long"))


def coloured(*colour: int) -> Callable[[np.ndarray], Image.Image]:
    return lambda mask: Image.fromarray(mask[..., None] * np.array(colour, np.uint8))


def indexed(index: int, *palette: int) -> Callable[[np.ndarray], Image.Image]:
    def image(mask: np.ndarray) -> Image.Image:
        made = Image.fromarray(mask.astype(np.uint8) * np.uint8(index), "P")
        made.putpalette(palette)
        return made

    return image


def grey(dtype: type, value: int) -> Callable[[np.ndarray], Image.Image]:
    return lambda mask: Image.fromarray(mask.astype(dtype) * dtype(value))


DAVIS = (0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0, 0, 0, 128, 128, 0, 128, 0, 128, 128, 128, 128, 128, 64, 0, 0)


@pytest.mark.parametrize(
    "image",
    [coloured(0, 100, 0), coloured(0, 0, 128), coloured(1, 1, 1), coloured(255, 0, 0, 180), indexed(2, *DAVIS),
     indexed(4, *DAVIS), indexed(7, *DAVIS), indexed(2, 255, 0, 0, 9, 9, 9, 0, 0, 255), Image.fromarray,
     grey(np.uint16, 65535), grey(np.uint16, 255), grey(np.uint16, 1)],
    ids=["dark green", "blue", "RGB 1", "RGBA", "DAVIS 2", "DAVIS 4", "DAVIS 7", "no black", "1 bit", "16 bit",
         "16 bit, 255", "16 bit, 1"],
)  # fmt: skip
def test_a_binary_png_of_every_mode_scores_the_same(made, tmp_path, image):
    root, logits, _ = made
    for uid in SPLITS["test_s"]:
        for t, frame in enumerate(logits[uid]):
            (tmp_path / uid).mkdir(exist_ok=True)
            image(frame > 0).save(tmp_path / uid / f"{t}.png")
    found = scored(root, tmp_path, ["simtoken"], ["test_s"]).protocols["simtoken"]["test_s"]
    binary = {uid: grey_logits((of > 0) * 255, 255) for uid, of in logits.items()}
    assert found == expected(made, binary, "test_s", "simtoken") | {"F": None, "J&F": None}


def test_a_picture_of_many_colours_is_refused(made, tmp_path):
    save(tmp_path / "a_x_1" / "0.png", np.arange(np.prod(SHAPE) * 3, dtype=np.uint8).reshape(*SHAPE, 3))
    with pytest.raises(SamloveError, match="a_x_1/0.png: expected grey levels, or one colour on black"):
        scored(made[0], tmp_path, splits=["test_s"])


def test_a_dark_mask_has_the_unit_of_the_others(made, tmp_path):
    """A map of grey levels 0 and 1 of 255, or up to 200 of 65535, marks nothing; nor does its order matter."""
    root, logits, _ = made
    for name, dtype, dark in (("8", np.uint8, 1), ("16", np.uint16, 200)):
        top = np.iinfo(dtype).max
        for split in ("test_s", "test_n"):
            for uid in SPLITS[split]:
                for t, frame in enumerate(logits[uid]):
                    soft = np.round(top / (1 + np.exp(-frame))).astype(dtype)
                    save(tmp_path / name / uid / f"{t}.png", soft if split == "test_s" else np.full(SHAPE, dark, dtype))
        found = scored(root, tmp_path / name, ["simtoken"], ["test_s", "test_n"]).protocols["simtoken"]
        assert found["test_n"]["S"] == 0 and found["test_s"]["F"] > 50, name


def test_masks_of_0_and_1_beside_masks_of_0_and_255_are_refused(made, tmp_path):
    root, logits, _ = made
    masks = {uid: of > 0 for uid, of in logits.items()}
    write("zero and one", tmp_path, masks)
    save(tmp_path / "c_z_2" / "mask" / "2.png", masks["c_z_2"][2].astype(np.uint8) * np.uint8(255))
    with pytest.raises(RequestError, match="expected one value for the object in all masks, found 1 and 255"):
        scored(root, tmp_path)


def test_one_split_of_mostly_empty_masks(made, tmp_path):
    root = made[0]
    for t in range(FRAMES):
        save(tmp_path / "null_m-a_null_1" / f"{t}.png", np.full(SHAPE, 255 * (t == 2), np.uint8))
    found = scored(root, tmp_path, ["simtoken"], ["test_n"])
    assert found.protocols["simtoken"]["test_n"]["S"] == pytest.approx((1 / 3) ** 0.5, abs=1e-6)


@pytest.mark.parametrize(
    "change",
    [lambda of: 1 / (1 + np.exp(-of)), lambda of: (of > 0).astype(np.float32), lambda of: (of > 0) * 255.0],
    ids=["probabilities", "0 and 1", "0 and 255"],
)
def test_floats_that_are_no_logits_are_refused(made, tmp_path, change):
    root, logits, _ = made
    with pytest.raises(RequestError, match="expected floats that are logits, found only values in"):
        scored(root, write("arrays", tmp_path, {uid: change(of) for uid, of in logits.items()}))


def test_logits_that_mark_everything_are_logits(made, tmp_path):
    root, logits, _ = made
    full = {uid: np.full_like(of, 5) for uid, of in logits.items()}
    found = scored(root, write("arrays", tmp_path, full), ["crab_plus"])
    assert found.protocols["crab_plus"]["test_u"] == expected(made, full, "test_u", "crab_plus")


def test_a_frame_of_an_array_file_is_that_of_its_name(made, tmp_path):
    root, logits, _ = made
    for uid, of_uid in logits.items():
        (tmp_path / uid).mkdir()
        for t, frame in enumerate(of_uid):
            np.save(tmp_path / uid / f"{t}.npy", frame[None].astype(np.float16))
    half = {uid: of.astype(np.float16) for uid, of in logits.items()}
    found = scored(root, tmp_path)
    assert found.protocols["simtoken"]["test_s"] == expected(made, half, "test_s", "simtoken")
    np.save(tmp_path / "a_x_1" / "1.npy", logits["a_x_1"])
    with pytest.raises(SamloveError, match="a_x_1/1.npy: expected a mask"):
        scored(root, tmp_path)


def test_linked_folders_are_read_and_other_files_are_listed(made, tmp_path):
    root, logits, _ = made
    write("png", tmp_path / "masks", {uid: of > 0 for uid, of in logits.items()})
    copy = tmp_path / "linked"
    copy.mkdir()
    for link, target in (("test", tmp_path / "masks" / "test"), ("loop", copy)):
        (copy / link).symlink_to(target)
    (tmp_path / "masks" / "test" / "a_x_1" / "._00000.png").write_bytes(b"written by a file manager")
    own, linked = (scored(root, path) for path in (tmp_path / "masks", copy))
    assert own.protocols == linked.protocols and own.counts == linked.counts
    (copy / "results.json").write_text("{}")
    shutil.copy(root / "media" / "a" / "frames" / "0.jpg", copy / "0.jpg")
    every, _ = read_rows(RefAvsFolder(root), ["test_s"])
    assert [Path(name).name for name in open_masks(copy, every, ["test_s"], FRAMES).unused] == ["0.jpg", "results.json"]


def test_a_damaged_predictions_file_is_not_said_to_be_our_own(made, tmp_path):
    path = tmp_path / "predictions.h5"
    with PredictionWriter(path, FRAMES, 24, EDGES) as writer:
        writer.write(["a_x_1"], np.zeros((1, FRAMES, 24, 24), np.uint8))
    whole = path.read_bytes()
    with PredictionWriter(tmp_path / "other.h5", FRAMES, 24, EDGES[::2]) as writer:
        writer.write(["a_x_1"], np.zeros((1, FRAMES, 24, 24), np.uint8))
    for content, text in ((whole[:3000], "not a complete"), ((tmp_path / "other.h5").read_bytes(), "its bins")):
        path.write_bytes(content)
        with pytest.raises(SamloveError, match=f"{path}: {text}.*the masks in another format$") as raised:
            scored(made[0], tmp_path, splits=["test_s"])
        assert "dvc" not in str(raised.value)


def test_rows_in_two_prediction_files_are_doubled(made, tmp_path):
    for path, value in ((tmp_path, 255), (tmp_path / "test_s", 0)):
        with PredictionWriter(path / "predictions.h5", FRAMES, 24, EDGES) as writer:
            writer.write(["a_x_1"], np.full((1, FRAMES, 24, 24), value, np.uint8))
    every, _ = read_rows(RefAvsFolder(made[0]), ["test_s"])
    masks = open_masks(tmp_path, every, ["test_s"], FRAMES)
    assert masks.doubled == [f"{tmp_path}/test_s/predictions.h5: a_x_1"] and masks.read("a_x_1")[0].min() > 0


def test_masks_that_cannot_be_read_are_named(made, tmp_path):
    root, logits, _ = made
    masks = {uid: of > 0 for uid, of in logits.items()}
    write("png", tmp_path, masks)
    bad = tmp_path / "test" / "b_y_1" / "00002.png"
    bad.write_bytes(bad.read_bytes()[:30])
    with pytest.raises(SamloveError, match=f"{bad}: "):
        scored(root, tmp_path)
    broken = logits | {"c_z_2": np.full_like(logits["c_z_2"], np.nan)}
    with pytest.raises(SamloveError, match="c_z_2, frame 0: expected finite logits"):
        scored(root, write("archive", tmp_path, broken))


def npy(shape: str) -> bytes:
    """An .npy file whose header states a shape, without the values."""
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()


def hostile_archive(path: Path, content: object) -> None:
    """content: the array of an expression, the bytes of its .npy file, or None for an .npy file instead of an .npz."""
    if content is None:
        path.write_bytes(npy("(0,)"))
        return
    with zipfile.ZipFile(path, "w") as archive, archive.open("a_x_1.npy", "w") as file:
        if isinstance(content, bytes):
            file.write(content)
        else:
            np.save(file, content)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "not a zip archive"),
        (npy("(1000000, 100000, 1000)"), "not a readable array"),
        (np.ones((FRAMES, *SHAPE), complex), "expected floats, whole numbers or bool, found complex128"),
        (np.full((FRAMES, *SHAPE), "x"), "expected floats, whole numbers or bool, found <U1"),
        (np.float32(1), "expected an array"),
        (np.zeros((1, 1, 2**26 + 1), bool), "at most 67,108,864 pixels"),
    ],
    ids=["npy", "huge", "complex", "text", "number", "pixels"],
)
def test_archives_of_anything_else_are_refused(made, tmp_path, content, text):
    hostile_archive(tmp_path / "masks.npz", content)
    with pytest.raises(SamloveError, match=text) as raised:
        scored(made[0], tmp_path / "masks.npz", splits=["test_s"])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "text",
    [
        '{"a_x_1": [null], "a_x_1": [null]}',  # the second would replace the first
        '[{"uid": "a_x_1", "frame": Infinity, "segmentation": null}]',
        '[{"uid": "a_x_1", "frame": -1, "segmentation": null}]',
        "[" * 100_000,
        '{"a_x_1": [{"size": [1000000, 1000000], "counts": [1000000000000]}]}',
        '{"a_x_1": [{"size": [-24, -32], "counts": [768]}]}',
        '{"a_x_1": "abc"}',
        "5",
    ],
    ids=lambda text: text[:30],
)
def test_json_of_anything_else_is_refused(made, tmp_path, text):
    (tmp_path / "masks.json").write_text(text)
    with pytest.raises(SamloveError, match=str(tmp_path)) as raised:
        scored(made[0], tmp_path / "masks.json", splits=["test_s"])
    assert "\n" not in str(raised.value)
