"""The index and its audit: every kind of fault, in a folder that is made to have it."""

import csv
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
from PIL import Image

from pipelines import index as stage
from samlove.config import DatasetConfig
from samlove.data.audit import KINDS, UNUSABLE
from samlove.data.dataset import RefAvsFolder
from samlove.data.index import POLICIES, Audit, audit_folder, merge_policies, write_index
from samlove.errors import RequestError, SamloveError

FRAMES = 3
SIZE = (24, 16)  # width, height
ROWS = [  # vid, uid, split, fid, exp
    ("-a_b", "-a_b_cat_1", "train", "0", "The cat."),
    ("-a_b", "-a_b_hair-dryer_2", "train", "1", "The loudest object."),
    ("-a_b", "null_m--a_b_null_1", "train", "0", "The sounding object."),
    ("c", "c_dog_1", "val", "0", "The dog."),
    ("d", "d_dog_1", "test_s", "2", "The dog."),
    ("d", "null_c-d_null_1", "test_n", "0", "The sounding object"),
    ("e", "e_wolf_1", "test_u", "0", "The wolf."),
]


def write_rows(root: Path, rows: Iterable[tuple[str, ...]]) -> None:
    with (root / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("vid", "uid", "split", "fid", "exp"), *rows])


def write_media(root: Path, media_id: str) -> None:
    folder = RefAvsFolder(root)
    folder.frame_path(media_id, 0).parent.mkdir(parents=True)
    for t in range(FRAMES):
        Image.new("RGB", SIZE, (40 * t, 99, 9)).save(folder.frame_path(media_id, t))
    soundfile.write(folder.audio_path(media_id), np.zeros(FRAMES * 800), 800)


