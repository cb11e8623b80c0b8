"""Real-world files: each broken file is listed in the failure log with its reason, each unusual one is read."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import samlove.features.extract as extract_module
from samlove.data.dataset import RefAvsFolder
from samlove.features.encoders.frames import frame_sources
from samlove.features.encoders.timm_image import TimmEncoder
from samlove.features.encoders.vggish import VggishEncoder
from samlove.features.extract import Job, extract
from stores import FeatureStore
from tests import small_encoders as small
from tests.plain_user import run_as_plain_user

SECONDS = 2


def tone(rate: int, seconds: float = SECONDS, channels: int = 1) -> np.ndarray:
    wave = 0.5 * np.sin(2 * np.pi * 440 * np.arange(round(rate * seconds)) / rate)
    return np.repeat(wave[:, None], channels, axis=1)


def write(path: Path, wave: np.ndarray, rate: int, subtype: str = "PCM_16") -> None:
    soundfile.write(path, wave, rate, subtype=subtype)


BROKEN_AUDIO: dict[str, tuple[Callable[[Path], object], str]] = {
    "zero_bytes": (lambda path: path.write_bytes(b""), "expected one of the formats WAV"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:9000]), "truncated audio: expected"),
    "missing": (lambda path: path.unlink(), "no such file; expected audio"),
    "no_sound": (lambda path: path.write_text("hello, this is a text"), "expected one of the formats WAV"),
    "a_folder": (lambda path: (path.unlink(), path.mkdir()), "expected a file, found a folder"),
}
UNUSUAL_AUDIO: dict[str, tuple[Callable[[Path], object], list[bool]]] = {
    "empty": (lambda path: write(path, tone(16_000, 0), 16_000), [False, False]),
    "short": (lambda path: write(path, tone(16_000, 0.01), 16_000), [False, False]),
    "one_second": (lambda path: write(path, tone(16_000, 1), 16_000), [True, False]),
    "8_bit": (lambda path: write(path, tone(16_000), 16_000, "PCM_U8"), [True, True]),
    "96_khz_stereo": (lambda path: write(path, tone(96_000, channels=2), 96_000), [True, True]),
    "float": (lambda path: write(path, tone(44_100), 44_100, "FLOAT"), [True, True]),
}
BROKEN_FRAME: dict[str, tuple[Callable[[Path], object], str]] = {
    "zero_bytes": (lambda path: path.write_bytes(b""), "expected an image in one of the formats PNG"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-200]), "truncated image: expected a JPEG"),
    "missing": (lambda path: path.unlink(), "no such file; expected image"),
    "no_image": (lambda path: path.write_text("hello"), "expected an image in one of the formats PNG"),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RefAvsFolder:
    """Three valid videos. Any share of items may fail: the real budget suits thousands of items."""
    monkeypatch.setattr("samlove.features.extract.FAILURE_BUDGET", 1.0)
    folder = RefAvsFolder(tmp_path / "clips")
    for media_id in ("before", "sound", "after"):
        small.write_clip(folder, media_id, frames=3, seconds=SECONDS)
    return folder


def extract_audio(folder: RefAvsFolder, media_ids: list[str]) -> FeatureStore:
    root = folder.root.parent
    encoder = VggishEncoder(small.audio_config(root / "weights"), SECONDS, torch.device("cpu"))
    sources = {media_id: folder.audio_path(media_id) for media_id in media_ids}
    extract(Job(encoder, sources, root / "audio", root / "scratch" / "audio", 4, 2))
    return FeatureStore.open(root / "audio")


def extract_visual(folder: RefAvsFolder, media_ids: list[str]) -> FeatureStore:
    root = folder.root.parent
    encoder = TimmEncoder(small.vit_config(root / "weights"), torch.device("cpu"))
    extract(Job(encoder, frame_sources(folder, media_ids, 3), root / "visual", root / "scratch" / "visual", 4, 2))
    return FeatureStore.open(root / "visual")


def test_every_broken_wav_is_in_the_failure_log_with_its_reason(folder: RefAvsFolder) -> None:
    for media_id, (spoil, _) in BROKEN_AUDIO.items():
        small.write_clip(folder, media_id, frames=1, seconds=SECONDS)
        spoil(folder.audio_path(media_id))
    store = extract_audio(folder, ["before", *BROKEN_AUDIO, "after"])
    assert store.keys() == ["before", "after"]
    assert [failure.key for failure in store.failures] == list(BROKEN_AUDIO)
    for failure in store.failures:
        assert failure.stage == "audio"
        assert failure.error.startswith(f"{folder.audio_path(failure.key)}: {BROKEN_AUDIO[failure.key][1]}")


def test_every_unusual_wav_is_read(folder: RefAvsFolder) -> None:
    for media_id, (spoil, _) in UNUSUAL_AUDIO.items():
        small.write_clip(folder, media_id, frames=1, seconds=SECONDS)
        spoil(folder.audio_path(media_id))
    small.write_clip(folder, "plain", frames=1, seconds=SECONDS)
    write(folder.audio_path("plain"), tone(16_000), 16_000)
    store = extract_audio(folder, ["plain", *UNUSUAL_AUDIO])
    assert store.failures == []
    for media_id, (_, valid) in UNUSUAL_AUDIO.items():
        found = store.read(media_id)
        assert found["audio_valid"].tolist() == valid, media_id
        if all(valid):  # the same tone at any sample rate, channel count and bit depth
            expected = store.read("plain")["audio"].astype(np.float32)
            error = np.linalg.norm(found["audio"] - expected) / np.linalg.norm(expected)
            assert error < 0.05, (media_id, error)  # 8 bits give 0.03


def test_every_broken_frame_is_in_the_failure_log_with_its_reason(folder: RefAvsFolder) -> None:
    for media_id, (spoil, _) in BROKEN_FRAME.items():
        small.write_clip(folder, media_id, frames=3, seconds=SECONDS)
        spoil(folder.frame_path(media_id, 1))
    (folder.root / "media" / "no_frames" / "frames").mkdir(parents=True)
    broken = [*BROKEN_FRAME, "no_frames"]
    store = extract_visual(folder, ["before", *broken, "after"])
    assert store.keys() == ["before", "after"]
    assert [failure.key for failure in store.failures] == broken
    for failure in store.failures:
        reason = BROKEN_FRAME.get(failure.key, (None, "no such file; expected image"))[1]
        frame = 0 if failure.key == "no_frames" else 1
        assert failure.error.startswith(f"{folder.frame_path(failure.key, frame)}: {reason}")


def test_a_shorter_video_repeats_its_last_frame(folder: RefAvsFolder) -> None:
    small.write_clip(folder, "one", frames=1, seconds=SECONDS)
    tokens = extract_visual(folder, ["one"]).read("one")["visual"]  # (3, 1 + P, d)
    np.testing.assert_array_equal(tokens, np.repeat(tokens[:1], 3, axis=0))


def print_failures(root: str) -> None:
    """Extract audio and visual features of the folder in `root`, and print the failures as JSON."""
    extract_module.FAILURE_BUDGET = 1.0
    folder = RefAvsFolder(Path(root) / "clips")
    stores = [extract_some(folder, ["before", "sound"]) for extract_some in (extract_audio, extract_visual)]
    print("\n" + json.dumps([[store.keys(), [[f.key, f.error] for f in store.failures]] for store in stores]))


def test_what_may_not_be_read_is_a_row_with_its_reason(folder: RefAvsFolder) -> None:
    for path in (folder.audio_path("sound"), folder.frame_path("sound", 1)):
        path.chmod(0)
    code = f"from tests.test_failures import print_failures; print_failures({str(folder.root.parent)!r})"
    done = run_as_plain_user("-c", code)
    assert done.returncode == 0, done.stderr
    for keys, failures in json.loads(done.stdout.splitlines()[-1]):
        assert keys == ["before"]
        ((key, error),) = failures
        assert key == "sound"
        assert "Permission denied" in error


def test_fixed_files_are_computed_and_the_others_are_kept(folder: RefAvsFolder) -> None:
    wav = folder.audio_path("sound")
    whole = wav.read_bytes()
    wav.write_bytes(whole[:100])
    before = extract_audio(folder, ["before", "sound", "after"])
    assert [failure.key for failure in before.failures] == ["sound"]
    kept = before.read("before")["audio"]
    wav.write_bytes(whole)
    store = extract_audio(folder, ["before", "sound", "after"])
    assert store.failures == []
    assert store.keys() == ["before", "sound", "after"]
    np.testing.assert_array_equal(store.read("before")["audio"], kept)
