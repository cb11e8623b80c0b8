"""LAVS-synth's scenes: coloured, textured shapes that move, hide one another, leave the frame and come back.

A `Scene` is the ground truth from which frames (`render`), audio (`samlove.synth.voice`) and expressions
(`samlove.synth.expressions`) are made. Positions are fractions of the frame's width and height, radii are fractions
of its shorter side, times are integer seconds: frame t shows second t.
"""

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

SECONDS = 10
SEEN = ("circle", "square", "triangle", "star", "cross", "heart", "arrow", "ring")
UNSEEN = ("moon", "bolt", "flower", "hourglass")  # shapes and timbres that are not in the training split
COLOURS = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (45, 85, 225),
    "yellow": (245, 215, 40),
    "purple": (150, 60, 190),
    "orange": (245, 130, 25),
    "white": (238, 238, 238),
    "cyan": (50, 205, 215),
}
RADII = {"small": (0.12, 0.14), "medium": (0.155, 0.175), "big": (0.2, 0.23)}
CORE = {"moon": (-0.45, 0.0)}  # centre of the bright core, if it is not the middle of the shape
PULSE = 1.15  # a pulsing object is larger by this factor and has a bright core
SHOWN = 0.8  # probability that a sounding thing pulses while it sounds
DECOY = 0.5  # probability that a silent thing pulses for a while
REACH = 1.15  # the largest distance of a vertex of OUTLINES from the centre, in radii
OUTSIDE = 0.01 + REACH * PULSE * RADII["big"][1]  # of the frame: so far from its side, nothing is in sight


def _polar(radius: np.ndarray) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, len(radius), endpoint=False) - np.pi / 2
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)  # (n, 2)


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x, y], axis=1) / 16  # (40, 2)


def _moon() -> np.ndarray:
    outer = np.linspace(0.3 * np.pi, 1.7 * np.pi, 30)
    inner = np.linspace(1.62 * np.pi, 0.38 * np.pi, 20)
    bow = np.stack([0.95 + 0.85 * np.cos(inner), 0.85 * np.sin(inner)], axis=1)
    crescent = np.concatenate([np.stack([np.cos(outer), np.sin(outer)], axis=1), bow])  # (50, 2)
    return (crescent + (0.15, 0)) * 1.1


def random_outline(rng: np.random.Generator) -> np.ndarray:
    """A shape with 3 to 9 corners that belongs to no category."""
    return _polar(rng.uniform(0.55, 1.15, int(rng.integers(3, 10))))


def _outline(*points: tuple[float, float]) -> np.ndarray:
    return np.array(points, dtype=float)


OUTLINES = {  # vertices (n, 2) within about the unit circle
    "circle": _polar(np.ones(40)),
    "square": _outline((-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)),
    "triangle": _polar(np.full(3, 1.15)),
    "star": _polar(np.array([1.15, 0.48] * 5)),
    "cross": _outline(
        *[(-0.36, -1), (0.36, -1), (0.36, -0.36), (1, -0.36), (1, 0.36), (0.36, 0.36)],
        *[(0.36, 1), (-0.36, 1), (-0.36, 0.36), (-1, 0.36), (-1, -0.36), (-0.36, -0.36)],
    ),
    "heart": _heart(),
    "arrow": _outline((-1, -0.36), (0.1, -0.36), (0.1, -0.9), (1.05, 0), (0.1, 0.9), (0.1, 0.36), (-1, 0.36)),
    "ring": _polar(np.ones(40)),  # with a hole, see HOLES
    "moon": _moon(),
    "bolt": _outline((0.25, -1.1), (-0.7, 0.2), (-0.1, 0.2), (-0.3, 1.1), (0.7, -0.25), (0.1, -0.25)),
    "flower": _polar(0.78 + 0.3 * np.cos(5 * np.linspace(0, 2 * np.pi, 60, endpoint=False))),
    "hourglass": _outline((-0.8, -1), (0.8, -1), (0.2, 0), (0.8, 1), (-0.8, 1), (-0.2, 0)),
}
HOLES = {"ring": 0.42}  # radius of the hole, as a fraction of the shape's radius


