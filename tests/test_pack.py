"""Packing: every array and mask is in its place, and stores that do not match are refused."""

import numpy as np
import pytest

from samlove.config import AudioConfig, Sam2Config, TextConfig, VisualConfig
from samlove.data.dataset import resize_mask
from samlove.data.digest import rows_digest
from samlove.data.frames import trained_frames
from samlove.data.pack import check_asked, pack
from samlove.errors import RequestError, SamloveError
from stores import ShardReader
from tests.tiny_pack import (
    ROWS,
    SIZE,
    features_of,
    make_folder,
    make_shards,
    make_store,
    make_stores,
    mask_on,
    true_mask,
)


def test_a_sample_holds_its_video_texts_and_masks(tmp_path):
    packed = make_shards(tmp_path)
    assert (packed.videos, packed.rows, packed.left_out) == (3, 6, [])
    reader = ShardReader(tmp_path / "shards")
    assert reader.keys() == ["m_a", "-m.b", "null_c-m_a"]
    for i, media_id in enumerate(reader.keys()):
        sample = reader[i]
        for source in ("audio", "visual"):
            for name, value in features_of(source, media_id).items():
                np.testing.assert_array_equal(sample[name], value)
        for name, value in features_of("sam2", media_id).items():
            np.testing.assert_array_equal(sample[name], value[:1])
        rows = ROWS[ROWS["media_id"] == media_id]
        assert [row["row_id"] for row in sample["rows"]] == list(rows["row_id"])
        assert len(sample["text"]) == rows["exp"].nunique()
        assert len(sample["masks"]) == rows.loc[~rows["null"], "fid"].nunique()
        assert sample["masks"].dtype == np.uint8 and sample["masks"].shape[1:] == (1, SIZE, SIZE)
        for packed_row, row in zip(sample["rows"], rows.itertuples(), strict=True):
            words = features_of("text", row.exp)
            np.testing.assert_array_equal(sample["text"][packed_row["text"]], words["text"])
            np.testing.assert_array_equal(sample["text_mask"][packed_row["text"]], words["text_mask"])
            if row.null:
                assert packed_row["mask"] == -1
            else:
                expected = resize_mask(true_mask(media_id, row.fid), SIZE)
                np.testing.assert_array_equal(sample["masks"][packed_row["mask"], 0], expected)


def test_the_manifest_records_the_sources(tmp_path):
    make_shards(tmp_path)
    fingerprint = ShardReader(tmp_path / "shards").manifest["fingerprint"]
    made_of = {"audio", "visual", "text", "sam2", "mask_size", "rows_sha256", "gt_mask_sha256", "sam2_frames"}
    assert set(fingerprint) == made_of and fingerprint["sam2_frames"] == [0]
    assert fingerprint["mask_size"] == SIZE
    assert fingerprint["rows_sha256"] == rows_digest(ROWS) != rows_digest(ROWS[1:])
    assert fingerprint["visual"] == {"encoder": "visual", "dtype": "float16"}


def test_rows_with_failed_features_are_left_out_and_reported(tmp_path):
    failed = {"audio": ("-m.b",), "text": ("the silent square", "the object making the loudest sound")}
    packed = make_shards(tmp_path, failed=failed)
    assert (packed.videos, packed.rows) == (2, 2)
    assert [line.split(":")[0] for line in packed.left_out] == ["r1", "r2", "r3", "r4"]
    assert "r3: audio failed: truncated file" in packed.left_out
    assert "4 rows left out" in str(packed)
    reader = ShardReader(tmp_path / "shards")
    assert [[row["row_id"] for row in reader[i]["rows"]] for i in range(2)] == [["r0"], ["r5"]]
    assert reader[0]["masks"].shape == (1, 1, SIZE, SIZE)


@pytest.mark.parametrize(("coding", "packed"), [("int8", np.float16), ("bfloat16", np.float32)])
def test_embeddings_that_are_stored_narrower_are_packed_as_floats(tmp_path, coding, packed):
    sources = make_stores(tmp_path)
    sources["sam2"] = make_store(tmp_path / coding, "sam2", {"dtype": coding}, coding=coding)
    pack(tmp_path / "shards", ROWS, sources, make_folder(tmp_path), SIZE, 2)
    reader = ShardReader(tmp_path / "shards")
    for i, media_id in enumerate(reader.keys()):
        for name, value in sources["sam2"].read(media_id).items():
            assert reader[i][name].dtype == packed
            np.testing.assert_array_equal(reader[i][name], value[:1].astype(packed))


