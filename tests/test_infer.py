"""Full-video inference on a small split, with stores, checkpoint and masks as left by the previous stages."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import pipelines.infer
from samlove.config import InferConfig, Sam2Config
from samlove.data.dataset import RefAvsFolder
from samlove.errors import RequestError, SamloveError
from samlove.infer import Sources, infer, plan
from samlove.model.checkpoint import Header, Origin, load_model, save_checkpoint
from samlove.model.sam2 import LEVELS
from samlove.scoring.metrics import EDGES, f_score, jaccard, null_score, scores_from_bins
from samlove.scoring.presence import SCORES, UNGATED
from stores import Failure, FeatureStoreWriter, PredictionReader, PredictionWriter
from tests.tiny_training import CONFIG, DIMS, PATCHES, TOKENS, origin, write_sam2

FRAMES, SIZE = DIMS["frames"], 64  # large enough that one pixel weighs less than the tolerance
CONTROLS = ["swapped_audio", "permuted_text", "true_mask"]
SHAPES = {"sam2_image_embed": (64, 4, 4), "sam2_high_res_0": (8, 16, 16), "sam2_high_res_1": (16, 8, 8)}


def expressions(videos: int = 3) -> pd.DataFrame:
    """Each video has two objects, the first with two expressions. The last row of all is a null expression."""
    rows = [
        {"row_id": f"{v}.{i}", "media_id": f"clip{v}", "vid": f"vid{v}", "fid": fid, "exp": f"the {v}.{i}"}
        for v in range(videos)
        for i, fid in enumerate([1, 1, 2])
    ]
    table = pd.DataFrame(rows).assign(split="test_s", null=False)
    table.loc[len(table) - 1, "null"] = True
    return table


class Run:
    """A data folder, and `infer` on it."""

    def __init__(self, root: Path, seed: int = 0):
        self.root, self.rows = root, expressions()
        self.features, self.checkpoint = root / "features", root / "model" / "best.safetensors"
        self.out, self.scratch = root / "predictions" / "test_s", root / ".scratch" / "infer" / "test_s"
        self.folder = RefAvsFolder(root / "set")
        self.device = torch.device("cpu")
        media, texts = self.rows["media_id"].unique(), self.rows["exp"].unique()
        generator = np.random.default_rng(seed)

        def floats(*shape: int) -> np.ndarray:
            return generator.normal(size=shape).astype(np.float16)

        heard = np.arange(FRAMES) < 2
        self.store("audio", {m: {"audio": floats(FRAMES, DIMS["audio"]), "audio_valid": heard.copy()} for m in media})
        self.store("visual", {m: {"visual": floats(FRAMES, 1 + PATCHES, DIMS["visual"])} for m in media})
        known = np.arange(TOKENS) < 3
        self.store("text", {t: {"text": floats(TOKENS, DIMS["text"]) * 4, "text_mask": known.copy()} for t in texts})
        self.store("sam2_eval", {m: {name: floats(FRAMES, *SHAPES[name]) for name in LEVELS} for m in media})
        self.save_checkpoint()
        for media_id, fid in self.rows[["media_id", "fid"]].drop_duplicates().itertuples(index=False):
            path = self.folder.mask_path(media_id, fid, 0)
            path.parent.mkdir(parents=True)
            Image.fromarray((generator.random((24, 40)) < 0.3).astype(np.uint8) * 255).save(path)

    def store(self, name: str, items: dict, fingerprint: str = "a", failures: tuple = ()) -> None:
        keys = [*items, *(failure.key for failure in failures)]
        stage = name.removesuffix("_eval")
        made_by = {"encoder": stage, "weights": fingerprint}
        writer = FeatureStoreWriter(self.features / name, self.root / ".scratch" / name, made_by, keys, 2)
        for number, shard in writer.plan():
            writer.write_shard(number, {key: items[key] for key in shard if key in items})
        writer.publish(failures)

    def save_checkpoint(self, seed: int = 0, present: float = 10, **validation: float) -> None:
        sam2 = write_sam2(self.root / "sam2.safetensors")
        features = {name: {"encoder": name, "weights": "a"} for name in ("audio", "visual", "text", "sam2")}
        made_by = dict(origin(sam2)) | {
            "sam2": Sam2Config(config=str(Path(CONFIG).absolute()), checkpoint=str(sam2)),
            "features": features,
        }
        torch.manual_seed(seed)
        model = Origin(**made_by).build()
        for parameter in model.fusion.head.parameters():
            parameter.data *= 3  # so that the tokens matter
        score = model.sam2.sam_mask_decoder.pred_obj_score_head.layers[-1]
        score.bias.data.fill_(present)  # an absent object has no mask
        model.sam2.set_trainable(True, True)
        save_checkpoint(self.checkpoint, model, Header(**made_by, epoch=1, validation={"J&F": 0.0} | validation))

    def infer(self, controls: list = CONTROLS, rows: pd.DataFrame | None = None) -> dict[str, int]:
        return infer(
            "test_s",
            self.rows if rows is None else rows,
            self.checkpoint,
            Sources.open(self.features),
            self.folder,
            InferConfig(controls=controls),
            SIZE,
            self.out,
            self.scratch,
            self.device,
        )

    def bins(self, variant: str = "predictions") -> dict[str, np.ndarray]:
        reader = PredictionReader(self.out / f"{variant}.h5")
        return {row_id: reader.read(row_id) for row_id in reader.row_ids}


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(tmp_path)


def test_writes_every_row_with_its_provenance(run):
    counts = run.infer()
    assert counts == {"predictions": 9, "swapped_audio": 9, "permuted_text": 9, "true_mask": 8}
    assert {path.name for path in run.out.iterdir()} == {f"{name}.h5" for name in counts}
    reader = PredictionReader(run.out / "predictions.h5")
    assert reader.row_ids == run.rows["row_id"].tolist()
    assert reader.shape == (FRAMES, SIZE, SIZE)
    np.testing.assert_array_equal(reader.edges, EDGES)
    assert reader.attrs["features"]["sam2"] == {"encoder": "sam2", "weights": "a"}
    assert len(reader.attrs["checkpoint_sha256"]) == 64
    assert not run.scratch.exists()


def test_scores_from_the_file_equal_scores_from_the_logits(run):
    run.infer()
    bins = run.bins()
    model = load_model(run.checkpoint)
    target = np.random.default_rng(1).random((FRAMES, SIZE, SIZE)) < 0.4
    for media_id, rows in run.rows.groupby("media_id"):
        for row_id, logits in zip(rows["row_id"], _logits(run, model, media_id, rows["exp"].tolist()), strict=True):
            stored = scores_from_bins(bins[row_id], target)
            assert stored.J == pytest.approx(jaccard(logits, target), abs=1e-4)
            assert stored.F == pytest.approx(f_score(logits, target), abs=1e-4)
            assert stored.S == pytest.approx(null_score(logits), abs=1e-4)


def _logits(run: Run, model, media_id: str, texts: list[str]) -> torch.Tensor:
    """Logits (B, T, S, S) of a video's expressions, computed without `infer`.

    One batch, as in `infer`: in a different batch the last bits differ, and one pixel that crosses an edge is 3e-4 of
    these small masks.
    """
    from stores import FeatureStore

    batch = {}
    stores = {name: FeatureStore.open(run.features / name) for name in ("audio", "visual", "text", "sam2_eval")}
    for name, keys in (("audio", [media_id] * len(texts)), ("visual", [media_id] * len(texts)), ("text", texts)):
        read = [stores[name].read(key) for key in keys]
        for array in read[0]:
            tensor = torch.from_numpy(np.stack([arrays[array] for arrays in read]))
            batch[array] = tensor if tensor.dtype == torch.bool else tensor.float()
    embeds = {k: torch.from_numpy(v) for k, v in stores["sam2_eval"].read(media_id).items()}
    with torch.no_grad():
        logits = model.sam2.track(embeds, token=model.token(batch))
    return torch.nn.functional.interpolate(logits, size=(SIZE, SIZE), mode="bilinear")


def test_masks_are_empty_below_the_threshold_of_the_object_score(run):
    run.infer()
    everything = {variant: run.bins(variant) for variant in ("predictions", *CONTROLS)}
    run.save_checkpoint(threshold=0.0)
    run.infer()
    scores = PredictionReader(run.out / f"{UNGATED}.h5").attrs[SCORES]
    assert list(scores) == run.rows["row_id"].tolist() and not run.bins(UNGATED)
    threshold = float(np.median([*scores.values()]))
    run.save_checkpoint(threshold=threshold)
    run.infer()
    hidden = [row_id for row_id, score in scores.items() if score < threshold]
    assert 0 < len(hidden) < len(scores)
    reader = PredictionReader(run.out / f"{UNGATED}.h5")
    assert reader.attrs["threshold"] == threshold and reader.attrs[SCORES] == scores
    np.testing.assert_equal(run.bins(UNGATED), {row_id: everything["predictions"][row_id] for row_id in hidden})
    for row_id, bins in run.bins().items():
        np.testing.assert_array_equal(bins, 0 if row_id in hidden else everything["predictions"][row_id])
    np.testing.assert_equal(run.bins("true_mask"), everything["true_mask"])  # no token, no score
    swapped = run.bins("swapped_audio")  # gated by the scores of their own tokens
    emptied = [
        row_id for row_id, bins in swapped.items() if not bins.any() and everything["swapped_audio"][row_id].any()
    ]
    assert emptied and emptied != hidden


def test_an_absent_object_is_tracked_without_a_threshold(run):
    for present in np.arange(-0.2, 1, 0.1):  # until an object is absent on frame 0 and found later
        run.save_checkpoint(present=float(present))
        run.infer(controls=[])
        if late := [row for row, bins in run.bins().items() if not bins[0].any() and bins.any()]:
            break
    assert late
    run.save_checkpoint(present=float(present), threshold=0.0)
    run.infer(controls=[])
    assert not any(run.bins()[row].any() for row in late)


def test_rows_do_not_depend_on_their_batch(run):
    run.infer(controls=[])
    together = run.bins()
    alone = {}
    for i in range(len(run.rows)):
        run.infer(controls=[], rows=run.rows.iloc[i : i + 1])
        alone |= run.bins()
    differing = np.concatenate([(together[row] != alone[row]).ravel() for row in together])
    assert differing.mean() < 1e-3  # the last bits of a logit may cross an edge


def test_controls_change_the_predictions(run):
    run.infer()
    plain, sound, words = run.bins(), run.bins("swapped_audio"), run.bins("permuted_text")
    assert all((plain[row] != sound[row]).any() for row in plain)
    assert all((plain[row] != words[row]).any() for row in plain)
    masks = run.bins("true_mask")
    np.testing.assert_array_equal(masks["0.0"], masks["0.1"])  # two expressions of one object
    true = Image.open(run.folder.mask_path("clip0", 1, 0)).resize((SIZE, SIZE), Image.Resampling.NEAREST)
    assert ((masks["0.0"][0] > 127) == (np.asarray(true) > 0)).mean() > 0.7


def test_true_masks_of_one_video_may_differ_in_size(run):
    masks = []
    for scale in (1, 2):
        mask = np.zeros((24 * scale, 40 * scale), np.uint8)
        mask[6 * scale : 18 * scale, 10 * scale : 30 * scale] = 255
        Image.fromarray(mask).save(run.folder.mask_path("clip0", 2, 0))
        run.infer(["true_mask"], run.rows[run.rows["media_id"] == "clip0"])
        masks.append(run.bins("true_mask")["0.2"][0] > 127)
    assert (masks[0] != masks[1]).mean() < 0.05


def test_plan_swaps_audio_between_videos_and_texts_between_objects():
    jobs = plan(expressions(), CONTROLS)
    assert jobs == plan(expressions(), CONTROLS)
    donors = {media_id: variants["swapped_audio"].audio for media_id, variants in jobs.items()}
    assert all(media_id != donor for media_id, donor in donors.items())
    assert set(donors.values()) == set(donors)
    assert jobs["clip0"]["permuted_text"].texts == ["the 0.2", "the 0.2", "the 0.0"]
    assert jobs["clip2"]["true_mask"] == (["2.0", "2.1"], [], "clip2", [1, 1])


def test_plan_uses_other_videos_if_a_video_has_one_object_or_a_vid_two_videos():
    rows = expressions().assign(fid=1)
    texts = plan(rows, CONTROLS)["clip0"]["permuted_text"].texts
    assert len(texts) == 3 and not any(text.startswith("the 0.") for text in texts)
    rows = expressions().replace({"vid": {"vid1": "vid0"}})
    donors = {media_id: variants["swapped_audio"].audio for media_id, variants in plan(rows, CONTROLS).items()}
    assert donors["clip0"] == donors["clip1"] == "clip2"
    with pytest.raises(RequestError, match="two videos"):
        plan(expressions(videos=1), CONTROLS)


def test_resumes_after_an_interruption(run):
    run.infer()
    whole = {name: (run.out / f"{name}.h5").read_bytes() for name in ("predictions", *CONTROLS)}
    path = run.folder.mask_path("clip1", 2, 0)
    mask = path.read_bytes()
    path.write_bytes(mask[:40])
    with pytest.raises(SamloveError, match="clip1"):
        run.infer()
    assert (run.out / "predictions.h5").read_bytes() == whole["predictions"]  # a failed run keeps the previous file
    path.write_bytes(mask)
    (kept,) = run.scratch.glob("*/clip0/predictions.h5")
    mark = np.full((3, FRAMES, SIZE, SIZE), 7, np.uint8)
    with PredictionWriter(kept, FRAMES, SIZE, EDGES) as writer:
        writer.write(["0.0", "0.1", "0.2"], mark)
    run.infer()
    bins = run.bins()
    assert all((bins[row] == 7).all() == row.startswith("0.") for row in bins)  # clip0 was not recomputed
    run.infer()
    assert whole == {name: (run.out / f"{name}.h5").read_bytes() for name in whole}


def test_masks_of_a_different_checkpoint_are_not_reused(run):
    path = run.folder.mask_path("clip1", 2, 0)
    mask = path.read_bytes()
    path.write_bytes(b"")
    with pytest.raises(SamloveError):
        run.infer()
    path.write_bytes(mask)
    run.save_checkpoint(seed=1)
    run.infer()
    resumed = run.bins()
    run.infer()
    assert all((resumed[row] == bins).all() for row, bins in run.bins().items())


def test_refuses_features_with_a_different_fingerprint(run):
    words = {t: {"text": np.ones((TOKENS, DIMS["text"]), np.float16)} for t in run.rows["exp"]}
    run.store("text", words, fingerprint="b")
    with pytest.raises(SamloveError, match=r"weights: expected 'a', found 'b'.*dvc repro text"):
        run.infer()


@pytest.mark.parametrize("arrays", [("text",), ("text_mask",), ("text", "text_mask", "masks")])
def test_refuses_features_with_other_arrays(run, arrays):
    run.store("text", {t: {name: np.ones(TOKENS, np.float16) for name in arrays} for t in run.rows["exp"]})
    with pytest.raises(SamloveError, match=r"text: expected arrays .*found .*dvc repro -f -s text"):
        run.infer()


def test_names_the_items_that_could_not_be_encoded(run):
    embeds = {f"clip{v}": {name: np.ones((FRAMES, *SHAPES[name]), np.float16) for name in LEVELS} for v in range(2)}
    run.store("sam2_eval", embeds, failures=(Failure("clip2", "sam2", "clip2/frames/1.jpg: truncated"),))
    with pytest.raises(SamloveError, match=r"'clip2' \(sam2 failed: clip2/frames/1.jpg: truncated\)"):
        run.infer()


def test_stage(tmp_path, monkeypatch, capsys):
    run = Run(tmp_path / "data" / "micro")
    (tmp_path / "configs" / "micro").mkdir(parents=True)
    (tmp_path / "configs" / "profile.yaml").write_text("profile: micro\n")
    (tmp_path / "configs" / "micro" / "dataset.yaml").write_text(f"mask_size: {SIZE}\n")
    (tmp_path / "configs" / "micro" / "infer.yaml").write_text("controls: [swapped_audio]\n")
    (tmp_path / "data" / "micro" / "index").mkdir()
    run.rows.to_parquet(tmp_path / "data" / "micro" / "index" / "expressions.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["infer", "test_s"])
    pipelines.infer.main()
    assert "test_s: predictions 9 expressions, swapped_audio 9 expressions" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["infer", "train"])
    with pytest.raises(SystemExit) as stopped:
        pipelines.infer.main()
    assert stopped.value.code == 2
    assert "expected one split of val, test_s, test_u, test_n, found train" in capsys.readouterr().err
