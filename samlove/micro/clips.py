"""Generated clips from which the micro profile's encoders and SAM2 learn; none is a clip of LAVS-synth.

Scenes of all categories, some things in them of no category: random outlines, colours and timbres, so that not
everything has a name. Letters: K things, T frames, S the side of an image.
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
STRANGE = 0.12  # of the things
POOL = 1200  # clips kept to draw from, so that training never waits for the renderer


def random_scene(rng: np.random.Generator, strange: float = STRANGE) -> Scene:
    """A scene of all categories; each thing is one of none with a chance of `strange`."""
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
    """One of 64 timbres that are no category's; each is always the same, and drawn from nothing but its number."""
    name = f"strange{number}"
    if name not in TIMBRES:
        rng = np.random.default_rng(number)
        weights = tuple(rng.uniform(0, 1, int(rng.integers(1, 9))))
        TIMBRES[name] = (weights, float(rng.choice([0, rng.uniform(2, 14)])), float(rng.uniform(0, 0.4)))
    return name


@dataclass(frozen=True)
class Clip:
    """frames (T, S, S, 3) uint8, masks (K, T, S, S) bool; of each thing category, colour and size, and when it
    sounds: sounding (K, T) bool."""

    frames: np.ndarray
    masks: np.ndarray
    names: list[tuple[str, str, str]]
    sounding: np.ndarray


def draw_clip(rng: np.random.Generator, strange: float = 0.35) -> Clip:
    """SECONDS frames; every other one drawn at twice the size and averaged down, smooth as resized photographs are."""
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
    return Clip(frames, masks, names, np.stack([thing.sounding for thing in scene.things]))


def augment(rng: np.random.Generator, clip: Clip, length: int) -> Clip:
    """`length` frames in a row of a clip, perhaps mirrored, turned or backwards."""
    start = int(rng.integers(0, len(clip.frames) - length + 1))
    part = slice(start, start + length)
    frames, masks, sounding = clip.frames[part], clip.masks[:, part], clip.sounding[:, part]
    if rng.random() < 0.5:
        frames, masks, sounding = frames[::-1], masks[:, ::-1], sounding[:, ::-1]
    if rng.random() < 0.5:
        frames, masks = frames[:, :, ::-1], masks[..., ::-1]
    if rng.random() < 0.5:
        frames, masks = frames.swapaxes(1, 2), masks.swapaxes(2, 3)
    return Clip(frames, masks, clip.names, sounding)


def describe(rng: np.random.Generator, clip: Clip, k: int) -> np.ndarray:
    """What thing k of a clip is on its first frame, enough to tell it from the others: (code.WIDTH,) float32.

    Some words, as sentences have them, the category most often; where none of a few tries will do, all of them and the
    exact place.
    """
    words = {j: _words(clip, j) for j in range(len(clip.masks)) if clip.masks[j, 0].any()}
    for _ in range(4):
        alone = rng.random() < 0.4 and words[k][0] in code.CATEGORY
        meant = words[k][:1] if alone else [word for word in words[k] if rng.random() < 0.5]
        if meant and sum(set(meant) <= set(other) for other in words.values()) == 1:
            return code.meaning(meant)
    all_of_it = code.meaning(words[k])
    all_of_it[code.WHERE] = 1.5 * code.place(_centre(clip.masks[k, 0]))
    return all_of_it


def absent(rng: np.random.Generator, clip: Clip) -> np.ndarray:
    """What none of the things of a clip is: (code.WIDTH,) float32."""
    words = [set(_words(clip, j)) for j in range(len(clip.masks))]
    while True:
        meant = {str(rng.choice(list(names))) for names in (code.CATEGORY, code.COLOUR) if rng.random() < 0.6}
        if meant and not any(meant <= other for other in words):
            return code.meaning(meant)


def name_map(clip: Clip, grid: int) -> np.ndarray:
    """What is seen in each cell of a clip's first frame: (grid, grid, channels of code.SEEN_OF) float32, else 0."""
    codes = np.stack([code.meaning(_words(clip, k)) for k in range(len(clip.masks))])[:, code.SEEN_OF]
    covered = cover(clip.masks[:, 0], grid)  # (K, grid, grid)
    return codes[covered.argmax(axis=0)] * (covered.max(axis=0) >= 0.3)[..., None]


def cover(masks: np.ndarray, grid: int) -> np.ndarray:
    """The part of each cell of a square grid that masks (K, S, S) cover: (K, grid, grid)."""
    side = masks.shape[-1] // grid
    return masks.reshape(len(masks), grid, side, grid, side).mean(axis=(2, 4))


def _words(clip: Clip, k: int) -> list[str]:
    words = [word for word in clip.names[k] if word in code.CATEGORY | code.COLOUR | code.SIZE]
    x = _centre(clip.masks[k, 0])[0] if clip.masks[k, 0].any() else 0.5
    words += ["left"] if x < LEFT else ["right"] if x > RIGHT else []
    return words + (["sounding"] if clip.sounding[k, 0] else [])  # it pulses


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
    """The latest POOL clips of a renderer in a process of its own."""

    def __init__(self, seed: list[int]):
        context = multiprocessing.get_context("spawn")
        self.fresh = context.Queue(maxsize=16)
        self.worker = context.Process(target=_draw_for_ever, args=(self.fresh, seed), daemon=True)
        self.worker.start()
        self.clips: list[Clip] = [self.fresh.get() for _ in range(8)]  # enough for any step
        self.drawn = len(self.clips)

    def take(self, rng: np.random.Generator, count: int) -> list[Clip]:
        """Any `count` of the pool's clips, after taking in what the renderer has ready; waits while it has too few."""
        while len(self.clips) < count or not self.fresh.empty():
            clip = self.fresh.get()
            if len(self.clips) < POOL:
                self.clips.append(clip)
            else:
                self.clips[self.drawn % POOL] = clip
            self.drawn += 1
        return [self.clips[i] for i in rng.choice(len(self.clips), count, replace=False)]