@pytest.mark.parametrize("coding", [None, "int8"])
@pytest.mark.parametrize("frames", [[0, 1], [0, 2], [0, 1, 2]])
def test_several_frames_are_packed_from_a_store_of_these_frames_or_of_all(tmp_path, frames, coding):
    made, folder = make_stores(tmp_path), make_folder(tmp_path)
    packed = []
    for name, stored in (("train", frames), ("val", None)):
        store = make_store(tmp_path / name, "sam2", {"dtype": coding or "float16"}, coding=coding, rows=stored)
        pack(tmp_path / "shards" / name, ROWS, {**made, "sam2": store}, folder, SIZE, 2, "", frames, stored)
        reader = ShardReader(tmp_path / "shards" / name)
        packed.append([reader[i] for i in range(len(reader))])
        assert reader.manifest["fingerprint"]["sam2_frames"] == frames
        for sample in packed[-1]:
            media_id = sample["__key__"]
            for level, value in store.read(media_id).items():
                expected = value if stored else value[frames]
                assert sample[level].dtype == np.float16
                np.testing.assert_array_equal(sample[level], expected.astype(np.float16))
            fids = ROWS.loc[(ROWS["media_id"] == media_id) & ~ROWS["null"], "fid"].unique()
            assert sample["masks"].shape == (len(fids), len(frames), SIZE, SIZE)
            for masks, fid in zip(sample["masks"], fids, strict=True):
                np.testing.assert_array_equal(masks, [resize_mask(mask_on(media_id, fid, t), SIZE) for t in frames])
    for train, val in zip(*packed, strict=True):
        assert all(np.array_equal(train[level], val[level]) for level in made["sam2"].shapes)


@pytest.mark.parametrize(
    ("frames", "stored", "rows"), [([0, 2], [0, 2], None), ([0, 2], None, [0, 1]), ([0], [0], [0, 1])]
)
def test_a_store_of_other_frames_is_refused(tmp_path, frames, stored, rows):
    sources = {**make_stores(tmp_path), "sam2": make_store(tmp_path / "other", "sam2", rows=rows)}
    with pytest.raises(SamloveError, match=r"sam2: expected \d frames of every video, found \d; run: dvc repro sam2"):
        pack(tmp_path / "shards", ROWS, sources, make_folder(tmp_path), SIZE, 2, "", frames, stored)
    assert not (tmp_path / "shards").exists()


def test_the_frames_of_training_are_evenly_spaced_from_the_first():
    assert [trained_frames(10, count) for count in (1, 2, 3, 5)] == [[0], [0, 5], [0, 3, 6], [0, 2, 4, 6, 8]]
    assert trained_frames(3, 3) == [0, 1, 2]
    with pytest.raises(RequestError, match="train_frames: expected at most the 10 frames .* found 11"):
        trained_frames(10, 11)


def test_a_row_that_a_store_does_not_know_is_an_error(tmp_path):
    rows = ROWS.assign(exp=ROWS["exp"].replace("the red disc", "the blue disc"))
    with pytest.raises(SamloveError, match=r"text: 'the blue disc' is in the index.*dvc repro text"):
        pack(tmp_path / "shards", rows, make_stores(tmp_path), make_folder(tmp_path), SIZE, 2)
    assert not (tmp_path / "shards").exists()


@pytest.mark.parametrize("name", ["audio", "visual", "text", "sam2"])
def test_a_store_with_other_arrays_is_refused(tmp_path, name):
    sources = make_stores(tmp_path)
    other = sources["visual" if name == "audio" else "audio"]
    with pytest.raises(SamloveError, match=f"{other.path}: expected arrays .*found .*run: dvc repro -f -s {name}$"):
        pack(tmp_path / "shards", ROWS, {**sources, name: other}, make_folder(tmp_path), SIZE, 2)
    assert not (tmp_path / "shards").exists()


def test_a_missing_mask_is_reported(tmp_path):
    folder = make_folder(tmp_path)
    path = folder.mask_path("m_a", 2, 0)
    path.unlink()
    with pytest.raises(SamloveError, match=str(path)):
        pack(tmp_path / "shards", ROWS, make_stores(tmp_path), folder, SIZE, 2)


@pytest.mark.parametrize(
    ("asked", "fingerprint", "field"),
    [
        (VisualConfig(encoder="clip", weights="w"), {"encoder": "vit", "image_size": 224}, "encoder"),
        (VisualConfig(image_size=256, weights="w"), {"encoder": "vit", "image_size": 224}, "image_size"),
        (
            VisualConfig(model_args={"depth": 4}, weights="w"),
            {"encoder": "vit", "model_args": ["depth=2"]},
            "model_args",
        ),
        (AudioConfig(dtype="float32", weights="w"), {"encoder": "vggish", "dtype": "float16"}, "dtype"),
        (TextConfig(max_tokens=25, weights="w"), {"encoder": "roberta", "max_tokens": 32}, "max_tokens"),
        (Sam2Config(config="c", checkpoint="w", cache_point="pre_conv"), {"cache_point": "post_conv"}, "cache_point"),
    ],
)
def test_a_store_that_contradicts_the_configuration_is_refused(tmp_path, asked, fingerprint, field):
    store = make_store(tmp_path, "visual", fingerprint)
    with pytest.raises(SamloveError, match=rf"visual: fingerprint mismatch \({field}: .*dvc repro it"):
        check_asked(store, asked, "it")


def test_a_store_that_matches_the_configuration_passes(tmp_path):
    fingerprint = {"encoder": "vit", "image_size": 224, "model_args": ["a=2", "b=1"], "weights_sha256": "0"}
    asked = VisualConfig(weights="elsewhere", model_args={"b": 1, "a": 2})
    check_asked(make_store(tmp_path, "visual", fingerprint), asked, "visual")
