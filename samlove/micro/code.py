"""The code in which the micro profile's frozen encoders express what they see, hear and read.

Each meaning has one channel, the same in all encoders, as in encoders that were trained together (CLIP): a red patch,
and every token of an expression that asks for something red, have a high value in the channel for red. Without a
meaning, all values are 0. The code covers all categories of LAVS-synth: encoders that were trained on broad data know
more than the eight categories on which the fusion module is trained, which is why the unseen split is not the hardest
one in the paper.
"""

import re
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from samlove.synth.scene import COLOURS, RADII, SECONDS, SEEN, UNSEEN, Scene

WIDTH = 128  # channels of every micro encoder
TRAITS = 8
# A category is four of eight traits; any two categories share two traits or none (the extended Hamming code). What is
# learned about the eight seen categories holds for all categories with the same traits, as in learned embeddings.
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
BESIDE = {"left": 33, "right": 34}  # "on the left of the ...": the side
REFERENCE = 35  # first of the channels for the traits of the thing that the object is beside
WHERE = slice(50, 60)  # the object's centre; see `place`
COVER = 60  # the fraction of a patch that the object covers
LOW = 64  # first of the channels for the traits of the lowest voice
SEEN_OF = slice(0, KIND["sounding"] + 1)  # the channels that [cls] summarises

QUIETEST, FAINT, RANGE = 0.03, 0.02, 4.5  # RMS of the faintest voice; zero of the loudness scale; its octaves
DEEP, PITCH_RANGE = 150.0, 2.4  # Hz of the lowest pitch; octaves from it to the highest
PATCH_SECONDS = 0.96  # of a VGGish patch


def place(centre: np.ndarray) -> np.ndarray:
    """(..., 2) fractions of width and height -> (..., 10): rescaled to -1..1, with their sines and cosines."""
    z = 2 * centre - 1
    waves = [wave(np.pi * turns * z) for turns in (0.5, 1.0) for wave in (np.sin, np.cos)]
    return np.concatenate([z, *waves], axis=-1)


def sight(scene: Scene, t: int) -> np.ndarray:
    """The code of what each thing in a scene looks like in second t: (K, WIDTH) float32.

    An unknown category or colour is left out.
    """
    code = np.zeros((len(scene.things), WIDTH), dtype=np.float32)
    for row, thing in zip(code, scene.things, strict=True):
        if thing.category in CATEGORY:
            row[CATEGORY[thing.category]] = 2.4
        if thing.colour in COLOUR:
            row[COLOUR[thing.colour]] = 3.0
        row[SIZE[thing.size]] = 1.8
        x = thing.path[t, 0]
        row[SIDE["left"]], row[SIDE["right"]] = 1.8 * np.clip([2 - 4 * x, 4 * x - 2], 0, 1)
        row[KIND["sounding"]] = 3.0 * thing.pulsing[t]  # it looks as if it sounded
        row[WHERE] = 1.5 * place(thing.path[t])
    return code


def sound(scene: Scene) -> np.ndarray:
    """The code of what is heard in each second of a scene: (SECONDS, WIDTH) float32, no value negative.

    As in hearing, the category of the loudest voice stands out and the others are faint. The category of the lowest
    voice also has channels of its own. The channels for "loudest" and "lowest" hold how loud the loudest voice is, and
    how low the lowest one.
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
    """The code of single words: (WIDTH,) float32; 3 in a word's channel, 1.5 in each of a category's four."""
    code = np.zeros(WIDTH, dtype=np.float32)
    for word in words:
        if word in CATEGORY:
            code[CATEGORY[word]] = 1.5
        for meanings in COLOUR, SIZE, SIDE, KIND:
            if word in meanings:
                code[meanings[word]] = 3.0
    return code


def sentence(text: str) -> np.ndarray:
    """The code of what an expression of LAVS-synth asks for: (WIDTH,) float32, like `meaning`."""
    words = re.findall(r"[\w']+", text.lower())
    code = meaning(words)
    if " of the " in text and not text.startswith("The source"):
        code[REFERENCE : REFERENCE + TRAITS], code[:TRAITS] = code[:TRAITS].copy(), 0
        for side, channel in BESIDE.items():
            code[channel], code[SIDE[side]] = code[SIDE[side]], 0
    return code


def category_logits(said: Tensor) -> Tensor:
    """(..., channels of the code) -> (..., categories): how well each category's traits match."""
    return said[..., :TRAITS] @ torch.from_numpy(TRAIT_TABLE).T
