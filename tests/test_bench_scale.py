"""The scale benchmark on few videos: what each step does, and what a run prints."""

import json
from pathlib import Path

import numpy as np
import pytest

from samlove.bench import scale
from samlove.bench.scale import STEPS, Step, _sample, parse_sizes, run
from samlove.cli.main import main
from samlove.data.loader import ExpressionDataset
from samlove.errors import RequestError, SamloveError
from stores import FeatureStore
from tests.test_bench_memory import failing, growing
from tests.tiny_pack import make_shards

VIDEOS = 70  # more than two shards


def test_every_step_works_on_what_earlier_steps_wrote(tmp_path: Path) -> None:
    for step in STEPS.values():
        step.prepare(tmp_path, VIDEOS)()
    dataset = ExpressionDataset(tmp_path / "shards")
    assert len(dataset) == 5 * VIDEOS
    assert len({dataset[i]["row_id"] for i in range(len(dataset))}) == 5 * VIDEOS
    assert len(FeatureStore.open(tmp_path / "features")) == VIDEOS


def test_a_sample_has_what_pack_writes(tmp_path: Path) -> None:
    make_shards(tmp_path)
    packed = ExpressionDataset(tmp_path / "shards").reader[0]
    sample = _sample("key")
    del packed["__key__"]
    assert sample.keys() == packed.keys()
    for name, value in packed.items():
        if isinstance(value, np.ndarray):
            assert (sample[name].dtype, sample[name].ndim) == (value.dtype, value.ndim), name
    assert sample["rows"][0].keys() == packed["rows"][0].keys()


def test_a_run_prints_the_growth_of_each_step_and_one_json_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = {"grow": Step(growing), "fail": Step(failing), "use": Step(growing, needs="fail")}
    monkeypatch.setattr(scale, "STEPS", steps)
    with pytest.raises(SamloveError, match=r"2 steps failed: fail, 20 videos: SamloveError: found a fault; fail, 60"):
        run([20, 60], tmp_path)
    *table, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)["steps"]
    assert found["fail"] == found["use"] == {"20": None, "60": None}
    small, large = found["grow"]["20"], found["grow"]["60"]
    assert large["peak_mb"] / small["peak_mb"] == pytest.approx(3, rel=0.2)
    assert table[2].split()[:2] == ["grow", "60"]
    assert f"x {large['peak_mb'] / small['peak_mb']:.1f}" in table[2]
    assert [line.split() for line in table[3:]] == [
        [name, videos, "not", "reached"] for name in ("fail", "use") for videos in ("20", "60")
    ]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_command_measures_every_step(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["samlove", "bench", "scale", "--sizes", "40"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    steps = json.loads(capsys.readouterr().out.splitlines()[-1])["steps"]
    assert steps.keys() == STEPS.keys()
    assert all(row["40"]["seconds"] >= 0 for row in steps.values())


@pytest.mark.parametrize("text", ["", "x", "3000,", "30,3", "3,3", "0,3", "-1", "3.5"])
def test_sizes_that_do_not_grow_are_refused(text: str) -> None:
    with pytest.raises(RequestError, match="expected increasing numbers of videos"):
        parse_sizes(text)


def test_a_folder_without_room_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no such folder"):
        run([1], tmp_path / "missing")
    for sizes in ([10**10], [1, 10**400]):
        with pytest.raises(RequestError, match="0 videos need 130,000.* MB, found .* MB free"):
            run(sizes, tmp_path)
    assert not list(tmp_path.iterdir())
