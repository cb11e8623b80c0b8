"""LAVS-synth: the same seed gives the same bytes, and the files match the ground truth."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
import yaml
from PIL import Image

from pipelines import dataset as stage
from samlove.errors import RequestError, one_line_errors
from samlove.synth.expressions import expressions
from samlove.synth.scene import COLOURS, SECONDS, SEEN, UNSEEN, render, sample_scene
from samlove.synth.voice import RATE, TIMBRES, mix
from samlove.synth.write import SCALES, Scale, check_replaceable, plan, rewrite_dataset, write_dataset


def tree(root: Path) -> dict[str, str]:
    files = sorted(p for p in root.rglob("*") if p.is_file())
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synth") / "lavs"
    write_dataset(out, seed=3, scale="small")
    return out


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(folder: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "again", seed=3, scale="small")
    write_dataset(tmp_path / "other", seed=4, scale="small")
    assert tree(tmp_path / "again") == tree(folder)
    assert (tmp_path / "other/metadata.csv").read_bytes() != (folder / "metadata.csv").read_bytes()


def test_layout_is_ref_avs(folder: Path) -> None:
    rows = pd.read_csv(folder / "metadata.csv")
    late = pd.read_csv(folder / "cues.csv")["late"].astype(bool)
    assert list(rows.columns) == ["vid", "uid", "split", "fid", "exp"]
    assert set(rows["split"]) == {"train", "val", "test_s", "test_u", "test_n"}
    assert rows["uid"].is_unique
    assert late.any() and not late.all()
    sizes = set()
    for row in rows.itertuples():
        media = row.uid.rsplit("_", 2)[0]
        null = row.uid.startswith("null_")
        assert media in ({f"null_m-{row.vid}", f"null_c-{row.vid}"} if null else {row.vid})
        assert (row.uid.rsplit("_", 2)[1] == "null") == null
        samples, rate = soundfile.read(folder / "media" / media / "audio.wav", dtype="int16")
        assert (len(samples), rate) == (SECONDS * RATE, RATE)
        assert samples.any() != media.startswith("null_m-")
        for t in range(SECONDS):
            with Image.open(folder / "media" / media / "frames" / f"{t}.jpg") as frame:
                mask = np.asarray(Image.open(folder / f"gt_mask/{media}/fid_{row.fid}/{t:05d}.png"))
                assert frame.size == mask.shape[::-1]
                sizes.add(frame.size)
            assert not (null and mask.any())
            if t == 0 and not null:
                assert mask.any() != late[row.Index]
    assert len(sizes) > 1


def test_only_null_and_seen_share_videos(folder: Path) -> None:
    rows = pd.read_csv(folder / "metadata.csv")
    vids = {split: set(part["vid"]) for split, part in rows.groupby("split")}
    assert vids["test_n"] <= vids["test_s"]
    for one, other in [("train", "val"), ("train", "test_s"), ("train", "test_u"), ("val", "test_s")]:
        assert not vids[one] & vids[other]


def test_unseen_only_in_test_u() -> None:
    for clip in plan(0, SCALES["small"]):
        categories = {thing.category for thing in clip.scene.things}
        heard = set() if clip.sound is None else {thing.category for thing in clip.sound.things}
        if clip.split == "test_u":
            assert {clip.scene.things[row.target].category for row in clip.rows} <= set(UNSEEN)
        else:
            assert not (categories | heard) & set(UNSEEN)
        if clip.media_id.startswith("null_c-"):  # nothing here can make what is heard
            sounding = {thing.category for thing in clip.sound.things if thing.sounding.any()}
            assert sounding and not sounding & categories


def test_expressions_fit_one_thing_of_the_ground_truth() -> None:
    """Checked against separate conditions, derived from the words of the simpler expressions."""
    rng = np.random.default_rng(0)
    read = 0
    for _ in range(150):
        scene = sample_scene(rng, SEEN)
        things = scene.things
        heard = [k for k, thing in enumerate(things) if thing.sounding.any()]
        for said in expressions(scene):
            words = said.text.rstrip(".").lower().split()
            if said.template == "loudest":
                fits = [max(heard, key=lambda k: things[k].loudness)]
            elif said.template == "lowest":
                fits = [min(heard, key=lambda k: things[k].pitch)]
            elif said.template == "first":
                fits = [min(heard, key=lambda k: int(np.flatnonzero(things[k].sounding)[0]))]
            elif said.template == "longest":
                fits = [max(heard, key=lambda k: int(things[k].sounding.sum()))]
            elif said.template in ("sounding", "source"):
                fits = heard
            elif said.template == "silent category":
                fits = [k for k, thing in enumerate(things) if thing.category == words[-1] and k not in heard]
            elif said.template == "colour category":
                fits = [k for k, thing in enumerate(things) if [thing.colour, thing.category] == words[1:]]
            else:
                continue
            read += 1
            assert fits == [said.target], said.text
            if said.template == "colour category":
                assert said.sight and not said.sound
            elif said.template != "silent category":
                assert said.sound and not said.sight
    assert read > 300


def test_a_late_thing_is_out_of_sight_at_second_0_and_appears_from_outside_or_behind_another() -> None:
    """All other things are in sight then. No expression uses the place of a thing that is not."""
    inside = []
    for seed in range(80):
        scene = sample_scene(np.random.default_rng(seed), SEEN, late=1.0)
        shown = np.array([render(scene, t, (96, 96))[1].any((1, 2)) for t in range(SECONDS)])  # (SECONDS, K)
        assert [thing.late for thing in scene.things] == (~shown[0]).tolist() and (~shown[0]).sum() == 1
        assert not shown[1].all() and shown[5:].all(0)[~shown[0]].sum() + shown[5:, ~shown[0]].sum() >= 3
        late = next(thing for thing in scene.things if thing.late)
        inside.append(bool(np.all((late.path[0] > 0) & (late.path[0] < 1))))
        for said in expressions(scene):
            target = scene.things[said.target]
            if "place" in said.template or "beside" in said.template:
                assert not target.late, said.text
            if "beside" in said.template:
                assert not said.text.endswith(f" of the {late.category}."), said.text
    assert 4 <= sum(inside) <= 40


def test_a_scene_without_a_late_thing_does_not_depend_on_their_probability() -> None:
    for seed in range(20):
        scenes = [sample_scene(np.random.default_rng(seed), SEEN, late=share) for share in (0.0, 0.3)]
        if not any(thing.late for thing in scenes[1].things):
            for one, other in zip(*(scene.things for scene in scenes), strict=True):
                assert all(np.array_equal(getattr(one, name), getattr(other, name)) for name in one.__dict__)
        else:
            assert not any(thing.late for thing in scenes[0].things)


def test_a_pulse_is_seen_and_a_sounding_thing_is_heard() -> None:
    rng = np.random.default_rng(1)
    scene = next(
        s
        for s in iter(lambda: sample_scene(rng, SEEN), None)
        if 0 < s.things[-1].sounding.sum() < SECONDS and s.things[-1].pulsing.any()
    )
    thing = scene.things[-1]  # nothing hides it
    on, off = int(np.argmax(thing.sounding)), int(np.argmin(thing.sounding))
    size = (128, 128)
    bright = {}
    for t in (on, off):
        picture, masks = render(scene, t, size)
        bright[t] = (picture[masks[-1]].min(axis=-1) > 250).sum()
    assert bright[on] > bright[off]
    alone = type(scene)((thing,), scene.aspect, scene.background)
    loud = np.abs(mix(alone, np.random.default_rng(0)).reshape(SECONDS, RATE).astype(float)).mean(axis=1)
    assert loud[thing.sounding].min() > 2 * loud[~thing.sounding].max()


def test_a_pulse_does_not_tell_what_sounds() -> None:
    rng = np.random.default_rng(0)
    things = [thing for _ in range(200) for thing in sample_scene(rng, SEEN).things]
    sounding = [thing for thing in things if thing.sounding.any()]
    silent = [thing for thing in things if not thing.sounding.any()]
    assert 0.7 < np.mean([thing.pulsing.any() for thing in sounding]) < 0.9
    assert 0.4 < np.mean([thing.pulsing.any() for thing in silent]) < 0.6
    assert all(np.array_equal(thing.pulsing, thing.sounding) for thing in sounding if thing.pulsing.any())


def test_every_category_has_a_shape_a_colour_and_a_timbre() -> None:
    assert set(SEEN) | set(UNSEEN) <= set(TIMBRES) and not set(SEEN) & set(UNSEEN)
    assert len(COLOURS) == 8


@pytest.mark.parametrize(
    "signals",
    [
        [signal.SIGTERM],
        pytest.param([signal.SIGINT], marks=pytest.mark.slow),
        pytest.param([signal.SIGINT, signal.SIGINT], marks=pytest.mark.slow),
    ],
)
def test_an_interrupt_ends_the_command_and_its_workers_at_once(signals: list[int], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "samlove.cli.main", "synth", "--out", str(tmp_path / "new"), "--seed", "0"]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)
    assert run.stderr is not None
    while b"video" not in run.stderr.readline(20):
        assert run.poll() is None
    for number in signals:
        os.killpg(run.pid, number) if number == signal.SIGINT else run.send_signal(number)
        time.sleep(0.2)
    _, said = run.communicate(timeout=20)  # to the end of stderr, which the workers have open too
    if len(signals) == 1:
        assert run.returncode == 1 and said.decode().splitlines()[-1].startswith("stopped; ")
        assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(folder: Path) -> None:
    before = tree(folder)
    with pytest.raises(RequestError, match="not an empty folder"):
        write_dataset(folder, seed=0, scale="small")
    with pytest.raises(RequestError, match="expected one of"):
        write_dataset(folder.parent / "new", seed=0, scale="huge")
    assert tree(folder) == before and not (folder.parent / "new").exists()


@pytest.fixture
def tiny(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The tree of a dataset of seed 3 and the scale `tiny`, which exists for this test."""
    monkeypatch.setitem(SCALES, "tiny", Scale(dict.fromkeys(SCALES["small"].clips, 1), 32, 1, 1))
    out = tmp_path_factory.mktemp("tiny") / "lavs"
    write_dataset(out, seed=3, scale="tiny")
    return tree(out)


