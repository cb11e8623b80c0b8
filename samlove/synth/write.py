"""Writes LAVS-synth as a Ref-AVS folder: metadata.csv, media, gt_mask, and the extra table cues.csv.

The same seed and scale give the same bytes: every video has its own random generator, seeded by (seed, split, number),
so neither the number of processes nor their order matters.
"""

import csv
import io
import os
import shutil
import signal
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import active_children, parent_process
from pathlib import Path
from threading import Thread

import numpy as np
import soundfile
from PIL import Image
from tqdm import tqdm

from samlove.errors import RequestError, absence
from samlove.synth.expressions import SHARES, Expression, expressions
from samlove.synth.scene import SECONDS, SEEN, UNSEEN, Scene, background, render, sample_scene
from samlove.synth.voice import RATE, mix

PARTIAL = ".partial"  # the end, or the whole, of the name of an unfinished folder
CONTENT = ("media", "gt_mask", "cues.csv", "metadata.csv")
SPLITS = ("train", "val", "test_s", "test_u")  # test_n is made from videos of test_s, as in Ref-AVS
VID_LETTERS = list("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_")
SOUND_ASKED = frozenset(  # templates whose target must sound: without the sound, nothing matches them
    ["sounding", "source", "loudest", "softest", "lowest", "highest", "longest", "shortest", "first", "last", "always"]
    + ["sounding place", "sounding category", "sounding colour", "sounding beside"]
)


@dataclass(frozen=True)
class Scale:
    clips: dict[str, int]  # videos by split; test_n: videos of null expressions
    short_side: int  # pixels
    rows: int  # expressions per video, at most; half as many per video of null expressions
    train_rows: int  # the same for the training split: more expressions need no more frames or media features


SCALES = {
    "small": Scale({"train": 12, "val": 4, "test_s": 6, "test_u": 6, "test_n": 4}, 96, 4, 4),
    "demo": Scale({"train": 900, "val": 40, "test_s": 64, "test_u": 64, "test_n": 64}, 128, 6, 16),
    "large": Scale({"train": 2767, "val": 257, "test_s": 273, "test_u": 269, "test_n": 257}, 480, 6, 6),
}
NULL_SHARE = {"train": 0.8, "val": 0.4}  # fraction of the videos that also get a null version
# Probability that one thing of a video is out of sight in frame 0 and appears later. The share of such targets in
# Ref-AVS is not known without its masks; its table only shows that they exist ("the object appearing longer than ...").
LATE = 0.25


@dataclass(frozen=True)
class Clip:
    """One video to write, with its rows."""

    media_id: str
    vid: str
    split: str
    scene: Scene
    sound: Scene | None  # the scene whose sound is heard; None for silence
    sound_seed: tuple[int, ...]
    rows: tuple[Expression, ...]

    @property
    def null(self) -> bool:
        return self.media_id != self.vid


def write_dataset(out: Path, seed: int, scale: str) -> None:
    """Write LAVS-synth to `out`, which must not exist or must be an empty folder, a link to one, or a mount point.

    A new folder is published by one rename; into an empty one, metadata.csv is moved last. After an error, nothing is
    left. scale is a key of SCALES. Raises RequestError if it is not, or if `out` is anything else or cannot be made.
    """
    if scale not in SCALES:
        raise RequestError(f"scale: expected one of {sorted(SCALES)}, found {scale!r}")
    out = Path(out)
    if os.path.lexists(out) and not out.is_dir():
        raise RequestError(f"{out}: {absence(out)}; expected a new or empty folder; choose another path")
    inside = out.is_dir()  # it stays: a link, a mount point and the current folder cannot be replaced
    scratch = out / PARTIAL if inside else out.with_name(f".{out.name}{PARTIAL}")
    if inside and any(path != scratch for path in out.iterdir()):
        raise RequestError(f"{out}: already exists and is not an empty folder; remove it or choose another path")
    shutil.rmtree(scratch, ignore_errors=True)  # left by a killed run
    try:
        scratch.mkdir(parents=True)
    except OSError as error:
        raise RequestError(f"{out}: cannot be made ({error.strerror}); choose another path") from None
    try:
        _write_all(plan(seed, SCALES[scale]), scratch, SCALES[scale].short_side)
        if inside:
            for name in CONTENT:
                os.replace(scratch / name, out / name)
            scratch.rmdir()
        else:
            os.replace(scratch, out)
    except BaseException:
        for left in [scratch, *(out / name for name in CONTENT if inside)]:
            shutil.rmtree(left, ignore_errors=True)
        raise