@dataclass(frozen=True)
class Thing:
    """One object: its appearance, its path, and when and how it sounds."""

    category: str
    colour: str
    rgb: tuple[int, int, int]
    size: str  # a key of RADII
    radius: float
    outline: np.ndarray  # (n, 2), within the unit circle, already rotated
    hole: float  # 0 if there is none
    texture: tuple[float, float, float]  # stripes: direction in radians, cycles per radius, contrast 0..1
    path: np.ndarray  # (SECONDS, 2) centre, fractions of width and height; may lie outside
    sounding: np.ndarray  # (SECONDS,) bool
    pulsing: np.ndarray  # (SECONDS,) bool: when it pulses, which need not be when it sounds
    pitch: float  # Hz
    loudness: float  # RMS amplitude while sounding, 0..1
    late: bool = False  # out of sight at second 0; all other things are in sight then


@dataclass(frozen=True)
class Scene:
    """Things from back to front, over a background; aspect is width / height."""

    things: tuple[Thing, ...]
    aspect: float
    background: int  # seed of the background's texture


def _path(rng: np.random.Generator, start: np.ndarray, leaves: bool, seconds: int) -> np.ndarray:
    """(seconds, 2): a smooth path from `start`; if it `leaves`, it goes out at a near side and comes back."""
    t = np.arange(seconds)[:, None]
    sway = rng.uniform(0.02, 0.09, 2) * rng.choice([-1, 1], 2)
    path = start + sway * np.sin(rng.uniform(0.25, 0.9, 2) * t)
    drift = (rng.uniform(0.15, 0.85, 2) - start) * rng.uniform(0.2, 0.9)
    if leaves:
        side = int(rng.integers(2))
        out = np.zeros(2)
        out[side] = (1.3 - start[side]) if start[side] > 0.5 else (-0.3 - start[side])
        return path + out * np.sin(np.pi * np.clip(t - rng.integers(0, 3), 0, 7) / 7)
    return path + drift * t / max(seconds - 1, 1)


def _starts(rng: np.random.Generator, radii: list[float], aspect: float) -> np.ndarray | None:
    """Centres (n, 2) at second 0: shapes are fully in the frame and apart; None if random tries fail."""
    short = np.array([min(1, 1 / aspect), min(1, aspect)])  # the shorter side, as fractions of width and height
    centres: list[np.ndarray] = []
    for radius in radii:
        for _ in range(30):
            centre = rng.uniform(radius * short, 1 - radius * short)
            gaps = [np.hypot(*((centre - c) / short)) - (radius + r) for c, r in zip(centres, radii, strict=False)]
            if all(gap > 0.01 for gap in gaps):
                centres.append(centre)
                break
        else:
            return None
    return np.array(centres)


def _voice(rng: np.random.Generator, count: int) -> list[tuple[np.ndarray, np.ndarray, float, float]]:
    """(sounding, pulsing, pitch, loudness) of each thing: clearly different pitch and loudness, independent times.

    Most things pulse while they sound, but some do not, and silent things may pulse, too. So sight alone does not tell
    which thing sounds: its timbre tells, or whether it pulses when something is heard.
    """
    pitches = rng.permutation([160, 270, 450, 750])[:count] * rng.uniform(0.95, 1.05, count)
    loudness = rng.permutation([0.03, 0.075, 0.19, 0.45])[:count] * rng.uniform(0.9, 1.1, count)
    still = np.zeros(SECONDS, dtype=bool)
    voices = []
    for k in range(count):
        sounding = _times(rng) if rng.random() < 0.7 else still
        if sounding.any():
            pulsing = sounding if rng.random() < SHOWN else still
        else:
            pulsing = _times(rng) if rng.random() < DECOY else still
        voices.append((sounding, pulsing, float(pitches[k]), float(loudness[k])))
    return voices


