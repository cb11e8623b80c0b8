"""LAVS-synth's audio: one voice per thing, with a timbre by category and its own pitch, loudness and times of sound."""

import numpy as np

from samlove.synth.scene import SECONDS, Scene, Thing

RATE = 16_000  # samples per second
PERIOD = 4096  # samples in the table of one period of a voice
FADE = RATE // 50  # 20 ms fade in and out, so that a voice starts and stops without a click

# Timbre: weights of the harmonics 1, 2, 3, ...; tremolo in Hz; breath, the fraction that is noise.
TIMBRES: dict[str, tuple[tuple[float, ...], float, float]] = {
    "circle": ((1.0,), 0.0, 0.0),  # a flute's near sine
    "square": ((1, 0, 0.6, 0, 0.4, 0, 0.3, 0, 0.2), 0.0, 0.0),  # odd harmonics: a clarinet
    "triangle": ((0.3, 0.2, 0.2, 0.8, 0.2, 0.1, 0.9), 9.0, 0.0),  # bell partials that ring
    "star": ((0.5, 0.7, 0.8, 0.9, 1, 0.9, 0.8, 0.7, 0.6, 0.5), 0.0, 0.0),  # bright brass
    "cross": ((1, 0.5, 0.33, 0.25, 0.2, 0.17, 0.14), 6.0, 0.0),  # a bowed saw with tremolo
    "heart": ((1, 0.8, 0.1, 0.05), 3.0, 0.1),  # a warm, slow voice
    "arrow": ((0.2, 1.0, 0.1, 0.7), 0.0, 0.45),  # an octave pipe with breath
    "ring": ((0.1, 0.1, 1.0, 0.1, 0.1, 1.0), 4.5, 0.0),  # hollow metal
    "moon": ((1, 0.3, 0.5, 0.3), 2.0, 0.3),
    "bolt": ((0.6, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6), 14.0, 0.3),
    "flower": ((1, 0, 0.9), 7.5, 0.0),
    "hourglass": ((0.4, 1, 0.9, 0.1, 0.5), 0.0, 0.2),
}


def voice(thing: Thing, rng: np.random.Generator) -> np.ndarray:
    """(SECONDS * RATE,) float64: the sound of one thing, with RMS `thing.loudness` while it sounds."""
    weights, tremolo, breath = TIMBRES[thing.category]
    turn = np.arange(PERIOD) / PERIOD
    period = np.zeros(PERIOD)
    for number, weight in enumerate(weights, start=1):
        if weight and number * thing.pitch < RATE / 2:
            period += weight * np.sin(2 * np.pi * (number * turn + rng.uniform()))
    period /= np.sqrt(np.mean(period**2))
    t = np.arange(SECONDS * RATE) / RATE
    wave = (1 - breath) * period[(t * thing.pitch % 1 * PERIOD).astype(int)]
    if breath:
        wave += breath * rng.standard_normal(len(t))
    if tremolo:
        wave *= 1 + 0.6 * np.sin(2 * np.pi * tremolo * t)
    wave *= thing.loudness / np.sqrt(np.mean(wave**2))
    return wave * _gate(thing.sounding)


def _gate(sounding: np.ndarray) -> np.ndarray:
    """(SECONDS * RATE,): 1 in the sounding seconds, with ramps of FADE samples inside them."""
    gate = np.repeat(sounding.astype(float), RATE)
    starts = np.flatnonzero(np.diff(gate, prepend=0) > 0)
    ends = np.flatnonzero(np.diff(gate, append=0) < 0) + 1
    for start, end in zip(starts, ends, strict=True):
        gate[start : start + FADE] = np.linspace(0, 1, FADE)
        gate[end - FADE : end] = np.linspace(1, 0, FADE)
    return gate


def mix(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """(SECONDS * RATE,) int16: all voices of a scene over faint room noise; clipped at full scale."""
    total = 0.002 * rng.standard_normal(SECONDS * RATE)
    for thing in scene.things:
        if thing.sounding.any():
            total = total + voice(thing, rng)
    return (np.clip(0.5 * total, -1, 1) * 32767).astype(np.int16)
