"""Videos, sounds, folders and pictures as media, and videos written."""

import re
import resource
import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
import soxr
from PIL import Image

from samlove.data.dataset import load_audio, load_frame
from samlove.errors import RequestError, SamloveError
from samlove.media import Media, open_media, write_video
from tests.media_files import decoded, made_frames, made_sound, write_media

ROOT = Path(__file__).parents[1]
REAL = ROOT.parent / "shared" / "video" / "bigbuckbunny.mp4"
FRAMES = 36
CONTAINERS: dict[str, dict[str, Any]] = {
    "h264_aac.mp4": {"options": {"g": "8"}},
    "h265_flac.mkv": {"codec": "libx265", "options": {"x265-params": "log-level=0:keyint=8"}, "sound_codec": "flac"},
    "ffv1_pcm.mkv": {"codec": "ffv1", "pixels": "bgr0", "sound_codec": "pcm_s16le"},
    "vp9_opus.webm": {"codec": "libvpx-vp9", "options": {"g": "8"}, "sound_codec": "libopus", "rate": 48_000},
    "mjpeg_pcm.avi": {"codec": "mjpeg", "pixels": "yuvj420p", "sound_codec": "pcm_s16le"},
    "h264.avi": {"options": {"g": "8"}, "sound_codec": "pcm_s16le"},
    "mpeg4_mp3.avi": {"codec": "mpeg4", "options": {"g": "8", "bf": "2"}, "sound_codec": "libmp3lame", "rate": 44_100},
    "prores_pcm.mov": {"codec": "prores_ks", "pixels": "yuv422p10le", "sound_codec": "pcm_s16le"},
    "h264.ts": {"options": {"g": "8"}},
    "mpeg2.mpg": {
        "codec": "mpeg2video",
        "fps": 25,
        "options": {"g": "8", "bf": "2"},
        "sound_codec": "mp2",
        "rate": 48_000,
    },
    "h264.flv": {"options": {"g": "8"}},
    "loop.gif": {"codec": "gif", "pixels": "rgb8", "sound": None},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file in each container, of FRAMES frames and 3.6 s of stereo sound."""
    root = tmp_path_factory.mktemp("files")
    written = {}
    for name, how in CONTAINERS.items():
        how = {"sound": made_sound(3.6, how.get("rate", 16_000), 2), **how}
        written[name] = write_media(root / name, made_frames(FRAMES), **how)
    return written


def shown(times: np.ndarray, frames: np.ndarray, at: list[float]) -> np.ndarray:
    """The last of the decoded frames that begins at each time or before; the first one before all."""
    return frames[np.maximum(np.searchsorted(times, np.array(at) + 1e-6, "right") - 1, 0)]


@pytest.mark.parametrize("name", CONTAINERS)
def test_shows_the_frames_that_decoding_all_gives(files: dict[str, Path], name: str) -> None:
    times, frames = decoded(files[name])
    last = float(times[-1])
    at = [0.6 * last, 0.0, last, last + 9, 0.3 * last, 0.31 * last, 0.99 * last, 0.05, -1.0]
    with open_media(files[name]) as media:
        assert np.array_equal(media.frames_at(at), shown(times, frames, at))
        one_by_one = [media.frames_at([time])[0] for time in at]
        assert np.array_equal(one_by_one, shown(times, frames, at))
        every = list(media.frames(0, 99))
    assert np.allclose([time for time, _ in every], times, atol=1e-9)
    assert np.array_equal([frame for _, frame in every], frames)
    assert media.size == (64, 48)
    assert media.duration == pytest.approx(FRAMES / CONTAINERS[name].get("fps", 10), abs=0.02)
    assert media.fps == pytest.approx(CONTAINERS[name].get("fps", 10), rel=0.01)
    assert media.has_sound == (name != "loop.gif")


@pytest.mark.parametrize("name", [name for name in CONTAINERS if name not in ("loop.gif", "mpeg4_mp3.avi")])
def test_sound_is_in_time(files: dict[str, Path], name: str) -> None:
    """mpeg4_mp3.avi is out: AVI does not state the delay of MP3."""
    rate = CONTAINERS[name].get("rate", 16_000)
    written = made_sound(3.6, rate, 2).astype(np.float32).mean(1) / 32768
    written = soxr.resample(written, rate, 16_000)
    with open_media(files[name]) as media:
        for start in (0.0, 1.3):
            heard, expected = media.sound(start, 2), written[round(start * 16_000) :][: 2 * 16_000]
            assert heard is not None and heard.dtype == np.float32 and heard.shape == (32_000,)
            assert np.corrcoef(heard, expected)[0, 1] > 0.99  # a shift by one sample makes it 0.98


@pytest.mark.parametrize("rate", [16_000, 44_100, 48_000])
@pytest.mark.parametrize("channels", [1, 2, 6])
@pytest.mark.parametrize("codec", ["pcm_s16le", "pcm_f32le", "flac"])
def test_lossless_sound_is_the_pipelines_bit_for_bit(tmp_path: Path, rate: int, channels: int, codec: str) -> None:
    sound = made_sound(11.7, rate, channels)
    samples = sound.astype(np.float32) / 32768 if codec == "pcm_f32le" else sound
    path = write_media(
        tmp_path / "a.mkv", made_frames(12), "ffv1", "bgr0", 1, sound=samples, sound_codec=codec, rate=rate
    )
    with open_media(path) as media:
        for start in (0.0, 1.5, 4.0, 1.5):
            soundfile.write(tmp_path / "cut.wav", sound[round(start * rate) :], rate, subtype="PCM_16")
            cut, _ = load_audio(tmp_path / "cut.wav")
            wanted = (soxr.resample(cut, rate, 16_000) if rate != 16_000 else cut)[: 5 * 16_000]
            assert np.array_equal(media.sound(start, 5), wanted)
        assert np.array_equal(media.sound(1.5, 2, rate=rate), cut[: 2 * rate])
        assert media.sound(11, 5).shape == (round(0.7 * 16_000),)  # type: ignore[union-attr]
        assert media.sound(20, 5).shape == (0,)  # type: ignore[union-attr]


def test_lossless_frames_are_kept_bit_for_bit(tmp_path: Path) -> None:
    frames = made_frames(12, 61, 47)
    with open_media(write_media(tmp_path / "a.mkv", frames, "ffv1", "bgr0", fps=1)) as media:
        assert np.array_equal(media.frames_at(range(12)), frames)
        assert media.frames_at(np.arange(10)).dtype == np.uint8


def test_variable_frame_rate(tmp_path: Path) -> None:
    ticks, frames = [0, 30, 45, 400, 401, 1_000, 2_500], made_frames(7)
    path = write_media(tmp_path / "a.mkv", frames, "ffv1", "bgr0", ticks=ticks, base=Fraction(1, 1000))
    with open_media(path) as media:
        at = [0.029, 0.03, 0.044, 0.2, 0.4, 0.999, 1.0, 2.4, 2.5, 7.0]
        assert np.array_equal(media.frames_at(at), frames[[0, 1, 1, 2, 3, 4, 5, 5, 6, 6]])
        assert [time for time, _ in media.frames(0.2, 1.0)] == [0.2, 0.4, 0.401, 1.0]
        sampled = list(media.frames(0.5, 2.0, fps=2))
        assert [time for time, _ in sampled] == [0.5, 1.0, 1.5, 2.0]
        assert np.array_equal([frame for _, frame in sampled], frames[[4, 5, 5, 5]])


def test_a_section_of_no_length_has_no_frames(tmp_path: Path) -> None:
    with open_media(write_media(tmp_path / "a.mp4", made_frames(10))) as media:
        for start, seconds in ((0.5, 0.0), (1.0, 2.0), (7.0, 2.0)):
            assert not list(media.frames(start, seconds)) and not list(media.frames(start, seconds, 5))


@pytest.mark.parametrize(
    ("matrix", "turned"),
    [
        ((0, 1, -1, 0), lambda f: np.rot90(f, -1)),
        ((-1, 0, 0, -1), lambda f: np.rot90(f, 2)),
        ((0, -1, 1, 0), lambda f: np.rot90(f, 1)),
        ((-1, 0, 0, 1), lambda f: f[:, ::-1]),
        ((0, 1, 1, 0), lambda f: f.swapaxes(0, 1)),
    ],
)
def test_turns_and_mirrors_as_the_file_says(tmp_path: Path, matrix: tuple[int, ...], turned: Any) -> None:
    path = write_media(tmp_path / "a.mp4", made_frames(3))
    _, frames = decoded(path)
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 44  # the matrix a b u c d v x y w, which players apply
    a, b, c, d = (65536 * value for value in matrix)
    content[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    with open_media(path) as media:
        upright = turned(frames[2])
        assert np.array_equal(media.frames_at([0.2])[0], upright)
        assert media.size == upright.shape[1::-1]


@pytest.mark.parametrize("sound_start", [0.0, 0.75])
def test_sound_that_begins_later_than_the_frames(tmp_path: Path, sound_start: float) -> None:
    sound = made_sound(2, 16_000)
    path = write_media(
        tmp_path / "a.mkv",
        made_frames(30),
        "ffv1",
        "bgr0",
        sound=sound,
        sound_codec="pcm_s16le",
        sound_start=sound_start,
    )
    late = round(sound_start * 16_000)
    with open_media(path) as media:
        heard = media.sound(0, 10)
        assert heard is not None and len(heard) == late + len(sound) and media.duration == 3.0
        assert not heard[:late].any() and np.array_equal(heard[late:], sound[:, 0].astype(np.float32) / 32768)
        part = media.sound(0.5, 1)
        assert np.array_equal(part, heard[8_000:24_000])


def test_frames_that_begin_later_than_the_sound(tmp_path: Path) -> None:
    """Time 0 is the first frame, so what is heard before it is cut."""
    sound = made_sound(3, 16_000)
    ticks = list(range(10, 30))
    path = write_media(
        tmp_path / "a.mkv", made_frames(20), "ffv1", "bgr0", ticks=ticks, sound=sound, sound_codec="pcm_s16le"
    )
    with open_media(path) as media:
        assert media.duration == pytest.approx(2.0)
        assert np.array_equal(media.sound(0, 5), sound[16_000:, 0].astype(np.float32) / 32768)


def test_a_file_without_sound(tmp_path: Path) -> None:
    with open_media(write_media(tmp_path / "a.mp4", made_frames(5))) as media:
        assert not media.has_sound and media.sound(0, 1) is None


def test_another_sound_in_place_of_the_videos(tmp_path: Path) -> None:
    path = write_media(tmp_path / "a.mp4", made_frames(5), sound=made_sound(1))
    other = made_sound(3, 22_050)
    soundfile.write(tmp_path / "b.flac", other, 22_050)
    with open_media(path, tmp_path / "b.flac") as media:
        assert np.array_equal(media.sound(0, 5, rate=22_050), other[:, 0].astype(np.float32) / 32768)
        assert media.duration == pytest.approx(0.5)


def write_folder(root: Path, names: list[str]) -> np.ndarray:
    root.mkdir(parents=True)
    for name, frame in zip(names, made_frames(len(names)), strict=True):
        Image.fromarray(frame).save(root / name)
    return np.stack([load_frame(root / name) for name in names])


def test_a_folder_of_frames(tmp_path: Path) -> None:
    names = [f"shot {n}.{'png' if n % 2 else 'jpg'}" for n in range(12)]
    frames = write_folder(tmp_path / "shots", names)
    (tmp_path / "shots" / "notes.txt").write_text("no frame")
    with open_media(tmp_path / "shots") as media:
        assert (media.duration, media.fps, media.size, media.has_sound) == (12.0, 1.0, (64, 48), False)
        assert np.array_equal(media.frames_at(range(12)), frames)
    soundfile.write(tmp_path / "shots" / "sound.wav", made_sound(2), 16_000)
    with open_media(tmp_path / "shots", fps=24) as media:
        assert media.duration == 0.5 and media.has_sound
        assert np.array_equal([frame for _, frame in media.frames(0, 1)], frames)
        assert np.array_equal(media.sound(0, 10), load_audio(tmp_path / "shots" / "sound.wav")[0])
    soundfile.write(tmp_path / "shots" / "other.mp3", made_sound(2), 16_000)
    with pytest.raises(RequestError, match=r"at most one sound file, found other.mp3 and sound.wav"):
        open_media(tmp_path / "shots")
    with open_media(tmp_path / "shots", tmp_path / "shots" / "other.mp3") as media:
        assert media.has_sound


def test_a_videos_folder_of_ref_avs(tmp_path: Path) -> None:
    frames = write_folder(tmp_path / "clip" / "frames", [f"{n}.jpg" for n in range(10)])
    soundfile.write(tmp_path / "clip" / "audio.wav", made_sound(10, 44_100), 44_100)
    with open_media(tmp_path / "clip") as media:
        assert np.array_equal(media.frames_at(range(10)), frames)
        samples, rate = load_audio(tmp_path / "clip" / "audio.wav")
        assert np.array_equal(media.sound(0, 10), soxr.resample(samples, rate, 16_000))


def test_a_picture_with_sound(tmp_path: Path) -> None:
    (frame,) = write_folder(tmp_path / "a", ["picture.jpg"])
    soundfile.write(tmp_path / "sound.wav", made_sound(4), 16_000)
    with open_media(tmp_path / "a" / "picture.jpg", tmp_path / "sound.wav") as media:
        assert media.duration == pytest.approx(4.0) and media.fps is None
        assert all(np.array_equal(shown, frame) for shown in media.frames_at([0, 1.5, 99]))
        assert [time for time, _ in media.frames(1, 2, fps=2)] == [1.0, 1.5, 2.0, 2.5]
    with open_media(tmp_path / "a" / "picture.jpg") as media:
        assert media.duration == 1.0 and not media.has_sound


def test_a_real_clip() -> None:
    if not REAL.exists():
        pytest.skip(f"needs {REAL}")
    with open_media(REAL) as media:
        assert (media.fps, media.size) == (25.0, (1280, 720))
        assert media.duration == pytest.approx(5.28)
        times, frames = decoded(REAL)
        at = [4.0, 0.999, 1.0, 5.3, 2.46]
        assert np.array_equal(media.frames_at(at), shown(times, frames, at))
        heard = media.sound(0, 10)
        assert heard is not None and len(heard) == pytest.approx(5.312 * 16_000, abs=16) and heard.any()
        assert np.array_equal(media.sound(0, 1), heard[:16_000])


# Files that cannot be read


def error_of(path: Path, sound: Path | None = None) -> SamloveError:
    with pytest.raises(SamloveError) as caught:
        open_media(path, sound)
    assert "\n" not in str(caught.value)
    return caught.value


def test_names_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("not a video\n" * 99)
    (tmp_path / "notes.txt").write_text("not a video\n" * 99)
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    soundfile.write(tmp_path / "sound.wav", made_sound(1), 16_000)
    write_media(tmp_path / "silent.mp4", made_frames(3))
    write_folder(tmp_path / "frames", ["0.png", "1.png"])
    for path, sound, kind, text in (
        ("missing.mp4", None, RequestError, "missing.mp4: no such file"),
        ("text.mp4", None, RequestError, "text.mp4: expected a video"),
        ("notes.txt", None, RequestError, "notes.txt: expected a video"),
        ("empty.mp4", None, RequestError, "empty.mp4: .*an empty file"),
        ("folder", None, RequestError, "folder: expected frames"),
        ("sound.wav", None, RequestError, "sound.wav: expected a video track, found audio"),
        ("frames", "silent.mp4", RequestError, "silent.mp4: expected a sound track, found none"),
        ("frames", "missing.wav", RequestError, "missing.wav: no such file"),
        ("frames", "text.mp4", RequestError, "text.mp4: expected a video or sound"),
    ):
        error = error_of(tmp_path / path, None if sound is None else tmp_path / sound)
        assert type(error) is kind
        assert re.search(text, str(error)), str(error)


@pytest.mark.parametrize("name", ["h264_aac.mp4", "ffv1_pcm.mkv", "mjpeg_pcm.avi", "h264.avi", "prores_pcm.mov"])
def test_a_truncated_file(files: dict[str, Path], tmp_path: Path, name: str) -> None:
    content = files[name].read_bytes()
    path = tmp_path / name
    if name.endswith(("mp4", "mov")):  # with its header first, as on the web
        with av.open(str(files[name])) as old, av.open(str(path), "w", options={"movflags": "faststart"}) as new:
            copies = {stream.index: new.add_stream_from_template(stream) for stream in old.streams}
            for packet in old.demux():
                if packet.dts is not None:
                    packet.stream = copies[packet.stream_index]
                    new.mux(packet)
        content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert "truncated: expected 3.6 s" in str(error_of(path))
    path.write_bytes(content[:64])
    error_of(path)


def test_a_playlist_opens_no_other_file(files: dict[str, Path], tmp_path: Path) -> None:
    name = files["h264.ts"]
    (tmp_path / "a.mp4").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{name}\n#EXT-X-ENDLIST\n")
    (tmp_path / "a.m3u8").write_text((tmp_path / "a.mp4").read_text())
    (tmp_path / "b.mp4").write_text(f"ffconcat version 1.0\nfile {name}\n")
    for made in ("a.mp4", "a.m3u8", "b.mp4"):
        assert isinstance(error_of(tmp_path / made), RequestError)


def test_frames_of_different_sizes(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", ["0.png", "1.png"])
    Image.new("RGB", (30, 20)).save(tmp_path / "a" / "2.png")
    with open_media(tmp_path / "a") as media, pytest.raises(SamloveError, match=r"2.png: expected 64x48.*30x20"):
        media.frames_at([0, 1, 2])


def test_a_damaged_frame_is_the_one_before(files: dict[str, Path], tmp_path: Path) -> None:
    content = bytearray(files["mjpeg_pcm.avi"].read_bytes())
    with av.open(str(files["mjpeg_pcm.avi"])) as container:
        packet = list(container.demux(video=0))[20]
        assert packet.pos is not None
        content[packet.pos + 8 : packet.pos + 8 + packet.size] = bytes(packet.size)
    (tmp_path / "a.avi").write_bytes(content)
    _, frames = decoded(files["mjpeg_pcm.avi"])
    with open_media(tmp_path / "a.avi") as media:
        found = media.frames_at(np.arange(FRAMES) / 10)
    same = (found == frames).all(axis=(1, 2, 3))
    assert same.sum() == FRAMES - 1 and np.array_equal(found[20], frames[19])


# Writing


def test_writes_what_it_is_given(tmp_path: Path) -> None:
    frames = made_frames(25, 64, 48)
    sound = made_sound(4, 44_100, 2)
    source = write_media(
        tmp_path / "a.mkv", frames, "ffv1", "bgr0", fps=10, sound=sound, sound_codec="pcm_s16le", rate=44_100
    )
    path = tmp_path / "b.mp4"
    with open_media(source) as media:
        write_video(path, (frame for _, frame in media.frames(0.5, 1.5)), 10, media, 0.5, 1.5, quality=10)
        wanted = media.sound(0.5, 1.5)
    with open_media(path) as media:
        assert (media.duration, media.fps, media.size) == (pytest.approx(1.5), pytest.approx(10), (64, 48))
        found = media.frames_at(np.arange(15) / 10)
        heard = media.sound(0, 1.5)
    assert np.abs(found.astype(int) - frames[5:20]).mean() < 3
    assert np.abs(found.astype(int) - frames[5:20]).mean(axis=(0, 1, 2)).max() < 4  # no shift of colours
    assert heard is not None and wanted is not None and np.corrcoef(heard, wanted)[0, 1] > 0.99
    assert list(tmp_path.iterdir()) != [] and not list(tmp_path.glob(".*"))
    with av.open(str(path)) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert (video.codec_context.name, video.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (audio.codec_context.name, audio.codec_context.layout.name) == ("aac", "stereo")
        assert container.duration is not None and container.duration / 1e6 == pytest.approx(1.5, abs=0.03)
    content = path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")  # a browser can begin before it has all


@pytest.mark.parametrize(("fps", "seconds"), [(1, 4.0), (29.97, 0.4), (0.5, 6.0), (240, 0.1)])
def test_writes_any_frame_rate(tmp_path: Path, fps: float, seconds: float) -> None:
    frames = made_frames(max(round(fps * seconds), 1))
    write_video(tmp_path / "a.mp4", frames, fps)
    with open_media(tmp_path / "a.mp4") as media:
        assert media.duration == pytest.approx(len(frames) / fps, rel=1e-3)
        found = media.frames_at([n / fps for n in range(len(frames))])
    assert np.abs(found.astype(int) - frames).mean() < 4


@pytest.mark.parametrize(("height", "width"), [(47, 61), (1, 1), (48, 61)])
def test_writes_odd_sizes(tmp_path: Path, height: int, width: int) -> None:
    frames = made_frames(3, width, height)
    write_video(tmp_path / "a.mp4", frames, 1, quality=5)
    with open_media(tmp_path / "a.mp4") as media:
        assert media.size == (width + width % 2, height + height % 2)
        found = media.frames_at([0, 1, 2])[:, :height, :width]
    assert np.abs(found.astype(int) - frames).mean() < 6


@pytest.mark.parametrize(("channels", "rate"), [(1, 8_000), (6, 48_000), (2, 37_800), (2, 96_000)])
def test_writes_the_sound_of_any_rate_and_layout(tmp_path: Path, channels: int, rate: int) -> None:
    source = write_media(
        tmp_path / "a.mkv", made_frames(20), "ffv1", "bgr0", sound=made_sound(2, rate, channels),
        sound_codec="pcm_s16le", rate=rate,
    )  # fmt: skip
    with open_media(source) as media:
        write_video(tmp_path / "b.mp4", (frame for _, frame in media.frames(0, 2)), 10, media)
        wanted = media.sound(0, 2)
    with open_media(tmp_path / "b.mp4") as media:
        heard = media.sound(0, 2)
    assert heard is not None and wanted is not None and len(heard) == pytest.approx(len(wanted), abs=16)
    short = min(len(heard), len(wanted))
    assert np.corrcoef(heard[:short], wanted[:short])[0, 1] > (0.6 if channels == 6 else 0.98)


def test_a_sound_shorter_or_longer_than_the_frames(tmp_path: Path) -> None:
    for seconds in (0.5, 5.0):
        source = write_media(tmp_path / "a.mp4", made_frames(20), sound=made_sound(seconds))
        with open_media(source) as media:
            assert media.duration == pytest.approx(2.0, abs=0.05)
            write_video(tmp_path / "b.mp4", (frame for _, frame in media.frames(0, 9)), 10, media)
        with open_media(tmp_path / "b.mp4") as media:
            heard = media.sound(0, 9)
            assert media.duration == pytest.approx(2.0) and heard is not None
            assert len(heard) / 16_000 == pytest.approx(min(seconds, 2.0), abs=0.07)  # AAC ends with a whole block


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_text("before")
    frames = made_frames(3)
    with pytest.raises(SamloveError, match="expected frames to write, found none"):
        write_video(path, [], 1)
    with pytest.raises(SamloveError, match="expected frames of shape"):
        write_video(path, [frames[0], frames[1, :20]], 1)
    with pytest.raises(KeyboardInterrupt):
        write_video(path, stopping(frames), 1)
    with pytest.raises(OSError, match="no_folder"):
        write_video(tmp_path / "no_folder" / "a.mp4", frames, 1)
    assert path.read_text() == "before" and [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_a_full_disk_is_an_error_wherever_it_ends(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (6, 60, 80, 3), dtype=np.uint8)
    write_video(tmp_path / "a.mp4", frames, 5)
    size, before = (tmp_path / "a.mp4").stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (0, 100, size // 2, size - 600, size - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
        try:
            with pytest.raises(OSError, match="too large"):
                write_video(tmp_path / "b.mp4", frames, 5)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def stopping(frames: np.ndarray) -> Any:
    yield frames[0]
    raise KeyboardInterrupt


def test_media_is_not_kept_open(files: dict[str, Path]) -> None:
    open_files = Path("/proc/self/fd")
    if not open_files.exists():
        pytest.skip("needs /proc")
    before = len(list(open_files.iterdir()))
    for _ in range(3):
        with open_media(files["h264_aac.mp4"]) as media:
            media.frames_at([0, 3, 1])
            media.sound(0, 1)
    assert isinstance(media, Media) and len(list(open_files.iterdir())) == before