def _times(rng: np.random.Generator) -> np.ndarray:
    """(SECONDS,) bool: all seconds, or some that follow each other, perhaps with a pause."""
    if rng.random() < 0.2:
        return np.ones(SECONDS, dtype=bool)
    times = np.zeros(SECONDS, dtype=bool)
    length = int(rng.integers(2, 8))
    first = int(rng.integers(0, SECONDS - length + 1))
    times[first : first + length] = True
    if length >= 5 and rng.random() < 0.4:  # with a pause in the middle
        times[first + 2 : first + length - 2] = False
    return times


def sample_scene(
    rng: np.random.Generator, categories: tuple[str, ...], must: tuple[str, ...] = (), late: float = 0.0
) -> Scene:
    """A random scene of 2 to 4 things of the given categories; with `must`, at least one is of those categories.

    late: the probability that one thing is out of sight at second 0 and appears later. A scene without such a thing
    does not depend on this probability.
    """
    while True:
        aspect = float(rng.choice([4 / 3, 1.0, 3 / 4], p=[0.5, 0.3, 0.2]))
        count = int(rng.choice([2, 3, 4], p=[0.35, 0.4, 0.25]))
        sizes = [str(s) for s in rng.choice(list(RADII), count)]
        radii = [float(rng.uniform(*RADII[s])) for s in sizes]
        starts = _starts(rng, radii, aspect)
        if starts is not None:
            break
    chosen = [str(c) for c in rng.choice(categories, count)]
    if count > 2 and rng.random() < 0.3:
        chosen[1] = chosen[0]  # two of the same category, distinguished by colour, place or sound
    if must and not set(chosen) & set(must):
        chosen[int(rng.integers(count))] = str(rng.choice(must))
    voices = _voice(rng, count)
    things = []
    for k in range(count):
        colour = str(rng.choice(list(COLOURS)))
        things.append(
            Thing(
                chosen[k],
                colour,
                _shade(rng, COLOURS[colour]),
                sizes[k],
                radii[k],
                _turn(OUTLINES[chosen[k]], rng.uniform(-0.3, 0.3)),
                HOLES.get(chosen[k], 0.0),
                (rng.uniform(0, np.pi), rng.uniform(0.5, 2.5), rng.uniform(0, 0.25)),
                _path(rng, starts[k], rng.random() < 0.15, SECONDS),
                *voices[k],
            )
        )
    scene = Scene(tuple(things), aspect, int(rng.integers(2**31)))
    (own,) = rng.spawn(1)  # leaves the numbers of `rng` as they are
    return _with_late_thing(own, scene) if own.random() < late else scene


def _with_late_thing(rng: np.random.Generator, scene: Scene) -> Scene:
    """The scene with one thing, now the rearmost, that is out of sight until a second from 2 to 5 and then moves to its
    place within two seconds: from behind another thing if one is large enough, else from outside the frame."""
    things = list(scene.things)
    pairs = [(one, other) for one in things for other in things if one is not other and _hides(other, one)]
    if pairs:
        late, front = pairs[int(rng.integers(len(pairs)))]
        origin = front.path
    else:
        late, side = things[int(rng.integers(len(things)))], int(rng.integers(2))
        origin = np.tile(late.path[0], (SECONDS, 1))
        origin[:, side] = 1 + OUTSIDE if late.path[0, side] > 0.5 else -OUTSIDE
    t = np.arange(SECONDS)[:, None]
    there = np.clip((t - rng.integers(2, 6) + 1) / 2, 0, 1)  # 0: at the origin, 1: at its place
    place = late.path[0] + rng.uniform(-0.06, 0.06, 2) * np.sin(rng.uniform(0.25, 0.9, 2) * t)
    path = (1 - there) * origin + there * place
    others = [thing for thing in things if thing is not late]
    return replace(scene, things=(replace(late, path=path, late=True), *others))