@pytest.mark.parametrize(
    "kind", ["new", "below new folders", "empty", "link", "current folder", "left by a killed run"]
)
def test_a_new_or_empty_folder_of_any_kind_is_written(
    kind: str, tiny: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "out"
    if kind == "below new folders":
        place = place / "a" / "b"
    elif kind != "new":
        place.mkdir()
    if kind == "link":
        (tmp_path / "link").symlink_to("out")
    if kind == "left by a killed run":
        (place / ".partial" / "media").mkdir(parents=True)
    monkeypatch.chdir(place if kind == "current folder" else tmp_path)
    out = {"link": "link", "current folder": "."}.get(kind, str(place.relative_to(tmp_path)))
    write_dataset(Path(out), seed=3, scale="tiny")
    assert tree(place) == tiny
    assert {path.name for path in tmp_path.iterdir()} <= {"out", "link"}
    assert sorted(path.name for path in place.iterdir()) == ["cues.csv", "gt_mask", "media", "metadata.csv"]


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("file", "a file; expected a new or empty folder"),
        ("below a file", r"cannot be made \(Not a directory\)"),
        ("dangling", "link to nowhere, which does not exist; expected a new or empty folder"),
        ("loop", "link to out, which leads back to it"),
        ("full", "already exists and is not an empty folder"),
    ],
)
def test_anything_else_is_refused_and_nothing_is_left(kind: str, says: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if kind in ("file", "below a file"):
        out.write_text("content")
    elif kind == "full":
        out.mkdir()
        (out / "file").write_text("content")
    else:
        out.symlink_to({"dangling": "nowhere", "loop": "out"}[kind])
    before = sorted(path for path in tmp_path.rglob("*"))
    place = out / "below" if kind == "below a file" else out
    with pytest.raises(RequestError, match=f"^{place}: {says}.*; (remove it or )?choose another path$"):
        write_dataset(place, seed=3, scale="small")
    assert sorted(path for path in tmp_path.rglob("*")) == before


@pytest.fixture
def mount_point(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    place = tmp_path / "mounted"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", place], capture_output=True).returncode:
        pytest.skip("needs permission to mount a file system")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_mount_point_is_written_and_a_full_or_read_only_disk_leaves_nothing(
    mount_point: Path, tiny: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = one_line_errors(lambda out: write_dataset(out, seed=3, scale="tiny"))
    for out in (mount_point, mount_point / "below"):
        with pytest.raises(SystemExit, match="1"):
            write(out)
        assert capsys.readouterr().err.splitlines()[-1].endswith("free some space and run the same command again")
        assert list(mount_point.iterdir()) == []
    subprocess.run(["mount", "-o", "remount,size=100m", mount_point], check=True)
    write(mount_point)
    assert tree(mount_point) == tiny
    subprocess.run(["mount", "-o", "remount,ro", mount_point], check=True)
    with pytest.raises(SystemExit, match="2"):
        write(mount_point / "below")
    assert capsys.readouterr().err.endswith("below: cannot be made (Read-only file system); choose another path\n")
    monkeypatch.chdir(mount_point.parent)
    with pytest.raises(RequestError, match="mounted: is a mount point"):
        check_replaceable(mount_point)


def test_what_was_there_stays_if_the_new_dataset_cannot_be_written(
    tiny: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dataset(tmp_path / "lavs", seed=3, scale="tiny")
    before = tree(tmp_path)

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("samlove.synth.write._write_tables", fail)
    with pytest.raises(OSError, match="No space left"):
        rewrite_dataset(tmp_path / "lavs", seed=4, scale="tiny")
    assert tree(tmp_path) == before


# --- the stage `dataset` ---------------------------------------------------------------------------------------------


def select(**settings: object) -> Path:
    """Make a profile with these settings in dataset.yaml the active one. Returns the place of its dataset."""
    Path("configs/mine").mkdir(parents=True, exist_ok=True)
    Path("configs/profile.yaml").write_text("profile: mine\n")
    Path("configs/mine/dataset.yaml").write_text(yaml.safe_dump(settings))
    Path("data/dataset").mkdir(parents=True, exist_ok=True)
    return Path("data/dataset/mine")


def test_the_stage_replaces_a_generated_dataset(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    place = select(synth={"seed": 4, "scale": "small"})
    stage.main()
    select(synth={"seed": 3, "scale": "small"})
    stage.main()
    assert tree(place) == tree(folder)
    assert [path.name for path in place.parent.iterdir()] == ["mine"]


@pytest.mark.parametrize("kind", ["link", "other files", "file"])
def test_the_stage_never_replaces_the_users_files(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    place = select(synth={"seed": 3, "scale": "small"})
    users = tmp_path / "users" if kind == "link" else place
    if kind == "file":
        place.write_text("not a folder")
    else:
        users.mkdir()
        (users / "metadata.csv").write_text("vid,uid,split,fid,exp\n")
    if kind == "link":
        place.symlink_to(users)
    before = tree(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        stage.main()
    assert "synth: null in configs/mine/dataset.yaml" in capsys.readouterr().err
    assert tree(tmp_path) == before and place.is_symlink() == (kind == "link")


def test_the_stage_checks_that_the_users_dataset_is_there(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    place = select()
    with pytest.raises(SystemExit, match="2"):
        stage.main()
    assert f"ln -s /path/to/Ref-AVS {place}" in capsys.readouterr().err
    place.symlink_to("nowhere")
    with pytest.raises(SystemExit, match="2"):
        stage.main()
    assert f"link to nowhere, which is not a folder; run: ln -sfn /path/to/Ref-AVS {place}" in capsys.readouterr().err
    place.unlink()
    place.symlink_to(folder)
    before = tree(folder)
    stage.main()
    assert tree(folder) == before