def _write_all(clips: list[Clip], root: Path, short_side: int) -> None:
    others = active_children()
    pool = ProcessPoolExecutor(os.cpu_count(), initializer=_follow_parent)
    try:
        jobs = pool.map(_write_clip, clips, [root] * len(clips), [short_side] * len(clips), chunksize=8)
        list(tqdm(jobs, total=len(clips), unit="video", desc="LAVS-synth", mininterval=2))
    except BaseException:  # Ctrl-C, perhaps twice, must not wait for the workers
        for worker in set(active_children()).difference(others):
            worker.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    _write_tables(clips, root)


def _follow_parent() -> None:
    """In a worker: leave Ctrl-C to the parent, and end with it, whatever ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the parent's handler
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if parent := parent_process():
        parent.join()
        os._exit(1)


def rewrite_dataset(out: Path, seed: int, scale: str) -> None:
    """Write LAVS-synth to `out` as `write_dataset` does, and then remove the LAVS-synth that was there.

    Raises RequestError, with nothing removed, as `check_replaceable` does.
    """
    check_replaceable(out)
    new, replaced = out.with_name(out.name + ".new"), out.with_name(out.name + ".replaced")
    for left in (new, replaced):  # by a killed run
        shutil.rmtree(left, ignore_errors=True)
    write_dataset(new, seed, scale)
    if out.exists():
        out.rename(replaced)
    new.rename(out)
    shutil.rmtree(replaced, ignore_errors=True)


def check_replaceable(out: Path) -> None:
    """Raise RequestError if `out` is a link or a mount point, or is anything but an empty folder or LAVS-synth."""
    remedy = f"remove it, or set synth: null in configs/{out.name}/dataset.yaml to use it"
    if out.is_symlink() or out.is_mount():
        kind = "link" if out.is_symlink() else "mount point"
        raise RequestError(f"{out}: is a {kind}, so no dataset is generated there; {remedy}")
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / "cues.csv").is_file()):
        raise RequestError(f"{out}: expected LAVS-synth or nothing, found other files; {remedy}")


def plan(seed: int, scale: Scale) -> list[Clip]:
    """All videos of the dataset, in the order of metadata.csv."""
    clips = []
    for number, split in enumerate(SPLITS):
        rows = scale.train_rows if split == "train" else scale.rows
        real = [_real_clip(seed, number, i, split, rows) for i in range(scale.clips[split])]
        clips += real
        if split == "test_s":
            clips += _null_clips(real, scale.clips["test_n"], "test_n", rows // 2)
        elif split in NULL_SHARE:
            clips += _null_clips(real, round(NULL_SHARE[split] * len(real)), split, rows // 2)
    return sorted(clips, key=lambda clip: (clip.vid, clip.media_id))


def _real_clip(seed: int, split_number: int, number: int, split: str, rows: int) -> Clip:
    rng = np.random.default_rng([seed, split_number, number])
    name = "".join(rng.choice(VID_LETTERS, 11))
    start = 1000 * int(rng.integers(0, 400))
    while True:
        categories, must = (UNSEEN + UNSEEN + SEEN, UNSEEN) if split == "test_u" else (SEEN, ())
        scene = sample_scene(rng, categories, must, LATE)
        said = expressions(scene)
        if split == "test_u":
            said = [e for e in said if scene.things[e.target].category in UNSEEN]
        if said:
            break
    vid = f"{name}_{start}_{start + 10_000}"
    return Clip(vid, vid, split, scene, scene, (seed, split_number, number, 1), tuple(_choose(said, rows, rng)))


def _choose(said: list[Expression], rows: int, rng: np.random.Generator) -> list[Expression]:
    """Up to `rows` of the expressions. Each draw picks first a set of cues, all with equal probability, so that none is
    rare; then a template, as often as Ref-AVS uses its kind; then one of the template's expressions."""
    left = list(said)
    chosen: list[Expression] = []
    while left and len(chosen) < rows:
        cues = sorted({(e.sight, e.sound, e.time) for e in left})
        picked = cues[int(rng.integers(len(cues)))]
        templates = sorted({e.template for e in left if (e.sight, e.sound, e.time) == picked})
        shares = np.array([SHARES[template] for template in templates])
        template = templates[int(rng.choice(len(templates), p=shares / shares.sum()))]
        ways = [e for e in left if e.template == template and (e.sight, e.sound, e.time) == picked]
        chosen.append(ways[int(rng.integers(len(ways)))])
        left.remove(chosen[-1])
    return chosen


