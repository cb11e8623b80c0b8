"""Every junction of the pipeline with one mismatch: the stage stops with one line that names the field, both values and
the command that fixes it.

The real stages build one small project once; each case breaks a copy of it and runs the stage that must notice.
"""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from pipelines import evaluate, infer, pack, train
from samlove.data.dataset import RefAvsFolder
from samlove.features.lock import only_run
from samlove.model.checkpoint import read_header
from samlove.model.sam2 import LEVELS
from samlove.model.training_state import MADE_BY, STATE
from stores import FeatureStore, FeatureStoreWriter, PredictionReader, ShardReader, ShardWriter
from stores.fingerprint import sha256_file
from stores.inspect import open_artefact
from tests.store_kinds import files_of
from tests.tiny_training import CONFIG, DIMS, PATCHES, TOKENS, write_sam2

FRAMES, SIZE = DIMS["frames"], 32
SPLITS = {"train": ["a", "b"], "val": ["c"], "test_s": ["d"], "test_u": ["e"], "test_n": ["f"]}
LEVEL_SHAPES = dict(zip(LEVELS, [(8, 16, 16), (16, 8, 8), (64, 4, 4)], strict=True))
CONFIGS: dict[str, dict] = {
    "audio": {"weights": "w"},
    "visual": {"weights": "w"},
    "text": {"weights": "w"},
    "sam2": {"config": CONFIG, "checkpoint": "sam2.safetensors"},
    "dataset": {"frames": FRAMES, "mask_size": SIZE},
    "pack": {},
    "fusion": {"dim": 16, "blocks": 1, "heads": 2},
    "train": {"epochs": 1, "batch_size": 2, "accumulate": 1, "warmup_steps": 1, "resident": "off"},
    "infer": {},
    "evaluate": {},
}
FINGERPRINTS: dict[str, dict] = {
    "audio": {"encoder": "vggish", "dtype": "float16"},
    "visual": {"encoder": "vit", "image_size": 224, "dtype": "float16"},
    "text": {"encoder": "roberta", "max_tokens": 25, "dtype": "float16"},
    "sam2": {"encoder": "sam2", "cache_point": "post_conv", "dtype": "float16", "compression": "none"},
}


def item(name: str, key: str, frames: int = FRAMES) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([ord(letter) for letter in name + key])

    def values(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float16)

    if name == "audio":
        return {"audio": values(frames, DIMS["audio"]), "audio_valid": np.ones(frames, bool)}
    if name == "visual":
        return {"visual": values(frames, 1 + PATCHES, DIMS["visual"])}
    if name == "text":
        return {"text": values(TOKENS, DIMS["text"]), "text_mask": np.arange(TOKENS) < 3}
    return {level: values(frames, *shape) for level, shape in LEVEL_SHAPES.items()}


def write_store(name: str, keys: list[str], frames: int = FRAMES, **changes: object) -> None:
    """Write a feature store below data/tiny/features, as its stage would."""
    stage = name.split("_")[0]
    fingerprint = {**FINGERPRINTS[stage], **changes}
    if stage == "sam2":
        fingerprint = {"weights_sha256": sha256_file("sam2.safetensors"), **fingerprint}
    writer = FeatureStoreWriter(
        Path("data/tiny/features", name), Path("data/tiny/.scratch", name), fingerprint, keys, 2
    )
    for number, planned in writer.plan():
        writer.write_shard(number, {key: item(stage, key, frames) for key in planned})
    writer.publish()


def rows() -> pd.DataFrame:
    table = [
        {"row_id": media_id, "uid": media_id, "media_id": media_id, "vid": media_id, "fid": 1,
         "exp": f"the {media_id}", "split": split, "null": split == "test_n", "object": "disc"}
        for split, media in SPLITS.items()
        for media_id in media
    ]  # fmt: skip
    return pd.DataFrame(table)


def configure(section: str, **changes: object) -> None:
    path = Path("configs/tiny", f"{section}.yaml")
    values = yaml.safe_load(path.read_text()) if path.exists() else CONFIGS[section]
    path.write_text(yaml.safe_dump({**values, **changes}))


def write_index(table: pd.DataFrame) -> None:
    Path("data/tiny/index").mkdir(parents=True, exist_ok=True)
    table.to_parquet("data/tiny/index/expressions.parquet")
    Path("data/tiny/index/gt_mask.sha256").write_text("0" * 64 + "\n")


