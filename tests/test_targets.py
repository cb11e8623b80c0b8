"""Decoded ground-truth masks: equal to the files, written once, damaged or outdated files are written again."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from samlove.data.dataset import RefAvsFolder
from samlove.data.digest import folder_digest
from samlove.data.targets import LOCK, Targets
from samlove.errors import SamloveError
from samlove.scoring.evaluate import evaluate
from tests.made_run import make_run

FRAMES, SIZE = 4, 23  # a video of make_run has 3 frames; 4 x 23 x 23 bits do not fill their last byte

SUMS = """
import json, sys
from pathlib import Path
import pandas as pd
from samlove.data.dataset import RefAvsFolder
from samlove.data.targets import Targets
run, shape = Path(sys.argv[1]), map(int, sys.argv[2:])
rows = pd.read_parquet(run / "index" / "expressions.parquet")
targets, frames, size = Targets(RefAvsFolder(run / "set"), rows, "digest", run / "scratch"), *shape
named = rows[~rows["null"]].to_dict("records")
print(json.dumps([int(targets.load_masks(r["media_id"], r["fid"], frames, size).sum()) for r in named]))
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    make_run(tmp_path, {"val": 2, "test_s": 4, "test_u": 3, "test_n": 2})
    return tmp_path


def targets(run: Path) -> Targets:
    rows = pd.read_parquet(run / "index" / "expressions.parquet")
    return Targets(RefAvsFolder(run / "set"), rows, (run / "index" / "gt_mask.sha256").read_text(), run / "scratch")


def objects(run: Path) -> list[tuple[str, int]]:
    rows = pd.read_parquet(run / "index" / "expressions.parquet")
    return [(row["media_id"], row["fid"]) for row in rows[~rows["null"]].to_dict("records")]


def assert_equals_the_masks(run: Path, found: Targets) -> None:
    for of_video in objects(run):
        expected = RefAvsFolder(run / "set").load_masks(*of_video, FRAMES, SIZE)
        loaded = found.load_masks(*of_video, FRAMES, SIZE)
        assert loaded.dtype == bool and loaded.shape == expected.shape == (FRAMES, SIZE, SIZE)
        assert expected.any() and (loaded == expected).all(), of_video


def files(run: Path) -> list[Path]:
    return sorted(path for path in (run / "scratch").iterdir() if path.name != LOCK)


def one_file(run: Path) -> Path:
    (path,) = files(run)
    return path


def change_a_mask(run: Path) -> None:
    path = RefAvsFolder(run / "set").mask_path(*objects(run)[0], 0)
    Image.fromarray(255 - np.asarray(Image.open(path))).save(path)


def test_they_equal_the_masks_of_every_row(run: Path) -> None:
    assert_equals_the_masks(run, targets(run))
    pixels = len(objects(run)) * FRAMES * SIZE**2
    assert one_file(run).stat().st_size < pixels / 8 + 100


def test_masks_are_decoded_once(run: Path) -> None:
    assert_equals_the_masks(run, targets(run))
    masks = {of_video: targets(run).load_masks(*of_video, FRAMES, SIZE) for of_video in objects(run)}
    shutil.rmtree(run / "set" / "gt_mask")  # no later run reads them
    for of_video, expected in masks.items():
        assert (targets(run).load_masks(*of_video, FRAMES, SIZE) == expected).all()


def test_scores_are_those_of_the_masks(run: Path) -> None:
    expressions = pd.read_parquet(run / "index" / "expressions.parquet")
    plain = evaluate(expressions, RefAvsFolder(run / "set"), run / "predictions", "per_expression")
    stored = evaluate(expressions, targets(run), run / "predictions", "per_expression")
    pd.testing.assert_frame_equal(plain.rows, stored.rows, check_exact=True)
    assert (plain.metrics, plain.details) == (stored.metrics, stored.details)


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty", "longer", "checksum"])
def test_a_damaged_file_is_written_again(run: Path, damage: str) -> None:
    assert_equals_the_masks(run, targets(run))
    path = one_file(run)
    content = path.read_bytes()
    changed = {
        "flipped": content[:100] + bytes([content[100] ^ 4]) + content[101:],
        "truncated": content[:-1],
        "empty": b"",
        "longer": content + b"\0",
        "checksum": b"\xff" * 8 + content[8:],
    }[damage]
    path.write_bytes(changed)
    assert_equals_the_masks(run, targets(run))
    assert one_file(run) == path and path.read_bytes() == content


def test_other_masks_have_another_file_and_the_old_one_is_removed(run: Path) -> None:
    assert_equals_the_masks(run, targets(run))
    old = one_file(run)
    (run / "scratch" / f"{old.stem}.0123.partial").write_bytes(b"left by a killed run")
    change_a_mask(run)
    (run / "index" / "gt_mask.sha256").write_text(folder_digest(run / "set" / "gt_mask"))
    assert_equals_the_masks(run, targets(run))
    assert one_file(run) != old


def test_the_number_of_a_videos_frames_counts(run: Path) -> None:
    assert_equals_the_masks(run, targets(run))
    old, folder = one_file(run), RefAvsFolder(run / "set")
    folder.frame_path(objects(run)[0][0], 2).unlink()  # masks after the last frame are not used
    assert_equals_the_masks(run, targets(run))
    assert one_file(run) != old


def test_an_unreadable_mask_is_named_and_nothing_is_kept(run: Path) -> None:
    path = RefAvsFolder(run / "set").mask_path(*objects(run)[-1], 1)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(SamloveError, match=f"{path}: image cannot be decoded"):
        targets(run).load_masks(*objects(run)[0], FRAMES, SIZE)
    assert files(run) == []


def test_processes_that_need_the_file_at_the_same_time_agree(run: Path) -> None:
    command = [sys.executable, "-c", SUMS, *map(str, (run, FRAMES, SIZE))]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    results = [process.communicate(timeout=120) for process in both]
    expected = [int(RefAvsFolder(run / "set").load_masks(*o, FRAMES, SIZE).sum()) for o in objects(run)]
    assert [json.loads(out) for out, _ in results] == [expected] * 2, results
    assert sum("decode masks" in err for _, err in results) == 1  # the other process waited for the file
    assert one_file(run).stat().st_size > 0
