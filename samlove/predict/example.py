"""The example of `samlove predict --example`: a scene of LAVS-synth as a video with sound, and two sentences about it.

Scenes have one frame a second. Here the things move smoothly between them, so that it looks like a video; frames at
whole seconds are those of the scene.
"""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import soundfile
from PIL import Image

from samlove.media import open_media, write_video
from samlove.synth.expressions import expressions
from samlove.synth.scene import SECONDS, SEEN, Scene, background, render, sample_scene
from samlove.synth.voice import RATE, mix

SEED = 306  # a scene in which the bundled model finds both objects
SIZE, FPS = (320, 240), 10
SENTENCES = ("The object making the loudest sound.", "The cross.")


def example_scene(seed: int = SEED) -> Scene:
    """A scene with an expression that needs its sound, of categories that the bundled model was trained on."""
    rng = np.random.default_rng(seed)
    while True:
        scene = sample_scene(rng, SEEN)
        if scene.aspect > 1 and any(said.sound for said in expressions(scene)):
            return scene


def write_example(path: Path, seed: int = SEED) -> None:
    """Write the example's video, H.264 and AAC in MP4, 10 s."""
    scene = example_scene(seed)
    smooth, behind = smoothed(scene, FPS), background(scene, SIZE)
    frames = (render(smooth, t, SIZE, behind)[0] for t in range(SECONDS * FPS))
    with TemporaryDirectory() as folder:
        picture, sound = Path(folder) / "picture.png", Path(folder) / "sound.wav"
        Image.new("RGB", SIZE).save(picture)
        soundfile.write(sound, mix(scene, np.random.default_rng(seed)), RATE, subtype="PCM_16")
        with open_media(picture, sound) as heard:
            write_video(path, frames, FPS, heard)


def smoothed(scene: Scene, fps: int) -> Scene:
    """The scene with `fps` steps per second in place of one; the last second stands still."""
    times, seconds = np.arange(SECONDS * fps) / fps, np.arange(SECONDS)
    things = []
    for thing in scene.things:
        path = np.stack([np.interp(times, seconds, thing.path[:, axis]) for axis in (0, 1)], axis=1)
        sounding, pulsing = np.repeat(thing.sounding, fps), np.repeat(thing.pulsing, fps)
        things.append(replace(thing, path=path, sounding=sounding, pulsing=pulsing))
    return replace(scene, things=tuple(things))
