"""Audio encoders of transformers in SOUND: AST, CLAP, Whisper and wav2vec 2.0, brought to one vector per second.

Time axis: second n covers the samples from n * rate to (n + 1) * rate, so that it starts at frame n of the video. The
audio is cut into windows of as many whole seconds as the encoder takes at once (AST and CLAP 10, Whisper 30, wav2vec
2.0 all). Each window goes through the folder's own feature extractor and through the encoder, which gives frames: one
per 100 ms (AST, averaged over its frequency bands), 312.5 ms (CLAP, also averaged over them) or 20 ms (Whisper, wav2vec
2.0). The vector of a second is the mean of the frames whose centre lies in it. So it holds what the encoder heard
around that second too, up to its whole window.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from samlove.config import AudioConfig
from samlove.data.dataset import load_audio
from samlove.errors import SamloveError
from samlove.features.encoders.base import Arrays, OnDevice, library_versions, to_store
from samlove.features.encoders.transformers_folder import (
    load_extractor,
    load_network,
    model_type,
    resolve_folder,
    sha256_model,
)
from samlove.features.encoders.vggish import RESAMPLER

NAME = "MIT/ast-finetuned-audioset-10-10-0.4593"
MEL_STEP = 0.01  # seconds between the spectrogram's columns in AST
EDGE = 1e-6  # seconds; a frame at the start of a second belongs to it, however its time is rounded


@dataclass(frozen=True)
class SoundModel:
    """A family of audio encoders.

    network: the class in transformers. part: the audio encoder in it. window: whole seconds that the encoder takes at
    once, from the extractor; 0: any number. frames: (encoder, input) -> frames (n,T,d) in order of time. centres:
    (configuration, extractor, T) -> the time of the first frame's centre and the time between frames, in seconds.
    """

    network: str
    part: str
    window: Callable[[Any], int]
    frames: Callable[[Any, Tensor], Tensor]
    centres: Callable[[Any, Any, int], tuple[float, float]]


def _ast_frames(network: Any, inputs: Tensor) -> Tensor:
    tokens = network(inputs).last_hidden_state[:, 2:]  # without the class and distillation tokens; band by band
    bands, _ = network.embeddings.get_shape(network.config)
    return tokens.unflatten(1, (bands, -1)).mean(dim=1)


def _clap_frames(network: Any, inputs: Tensor) -> Tensor:
    longer = torch.zeros(len(inputs), 1, dtype=torch.bool, device=inputs.device)  # no window is longer than CLAP's
    maps = network(inputs, is_longer=longer).last_hidden_state  # (n, d, bands, T)
    return maps.mean(dim=2).transpose(1, 2)


def _last(network: Any, inputs: Tensor) -> Tensor:
    return network(inputs).last_hidden_state


def _wav2vec2_centres(config: Any, extractor: Any, frames: int) -> tuple[float, float]:
    steps = [prod(config.conv_stride[:i]) for i in range(len(config.conv_stride) + 1)]  # in samples, of each layer
    seen = 1 + sum((kernel - 1) * step for kernel, step in zip(config.conv_kernel, steps, strict=False))
    return seen / 2 / extractor.sampling_rate, steps[-1] / extractor.sampling_rate


SOUND = {  # by model_type
    "audio-spectrogram-transformer": SoundModel(
        "ASTModel",
        "",
        lambda extractor: int(extractor.max_length * MEL_STEP),
        _ast_frames,
        lambda config, extractor, frames: (config.patch_size / 2 * MEL_STEP, config.time_stride * MEL_STEP),
    ),
    "clap": SoundModel(
        "ClapModel",
        "audio_model",
        lambda extractor: int(extractor.max_length_s),
        _clap_frames,
        lambda config, extractor, frames: (extractor.max_length_s / frames / 2, extractor.max_length_s / frames),
    ),
    "whisper": SoundModel(
        "WhisperModel",
        "encoder",
        lambda extractor: int(extractor.chunk_length),
        _last,
        lambda config, extractor, frames: (0.0, extractor.chunk_length / frames),
    ),
    "wav2vec2": SoundModel("Wav2Vec2Model", "", lambda extractor: 0, _last, _wav2vec2_centres),
}


def pool_seconds(frames: Tensor, first: float, step: float, seconds: int) -> Tensor:
    """Frames (n,T,d) -> (n,seconds,d): the mean of the frames whose centre, first + step * t, lies in each second.

    Raises SamloveError if a second has no frame.
    """
    second = torch.floor(first + step * torch.arange(frames.shape[1], dtype=torch.float64) + EDGE).long()
    inside = (second[None, :] == torch.arange(seconds)[:, None]).float()  # (seconds, T)
    if not inside.any(dim=1).all():
        raise SamloveError(f"expected at least one frame of the audio encoder per second, found one per {step:.2f} s")
    weights = (inside / inside.sum(dim=1, keepdim=True)).to(frames.device)
    return torch.einsum("st,ntd->nsd", weights, frames)


class TransformersAudioEncoder(OnDevice):
    """A video's audio -> audio (N,d), audio_valid (N,) bool, N seconds; the time axis is above.

    A second is valid if at least half of it comes from the file; the rest is silence. The weights may be the whole
    model, with its text encoder, decoder or classifier.
    """

    def __init__(self, config: AudioConfig, seconds: int, device: torch.device):
        """Raises RequestError, saying how to get them, if the weights are missing or of an unknown encoder."""
        self.config, self.seconds, self.device = config, seconds, device
        self.folder = resolve_folder(config.weights, "an audio encoder", NAME, tuple(SOUND))
        self.type = model_type(self.folder)
        self.extractor = load_extractor(self.folder)
        self.rate = int(self.extractor.sampling_rate)
        self.window = min(self.model.window(self.extractor) or seconds, seconds)

    @property
    def model(self) -> SoundModel:
        return SOUND[self.type]

    def fingerprint(self) -> dict:
        from transformers.utils import is_speech_available

        return {
            "encoder": "transformers",
            "model_type": self.type,
            "weights_sha256": sha256_model(self.folder),
            "rate": self.rate,
            "resampler": RESAMPLER,
            "window_seconds": self.window,
            "pooling": "mean of the frames of each second",
            "spectrogram": "torchaudio" if is_speech_available() else "numpy",  # which of them AST's extractor uses
            "seconds": self.seconds,
            "dtype": self.config.dtype,
            "libraries": library_versions("torch", "transformers", "soxr"),
        }

    @cached_property
    def network(self) -> Any:
        network = load_network(self.model.network, self.folder)
        return (getattr(network, self.model.part) if self.model.part else network).to(self.device)

    def load(self, source: Path) -> tuple[Tensor, np.ndarray]:
        """A wav of any rate and length -> the encoder's input, one row per window, and the seconds' validity (N,) bool.

        Raises SamloveError, naming the path, if it cannot be read.
        """
        import soxr

        samples, rate = load_audio(source)
        if rate != self.rate and len(samples):
            samples = soxr.resample(samples, rate, self.rate)
        return self.prepare(samples)

    def prepare(self, samples: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """Audio (S,) at `rate`, of any length -> as `load`."""
        valid = np.arange(self.seconds) * self.rate + self.rate // 2 <= len(samples)
        wanted = self.seconds * self.rate
        samples = np.pad(samples[:wanted], (0, max(0, wanted - len(samples))))
        length = self.window * self.rate
        return torch.cat([self._extract(samples[at : at + length]) for at in range(0, wanted, length)]), valid

    def _extract(self, samples: np.ndarray) -> Tensor:
        """One window, at most `window` seconds -> the encoder's input, (1, ...) float32."""
        given = self.extractor(samples, sampling_rate=self.rate, return_tensors="pt")
        return given[self.extractor.model_input_names[0]].float()

    @torch.inference_mode()
    def encode(self, items: list[tuple[Tensor, np.ndarray]]) -> list[Arrays]:
        """One {audio (N,d) of the configured dtype, audio_valid (N,) bool} per item."""
        inputs = torch.cat([windows for windows, _ in items]).to(self.device)
        frames = self.model.frames(self.network, inputs)  # (items * windows, T, d)
        first, step = self.model.centres(self.network.config, self.extractor, frames.shape[1])
        pooled = pool_seconds(frames, first, step, self.window)  # (items * windows, window, d)
        pooled = pooled.reshape(len(items), -1, pooled.shape[-1])[:, : self.seconds]
        audio = to_store("audio", pooled, self.config.dtype)
        return [{"audio": a, "audio_valid": valid} for a, (_, valid) in zip(audio, items, strict=True)]
