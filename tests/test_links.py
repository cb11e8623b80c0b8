"""Links and other entries of a dataset that DVC cannot watch: refused with a remedy that works with the real DVC."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from dvc.repo import Repo

from samlove.data.dataset import RefAvsFolder
from samlove.data.index import audit_folder
from samlove.data.links import unwatched
from samlove.errors import RequestError
from tests.plain_user import run_as_plain_user
from tests.test_index import FRAMES, ROWS, write_masks, write_media, write_rows

FOLDERS = ("media", "gt_mask", "media/c", "media/c/frames", "gt_mask/c", "gt_mask/c/fid_0")


@pytest.fixture
def folder(tmp_path: Path) -> RefAvsFolder:
    """A dataset of one video, c, with one object, 0."""
    root = tmp_path / "set"
    root.mkdir()
    write_rows(root, [ROWS[3]])
    write_media(root, "c")
    write_masks(root, "c", 0)
    return RefAvsFolder(root)


def move_and_link(path: Path, elsewhere: Path) -> Path:
    """Put a link in the place of a file or folder; returns where it is now."""
    elsewhere.mkdir(exist_ok=True)
    target = path.rename(elsewhere / path.name)
    path.symlink_to(target)
    return target


@pytest.mark.parametrize("name", FOLDERS)
def test_a_link_to_a_folder_is_refused_wherever_it_is(folder: RefAvsFolder, tmp_path: Path, name: str) -> None:
    move_and_link(folder.root / name, tmp_path / "elsewhere")
    message = rf"set/{name}: link to a folder, .*elsewhere/.*, in which DVC would notice no change; .*cp -rLs"
    with pytest.raises(RequestError, match=message):
        folder.check_links()
    for media in (True, False):
        with pytest.raises(RequestError, match=message):
            audit_folder(folder.root, media, {}, FRAMES)


def test_all_such_links_are_counted(folder: RefAvsFolder, tmp_path: Path) -> None:
    for name in ("media", "gt_mask"):
        move_and_link(folder.root / name, tmp_path / "elsewhere")
    with pytest.raises(RequestError, match=r"gt_mask: link to a folder.* \(1 more such\)$"):
        folder.check_links()


def test_a_link_to_the_dataset_and_links_to_files_are_accepted(folder: RefAvsFolder, tmp_path: Path) -> None:
    files = (
        folder.root / "metadata.csv",
        folder.frame_path("c", 0),
        folder.audio_path("c"),
        folder.mask_path("c", 0, 1),
    )
    for path in files:
        move_and_link(path, tmp_path / "elsewhere")
    (tmp_path / "link").symlink_to("set")
    (tmp_path / "link to the link").symlink_to("link")
    linked = RefAvsFolder(tmp_path / "link to the link")
    linked.check_exists()
    linked.check_links()
    assert not audit_folder(linked.root, True, {}, FRAMES).faults


def make_dvc_project(dataset: Path, root: Path) -> Repo:
    """A DVC project that uses the dataset, through a link, as the stages `dataset` and `index` do."""
    (root / "data").mkdir(parents=True)
    (root / "data" / "set").symlink_to(dataset)
    stages = {
        "dataset": {"cmd": "true", "outs": [{"data/set": {"cache": False, "persist": True}}]},
        "index": {"cmd": "echo done > out", "deps": ["data/set"], "outs": ["out"]},
    }
    (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    return Repo.init(str(root), no_scm=True)


@pytest.mark.parametrize("name", ["media", "gt_mask/c/fid_0"])
def test_the_remedy_makes_dvc_notice_changes(
    folder: RefAvsFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    target = move_and_link(folder.root / name, tmp_path / "else where")
    (target / "below").symlink_to(tmp_path / "more")  # the copy follows this link, too
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "file").write_text("a file")
    file = next(path for path in sorted(target.rglob("*")) if path.suffix in (".jpg", ".png"))
    monkeypatch.chdir(tmp_path)
    with make_dvc_project(folder.root, tmp_path / "project") as repo:
        monkeypatch.chdir(repo.root_dir)

        def notices_a_change() -> bool:
            repo.reproduce()
            assert not repo.status()
            file.write_bytes(file.read_bytes() + b"!")
            return bool(repo.status())

        assert not notices_a_change()
        with pytest.raises(RequestError) as refused:
            folder.check_links()
        remedy = str(refused.value).partition("or links to its files: ")[2]
        subprocess.run(remedy.removesuffix(" (1 more such)"), shell=True, check=True)
        folder.check_links()
        assert notices_a_change()


def test_dvc_passes_over_a_folder_that_is_a_dvc_repository(
    folder: RefAvsFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    media = folder.root / "media"
    Repo.init(str(media), no_scm=True).close()
    (media / ".dvcignore").unlink()  # at which DVC would fail
    with make_dvc_project(folder.root, tmp_path / "project") as repo:
        monkeypatch.chdir(repo.root_dir)
        repo.reproduce()
        folder.frame_path("c", 0).write_bytes(b"changed")
        assert not repo.status()
        with pytest.raises(RequestError, match="media: folder is a DVC repository of its own") as refused:
            folder.check_links()
        monkeypatch.chdir(tmp_path)
        subprocess.run(str(refused.value).partition("instead: ")[2], shell=True, check=True)
        assert Path("NEW/c/frames/0.jpg").exists() and not list(unwatched(Path("NEW")))


def at(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda root: make(root / name)


ENTRIES = {  # what is there -> a function that makes it, what the message says
    "dangling": (at("media/c/frames/1.jpg", lambda p: p.symlink_to("nowhere")), "1.jpg: link to nowhere, which does"),
    "dangling csv": (at("metadata.csv", lambda p: p.symlink_to("nowhere")), "metadata.csv: link to nowhere, which"),
    "link to itself": (at("media/c/loop", lambda p: p.symlink_to("loop")), "loop: link to loop, which cannot be fol"),
    "link to above": (at("media/c/up", lambda p: p.symlink_to("..")), "up: link to a folder, .*; remove it"),
    "pipe": (at("media/c/frames/1.jpg", os.mkfifo), "1.jpg: neither a file nor a folder; remove it"),
    "link to a device": (at("media/c/audio.wav", lambda p: p.symlink_to("/dev/null")), "null, which is neither a file"),
    "DVC's ignore file": (at(".dvcignore", Path.touch), ".dvcignore: DVC accepts no such file"),
    "DVC repository": (at("media/.dvc", Path.mkdir), "media: folder is a DVC repository of its own"),
    "bytes": (at("media/c/" + os.fsdecode(b"\xe4.jpg"), Path.touch), r"media/c/\\xe4.jpg: name is not UTF-8"),
    "folder of bytes": (at("media/" + os.fsdecode(b"\xff"), Path.mkdir), r"media/\\xff: name is not UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("name", ENTRIES)
def test_entries_at_which_dvc_fails_are_refused(folder: RefAvsFolder, name: str) -> None:
    make, message = ENTRIES[name]
    for path in (folder.frame_path("c", 1), folder.audio_path("c"), folder.root / "metadata.csv"):
        path.unlink()
    make(folder.root)
    with pytest.raises(RequestError, match=message) as refused:
        audit_folder(folder.root, True, {}, FRAMES)
    str(refused.value).encode()
    assert "\n" not in str(refused.value) and "; " in str(refused.value)


def test_git_folders_do_not_matter(folder: RefAvsFolder) -> None:
    (folder.root / ".git").mkdir()
    (folder.root / ".git" / "link").symlink_to(folder.root / "media")
    folder.check_links()


def samlove_audit(root: Path) -> tuple[int, str]:
    done = run_as_plain_user("-m", "samlove.cli.main", "audit", str(root))
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["media", "media/c/frames", "gt_mask/c"])
def test_a_folder_that_may_not_be_read_is_named(folder: RefAvsFolder, name: str) -> None:
    place = folder.root / name
    place.chmod(0)
    try:
        status, said = samlove_audit(folder.root)
    finally:
        place.chmod(0o755)
    assert status == 2 and f"error: {place}: folder cannot be read: Permission denied; run: chmod" in said


def test_files_that_may_not_be_read_are_faults_with_their_names(folder: RefAvsFolder) -> None:
    paths = {
        "bad_frame": folder.frame_path("c", 1),
        "bad_audio": folder.audio_path("c"),
        "bad_mask": folder.mask_path("c", 0, 2),
    }
    for path in paths.values():
        path.chmod(0)
    status, said = samlove_audit(folder.root)
    assert status == 1
    for kind, path in paths.items():
        assert f"\n{kind} " in said and f"{path}: cannot be read: Permission denied" in said
    (folder.root / "metadata.csv").chmod(0)
    status, said = samlove_audit(folder.root)
    assert status == 1 and f"error: {folder.root}/metadata.csv: Permission denied" in said