def run(stage: Callable[[], None], *arguments: str) -> None:
    sys.argv = ["stage", *arguments]
    stage()


def evaluate_all() -> None:
    for split in list(SPLITS)[1:]:
        run(infer.main, split)
    run(evaluate.main)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The project after all stages have run."""
    root = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(sys, "argv", [])
        Path("configs/tiny").mkdir(parents=True)
        Path("configs/profile.yaml").write_text("profile: tiny\n")
        for section in CONFIGS:
            configure(section)
        write_sam2(Path("sam2.safetensors"))
        table = rows()
        write_index(table)
        folder = RefAvsFolder("data/dataset/tiny")
        for media_id in table.loc[~table["null"], "media_id"]:
            for t in range(FRAMES):
                path = folder.mask_path(media_id, 1, t)
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.eye(SIZE, dtype=np.uint8) * 255).save(path)
        media = list(table["media_id"])
        for name, keys in (("audio", media), ("visual", media), ("text", list(table["exp"]))):
            write_store(name, keys)
        write_store("sam2_train", SPLITS["train"], frames=1)
        write_store("sam2_eval", [m for split in list(SPLITS)[1:] for m in SPLITS[split]])
        run(pack.main)
        run(train.main)
        evaluate_all()
        yield root


@pytest.fixture
def project(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the project, to be broken by a test."""
    root = tmp_path / "project"
    shutil.copytree(whole, root)
    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, "argv", [])
    return root


# --- ways to break it -------------------------------------------------------------------------------------------------


def all_keys(name: str) -> list[str]:
    return FeatureStore.open(Path("data/tiny/features", name)).keys()


def remake(name: str, **changes: object) -> None:
    write_store(name, all_keys(name), **changes)  # type: ignore[arg-type]


def another_sam2() -> None:
    write_sam2(Path("sam2.safetensors"), seed=7)


def repack(split: str, change: Callable[[dict], object]) -> None:
    """Write the shards of a split again, with a changed fingerprint."""
    root = Path("data/tiny/shards", split)
    reader = ShardReader(root)
    fingerprint = json.loads(json.dumps(reader.manifest["fingerprint"]))
    change(fingerprint)
    samples = [{name: np.array(v) if isinstance(v, np.ndarray) else v for name, v in s.items()} for s in reader]
    with ShardWriter(root, fingerprint=fingerprint) as writer:
        for sample in samples:
            writer.write(sample.pop("__key__"), sample)


def reword(row_id: str) -> None:
    table = rows()
    table.loc[table["row_id"] == row_id, "exp"] = "the b"  # which the text store has
    write_index(table)


def infer_again(split: str) -> None:
    """Predict a split again, in a precision that the other predictions do not have."""
    configure("infer", precision="bfloat16")
    run(infer.main, split)


def copy_split(source: str, target: str) -> None:
    shutil.copy(f"data/tiny/predictions/{source}/predictions.h5", f"data/tiny/predictions/{target}/predictions.h5")


def published() -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in files_of(Path("data")) if ".scratch" not in path.parts}


class Case(NamedTuple):
    stage: Callable[[], None]
    spoil: Callable[[], object]
    field: str
    expected: str
    found: str
    remedy: str
    argument: tuple[str, ...] = ()
    words: tuple[str, ...] = ("expected", "found")  # empty if the message says both in other words


