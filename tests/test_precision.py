"""`samlove bench precision` on two videos: narrower dtypes are smaller and change the masks little."""

import json
from pathlib import Path

import pytest

from samlove.bench.precision import run


def test_narrower_is_smaller_and_changes_little(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    found = run(clips=2)["by_dtype"]
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["by_dtype"] == found
    size = {dtype: row["bytes_a_frame_none"] for dtype, row in found.items()}
    assert size["int8"] < 0.55 * size["float16"] and size["bfloat16"] == size["float16"] < 0.51 * size["float32"]
    assert found["float32"]["largest"] == found["float32"]["pixels_flipped"] == 0
    assert found["float16"]["mean"] < found["bfloat16"]["mean"] < found["int8"]["mean"] < 0.5
    for row in found.values():
        assert row["bytes_a_frame_zstd"] < row["bytes_a_frame_none"]
        assert row["J&F"] == pytest.approx(found["float32"]["J&F"], abs=3)  # two videos: one lost object
