"""`samlove score`: scores, what is odd about masks, errors, and two methods compared."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from samlove.cli.main import app
from samlove.errors import RequestError
from samlove.scoring.compare import paired_bootstrap
from samlove.scoring.mask_formats import _BIN_LOGITS
from samlove.scoring.masks import grey_logits
from samlove.scoring.metrics import EDGES, quantise
from samlove.scoring.protocols import PROTOCOLS
from samlove.scoring.splits import compare
from stores import PredictionWriter
from tests.mask_files import FAST, FRAMES, SHAPE, SPLITS, Made, expected, make_dataset, save, scored, write
from tests.plain_user import run_as_plain_user


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    return make_dataset(tmp_path_factory.mktemp("set"))


def test_logits_score_as_in_python(made, tmp_path):
    root, logits, _ = made
    for split, uids in SPLITS.items():
        np.save(tmp_path / f"{split}.npy", np.stack([logits[uid] for uid in uids]))
    found = scored(root, tmp_path, [*FAST, "official", "tgs_agent", "crab", "als3p_infer", "aurora"])
    for name, of_splits in found.protocols.items():
        for split in SPLITS:
            assert of_splits[split] == expected(made, logits, split, name), (name, split)
        assert of_splits["mix"]["J"] == pytest.approx((of_splits["test_s"]["J"] + of_splits["test_u"]["J"]) / 2)
    assert found.counts["test_n"] == dict.fromkeys(found.counts["test_n"], 0) | {"expressions": 1, "null": 1}


def test_grey_levels_and_stored_bins_are_scores(made, tmp_path):
    root, logits, _ = made
    for uid, of_uid in logits.items():
        for t, frame in enumerate(of_uid):
            save(tmp_path / "png" / uid / f"{t}.png", np.round(255 / (1 + np.exp(-frame))).astype(np.uint8))
    grey = {uid: grey_logits(np.round(255 / (1 + np.exp(-of))), 255) for uid, of in logits.items()}
    found = scored(root, tmp_path / "png")
    assert found.protocols["simtoken"]["test_s"] == expected(made, grey, "test_s", "simtoken")
    square = {uid: of[:, :, :24] for uid, of in logits.items()}
    for split, uids in SPLITS.items():
        with PredictionWriter(tmp_path / "run" / split / "predictions.h5", FRAMES, 24, EDGES) as writer:
            writer.write(uids, np.stack([quantise(square[uid]) for uid in uids]))
    bins = {uid: _BIN_LOGITS[quantise(of)] for uid, of in square.items()}
    found = scored(root, tmp_path / "run")
    assert found.protocols["simtoken"]["test_u"] == expected(made, bins, "test_u", "simtoken")
    assert found.counts["test_u"]["other_size"] == 2


def test_the_logit_of_a_bin_lies_in_it():
    np.testing.assert_array_equal(quantise(_BIN_LOGITS), np.arange(256))


def test_what_is_odd_is_counted_and_counts_as_stated(made, tmp_path):
    root, logits, _ = made
    masks = {uid: of > 0 for uid, of in logits.items()}
    write("png", tmp_path, masks)
    shutil.rmtree(tmp_path / "test" / "a_x_2")  # missing
    (tmp_path / "test" / "b_y_1" / "00001.png").unlink()  # incomplete
    save(tmp_path / "test" / "c_z_1" / "00007.png", np.zeros(SHAPE, np.uint8))  # long
    save(tmp_path / "test" / "c_z_2" / "00000.png", np.full((12, 16), 255, np.uint8))  # another size
    save(tmp_path / "again" / "a_x_1" / "00000.png", np.zeros(SHAPE, np.uint8))  # doubled: it comes first
    save(tmp_path / "other" / "0.png", np.zeros(SHAPE, np.uint8))  # unused
    result = CliRunner().invoke(
        app, ["score", str(tmp_path), "--dataset", str(root), "--protocol", "omniavs,crab_plus,simtoken", "--out",
              str(tmp_path / "scores.json")]
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    for text in (
        "test_s: 1 without any mask: every frame counts as an empty mask; for example a_x_2\n",
        "test_s: 1 without a mask on some",
        "test_u: 1 with masks after the last frame",
        "test_u: 1 with masks of another size",
        "1 masks doubled: only the first is used",
        "1 masks of no expression or no known format: not used",
        "other/0.png",
        "Not computed: F and J&F of simtoken.",
        "OISA",
        "Crab+",
    ):
        assert text in result.output, result.output
    assert max(map(len, result.stdout.splitlines())) < 120 + len(str(tmp_path))
    content = json.loads((tmp_path / "scores.json").read_text())
    (method,) = content["methods"]
    assert method["binary"] and method["rows"]["test_s"] == {
        "expressions": 3, "null": 0, "missing": 1, "incomplete": 1, "long": 0, "other_size": 0, "shared": 0
    }  # fmt: skip
    assert method["scores"]["simtoken"]["test_s"]["F"] is None and content["used_by"]["crab_plus"].startswith("Crab+")
    empty = np.zeros_like(masks["a_x_1"])
    masks["a_x_2"] = empty
    masks["b_y_1"] = np.where(np.arange(FRAMES)[:, None, None] == 1, False, masks["b_y_1"])
    masks["a_x_1"] = np.where(np.arange(FRAMES)[:, None, None] == 0, False, masks["a_x_1"])
    binary = {uid: grey_logits(mask * 255, 255) for uid, mask in masks.items()}
    assert method["scores"]["omniavs"]["test_s"] == expected(made, binary, "test_s", "omniavs")


def test_rows_of_one_uid_share_its_masks(made, tmp_path):
    root, logits, _ = made
    copy = tmp_path / "set"
    shutil.copytree(root, copy)
    (copy / "cues.csv").unlink()
    with open(copy / "metadata.csv", "a") as file:
        file.write("c,c_z_1,test_u,0,the thing 0\n")
    found = scored(copy, write("archive", tmp_path, logits), splits=["test_u"])
    assert found.counts["test_u"]["expressions"] == 3 and found.counts["test_u"]["shared"] == 1
    assert found.rows.loc["c_z_1#2", "J_simtoken"] == found.rows.loc["c_z_1", "J_simtoken"]
    assert set(found.protocols["simtoken"]) == {"test_u"}


def test_two_methods_are_compared_by_expression(made, tmp_path):
    root, logits, _ = made
    for name, shift in (("a", 0), ("b", 4)):
        (tmp_path / name).mkdir()
        write("arrays", tmp_path / name, {uid: np.roll(of, shift, axis=2) for uid, of in logits.items()})
    own, other = (scored(root, tmp_path / name, ["simtoken"]) for name in "ab")
    by_split = compare(own, other, "simtoken", "split")
    assert set(by_split) == {"test_s", "test_u", "test_n", "mix"} and set(by_split["test_n"]) == {"S"}
    columns = [100 * table.rows.loc[SPLITS["test_s"], "J&F_simtoken"] for table in (own, other)]
    assert by_split["test_s"]["J&F"] == paired_bootstrap(*columns) and by_split["test_s"]["J&F"].mean > 1
    assert {group: of["J"].n for group, of in compare(own, other, "simtoken", "cue").items()} == {
        "sound": 3, "sight+sound": 2
    }  # fmt: skip
    assert set(compare(own, other, "simtoken", "category")) == {"x", "y", "z"}
    assert all(d.mean == 0 and not d.distinct for of in compare(own, own, "simtoken", "split").values()
               for d in of.values())  # fmt: skip
    result = CliRunner().invoke(
        app, ["score", str(tmp_path / "a"), str(tmp_path / "b"), "--dataset", str(root), "--protocol", "simtoken"]
    )
    assert result.exit_code == 0 and "sight+sound" in result.output and "minus" in result.output, result.output


def refusal(root: Path, masks: Path, *arguments: str) -> BaseException | None:
    return CliRunner().invoke(app, ["score", str(masks), "--dataset", str(root), *arguments]).exception


def test_invalid_requests_are_refused(made, tmp_path):
    root, logits, _ = made
    masks = write("archive", tmp_path, logits)
    for arguments, text in (
        (["--protocol", "best"], "--protocol best: expected all or one of official"),
        (["--dataset", str(tmp_path / "no")], "/no: no such file; expected the folder of a dataset with metadata.csv"),
        (["--split", "test_x"], "no rows of split test_x; its splits are test_n, test_s, test_u"),
        (["--out", str(tmp_path / "no" / "x.json")], "no such file; create the folder"),
    ):
        with pytest.raises(RequestError, match=text):
            raise refusal(root, masks, *arguments)
    with pytest.raises(RequestError, match="no masks of split test_n"):
        raise refusal(root, write("archive", tmp_path, {"a_x_1": logits["a_x_1"], "c_z_1": logits["c_z_1"]}))
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "absent", tmp_path / "empty", root / "metadata.csv"):
        with pytest.raises(RequestError, match=str(path)):
            raise refusal(root, path)


def test_a_dataset_without_ground_truth_is_an_error_where_it_is_needed(made, tmp_path):
    root, logits, _ = made
    masks = write("archive", tmp_path, logits)
    shutil.copytree(root, tmp_path / "set")
    shutil.rmtree(tmp_path / "set" / "gt_mask")
    assert refusal(tmp_path / "set", masks, "--split", "test_n", "--protocol", "crab_plus") is None
    with pytest.raises(RequestError, match="/gt_mask: no such file; expected the folder of a dataset"):
        raise refusal(tmp_path / "set", masks)


def test_a_protocol_that_is_named_twice_counts_once(made, tmp_path):
    root, logits, _ = made
    masks = write("archive", tmp_path, logits)
    for name, protocol in (("once", "official"), ("twice", "official,official")):
        out = str(tmp_path / f"{name}.json")
        assert refusal(root, masks, "--protocol", protocol, "--out", out) is None
    assert (tmp_path / "once.json").read_bytes() == (tmp_path / "twice.json").read_bytes()


def test_results_replace_no_folder_and_no_masks(made, tmp_path):
    root, logits, _ = made
    masks = write("archive", tmp_path, logits)
    for out, text in ((tmp_path, "a folder; expected a new file"), (masks, "holds masks to score")):
        before = masks.read_bytes()
        with pytest.raises(RequestError, match=text):
            raise refusal(root, masks, "--out", str(out))
        assert masks.read_bytes() == before


def test_a_folder_that_may_not_be_read_is_an_error(made, tmp_path):
    root, logits, _ = made
    write("png", tmp_path / "masks", {uid: of > 0 for uid, of in logits.items()})
    closed = next((tmp_path / "masks").rglob("b_y_1"))
    closed.chmod(0)
    try:
        done = run_as_plain_user("-m", "samlove.cli.main", "score", str(tmp_path / "masks"), "--dataset", str(root))
    finally:
        closed.chmod(0o755)
    assert done.returncode == 1 and done.stderr == f"error: {closed}: Permission denied\n"


def test_a_folder_that_may_not_be_written_is_an_error_before_the_work(made, tmp_path):
    root, logits, _ = made
    masks = write("archive", tmp_path, logits)
    (tmp_path / "closed").mkdir(mode=0o555)
    out = tmp_path / "closed" / "x.json"
    done = run_as_plain_user("-m", "samlove.cli.main", "score", str(masks), "--dataset", str(root), "--out", str(out))
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == f"error: {out.parent}: no permission to write; choose another --out\n"


def test_a_folder_whose_name_is_no_utf8(made, tmp_path):
    root, logits, _ = made
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    masks, out = write("archive", folder, logits), tmp_path / "scores.json"
    arguments = [str(masks), "--dataset", str(root), "--protocol", "crab_plus", "--out", str(out)]
    app(["score", *arguments], standalone_mode=False)
    assert json.loads(out.read_text(encoding="utf-8"))["methods"][0]["masks"].endswith(f"caf\ufffd/{masks.name}")


def test_every_protocol_has_a_name_for_the_table():
    assert all(protocol.used_by and len(name) < 13 for name, protocol in PROTOCOLS.items())
