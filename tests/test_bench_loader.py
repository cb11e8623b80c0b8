"""The loader benchmark: every format returns the same bytes, and `run` prints what it returns."""

import json
import sys

import numpy as np
import pytest

from samlove.bench.loader import FORMATS, SHAPES, make_samples, run

SAMPLES = make_samples(3)


@pytest.mark.parametrize("make", FORMATS, ids=lambda make: make.__name__)
def test_every_format_reads_what_was_written(tmp_path, make):
    read = make(SAMPLES, tmp_path)
    for _ in range(2):  # a pass can be repeated
        found = list(read())
        assert len(found) == 3
        for sample, expected in zip(found, SAMPLES, strict=True):
            if list(sample) == ["all"]:
                sample = {"all": np.asarray(sample["all"])}
                expected = {"all": np.concatenate([expected[name].ravel() for name in SHAPES])}
            assert set(sample) == set(expected)
            for name, array in expected.items():
                np.testing.assert_array_equal(np.asarray(sample[name]), array)


def test_a_run_prints_one_line_per_format_and_one_json_object(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "litdata", None)  # as if it were not installed
    result = run(videos=2, rounds=1)
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1]) == result
    assert set(result["gb_per_s"]) == {make.__name__ for make in FORMATS} - {"litdata"}
    assert set(result["shards_over"]) == set(result["gb_per_s"]) - {"shards"}
    assert any(line.startswith("litdata: left out, not installed") for line in lines)
    for name in result["gb_per_s"]:
        assert any(line.strip().startswith(name) for line in lines[:-1])