def _hides(front: Thing, behind: Thing) -> bool:
    """Whether one thing covers all of the other if both have the same centre, also while that one pulses."""
    side = 128
    shapes = [
        _fill(thing.outline, np.array([side / 2, side / 2]), np.full(2, side * radius), (side, side))
        for thing, radius in ((front, front.radius), (behind, behind.radius * PULSE * 1.05))
    ]
    return not front.hole and not (shapes[1] & ~shapes[0]).any()


def _shade(rng: np.random.Generator, rgb: tuple[int, int, int]) -> tuple[int, int, int]:
    red, green, blue = np.clip(np.array(rgb) + rng.integers(-14, 15, 3), 0, 255)
    return int(red), int(green), int(blue)


def _turn(outline: np.ndarray, angle: float) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    return outline @ np.array([[c, s], [-s, c]])  # (n, 2)


def background(scene: Scene, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) float32, 0..255: soft, muted blotches, stripes and grain with low saturation."""
    rng = np.random.default_rng(scene.background)
    width, height = size
    cells = rng.uniform(60, 165, (5, 5, 1)) + rng.uniform(-22, 22, (5, 5, 3))
    blotches = Image.fromarray(np.clip(cells, 0, 255).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    y, x = np.mgrid[0:height, 0:width]
    angle, cycles, contrast = rng.uniform(0, np.pi), rng.uniform(4, 14), rng.uniform(0, 14)
    wave = np.sin(2 * np.pi * cycles * (x / width * np.cos(angle) + y / height * np.sin(angle)))
    grain = rng.normal(0, 4, (height, width))
    return np.asarray(blotches, dtype=np.float32) + (contrast * wave + grain)[..., None].astype(np.float32)


def _fill(outline: np.ndarray, centre: np.ndarray, radii: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    canvas = Image.new("1", size)
    ImageDraw.Draw(canvas).polygon([(float(x), float(y)) for x, y in centre + outline * radii], fill=1)
    return np.array(canvas)  # (H, W) bool


def render(
    scene: Scene, t: int, size: tuple[int, int], behind: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Second t of a scene at (width, height): frame (H, W, 3) uint8, and the visible part of each thing (K, H, W) bool.

    If `size` has a different aspect than the scene, the frame is squeezed, like the square input of SAM 2.
    `behind` is `background(scene, size)`, for callers that render many seconds.
    """
    width, height = size
    short = np.array([min(1, 1 / scene.aspect) * width, min(1, scene.aspect) * height])
    picture = (background(scene, size) if behind is None else behind).copy()
    owner = np.full((height, width), -1)
    y, x = np.mgrid[0:height, 0:width]
    for k, thing in enumerate(scene.things):
        centre = thing.path[t] * (width, height)
        pulsing = bool(thing.pulsing[t])
        radii = thing.radius * short * (PULSE if pulsing else 1.0)
        if np.any(centre + 1.3 * radii < 0) or np.any(centre - 1.3 * radii > (width, height)):
            continue
        shape = _fill(thing.outline, centre, radii, size)
        if thing.hole:
            shape &= ~_fill(OUTLINES["circle"], centre, radii * thing.hole, size)
        angle, cycles, contrast = thing.texture
        along = ((x - centre[0]) / radii[0] * np.cos(angle) + (y - centre[1]) / radii[1] * np.sin(angle))[shape]
        shade = 1 - contrast * (np.sin(2 * np.pi * cycles * along) > 0)
        picture[shape] = np.array(thing.rgb, dtype=np.float32) * shade[:, None].astype(np.float32)
        if pulsing:  # a bright core with a dark rim, visible on every colour; on a ring it lies around the hole
            outline = OUTLINES["circle"] if thing.hole else thing.outline
            for scale, value in ((thing.hole or 0.33) + 0.24, 15.0), ((thing.hole or 0.33) + 0.1, 255.0):
                core = _fill(outline, centre + CORE.get(thing.category, (0.0, 0.0)) * radii, radii * scale, size)
                picture[core & shape] = value
        owner[shape] = k
    masks = owner == np.arange(len(scene.things))[:, None, None]  # (K, H, W)
    return np.clip(picture, 0, 255).astype(np.uint8), masks
