"""The training benchmark on little data: what it prints, and that it leaves no files behind."""

import json
import tempfile
from pathlib import Path

import pytest

from samlove.bench.train import run
from samlove.errors import RequestError
from tests.stage_code import ROOT


def test_it_ends_with_one_json_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    result = run("micro", videos=4, steps=1, rounds=1)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    rates = result["expressions_per_s"]
    assert {"off", "ram", "reused"} <= set(rates)
    assert all(rate > 0 for rate in rates.values())
    assert set(result["over_reused"]) == set(rates) - {"reused"}
    assert not list(tmp_path.glob("samlove-*"))


def test_an_unknown_profile_is_an_invalid_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(RequestError, match="expected one of micro, refavs"):
        run("huge")
