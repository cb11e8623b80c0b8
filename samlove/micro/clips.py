"""Generated clips on which the micro profile's encoders and SAM 2 are trained; none is a video of LAVS-synth.

The scenes show all categories. Some things belong to no category: they have random outlines, colours and timbres, so
that not everything has a name. Letters: K things, T frames, S the side of an image.
"""

import multiprocessing
import os
from dataclasses import dataclass, replace

import numpy as np

from samlove.micro import code
from samlove.synth.expressions import LEFT, RIGHT
from samlove.synth.scene import SECONDS, SEEN, UNSEEN, Scene, background, random_outline, render, sample_scene
from samlove.synth.voice import TIMBRES

SIDE = 128
STRANGE = 0.12  # fraction of the things that belong to no category
POOL = 1200  # clips to draw from, so that training never waits for the renderer


def random_scene(rng: np.random.Generator, strange: float = STRANGE) -> Scene:
    """A scene with all categories; with probability `strange`, a thing belongs to none."""
    scene = sample_scene(rng, SEEN + UNSEEN)
    things = []
    for thing in scene.things:
        if rng.random() < strange:
            red, green, blue = (int(c) for c in rng.integers(0, 256, 3))
            timbre = _strange_timbre(int(rng.integers(64)))
            thing = replace(thing, category=timbre, outline=random_outline(rng), hole=0.0)
            thing = replace(thing, colour="strange", rgb=(red, green, blue))
        things.append(thing)
    return replace(scene, things=tuple(things))


def _strange_timbre(number: int) -> str:
    """One of 64 timbres that belong to no category; `number` alone determines it."""
    name = f"strange{number}"
    if name not in TIMBRES:
        rng = np.random.default_rng(number)
        weights = tuple(rng.uniform(0, 1, int(rng.integers(1, 9))))
        TIMBRES[name] = (weights, float(rng.choice([0, rng.uniform(2, 14)])), float(rng.uniform(0, 0.4)))
    return name


@dataclass(frozen=True)
class Clip:
    """frames (T, S, S, 3) uint8, masks (K, T, S, S) bool, pulsing (K, T) bool; names: (category, colour, size) of each
    thing."""

    frames: np.ndarray
    masks: np.ndarray
    names: list[tuple[str, str, str]]
    pulsing: np.ndarray


def draw_clip(rng: np.random.Generator, strange: float = 0.35) -> Clip:
    """SECONDS frames; half of the clips are drawn at twice the size and averaged down, like resized photos."""
    scene = random_scene(rng, strange)
    times = 1 if rng.random() < 0.5 else 2
    size = (times * SIDE, times * SIDE)
    behind = background(scene, size)
    seconds = [render(scene, t, size, behind) for t in range(SECONDS)]
    frames = np.stack([picture for picture, _ in seconds])  # (T, times S, times S, 3)
    masks = np.stack([masks for _, masks in seconds], axis=1)  # (K, T, times S, times S)
    if times == 2:
        halves = (SIDE, 2, SIDE, 2)
        frames = frames.reshape(SECONDS, *halves, 3).mean((2, 4)).round().astype(np.uint8)
        masks = masks.reshape(len(masks), SECONDS, *halves).mean((3, 5)) >= 0.5
    names = [(thing.category, thing.colour, thing.size) for thing in scene.things]
    return Clip(frames, masks, names, np.stack([thing.pulsing for thing in scene.things]))


def augment(rng: np.random.Generator, clip: Clip, length: int) -> Clip:
    """`length` consecutive frames of a clip, randomly mirrored, transposed or reversed in time."""
    start = int(rng.integers(0, len(clip.frames) - length + 1))
    part = slice(start, start + length)
    frames, masks, pulsing = clip.frames[part], clip.masks[:, part], clip.pulsing[:, part]
    if rng.random() < 0.5:
        frames, masks, pulsing = frames[::-1], masks[:, ::-1], pulsing[:, ::-1]
    if rng.random() < 0.5:
        frames, masks = frames[:, :, ::-1], masks[..., ::-1]
    if rng.random() < 0.5:
        frames, masks = frames.swapaxes(1, 2), masks.swapaxes(2, 3)
    return Clip(frames, masks, clip.names, pulsing)


