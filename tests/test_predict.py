"""`samlove predict` and samlove.load on generated videos, with the weights that come with samlove."""

import dataclasses
import json
import os
import re
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import samlove
from samlove.cli.main import app
from samlove.config import InferConfig
from samlove.data.rle import decode_rle, encode_rle
from samlove.errors import RequestError, SamloveError
from samlove.features.encoders.frames import frame_sources
from samlove.infer import Sources, infer
from samlove.media import open_media, write_video
from samlove.predict import Segmenter
from samlove.predict.clip import Clip
from samlove.predict.example import SENTENCES as EXAMPLE_SENTENCES
from samlove.predict.example import SIZE as EXAMPLE_SIZE
from samlove.predict.example import example_scene, smoothed
from samlove.predict.features import FOLDERS
from samlove.scoring.metrics import quantise
from samlove.synth.expressions import expressions
from samlove.synth.scene import SECONDS, Scene, render
from stores import FeatureStoreWriter, PredictionReader
from tests.videos import SIZE, frames_of, sound_of, write_lossless, write_refavs

SENTENCES = ["The object making the loudest sound.", "The first object to make a sound.", "The object on the left."]
SEEDS = [1, 2]
CPU = torch.device("cpu")
S = 64
PAGE = (Path(__file__).parents[1] / "docs" / "predict.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    """Without a threshold: the masks do not depend on what it is in this checkpoint."""
    made = samlove.load()
    validation = {name: value for name, value in made.setup.header.validation.items() if name != "threshold"}
    made.setup.__dict__["header"] = made.setup.header.model_copy(update={"validation": validation})
    return made


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, segmenter):
    """A dataset of two videos with the features that the encoders give for its files, in batches of both."""
    root = tmp_path_factory.mktemp("dataset")
    folder, rows = write_refavs(root / "set", SEEDS, SENTENCES)
    media_ids = [f"v{seed}" for seed in SEEDS]
    frames = frame_sources(folder, media_ids, 10)
    sources = {
        "audio": {key: folder.audio_path(key) for key in media_ids},
        "visual": frames,
        "text": {text: text for text in SENTENCES},
        "sam2": frames,
    }
    for kind, make in segmenter.setup.encoders(CPU).items():
        encoder, keys = make(), list(sources[kind])
        items = dict(zip(keys, encoder.encode([encoder.load(sources[kind][key]) for key in keys]), strict=True))
        out = root / "features" / FOLDERS[kind]
        writer = FeatureStoreWriter(out, root / kind, encoder.fingerprint(), keys, 8, 1 if kind == "sam2" else None)
        for number, shard in writer.plan():
            writer.write_shard(number, {key: items[key] for key in shard})
        writer.publish()
    return root, folder, rows


@pytest.fixture(scope="module")
def lossless(tmp_path_factory, dataset) -> Path:
    _, folder, _ = dataset
    path = tmp_path_factory.mktemp("video") / "v1.mkv"
    return write_lossless(path, frames_of(folder, "v1"), sound_of(1))


@pytest.fixture(scope="module")
def found(segmenter, lossless):
    return segmenter.segment(lossless, SENTENCES)


def with_infer(segmenter: Segmenter, **settings) -> Segmenter:
    other = Segmenter(dataclasses.replace(segmenter.setup, infer=InferConfig(**settings)), CPU)
    other.setup.__dict__["header"] = segmenter.setup.header
    return other


def bins(logits: np.ndarray) -> np.ndarray:
    return quantise(F.interpolate(torch.from_numpy(logits), size=(S, S), mode="bilinear", align_corners=False))


# --- the pipeline's masks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt_frame", ["first", "best"])
def test_a_lossless_video_gives_the_masks_of_the_pipeline(segmenter, dataset, lossless, tmp_path, prompt_frame):
    root, folder, rows = dataset
    checkpoint = segmenter.setup.checkpoint
    threshold = samlove.load().setup.header.threshold
    chosen = with_infer(segmenter, prompt_frame=prompt_frame)
    infer(
        "test_s", rows, checkpoint, Sources.open(root / "features"), folder, chosen.setup.infer, S,
        tmp_path / "out", tmp_path / ".scratch" / "test_s", CPU,
    )  # fmt: skip
    gated = Segmenter(dataclasses.replace(chosen.setup), CPU)  # with the checkpoint's own threshold
    result = gated.segment(lossless, SENTENCES)
    reader = PredictionReader(tmp_path / "out" / "predictions.h5")
    expected = np.stack([reader.read(f"v1_{number}") for number in range(len(SENTENCES))])
    assert np.array_equal(bins(result.logits), expected)
    asked = [prompt.score for prompt in result.windows[0].prompts]
    hidden = [not mask.any() for mask in result.masks]
    assert threshold is None or all(empty for empty, score in zip(hidden, asked, strict=True) if score < threshold)


def test_the_folder_of_a_video_and_the_stores_of_the_pipeline_give_the_same(segmenter, dataset, found):
    root, folder, _ = dataset
    video = folder.root / "media" / "v1"
    assert np.array_equal(segmenter.segment(video, SENTENCES).logits, found.logits)
    stored = segmenter.segment(video, SENTENCES, features=root / "features")
    assert np.array_equal(stored.logits, found.logits)


def test_a_lossy_video_differs_little(segmenter, dataset, lossless, found, tmp_path):
    """H.264 and AAC as samlove writes them change fewer than 5 % of the pixels.

    The video may be prompted on another frame, if two have nearly equal object scores, as one sentence is here.
    """
    _, folder, _ = dataset
    with open_media(lossless) as media:
        write_video(tmp_path / "v1.mp4", frames_of(folder, "v1"), 1, media, quality=10)
    lossy = segmenter.segment(tmp_path / "v1.mp4", SENTENCES)
    assert not np.array_equal(lossy.logits, found.logits)
    assert (lossy.masks != found.masks).mean() < 0.05


def test_one_sentence_gives_what_several_give(segmenter, lossless, found):
    alone = segmenter.segment(lossless, SENTENCES[1])
    assert np.abs(alone.logits[0] - found.logits[1]).max() < 0.2  # rounding, through nine steps of memory
    assert (alone.masks[0] != found.masks[1]).mean() < 0.002


def test_the_result_describes_itself(found):
    K, T, (width, height) = len(SENTENCES), 10, SIZE
    assert found.masks.shape == (K, T, height, width) and found.masks.dtype == bool
    assert found.scores.shape == (K, T) and found.times.tolist() == list(range(10))
    assert found.masks.any() and not found.masks.all()
    (window,) = found.windows
    assert (window.start, window.end) == (0, 10) and all(prompt.used for prompt in window.prompts)
    absent = found.scores < 0
    assert not found.masks[absent].any()


# --- features --------------------------------------------------------------------------------------------------------


def test_kept_features_give_the_same_and_take_other_sentences(segmenter, lossless, found, tmp_path):
    kept = tmp_path / "kept"
    segmenter.segment(lossless, SENTENCES[:2], keep_features=kept)
    assert {path.name for path in kept.iterdir()} == set(FOLDERS.values())
    again = segmenter.segment(lossless, SENTENCES, features=kept)  # the last sentence is not in the store
    assert np.array_equal(again.logits, found.logits)
    with pytest.raises(RequestError, match="already exists"):
        segmenter.segment(lossless, SENTENCES, keep_features=kept)
    with pytest.raises(SamloveError, match="another video, or of other frames"):
        segmenter.segment(lossless, SENTENCES, seconds=5, features=kept)
    with pytest.raises(RequestError, match="none of this name and time"):
        segmenter.segment(lossless, SENTENCES, start=2, features=kept)
    other = write_lossless(tmp_path / lossless.name, [np.zeros((72, 96, 3), np.uint8)] * 10, sound_of(1))
    with pytest.raises(SamloveError, match="another video"):
        segmenter.segment(other, SENTENCES, features=kept)


def test_features_of_other_weights_are_refused(segmenter, dataset, lossless, tmp_path):
    root, _, _ = dataset
    header = segmenter.setup.header
    other = header.features | {"visual": header.features["visual"] | {"weights_sha256": "0" * 64}}
    strict = Segmenter(dataclasses.replace(segmenter.setup), CPU)
    strict.setup.__dict__["header"] = header.model_copy(update={"features": other})
    for options in ({}, {"features": root / "features"}):
        with pytest.raises(SamloveError, match="weights_sha256: expected '0000"):
            strict.segment(lossless, SENTENCES, **options)


def test_other_versions_of_libraries_are_accepted(segmenter):
    header = segmenter.setup.header
    fingerprint = header.features["audio"] | {"libraries": ["torch 9.9"]}
    segmenter.setup.check("audio", fingerprint, "audio", "")
    with pytest.raises(SamloveError, match="seconds: expected 10, found 9"):
        segmenter.setup.check("audio", fingerprint | {"seconds": 9}, "audio", "")


# --- time ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, dataset) -> Path:
    """34 s: a scene, then nothing but grey for two windows, then the scene again. Two frames a second."""
    _, folder, _ = dataset
    scene = [frame for frame in frames_of(folder, "v1") for _ in range(2)]
    grey = [np.full_like(scene[0], 128)] * 40
    samples = np.concatenate([sound_of(1), np.zeros(20 * 16_000, np.int16), sound_of(1)])
    path = tmp_path_factory.mktemp("long") / "long.mkv"
    return write_lossless(path, [*scene, *grey, *scene[:8]], samples, fps=2)


@pytest.mark.parametrize("prompt_frame", ["first", pytest.param("best", marks=pytest.mark.slow)])
def test_a_window_asks_again_only_if_the_object_was_nowhere_in_the_one_before(segmenter, interrupted, prompt_frame):
    result = with_infer(segmenter, prompt_frame=prompt_frame).segment(interrupted, SENTENCES)
    assert [(w.start, w.end) for w in result.windows] == [(0, 10), (10, 20), (20, 30), (30, 34)]
    assert result.times.tolist() == list(range(34))
    masks = result.masks
    asked = 0
    for number, window in enumerate(result.windows[1:], start=1):
        before = masks[:, (number - 1) * 10 : number * 10]
        for seen, prompt in zip(before.any(axis=(1, 2, 3)), window.prompts, strict=True):
            assert (prompt is None) == seen
            asked += prompt is not None
    assert 0 < asked < 3 * len(SENTENCES)
    assert masks[:, :10].any(axis=(1, 2, 3)).all()


def test_every_frame_can_be_tracked(segmenter, interrupted):
    result = segmenter.segment(interrupted, SENTENCES[0], start=1, seconds=3, fps=None)
    assert result.times.tolist() == [1, 1.5, 2, 2.5, 3, 3.5]
    slow = segmenter.segment(interrupted, SENTENCES[0], start=1, seconds=3)
    assert slow.times.tolist() == [1, 2, 3]
    assert (result.masks[:, ::2] != slow.masks).mean() < 0.05


@pytest.mark.parametrize(
    ("start", "seconds", "fps"), [(0, None, 1), (3.5, 21, 1), (0, 34, 2), (2, 20.5, 1.9), (0, 0.3, 5)]
)
def test_windows_and_items_cover_the_clip(interrupted, start, seconds, fps):
    with open_media(interrupted) as media:
        clip = Clip.of(media, start, seconds, fps, 10)
    windows = clip.windows
    assert windows[0].start == start and windows[-1].end == clip.end
    assert all(a.end == b.start and a.stop == b.first < b.stop for a, b in zip(windows, windows[1:], strict=False))
    assert windows[-1].stop == clip.items * clip.N >= clip.frames > (clip.items - 1) * clip.N
    for window in windows:
        seconds_of = clip.seconds_of(window)
        assert seconds_of[0] == window.first and len(seconds_of) <= clip.N
        inside = clip.times[window.first : window.stop]
        assert len(inside) and (inside >= window.start - 1e-3).all() and (inside < window.end).all()


def test_a_silent_video_and_a_picture_with_a_sound(segmenter, dataset, tmp_path):
    _, folder, _ = dataset
    silent = write_lossless(tmp_path / "silent.mkv", frames_of(folder, "v1")[:3], None)
    assert segmenter.segment(silent, SENTENCES[2]).masks.shape[1] == 3
    picture = folder.frame_path("v1", 0)
    alone = segmenter.segment(picture, SENTENCES[2], sound=folder.audio_path("v1"), seconds=2)
    assert alone.times.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"sentences": []}, "at least one"),
        ({"sentences": ["a", "  "]}, "none of them empty"),
        ({"sentences": ["the caf\udce9"]}, "expected UTF-8"),
        ({"start": 10}, "expected 0 s to its end"),
        ({"start": float("nan")}, "expected 0 s to its end"),
        ({"seconds": 0}, "above 0"),
        ({"fps": 0.5}, "expected 1 to"),
        ({"fps": float("nan")}, "expected 1 to"),
        ({"video": "missing.mp4"}, "no such file"),
        ({"features": "a", "keep_features": "b"}, "at most one"),
        ({"features": "missing"}, "missing: no such file; expected the stores"),
        ({"features": Path(__file__).parent}, "no audio; expected the stores"),
    ],
)
def test_a_wrong_request_is_one_clear_line(segmenter, lossless, request_, message):
    with pytest.raises(RequestError, match=message) as raised:
        segmenter.segment(**{"video": lossless, "sentences": SENTENCES} | request_)
    assert "\n" not in str(raised.value)


# --- the command -----------------------------------------------------------------------------------------------------


def run(*arguments: object) -> None:
    app([str(argument) for argument in arguments], standalone_mode=False)


def test_the_command_writes_video_sheet_masks_and_description(lossless, tmp_path, capsys):
    out = tmp_path / "out"
    run("predict", lossless, *SENTENCES[:2], "--out", out, "--start", 1, "--seconds", 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert str(out) in capsys.readouterr().out
    result = samlove.load().segment(lossless, SENTENCES[:2], start=1, seconds=4)
    with av.open(str(out / "overlay.mp4")) as file:
        assert {stream.type for stream in file.streams} == {"video", "audio"}
        assert len(list(file.decode(video=0))) == 4
    assert Image.open(out / "contact_sheet.png").size[0] > SIZE[0]
    rows = {(row["category_id"], row["image_id"]): row for row in json.loads((out / "masks.json").read_text())}
    assert len(rows) == 8
    for sentence, masks in enumerate(result.masks, start=1):
        for number, mask in enumerate(masks):
            assert np.array_equal(np.asarray(Image.open(out / "masks" / str(sentence) / f"{number:05d}.png")) > 0, mask)
            assert np.array_equal(decode_rle(rows[sentence, number]["segmentation"]), mask)
    about = json.loads((out / "prediction.json").read_text())
    assert about["times"] == [1, 2, 3, 4] and about["sentences"] == SENTENCES[:2]
    assert np.allclose(about["object_scores"], result.scores, atol=1e-3)
    assert about["features"].keys() == {"audio", "visual", "text", "sam2"}
    assert about["checkpoint"]["sha256"] == samlove.load().setup.sha256
    assert str(tmp_path) not in json.dumps(about)


def test_only_an_earlier_prediction_is_replaced(lossless, tmp_path):
    out = tmp_path / ("n" * 255)  # the longest name that a file can have
    out.mkdir()
    (out / "prediction.json").touch()
    run("predict", lossless, SENTENCES[0], "--out", out, "--seconds", 1)
    assert (out / "prediction.json").stat().st_size
    (out / "notes.txt").write_text("mine")
    with pytest.raises(RequestError, match="notes.txt"):
        run("predict", lossless, SENTENCES[0], "--out", out, "--seconds", 1)
    (out / "notes.txt").unlink()
    with pytest.raises(RequestError, match=r"has .*overlay.mp4 in it"):
        run("predict", out / "overlay.mp4", SENTENCES[0], "--out", out)
    assert (out / "overlay.mp4").is_file()


def test_what_is_wrong_with_a_path_is_said_before_anything_is_written(lossless, tmp_path, monkeypatch):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OSError, match="Not a directory"):
        run("predict", lossless, SENTENCES[0], "--out", "../file/out")
    for arguments, message in (
        (["missing.mp4"], "missing.mp4: no such file"),
        (["../loop"], "leads back to it"),
        ([lossless, "--sound", "../loop"], "leads back to it"),
        ([lossless, "--checkpoint", "../loop"], "leads back to it"),
        ([lossless, "--out", "."], "is the current folder"),
        ([lossless, "--out", "../file"], "a file; expected a new folder"),
        ([lossless, "--out", "/proc"], "a mount point; expected a new folder"),
        ([lossless, "--out", "new/deep", "--start", 99], "start: expected"),
        ([lossless, "--keep-features", "new/deep", "--start", 99], "start: expected"),
    ):
        with pytest.raises(RequestError, match=message):
            run("predict", *arguments, SENTENCES[0])
        assert sorted(tmp_path.rglob("*")) == before


def test_a_file_whose_name_is_no_utf8(tmp_path):
    picture = tmp_path / os.fsdecode(b"caf\xe9.png")
    Image.new("RGB", (64, 48)).save(picture)
    run("predict", picture, SENTENCES[0], "--out", tmp_path / "out")
    about = json.loads((tmp_path / "out" / "prediction.json").read_text(encoding="utf-8"))
    assert about["video"]["name"] == "caf\ufffd.png"


def test_the_scene_of_the_example_is_the_same_at_whole_seconds():
    scene, fps = example_scene(), 3
    smooth = smoothed(scene, fps)
    for t in range(SECONDS):
        assert np.array_equal(render(smooth, t * fps, (64, 48))[0], render(scene, t, (64, 48))[0])


def test_an_interrupted_run_leaves_what_was_there(lossless, tmp_path, monkeypatch):
    """Ctrl-C while frames are written."""
    drawn = []

    def draw(*arguments):
        drawn.append(arguments)
        if len(drawn) == 2:
            raise KeyboardInterrupt
        return arguments[0]

    monkeypatch.setattr("samlove.predict.output.draw", draw)
    with pytest.raises((KeyboardInterrupt, SystemExit)) as stopped:
        app(["predict", str(lossless), SENTENCES[0], "--out", str(tmp_path / "out")], standalone_mode=True)
    assert stopped.type is KeyboardInterrupt or stopped.value.code == 130
    assert not list(tmp_path.iterdir())


def assert_right_objects(scene: Scene, masks: Path) -> None:
    """The example shows what it promises: for another checkpoint, another scene may have to be chosen."""
    targets = {said.text: said.target for said in expressions(scene)}
    assert len({targets[sentence] for sentence in EXAMPLE_SENTENCES}) == 2
    for number, sentence in enumerate(EXAMPLE_SENTENCES, start=1):
        overlaps = []
        for t in range(SECONDS):
            truth = render(scene, t, EXAMPLE_SIZE)[1][targets[sentence]]
            mask = np.asarray(Image.open(masks / str(number) / f"{t:05d}.png")) > 0
            overlaps.append((truth & mask).sum() / (truth | mask).sum())
        assert np.mean(overlaps) > 0.7, sentence


def test_the_example_and_wrong_command_lines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("predict", "--example")
    assert (tmp_path / "predictions/example/video.mp4").is_file()
    with open_media(tmp_path / "predictions/example/video.mp4") as media:
        assert media.has_sound and media.duration == 10
    assert_right_objects(example_scene(), tmp_path / "predictions/example/masks")
    for example in re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL):
        exec(compile(example, "docs/predict.md", "exec"), {})
    for wrong in ([], ["video.mp4"], ["--example", "video.mp4", "the dog"], ["video.mp4", "the dog", "--fps", "fast"]):
        with pytest.raises(RequestError):
            run("predict", *wrong)


# --- run-length encoding ---------------------------------------------------------------------------------------------


def test_rle_is_that_of_pycocotools():
    mask = np.zeros((5, 7), bool)
    mask[1:4, 2:6] = True
    mask[0, 0] = True
    assert encode_rle(mask) == {"size": [5, 7], "counts": "01:2H000004"}
    assert encode_rle(np.zeros((3, 4), bool))["counts"] == "<" and encode_rle(np.ones((3, 4), bool))["counts"] == "0<"


@pytest.mark.parametrize("shape", [(1, 1), (64, 33), (720, 1280)])
def test_rle_gives_the_mask_back(shape):
    generator = np.random.default_rng(0)
    for mask in (generator.random(shape) < 0.5, np.zeros(shape, bool), np.ones(shape, bool)):
        assert np.array_equal(decode_rle(encode_rle(mask)), mask)


@pytest.mark.parametrize(
    "counts", ["<", "Q", "P" * 100_000, [5, 7], [-1, 10], [], None, ["x"]], ids=lambda c: str(c)[:9]
)
def test_rle_that_is_no_mask_is_refused(counts):
    with pytest.raises(SamloveError, match="RLE: expected"):
        decode_rle({"size": [3, 3], "counts": counts})
    with pytest.raises(SamloveError, match="RLE: expected"):
        decode_rle(counts)
