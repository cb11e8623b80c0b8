"""The code in which the micro profile's frozen encoders say what they see, hear and read.

One place a meaning, the same in all of them, as encoders have it that were trained together (CLIP): a red patch, and
every token of a sentence that asks for something red, are high in the channel of red. All values are 0 where nothing
is meant. It holds all of LAVS-synth's categories: encoders that saw the world know more of it than the eight
categories that a fusion module is trained on, and that is why the paper's unseen split is not its hardest.
"""

import re
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from samlove.synth.scene import COLOURS, RADII, SECONDS, SEEN, UNSEEN, Scene

WIDTH = 128  # channels of every micro encoder
TRAITS = 8
# A category is four of eight traits, any two share two or none (the extended Hamming code): what is learned of the
# eight seen categories holds for all that are made of the same traits, as in an embedding space that was learned.
_HALVES = {
    (functional, parity): [x for x in range(TRAITS) if bin(x & functional).count("1") % 2 == parity]
    for functional in range(1, TRAITS)
    for parity in (1, 0)
}
_KEYS = [(f, 1) for f in range(1, TRAITS)] + [(f, 0) for f in range(1, 6)]
CATEGORY = {name: _HALVES[key] for name, key in zip((*SEEN, *UNSEEN), _KEYS, strict=True)}
TRAIT_TABLE = np.array([[float(x in traits) for x in range(TRAITS)] for traits in CATEGORY.values()], np.float32)
COLOUR = {name: 12 + k for k, name in enumerate(COLOURS)}
SIZE = {name: 20 + k for k, name in enumerate(RADII)}
SIDE = {"left": 23, "right": 24}
KIND = {name: 25 + k for k, name in enumerate(("sounding", "silent", "loudest", "lowest", "longest", "first", "last"))}
KIND |= {"source": KIND["sounding"], "didn't": KIND["silent"], "always": 32, "keeps": 32}
BESIDE = {"left": 33, "right": 34}  # "on the left of the ...": the side, and
REFERENCE = 35  # the first of the channels of the traits of what it is beside
WHERE = slice(50, 60)  # of an object's centre; see `place`
COVER = 60  # the part of a patch that the object covers
LOW = 64  # the first of the channels of the traits of the lowest voice
SEEN_OF = slice(0, KIND["sounding"] + 1)  # what [cls] sums up

QUIETEST, FAINT, RANGE = 0.03, 0.02, 4.5  # RMS of the faintest voice; where loudness starts, in octaves from there
DEEP, PITCH_RANGE = 150.0, 2.4  # Hz of the lowest pitch; octaves from there to the highest
PATCH_SECONDS = 0.96  # of a VGGish patch


def place(centre: np.ndarray) -> np.ndarray:
    """(..., 2) fractions of width and height -> (..., 10): themselves as -1..1, and sines and cosines of these."""
    z = 2 * centre - 1
    waves = [wave(np.pi * turns * z) for turns in (0.5, 1.0) for wave in (np.sin, np.cos)]
    return np.concatenate([z, *waves], axis=-1)


def sight(scene: Scene, t: int) -> np.ndarray:
    """What is to be seen of each thing of a scene in second t: (K, WIDTH) float32. Of an unknown category or colour
    only the rest is said."""
    code = np.zeros((len(scene.things), WIDTH), dtype=np.float32)
    for row, thing in zip(code, scene.things, strict=True):
        if thing.category in CATEGORY:
            row[CATEGORY[thing.category]] = 2.4
        if thing.colour in COLOUR:
            row[COLOUR[thing.colour]] = 3.0
        row[SIZE[thing.size]] = 1.8
        x = thing.path[t, 0]
        row[SIDE["left"]], row[SIDE["right"]] = 1.8 * np.clip([2 - 4 * x, 4 * x - 2], 0, 1)
        row[KIND["sounding"]] = 3.0 * thing.sounding[t]  # it pulses
        row[WHERE] = 1.5 * place(thing.path[t])
    return code


def sound(scene: Scene) -> np.ndarray:
    """What is to be heard in each second of a scene: (SECONDS, WIDTH) float32, none negative.

    The loudest voice's category stands out, the others' are faint, as one hears it; the lowest voice's stands once
    more by itself. How loud the one is, and how low the other, stand in the channels of "loudest" and "lowest".
    """
    code = np.zeros((SECONDS, WIDTH), dtype=np.float32)
    for second, row in enumerate(code):
        hundredths = slice(round(100 * PATCH_SECONDS * second), round(100 * PATCH_SECONDS * (second + 1)))
        heard = [thing for thing in scene.things if np.repeat(thing.sounding, 100)[hundredths].mean() > 0.3]
        if not heard:
            continue
        loudest = max(heard, key=lambda thing: thing.loudness)
        for thing in heard:
            if thing.category in CATEGORY:
                said = 3.0 * (thing.loudness / 0.45) ** 0.2 * (1.0 if thing is loudest else 0.2)
                row[CATEGORY[thing.category]] = np.maximum(row[CATEGORY[thing.category]], said)
        row[KIND["sounding"]] = 1.8
        row[KIND["loudest"]] = 3.6 * np.clip(np.log2(loudest.loudness / FAINT) / RANGE, 0, 1)
        lowest = min(heard, key=lambda thing: thing.pitch)
        row[KIND["lowest"]] = 3.6 * np.clip(1 - np.log2(lowest.pitch / DEEP) / PITCH_RANGE, 0, 1)
        if lowest.category in CATEGORY:
            row[LOW + np.array(CATEGORY[lowest.category])] = 3.0
    return code


def meaning(words: Iterable[str]) -> np.ndarray:
    """What words mean, each by itself: (WIDTH,) float32; 3 in a channel, 1.5 in each of a category's four."""
    code = np.zeros(WIDTH, dtype=np.float32)
    for word in words:
        if word in CATEGORY:
            code[CATEGORY[word]] = 1.5
        for meanings in COLOUR, SIZE, SIDE, KIND:
            if word in meanings:
                code[meanings[word]] = 3.0
    return code


def sentence(text: str) -> np.ndarray:
    """What a sentence of LAVS-synth asks for: (WIDTH,) float32, as `meaning`."""
    words = re.findall(r"[\w']+", text.lower())
    code = meaning(words)
    if " of the " in text and not text.startswith("The source"):
        code[REFERENCE : REFERENCE + TRAITS], code[:TRAITS] = code[:TRAITS].copy(), 0
        for side, channel in BESIDE.items():
            code[channel], code[SIDE[side]] = code[SIDE[side]], 0
    return code


def category_logits(said: Tensor) -> Tensor:
    """(..., channels of the code) -> (..., categories): how well each category's traits fit."""
    return said[..., :TRAITS] @ torch.from_numpy(TRAIT_TABLE).T