def describe(rng: np.random.Generator, clip: Clip, k: int) -> np.ndarray:
    """A code that identifies thing k on the first frame of a clip: (code.WIDTH,) float32.

    It holds a few words, like an expression, most often the category. If a few random choices do not identify the
    thing, it holds all its words and its exact place.
    """
    words = {j: _words(clip, j) for j in range(len(clip.masks)) if clip.masks[j, 0].any()}
    for _ in range(4):
        alone = rng.random() < 0.6 and words[k][0] in code.CATEGORY
        meant = words[k][:1] if alone else [word for word in words[k] if rng.random() < 0.5]
        if meant and sum(set(meant) <= set(other) for other in words.values()) == 1:
            return code.meaning(meant)
    all_of_it = code.meaning(words[k])
    all_of_it[code.WHERE] = 1.5 * code.place(_centre(clip.masks[k, 0]))
    return all_of_it


def absent(rng: np.random.Generator, clip: Clip) -> np.ndarray:
    """A code that matches no thing in a clip: (code.WIDTH,) float32."""
    words = [set(_words(clip, j)) for j in range(len(clip.masks))]
    while True:
        meant = {str(rng.choice(list(names))) for names in (code.CATEGORY, code.COLOUR) if rng.random() < 0.6}
        if meant and not any(meant <= other for other in words):
            return code.meaning(meant)


def name_map(clip: Clip, grid: int) -> np.ndarray:
    """The code of the thing in each cell of the first frame, or 0: (grid, grid, channels of code.SEEN_OF) float32."""
    codes = np.stack([code.meaning(_words(clip, k)) for k in range(len(clip.masks))])[:, code.SEEN_OF]
    covered = cover(clip.masks[:, 0], grid)  # (K, grid, grid)
    return codes[covered.argmax(axis=0)] * (covered.max(axis=0) >= 0.3)[..., None]


def cover(masks: np.ndarray, grid: int) -> np.ndarray:
    """The fraction of each cell of a square grid that masks (K, S, S) cover: (K, grid, grid)."""
    side = masks.shape[-1] // grid
    return masks.reshape(len(masks), grid, side, grid, side).mean(axis=(2, 4))


def _words(clip: Clip, k: int) -> list[str]:
    words = [word for word in clip.names[k] if word in code.CATEGORY | code.COLOUR | code.SIZE]
    x = _centre(clip.masks[k, 0])[0] if clip.masks[k, 0].any() else 0.5
    words += ["left"] if x < LEFT else ["right"] if x > RIGHT else []
    return words + (["sounding"] if clip.pulsing[k, 0] else [])


def _centre(mask: np.ndarray) -> np.ndarray:
    """(2,): x and y of a mask's centre, 0..1."""
    ys, xs = np.nonzero(mask)
    return np.array([xs.mean() + 0.5, ys.mean() + 0.5]) / mask.shape[::-1]


def _draw_for_ever(clips: multiprocessing.Queue, seed: list[int]) -> None:
    os.nice(5)
    rng = np.random.default_rng(seed)
    while True:
        clips.put(draw_clip(rng))


class ClipPool:
    """The latest POOL clips of a renderer that runs in its own process."""

    def __init__(self, seed: list[int]):
        context = multiprocessing.get_context("spawn")
        self.fresh = context.Queue(maxsize=16)
        self.worker = context.Process(target=_draw_for_ever, args=(self.fresh, seed), daemon=True)
        self.worker.start()
        self.clips: list[Clip] = [self.fresh.get() for _ in range(8)]  # enough for any step
        self.drawn = len(self.clips)

    def take(self, rng: np.random.Generator, count: int) -> list[Clip]:
        """`count` random clips of the pool, after adding the renderer's new ones; waits if there are too few."""
        while len(self.clips) < count or not self.fresh.empty():
            clip = self.fresh.get()
            if len(self.clips) < POOL:
                self.clips.append(clip)
            else:
                self.clips[self.drawn % POOL] = clip
            self.drawn += 1
        return [self.clips[i] for i in rng.choice(len(self.clips), count, replace=False)]
