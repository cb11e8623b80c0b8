"""Fingerprints: equal inputs give equal ones, and a mismatch is an error that says what differs and how to fix it."""

import hashlib

import pytest

from samlove.errors import RequestError, SamloveError
from stores.fingerprint import check_fingerprint, fingerprint_id, sha256_file, sha256_tree


def test_hashes_depend_on_names_and_contents_only(tmp_path):
    (tmp_path / "a" / "deep").mkdir(parents=True)
    (tmp_path / "a" / "deep" / "w.bin").write_bytes(b"weights")
    first = sha256_tree(tmp_path / "a")
    assert sha256_file(tmp_path / "a" / "deep" / "w.bin") == hashlib.sha256(b"weights").hexdigest()
    (tmp_path / "a" / ".gitkeep").write_text("hidden files are ignored")
    assert sha256_tree(tmp_path / "a") == first
    (tmp_path / "a").rename(tmp_path / "b")
    assert sha256_tree(tmp_path / "b") == first
    (tmp_path / "b" / "deep" / "w.bin").rename(tmp_path / "b" / "deep" / "v.bin")
    assert sha256_tree(tmp_path / "b") != first
    (tmp_path / "b" / "deep" / "v.bin").rename(tmp_path / "b" / "deep" / "w.bin")
    (tmp_path / "b" / "deep" / "w.bin").write_bytes(b"changed")
    assert sha256_tree(tmp_path / "b") != first


def test_a_missing_file_or_folder_is_a_request_error(tmp_path):
    with pytest.raises(RequestError, match=r"gone\.bin"):
        sha256_file(tmp_path / "gone.bin")
    with pytest.raises(RequestError, match="gone"):
        sha256_tree(tmp_path / "gone")


def test_the_id_does_not_depend_on_the_order_of_fields():
    assert fingerprint_id({"a": 1, "b": [1, 2]}) == fingerprint_id({"b": (1, 2), "a": 1})
    assert fingerprint_id({"a": 1}) != fingerprint_id({"a": 2})
    assert len(fingerprint_id({})) == 12


@pytest.mark.parametrize("value", [float("nan"), {1}, b"x", object()])
def test_only_json_values_are_accepted(value):
    with pytest.raises(SamloveError, match="JSON"):
        fingerprint_id({"a": value})


def test_equal_fingerprints_pass():
    check_fingerprint({"a": [1], "b": None}, {"b": None, "a": (1,)}, "here", "do that")


def test_the_error_names_fields_values_location_and_fix():
    found = {"dtype": "float16", "weights": "aaa", "same": 1}
    wanted = {"dtype": "float32", "image_size": 224, "same": 1}
    with pytest.raises(SamloveError) as error:
        check_fingerprint(found, wanted, "data/features/visual", "dvc repro visual")
    assert str(error.value) == (
        "data/features/visual: fingerprint mismatch (dtype: expected 'float32', found 'float16'; "
        "image_size: expected 224, found 'missing'; weights: expected 'missing', found 'aaa'); "
        "to fix it, run: dvc repro visual"
    )
