"""`samlove plan`: the counts, the sizes at the paper's scale, the time by a calibration."""

import shutil
from pathlib import Path

import pytest
import torch

from samlove.cli.plan import PER_SHARD, measured, run, seconds_an_item
from samlove.config import SECTIONS, DatasetConfig, SynthConfig
from samlove.data.index import audit_folder, write_index
from samlove.data.layout import Layout
from samlove.data.sizes import REF_AVS, Settings, count, item_bytes, planned, read_settings
from samlove.features.encoders.roberta import RobertaEncoder
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
    assert set(PER_SHARD) == {path.split("/")[1] for path in made if path.startswith("features/")}


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
    assert set(times) == set(PER_SHARD)
    assert isinstance(times["text"], float) and times["text"] > 0
    for name in ("audio", "visual", "sam2_train", "sam2_eval"):
        assert "no such file" in str(times[name])


def test_time_does_not_depend_on_how_many_sources_there_are(tmp_path: Path) -> None:
    encoder = RobertaEncoder(roberta_config(tmp_path / "text"), torch.device("cpu"))
    assert seconds_an_item(encoder, ["the dog"], 64) > 0
    assert seconds_an_item(encoder, ["the dog", "the cat", "the bird"], 2) > 0


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
