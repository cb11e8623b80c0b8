"""The index of the metadata.csv of Ref-AVS Bench, if it is available: the counts are the known ones."""

from pathlib import Path

import pytest

from samlove.config import SPLITS
from samlove.data.index import Audit, audit_folder

REAL = Path(__file__).parents[1] / ".." / "shared" / "refavs"


@pytest.fixture(scope="module")
def real() -> Audit:
    if not (REAL / "metadata.csv").exists():
        pytest.skip("needs the real metadata.csv")
    return audit_folder(REAL, check_media=False)


def test_counts_of_the_real_table(real: Audit) -> None:
    report = real.as_dict()
    found = {split: list(sizes["found"].values()) for split, sizes in report["splits"].items()}
    assert found == {  # rows, vids, media folders, null rows
        "train": [14113, 2767, 2919, 608],
        "val": [1349, 257, 275, 72],
        "test_s": [2288, 273, 273, 0],
        "test_u": [1656, 269, 269, 0],
        "test_n": [1028, 257, 257, 1028],
        "TODO": [25, 8, 8, 0],
    }
    assert report["rows"] == {"found": 20459, "kept": 20459 - 25 - 103 - 1}
    counts = {kind: fault["count"] for kind, fault in report["faults"].items() if fault["count"]}
    assert counts == {
        "todo_split": 25,
        "no_expression": 103,
        "tool_error": 1,
        "edge_blanks": 41,
        "inner_blanks": 5,
        "non_ascii": 1,
        "repeated_uid": 11,
        "repeated_row": 8,
    }
    assert not real.failed


def test_texts_of_the_real_table(real: Audit) -> None:
    """5,232 distinct texts in all rows as written; fewer in the kept rows, after normalisation."""
    assert real.as_dict()["distinct_texts"] == {"found": 5232, "kept": 5213}
    assert not real.expressions["exp"].isin(["NO.", ""]).any()
    (apostrophe,) = real.expressions.loc[~real.expressions["exp"].map(str.isascii), "exp"]
    assert "man’s" in apostrophe


def test_splits_and_objects_of_the_real_table(real: Audit) -> None:
    report = real.as_dict()
    shared = {tuple(pair["splits"]): pair["vids"] for pair in report["shared_vids"]}
    assert shared == {("test_s", "test_n"): 250, ("test_n", "TODO"): 7}  # none with train
    unseen = "baby emergency-car gun leopard lion motorcycle mower pig sheep tiger truck tuba wolf"
    assert report["objects_only_in_test_u"] == unseen.split()
    assert dict(real.videos["split"].value_counts()) == dict(zip(SPLITS, (2919, 275, 273, 269, 257), strict=True))
    assert real.videos["media_id"].is_unique and real.expressions["row_id"].is_unique
    saws = real.expressions[real.expressions["uid"] == "MDyjY3uiWp0_297000_307000_saw_4"]
    assert dict(zip(saws["row_id"], saws["fid"], strict=True)) == {
        "MDyjY3uiWp0_297000_307000_saw_4": 4,
        "MDyjY3uiWp0_297000_307000_saw_4#2": 0,
    }