def write_masks(root: Path, media_id: str, fid: int, size: tuple[int, int] = SIZE, colour: int = 255) -> None:
    """Masks of an object that is the left half of the frame; 0 as `colour`: empty masks."""
    for t in range(FRAMES):
        path = RefAvsFolder(root).mask_path(media_id, fid, t)
        path.parent.mkdir(parents=True, exist_ok=True)
        mask = Image.new("L", size)
        mask.paste(colour, (0, 0, size[0] // 2, size[1]))
        mask.save(path)


@pytest.fixture(scope="module")
def sound_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    write_rows(root, ROWS)
    for media_id in ("-a_b", "null_m--a_b", "c", "d", "null_c-d", "e"):
        write_media(root, media_id)
    for media_id, fid in (("-a_b", 0), ("-a_b", 1), ("c", 0), ("d", 2), ("e", 0)):
        write_masks(root, media_id, fid)
    return root


@pytest.fixture
def folder(sound_folder: Path, tmp_path: Path) -> RefAvsFolder:
    """A copy of the faultless folder, for a test to damage."""
    return RefAvsFolder(shutil.copytree(sound_folder, tmp_path / "folder"))


def audit(folder: RefAvsFolder, policy: dict[str, str] | None = None, media: bool = True) -> Audit:
    return audit_folder(folder.root, media, policy, FRAMES)


def kinds(found: Audit) -> set[str]:
    return {fault.kind for fault in found.faults}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_faultless_folder_becomes_two_tables(sound_folder: Path, tmp_path: Path) -> None:
    found = audit_folder(sound_folder, True, {}, FRAMES)
    assert found.faults == [] and not found.failed and "no faults" in found.render()
    write_index(found, tmp_path / "index")
    files = {"audit.json", "expressions.parquet", "videos.parquet", "media.sha256", "gt_mask.sha256"}
    assert {p.name for p in (tmp_path / "index").iterdir()} == files
    rows = pd.read_parquet(tmp_path / "index" / "expressions.parquet")
    assert list(rows) == ["row_id", "uid", "vid", "media_id", "split", "fid", "object", "exp", "null"]
    assert list(rows["row_id"]) == [uid for _, uid, *_ in ROWS]
    assert list(rows["object"]) == ["cat", "hair-dryer", "null", "dog", "dog", "null", "wolf"]
    assert list(rows["null"]) == [False, False, True, False, False, True, False]
    assert rows["fid"].dtype == np.int64 and list(rows["fid"]) == [0, 1, 0, 0, 2, 0, 0]
    videos = pd.read_parquet(tmp_path / "index" / "videos.parquet")
    assert list(videos["media_id"]) == ["-a_b", "null_m--a_b", "c", "d", "null_c-d", "e"]
    assert list(videos["vid"]) == ["-a_b", "-a_b", "c", "d", "d", "e"]
    assert list(videos["kind"]) == ["real", "null_m", "real", "real", "null_c", "real"]
    assert list(videos["split"]) == ["train", "train", "val", "test_s", "test_n", "test_u"]
    same = {"frames": 3, "width": 24, "height": 16, "audio_seconds": 3.0, "audio_rate": 800}
    assert (videos[list(same)] == pd.Series(same)).all(axis=None)
    report = json.loads((tmp_path / "index" / "audit.json").read_text())
    assert report["objects_only_in_test_u"] == ["wolf"]
    assert report["shared_vids"] == [{"splits": ["test_s", "test_n"], "vids": 1}]
    assert report["splits"]["train"]["found"] == {"rows": 3, "vids": 1, "media": 2, "null_rows": 1}


def test_without_media_checks_no_media_is_read(tmp_path: Path) -> None:
    write_rows(tmp_path, ROWS)
    found = audit_folder(tmp_path, False, {}, FRAMES)
    assert not found.faults and not found.media_checked
    assert found.videos[["frames", "width", "height", "audio_seconds", "audio_rate"]].isna().all(axis=None)


ROW_FAULTS = {  # kind -> a row that has it
    "todo_split": ("c", "c_dog_2", "TODO", "0", "The dog."),
    "unknown_split": ("c", "c_dog_2", "test", "0", "The dog."),
    "wrong_split": ("d", "d_dog_2", "test_n", "2", "The dog."),
    "no_expression": ("c", "c_dog_2", "val", "0", " NO."),
    "tool_error": ("c", "c_dog_2", "val", "0", "[Error] 错误"),
    "empty_expression": ("c", "c_dog_2", "val", "0", " \t "),
    "edge_blanks": ("c", "c_dog_2", "val", "0", "The dog.\u3000"),
    "inner_blanks": ("c", "c_dog_2", "val", "0", "The\u00a0 dog."),
    "non_ascii": ("c", "c_dog_2", "val", "0", "The man’s dog."),
    "repeated_uid": ("c", "c_dog_1", "val", "0", "Another dog."),
    "repeated_row": ROWS[3],
    "split_leak": ("-a_b", "-a_b_cat_3", "test_s", "0", "The cat."),
}


@pytest.mark.parametrize("kind", ROW_FAULTS)
def test_each_fault_of_a_row_is_found_and_dropped_kept_or_failed(folder: RefAvsFolder, kind: str) -> None:
    write_rows(folder.root, [*ROWS, ROW_FAULTS[kind]])
    found = audit(folder, media=False)
    expected = {kind} | ({"edge_blanks"} if kind == "no_expression" else set())
    expected |= {"repeated_uid"} if kind == "repeated_row" else set()
    expected |= {"split_leak"} if kind == "wrong_split" else set()  # d is in test_s already
    assert kinds(found) == expected
    (fault,) = [f for f in found.faults if f.kind == kind]
    lost = 3 if kind == "split_leak" else 1  # the three train rows of the leaked video
    assert len(fault.rows) == lost
    if kind != "split_leak":
        assert fault.where == f"{folder.root}/metadata.csv:9"
    keep = dict.fromkeys(expected, "keep")
    assert len(audit(folder, keep | {kind: "drop"}, media=False).expressions) == len(ROWS) + 1 - lost
    failed = audit(folder, ({} if kind in UNUSABLE else keep) | {kind: "fail"}, media=False)
    assert failed.failing == {kind: 1} and fault.where in failed.render()
    if kind not in UNUSABLE:
        assert len(audit(folder, keep, media=False).expressions) == len(ROWS) + 1
        assert not audit(folder, keep, media=False).failed


@pytest.mark.parametrize(
    ("vid", "uid", "fid"),
    [("c", uid, "0") for uid in ("c_dog", "c_dog_x", "../c_dog_1", "c_null_9", "null_m-c_dog_9", "null_x-c_null_9")]
    + [("c", "c_dog_9", fid) for fid in ("-1", "1.0", "")]
    + [("x", "c_dog_9", "0"), ("", "", "0")],
)
def test_rows_that_name_no_folder_or_object_are_bad_and_never_kept(
    folder: RefAvsFolder, vid: str, uid: str, fid: str
) -> None:
    write_rows(folder.root, [*ROWS, (vid, uid, "val", fid, "The dog.")])
    found = audit(folder)
    assert kinds(found) == {"bad_row"} and found.failed
    assert len(found.expressions) == len(ROWS)
    assert not audit(folder, {"bad_row": "drop"}).failed
    with pytest.raises(RequestError, match="bad_row: expected drop or fail, found keep"):
        audit(folder, {"bad_row": "keep"})


def test_expressions_lose_blanks_and_nothing_else(folder: RefAvsFolder) -> None:
    write_rows(folder.root, [("c", "c_dog_1", "val", "0", "\tThe  man’s\n“dog” – NO. \u00a0")])
    assert list(audit(folder).expressions["exp"]) == ["The man’s “dog” – NO."]


def test_row_ids_are_unique_and_do_not_depend_on_the_policy(folder: RefAvsFolder) -> None:
    repeats = [("c", "c_dog_1", "val", "0", text) for text in ("NO.", "A dog.", "A dog.")]
    write_rows(folder.root, [*ROWS, *repeats])
    for policy in ("drop", "keep"):
        rows = audit(folder, {"no_expression": policy}).expressions
        assert rows["row_id"].is_unique
        assert list(rows.loc[rows["exp"] == "A dog.", "row_id"]) == ["c_dog_1#3", "c_dog_1#4"]


def test_a_leak_keeps_the_rows_of_the_last_split(folder: RefAvsFolder) -> None:
    leaks = [("c", "c_dog_2", "train", "0", "x"), ("e", "e_wolf_2", "test_s", "0", "y")]
    write_rows(folder.root, [*ROWS, *leaks])
    found = audit(folder, {"split_leak": "drop"})
    assert [(f.where, f.found) for f in found.faults] == [
        ("vid c", "in train and val"),
        ("media folder e", "in test_s and test_u"),
    ]
    rows = found.expressions
    assert set(rows.loc[rows["vid"] == "c", "split"]) == {"val"}
    assert set(rows.loc[rows["vid"] == "e", "split"]) == {"test_u"}
    kept = audit(folder, {"split_leak": "keep"}).videos
    assert not kept.duplicated(["media_id", "split"]).any() and len(kept) == 8


def test_a_dropped_row_leaks_nothing(folder: RefAvsFolder) -> None:
    write_rows(folder.root, [*ROWS, ("c", "c_dog_2", "train", "0", "NO."), ("d", "d_dog_2", "TODO", "0", "x")])
    assert kinds(audit(folder)) == {"no_expression", "todo_split"}


def unlink_frames(folder: RefAvsFolder) -> Path:
    for t in range(FRAMES):
        folder.frame_path("c", t).unlink()
    return folder.frame_path("c", 0)


def unlink_last_frame_with_its_mask(folder: RefAvsFolder) -> Path:
    folder.mask_path("c", 0, 2).unlink()
    folder.frame_path("c", 2).unlink()
    return folder.frame_path("c", 2)


def add_frame(folder: RefAvsFolder) -> Path:
    return Path(shutil.copy(folder.frame_path("c", 0), folder.frame_path("c", 3)))


def at(path: Callable[[RefAvsFolder], Path], spoil: Callable[[Path], object]) -> Callable[[RefAvsFolder], Path]:
    def spoiled(folder: RefAvsFolder) -> Path:
        spoil(path(folder))
        return path(folder)

    return spoiled


def masks(size: tuple[int, int], colour: int) -> Callable[[RefAvsFolder], Path]:
    def spoiled(folder: RefAvsFolder) -> Path:
        write_masks(folder.root, "c", 0, size, colour)
        return folder.mask_path("c", 0, 0) if colour else folder.mask_path("c", 0, 0).parent

    return spoiled


def frame(t: int) -> Callable[[RefAvsFolder], Path]:
    return lambda folder: folder.frame_path("c", t)


def mask(folder: RefAvsFolder) -> Path:
    return folder.mask_path("c", 0, 1)


def audio(folder: RefAvsFolder) -> Path:
    return folder.audio_path("c")


def replaced_by(what: str) -> Callable[[Path], None]:
    """A function that puts a file or a folder in the place of the other."""

    def replace(path: Path) -> None:
        if what == "file":
            shutil.rmtree(path)
            path.write_bytes(b"")
        else:
            path.unlink()
            path.mkdir()

    return replace


def stray(name: str, beside: Callable[[RefAvsFolder], Path]) -> Callable[[RefAvsFolder], Path]:
    def spoiled(folder: RefAvsFolder) -> Path:
        (beside(folder).parent / name).write_bytes(b"")
        return beside(folder).parent / name

    return spoiled


def turn_frames(folder: RefAvsFolder) -> Path:
    exif = Image.Exif()
    exif[0x0112] = 3
    for t in range(FRAMES):
        Image.open(folder.frame_path("c", t)).save(folder.frame_path("c", t), exif=exif)
    return folder.frame_path("c", 0)


def white_background(path: Path) -> None:
    mask = Image.new("L", SIZE, 255)
    mask.paste(0, (3, 3, 9, 9))
    mask.save(path)


def levels(path: Path) -> None:
    Image.fromarray(np.arange(SIZE[0] * SIZE[1], dtype=np.uint8).reshape(SIZE[::-1]) % 3).save(path)


MEDIA_FAULTS = [  # kind, a function that damages the folder and returns the path that the audit must name
    ("missing_media", at(lambda f: f.audio_path("c").parent, shutil.rmtree)),
    ("bad_folder", at(lambda f: audio(f).parent, replaced_by("file"))),
    ("bad_folder", at(lambda f: mask(f).parent, replaced_by("file"))),
    ("bad_folder", at(lambda f: mask(f).parent.parent, replaced_by("file"))),
    ("missing_frame", at(frame(1), Path.unlink)),
    ("missing_frame", at(frame(2), Path.unlink)),  # the last one: its mask implies that it existed
    ("missing_frame", unlink_frames),
    ("bad_frame", at(frame(1), truncate)),
    ("bad_frame", at(frame(1), lambda path: path.write_bytes(b""))),
    ("bad_frame", at(frame(1), replaced_by("folder"))),
    ("turned_frame", turn_frames),
    ("frame_count", unlink_last_frame_with_its_mask),
    ("frame_count", add_frame),
    ("missing_audio", at(audio, Path.unlink)),
    ("bad_audio", at(audio, truncate)),
    ("bad_audio", at(audio, replaced_by("folder"))),
    ("short_audio", at(audio, lambda path: soundfile.write(path, np.zeros(2000), 800))),
    ("long_audio", at(audio, lambda path: soundfile.write(path, np.zeros(2800), 800))),
    ("missing_mask", at(mask, Path.unlink)),
    ("missing_mask", at(lambda f: mask(f).parent, shutil.rmtree)),
    ("bad_mask", at(mask, truncate)),
    ("bad_mask", at(mask, replaced_by("folder"))),
    ("unclear_mask", at(mask, lambda path: Image.open(path).save(path, "JPEG"))),
    ("mask_values", at(mask, levels)),
    ("whole_mask", at(mask, lambda path: Image.new("L", SIZE, 255).save(path))),
    ("whole_mask", at(mask, white_background)),
    ("turned_mask", masks((16, 24), 255)),
    ("mask_size", masks((12, 8), 255)),
    ("empty_mask", masks(SIZE, 0)),
    ("stray_file", stray("Thumbs.db", audio)),
    ("stray_file", stray("2.JPG", frame(0))),
    ("stray_file", stray("02.jpg", frame(0))),
    ("stray_file", stray("2.jpeg", frame(0))),
    ("stray_file", stray(".DS_Store", mask)),
    ("stray_file", stray("0.png", mask)),
    ("stray_file", stray("fid_00", lambda f: mask(f).parent)),
]


@pytest.mark.parametrize(("kind", "spoil"), MEDIA_FAULTS)
def test_each_fault_of_the_media_is_found_with_its_path(
    folder: RefAvsFolder, kind: str, spoil: Callable[[RefAvsFolder], Path]
) -> None:
    path = spoil(folder)
    found = audit(folder)
    assert [(f.kind, f.where) for f in found.faults] == [(kind, str(path))]
    assert found.failed == (POLICIES[kind] == "fail") and str(path) in found.render()
    dropped = audit(folder, {kind: "drop"})
    assert set(dropped.videos["media_id"]) == {"-a_b", "null_m--a_b", "d", "null_c-d", "e"}
    assert len(dropped.expressions) == len(ROWS) - 1 and not dropped.failed
    assert len(audit(folder, {kind: "keep"}).expressions) == len(ROWS)
    assert audit(folder, {kind: "fail"}).failing == {kind: 1}


def test_frames_that_differ_in_size(folder: RefAvsFolder) -> None:
    Image.new("RGB", (8, 8)).save(folder.frame_path("null_c-d", 1))
    (fault,) = audit(folder).faults
    assert (fault.kind, fault.where) == ("frame_size", str(folder.frame_path("null_c-d", 1)))
    assert fault.found == "8x8, but an earlier frame is 24x16"


def test_a_broken_mask_costs_only_the_rows_of_its_object(folder: RefAvsFolder) -> None:
    truncate(folder.mask_path("-a_b", 1, 2))
    rows = audit(folder, {"bad_mask": "drop"}).expressions
    assert list(rows.loc[rows["vid"] == "-a_b", "fid"]) == [0, 0]


def test_every_kind_is_tested_and_documented() -> None:
    tested = {*ROW_FAULTS, *(kind for kind, _ in MEDIA_FAULTS), "bad_row", "frame_size", "missing_cues"}
    assert tested == set(KINDS)
    page = (Path(__file__).parents[1] / "docs" / "audit.md").read_text()
    assert all(f"| `{kind}` | {policy}" in page and meaning in page for kind, (policy, meaning) in KINDS.items())


def test_invalid_policies_are_refused_and_the_known_kinds_listed() -> None:
    with pytest.raises(RequestError, match="unknown fault kind 'bad_frames'; expected one of bad_row, .*empty_mask"):
        merge_policies({"bad_frames": "drop"})
    with pytest.raises(RequestError, match="bad_frame: expected drop, keep or fail, found 'ignore'"):
        merge_policies({"bad_frame": "ignore"})
    configured = DatasetConfig(root="", policy={"bad_frame": "drop"}).policy
    assert merge_policies(configured) == POLICIES | {"bad_frame": "drop"}


def write_cues(folder: RefAvsFolder, rows: Iterable[tuple[str, ...]]) -> None:
    with (folder.root / "cues.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("uid", "fid", "exp", "template", "sight", "sound", "time"), *rows])


def test_cues_are_joined_by_uid_fid_and_expression(folder: RefAvsFolder) -> None:
    same_uid = ("c", "c_dog_1", "val", "0", "The silent dog.")
    write_rows(folder.root, [*ROWS, same_uid])
    cues = [(uid, fid, exp, "by name", "1", "0", "0") for _, uid, _, fid, exp in ROWS]
    write_cues(folder, [*cues, ("c_dog_1", "0", "The silent  dog.", "silent", "1", "1", "0")])
    rows = audit(folder).expressions
    assert list(rows.columns[-4:]) == ["template", "sight", "sound", "time"]
    assert [rows[c].dtype == bool for c in ("sight", "sound", "time")] == [True] * 3
    assert list(rows["sound"]) == [False] * 7 + [True]
    assert list(rows["template"].unique()) == ["by name", "silent"]


def test_whether_a_target_appears_late_is_a_cue_that_older_datasets_lack(folder: RefAvsFolder) -> None:
    header = ("uid", "fid", "exp", "template", "sight", "sound", "time", "late")
    cues = [(uid, fid, exp, "by name", "1", "0", "0", str(int(n == 1))) for n, (_, uid, _, fid, exp) in enumerate(ROWS)]
    with (folder.root / "cues.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *cues])
    rows = audit(folder).expressions
    assert rows["late"].dtype == bool and list(np.flatnonzero(rows["late"])) == [1]
    write_cues(folder, [cue[:-1] for cue in cues])
    assert "late" not in audit(folder).expressions


def test_a_row_without_cues(folder: RefAvsFolder) -> None:
    write_cues(folder, [(uid, fid, exp, "by name", "1", "0", "0") for _, uid, _, fid, exp in ROWS[1:]])
    found = audit(folder)
    assert [(f.kind, f.rows) for f in found.faults] == [("missing_cues", (2,))] and found.failed
    assert len(audit(folder, {"missing_cues": "drop"}).expressions) == len(ROWS) - 1
    assert audit(folder, {"missing_cues": "keep"}).expressions["sight"].isna().sum() == 1
    write_cues(folder, [("c_dog_1", "0", "The dog.", "by name", "yes", "0", "0")])
    with pytest.raises(SamloveError, match="cues.csv: column sight: expected 0 or 1, found .'yes'.$"):
        audit(folder)


def test_a_failing_audit_leaves_the_old_index_alone(folder: RefAvsFolder, tmp_path: Path) -> None:
    out = tmp_path / "index"
    write_index(audit(folder), out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    truncate(folder.frame_path("c", 1))
    with pytest.raises(SamloveError, match=r"bad_frame \(1\); first: .*media/c/frames/1.jpg") as error:
        write_index(audit(folder), out)
    assert "\n" not in str(error.value)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    write_index(audit(folder, {"bad_frame": "drop"}), out)
    assert len(list(out.iterdir())) == 5
    assert "c" not in set(pd.read_parquet(out / "videos.parquet")["media_id"])


def test_an_index_of_no_rows_is_refused(folder: RefAvsFolder, tmp_path: Path) -> None:
    write_rows(folder.root, [ROW_FAULTS["todo_split"]])
    with pytest.raises(SamloveError, match="no row is left"):
        write_index(audit(folder), tmp_path / "index")
    assert not (tmp_path / "index").exists()


def test_the_same_folder_gives_the_same_bytes(folder: RefAvsFolder, tmp_path: Path) -> None:
    truncate(folder.frame_path("c", 1))
    write_index(audit(folder, {"bad_frame": "keep"}), tmp_path / "one")
    write_index(audit(folder, {"bad_frame": "keep"}), tmp_path / "two")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_the_stage_prints_its_audit_and_exits_with_a_status(
    folder: RefAvsFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs" / "small").mkdir(parents=True)
    (tmp_path / "configs" / "profile.yaml").write_text("profile: small\n")
    config = tmp_path / "configs" / "small" / "dataset.yaml"
    config.write_text(f"frames: {FRAMES}\n")
    place = tmp_path / "data" / "dataset" / "small"
    place.parent.mkdir(parents=True)
    place.symlink_to(folder.root)
    stage.main()
    assert "7 rows found, 7 kept; media checked" in capsys.readouterr().out
    truncate(folder.audio_path("c"))
    with pytest.raises(SystemExit, match="1"):
        stage.main()
    out, err = capsys.readouterr()
    assert "bad_audio             fail       1       1" in out
    assert "error: data/dataset/small: faults with policy 'fail': bad_audio (1)" in err
    config.write_text(f"frames: {FRAMES}\npolicy: {{bad_audio: drop}}\n")
    stage.main()
    assert len(pd.read_parquet("data/small/index/expressions.parquet")) == 6
    place.unlink()
    with pytest.raises(SystemExit, match="2"):
        stage.main()
    assert "data/dataset/small/metadata.csv: no such file" in capsys.readouterr().err