POST, PRE = "'post_conv'", "'pre_conv'"
DVC = "dvc repro"
CASES = {
    # pack compares stores with the configuration, and the two stores of SAM 2 with each other
    "pack_audio": Case(pack.main, lambda: configure("audio", dtype="float32"),
                       "dtype", "'float32'", "'float16'", f"{DVC} audio"),
    "pack_visual": Case(pack.main, lambda: configure("visual", image_size=384),
                        "image_size", "384", "224", f"{DVC} visual"),
    "pack_text": Case(pack.main, lambda: configure("text", max_tokens=30),
                      "max_tokens", "30", "25", f"{DVC} text"),
    "pack_sam2": Case(pack.main, lambda: configure("sam2", cache_point="pre_conv"),
                      "cache_point", PRE, POST, f"{DVC} sam2"),
    "pack_sam2_eval": Case(pack.main, lambda: remake("sam2_eval", dtype="float32"),
                           "dtype", "'float16'", "'float32'", f"{DVC} sam2"),
    "pack_frames": Case(pack.main, lambda: configure("sam2", train_frames=2),
                        "frames of every video", "2", "1", f"{DVC} sam2"),
    "pack_index": Case(pack.main, lambda: write_store("text", ["the a", "the b"]),
                       "text", "'the c' is in the index", "neither in the store", f"{DVC} text", words=()),
    # train compares shards with the configured SAM 2, and the splits with each other
    "train_sam2": Case(train.main, another_sam2, "weights_sha256", "", "", f"{DVC} pack"),
    "train_cache_point": Case(train.main, lambda: configure("sam2", cache_point="pre_conv"),
                              "cache_point", PRE, POST, f"{DVC} pack"),
    "train_frames": Case(train.main, lambda: configure("sam2", train_frames=2),
                         "train_frames", "2", "1", f"{DVC} pack"),
    "train_val": Case(train.main, lambda: repack("val", lambda made: made["audio"].update(dtype="float32")),
                      "audio.dtype", "'float16'", "'float32'", f"{DVC} pack"),
    "train_mask_size": Case(train.main, lambda: repack("val", lambda made: made.update(mask_size=64)),
                            "mask_size", "32", "64", f"{DVC} pack"),
    "train_foreign": Case(train.main, lambda: Path("data/tiny/shards/train/manifest.json").unlink(),
                          "audio, visual, text, sam2", "manifest", "no fingerprint", f"{DVC} pack", words=()),
    # infer compares stores, index and SAM 2 with the checkpoint
    "infer_audio": Case(infer.main, lambda: remake("audio", dtype="float32"),
                        "dtype", "'float16'", "'float32'", f"{DVC} audio pack train", ("test_s",)),
    "infer_visual": Case(infer.main, lambda: remake("visual", image_size=384),
                         "image_size", "224", "384", f"{DVC} visual pack train", ("test_s",)),
    "infer_text": Case(infer.main, lambda: remake("text", encoder="clip"),
                       "encoder", "'roberta'", "'clip'", f"{DVC} text pack train", ("test_s",)),
    "infer_sam2_store": Case(infer.main, lambda: remake("sam2_eval", cache_point="pre_conv"),
                             "cache_point", POST, PRE, f"{DVC} sam2 pack train", ("test_s",)),
    "infer_sam2": Case(infer.main, another_sam2, "sha256", "", "", f"{DVC} train", ("test_s",)),
    "infer_frames": Case(infer.main, lambda: remake("sam2_eval", frames=2),
                         "frames of sam2", "3", "2", f"{DVC} pack train", ("test_s",)),
    "infer_index": Case(infer.main, lambda: write_store("text", ["the a"]),
                        "text", "'the d'", "from a different index", f"{DVC} -f -s text", ("test_s",)),
    # evaluate compares predictions with the index, with their split and with each other
    "evaluate_rows": Case(evaluate.main, lambda: reword("d"), "rows_sha256", "", "", f"{DVC} -f -s infer"),
    "evaluate_split": Case(evaluate.main, lambda: copy_split("test_s", "test_u"),
                           "split", "'test_u'", "'test_s'", f"{DVC} -f -s infer"),
    "evaluate_mixed": Case(evaluate.main, lambda: infer_again("test_u"),
                           "precision", "'float32'", "'bfloat16'", f"{DVC} infer"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_mismatch_is_refused_by_name_with_both_values_and_the_remedy(
    case: Case, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digests = [sha256_file("sam2.safetensors")]
    case.spoil()
    digests.append(sha256_file("sam2.safetensors"))
    before = published()
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run(case.stage, *case.argument)
    assert ended.value.code == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(("error: data/tiny/", "error: sam2.safetensors"))
    for part in (case.field, case.expected, case.found, case.remedy, *case.words):
        assert part in error
    if "sha256" in case.field and "sam2" in case.spoil.__name__:
        assert all(digest in error for digest in digests)
    assert published() == before  # nothing was changed


@pytest.mark.parametrize("stage", [pack.main, train.main, evaluate_all], ids=["pack", "train", "infer_evaluate"])
def test_matching_artefacts_pass(stage: Callable[[], None], project: Path) -> None:
    stage()


def test_training_on_any_frame_and_prompting_the_best_run_from_features_to_scores(project: Path) -> None:
    for section, changes in (
        ("sam2", {"train_frames": 2}),
        ("train", {"supervise": "any"}),
        ("infer", {"prompt_frame": "best"}),
    ):
        configure(section, **changes)
    write_store("sam2_train", SPLITS["train"], frames=2)
    run(pack.main)
    run(train.main)
    evaluate_all()
    assert ShardReader("data/tiny/shards/val").manifest["fingerprint"]["sam2_frames"] == [0, FRAMES // 2]
    assert read_header("data/tiny/model/best.safetensors").train.supervise == "any"
    assert PredictionReader("data/tiny/predictions/test_s/predictions.h5").attrs["prompt_frame"] == "best"


# --- an interrupted run --------------------------------------------------------------------------------------


def interrupted() -> Path:
    """Interrupt a training run. Returns the folder with its state."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("samlove.train.Trainer.validate", stop)
        with pytest.raises(SystemExit):
            train.main()
    (folder,) = (path.parent for path in Path("data/tiny/.scratch/train").glob(f"*/{STATE}"))
    return folder


def stop(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("spoil", "fields"),
    [
        (lambda: configure("train", lr=0.002), ["train.lr: 0.0001 stored, 0.002 now"]),
        (lambda: configure("fusion", blocks=2), ["fusion.blocks: 1 stored, 2 now"]),
        (lambda: repack("train", lambda made: made.update(rows_sha256="x")), ["shards.train: '"]),
    ],
    ids=["settings", "model", "shards"],
)  # fmt: skip
def test_a_state_of_another_run_is_told_and_not_gone_on_with(
    spoil: Callable[[], object], fields: list[str], project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = interrupted()
    state = (folder / STATE).read_bytes()
    spoil()
    capsys.readouterr()
    train.main()
    told = "".join(capsys.readouterr())
    assert f"{folder}: interrupted run not resumed, because it differs (" in told
    assert all(field in told for field in fields)
    assert "dvc repro train" in told
    assert (folder / STATE).read_bytes() == state and (folder / MADE_BY).exists()


def test_a_damaged_state_is_refused(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = interrupted() / STATE
    data = bytearray(state.read_bytes())
    data[-1] ^= 1
    state.write_bytes(data)
    with pytest.raises(SystemExit) as ended:
        train.main()
    assert ended.value.code == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{state}: damaged: expected crc32c" in error and "dvc repro train" in error


@pytest.mark.parametrize(
    ("stage", "arguments", "lock"),
    [(train.main, (), "train.lock"), (infer.main, ("test_s",), "infer/test_s.lock")],
    ids=["train", "infer"],
)
def test_a_second_run_at_the_same_time_is_refused(
    stage: Callable[[], None],
    arguments: tuple[str, ...],
    lock: str,
    project: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = published()
    with only_run(Path("data/tiny/.scratch", lock), "the first run"), pytest.raises(SystemExit) as ended:
        run(stage, *arguments)
    assert ended.value.code == 1
    assert "in use by another run" in capsys.readouterr().err.splitlines()[-1]
    assert published() == before


# --- provenance --------------------------------------------------------------------------------


def test_each_artefact_records_its_origin(project: Path) -> None:
    store, shards, checkpoint, predictions = (
        open_artefact(Path("data/tiny") / path).fingerprint
        for path in ("features/audio", "shards/train", "model/best.safetensors", "predictions/test_s/predictions.h5")
    )
    assert store == FINGERPRINTS["audio"]
    made = {name: shards[name] for name in ("audio", "visual", "text", "sam2")}
    assert {name: made[name] for name in ("audio", "visual", "text")} == {
        name: FINGERPRINTS[name] for name in ("audio", "visual", "text")
    }
    assert made["sam2"]["weights_sha256"] == sha256_file("sam2.safetensors")
    assert shards["gt_mask_sha256"] == "0" * 64 and shards["mask_size"] == SIZE
    assert checkpoint["features"] == predictions["features"] == made
    assert checkpoint["sam2_sha256"] == predictions["sam2_sha256"] == made["sam2"]["weights_sha256"]
    assert checkpoint["fusion"]["dim"] == 16 and set(checkpoint["shards"]) == {"train", "val"}
    assert predictions["checkpoint_sha256"] == sha256_file("data/tiny/model/best.safetensors")
    assert predictions["rows_sha256"] != shards["rows_sha256"]
