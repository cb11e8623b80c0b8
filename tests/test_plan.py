"""`samlove plan`: the counts, the sizes at the paper's scale, the time by a calibration."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from samlove.ablations.runs import plan_runs
from samlove.cli import plan_ablations
from samlove.cli.plan import measured, per_shard, run, seconds_an_item
from samlove.config import SECTIONS, AblationsConfig, DatasetConfig, SynthConfig, load
from samlove.data.index import audit_folder, write_index
from samlove.data.layout import Layout
from samlove.errors import RequestError
from samlove.features.encoders.text import TextEncoder
from samlove.features.sizes import REF_AVS, Count, Settings, count, item_bytes, planned, read_settings
from samlove.synth.write import write_dataset
from tests.small_encoders import roberta_config
from tests.test_cli import ROOT, samlove, select


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    return tmp_path


def test_sizes_at_the_papers_scale(checkout: Path) -> None:
    """Per item, and in all, in fp16."""
    select(checkout, "refavs")
    settings = read_settings(checkout / "configs")
    assert item_bytes(settings) == {
        "audio": 10 * (128 * 2 + 1),
        "visual": 10 * 197 * 768 * 2,
        "text": 25 * (768 * 2 + 1),
        "sam2": 2 * (256 * 64**2 + 64 * 128**2 + 32 * 256**2),
        "sam2 packed": 2 * (256 * 64**2 + 64 * 128**2 + 32 * 256**2),
    }
    made = {entry.path: entry for entry in planned(settings, REF_AVS)}
    gigabytes = {path: round(sum(entry.bytes.values()) / 1e9, 1) for path, entry in made.items()}
    assert gigabytes["features/visual"] == 12.1
    assert gigabytes["features/sam2_train"] == 24.5
    assert gigabytes["features/sam2_eval"] == 90.1
    assert made["features/sam2_eval"].items == {"val": 275, "test_s": 273, "test_u": 269, "test_n": 257}
    before_convs = settings._replace(sam2=settings.sam2.model_copy(update={"cache_point": "pre_conv"}))
    assert item_bytes(before_convs)["sam2"] == 2 * 256 * (64**2 + 128**2 + 256**2)
    assert set(per_shard(settings)) == {path.split("/")[1] for path in made if path.startswith("features/")}


def test_several_frames_of_a_training_video_multiply_what_they_take(checkout: Path) -> None:
    select(checkout, "refavs")
    one = read_settings(checkout / "configs")
    five = one._replace(sam2=one.sam2.model_copy(update={"train_frames": 5}))
    made = [{entry.path: entry for entry in planned(settings, REF_AVS)} for settings in (one, five)]
    for path, entry in made[0].items():
        more = sum(made[1][path].bytes.values()) - sum(entry.bytes.values())
        added = {"features/sam2_train": 2919 * item_bytes(one)["sam2"]}
        for split in ("train", "val"):
            packed = REF_AVS[split].folders * item_bytes(one)["sam2 packed"] + REF_AVS[split].rows * 256**2
            added[f"shards/{split}"] = packed
        assert more == 4 * added.get(path, 0), path
    assert [per_shard(settings)["sam2_train"] for settings in (one, five)] == [128, 25]
    with pytest.raises(RequestError, match="train_frames: expected at most the 10 frames"):
        planned(one._replace(sam2=one.sam2.model_copy(update={"train_frames": 11})), REF_AVS)


def test_choices_are_sections() -> None:
    assert set(Settings._fields) < set(SECTIONS)


def test_counts_are_the_same_before_the_dataset_from_its_table_and_from_the_index(checkout: Path) -> None:
    folder, paths = checkout / "set", Layout(checkout / "data" / "micro")
    dataset = DatasetConfig(root=str(folder), synth=SynthConfig(seed=3, scale="small"))
    settings = read_settings(checkout / "configs")._replace(dataset=dataset)
    promised, source = count(settings, paths)
    assert "dataset stage" in source
    write_dataset(folder, 3, "small")
    table, source = count(settings, paths)
    assert source == str(folder / "metadata.csv")
    write_index(audit_folder(folder, check_media=False), paths.index)
    index, source = count(settings, paths)
    assert source == str(paths.expressions)
    assert promised == table == index
    assert sum(n.folders for n in index.values()) == sum(1 for _ in (folder / "media").iterdir())


def test_what_cannot_be_measured_says_why_and_the_rest_is_measured(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    select(checkout, "refavs")
    monkeypatch.chdir(checkout)
    settings = read_settings()._replace(text=roberta_config(checkout / "text"))
    write_dataset(Path(settings.dataset.root), 3, "small")
    times = measured(settings, planned(settings, REF_AVS))
    assert set(times) == set(per_shard(settings))
    assert isinstance(times["text"], float) and times["text"] > 0
    for name in ("audio", "visual", "sam2_train", "sam2_eval"):
        assert "no such file" in str(times[name])


def test_time_does_not_depend_on_how_many_sources_there_are(tmp_path: Path) -> None:
    encoder = TextEncoder(roberta_config(tmp_path / "text"), torch.device("cpu"))
    assert seconds_an_item(encoder, ["the dog"], 64) > 0
    assert seconds_an_item(encoder, ["the dog", "the cat", "the bird"], 2) > 0


@pytest.mark.slow
def test_plan_of_the_embedded_profile_lists_stores_and_splits() -> None:
    done = samlove("plan", "--no-calibrate")
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert {"features/sam2_eval", "test_u", "shards/train", "predictions/test_n", "total", "disk:"} <= {
        line[0] for line in lines if line
    }


def test_a_disk_with_too_little_room_is_said(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    select(checkout, "refavs")
    dataset = checkout / "configs" / "refavs" / "dataset.yaml"
    dataset.write_text(
        dataset.read_text().replace("mask_size: 256", "mask_size: 8192").replace("frames: 10", "frames: 8192")
    )
    monkeypatch.chdir(checkout)
    assert not run(calibrate=False)
    printed = capsys.readouterr().out
    assert "MISSING" in printed and "Ref-AVS as published" in printed


def test_the_plan_of_ablations_names_every_run_with_its_time_and_disk(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    select(checkout, "micro")
    shutil.copytree(ROOT / "weights" / "micro", checkout / "weights" / "micro")
    config = yaml.safe_load((checkout / "configs/micro/ablations.yaml").read_text())
    config["runs"] = {name: config["runs"][name] for name in ("no_cls", "blocks_4", "clip")}
    rows = [{"run": name, "label": name} for name in config["runs"]]
    config |= {"seeds": [0, 1], "tables": {"all": {"title": "All", "base": "no_cls", "rows": rows}}}
    (checkout / "configs/micro/ablations.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(checkout)
    (checkout / "samlove" / "micro").mkdir(parents=True)
    shutil.copy(ROOT / "samlove/micro/sam2_micro.yaml", checkout / "samlove/micro")
    assert plan_ablations.run()
    lines = capsys.readouterr().out.splitlines()
    found = {line.split()[0]: line for line in lines if line.split()}
    assert {"no_cls", "blocks_4", "clip", "shards", "disk:"} <= set(found)
    assert "fusion.blocks=4" in found["blocks_4"] and "2 seed(s)" in lines[0]
    assert any("device hours" in line for line in lines)
    assert sum(name.startswith(("visual-", "text-")) for name in found) == 2  # CLIP's own stores


def test_the_estimate_of_a_run_follows_from_its_speed_and_the_dataset(checkout: Path) -> None:
    select(checkout, "micro")
    base, *_ = plan_runs(load(AblationsConfig, checkout / "configs"), "micro")
    counts = {split: Count(2, 5, 10) for split in REF_AVS}
    found = plan_ablations.estimate(base, plan_ablations.Speed(1.0, 2.0, 3.0, 1000), counts)
    frames = base.sections["sam2"].train_frames  # validation scores all of them
    assert found.train_s == pytest.approx(base.sections["train"].epochs * (10 + 10 * frames / 3))
    assert (found.infer_s, found.evaluate_s, found.checkpoint) == (60, 90, 4000)
    three = base.sections["infer"].model_copy(update={"controls": ["true_mask", "swapped_audio"]})
    varied = replace(base, sections=base.sections | {"infer": three})
    assert plan_ablations.estimate(varied, plan_ablations.Speed(1.0, 2.0, 3.0, 1000), counts).infer_s == 180
