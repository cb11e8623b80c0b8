"""The extraction benchmark on few items: what it prints, and that it leaves no files behind."""

import json
import tempfile
from pathlib import Path

import pytest

from samlove.bench.extract import run
from samlove.errors import RequestError
from tests.stage_code import ROOT


def test_it_ends_with_one_json_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    result = run("micro", items=5, rounds=1)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    for stage in ("visual", "sam2"):
        assert result[stage]["items"] == 5
        assert result[stage]["ratio"] > 0
    assert not list(tmp_path.glob("tmp*"))


@pytest.mark.slow
def test_workers_are_compared_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    result = run("micro", items=32, rounds=1, workers=2)
    for stage in ("visual", "sam2"):
        many = result[stage]["workers"]
        assert many["workers"] == 2
        assert many["ratio"] == pytest.approx(many["items_s"] / many["one_items_s"], abs=0.01)
    with pytest.raises(RequestError, match="--items 1: too few for 2 workers"):
        run("micro", items=1, rounds=1, workers=2)


def test_an_unknown_profile_is_an_invalid_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(RequestError, match="expected one of micro, refavs"):
        run("huge", items=1)