def _null_clips(real: list[Clip], count: int, split: str, most: int) -> list[Clip]:
    """`count` null versions of real videos: null_m without the audio, null_c with the audio of another video.

    most: expressions per version. The categories that sound in the other video are not in this one, so that nothing
    here makes what is heard.
    """
    found: list[Clip] = []
    for number, clip in enumerate(real):
        rows = tuple(e for e in expressions(clip.scene) if e.sound and e.template in SOUND_ASKED)
        if len(found) == count or not rows:
            continue
        rng = np.random.default_rng([*clip.sound_seed, 2])
        rows = tuple(_choose(list(rows), most, rng))
        if len(found) % 2 == 0:
            found.append(Clip(f"null_m-{clip.vid}", clip.vid, split, clip.scene, None, (*clip.sound_seed, 3), rows))
            continue
        seen = {thing.category for thing in clip.scene.things}
        for other in real[number + 1 :] + real[:number]:
            heard = {thing.category for thing in other.scene.things if thing.sounding.any()}
            if heard and not heard & seen:
                null = Clip(f"null_c-{clip.vid}", clip.vid, split, clip.scene, other.scene, other.sound_seed, rows)
                found.append(null)
                break
    return found


def _write_clip(clip: Clip, root: Path, short_side: int) -> None:
    aspect = clip.scene.aspect
    size = (round(short_side * max(1, aspect)), round(short_side * max(1, 1 / aspect)))
    frames = root / "media" / clip.media_id / "frames"
    frames.mkdir(parents=True)
    asked = sorted({row.target for row in clip.rows})
    for k in asked:
        (root / "gt_mask" / clip.media_id / f"fid_{k}").mkdir(parents=True, exist_ok=True)
    behind = background(clip.scene, size)
    for t in range(SECONDS):
        picture, masks = render(clip.scene, t, size, behind)
        Image.fromarray(picture).save(frames / f"{t}.jpg", quality=92)
        for k in asked:
            mask = np.zeros_like(masks[k]) if clip.null else masks[k]
            Image.fromarray(mask).save(root / "gt_mask" / clip.media_id / f"fid_{k}" / f"{t:05d}.png")
    if clip.sound is None:
        samples = np.zeros(SECONDS * RATE, dtype=np.int16)
    else:
        samples = mix(clip.sound, np.random.default_rng(clip.sound_seed))
    wav = io.BytesIO()  # written to a file, libsndfile would not say why that fails
    soundfile.write(wav, samples, RATE, subtype="PCM_16", format="WAV")
    (root / "media" / clip.media_id / "audio.wav").write_bytes(wav.getvalue())


def _write_tables(clips: list[Clip], root: Path) -> None:
    with (
        open(root / "metadata.csv", "w", newline="", encoding="utf-8") as meta,
        open(root / "cues.csv", "w", newline="", encoding="utf-8") as side,
    ):
        metadata, cues = csv.writer(meta), csv.writer(side)
        metadata.writerow(["vid", "uid", "split", "fid", "exp"])
        cues.writerow(["uid", "fid", "exp", "template", "sight", "sound", "time", "late"])
        for clip in clips:
            for number, row in enumerate(clip.rows, start=1):
                name = "null" if clip.null else clip.scene.things[row.target].category
                uid = f"{clip.media_id}_{name}_{number}"
                metadata.writerow([clip.vid, uid, clip.split, row.target, row.text])
                late = clip.scene.things[row.target].late and not clip.null
                flags = [int(row.sight), int(row.sound), int(row.time), int(late)]
                cues.writerow([uid, row.target, row.text, row.template, *flags])
