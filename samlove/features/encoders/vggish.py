"""VGGish (Hershey et al., 2017) through torchvggish: one 128-d vector per second of audio.

torchvggish's own front-end turns 16 kHz audio into log-mel patches of 0.96 s, and its network embeds each patch. Two
settings are part of the fingerprint: `pre_relu` omits the last ReLU, as the TensorFlow original does (torchvggish ends
with one), and `postprocess` applies AudioSet's PCA and quantisation. Patch n covers 0.96 n to 0.96 (n + 1) s, so in a
video of 10 s it starts up to 0.36 s before frame n. This step is VGGish's own, and its other users keep it too.
"""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.fft  # otherwise NumPy imports it on first use, which fails if two reader threads do so at once
import torch
from torch import Tensor, nn

from samlove.config import AudioConfig
from samlove.data.dataset import load_audio
from samlove.errors import SamloveError
from samlove.features.encoders.base import Arrays, OnDevice, library_versions, to_store
from samlove.model.weights import load_into, load_state_dict, read_torch, resolve_file
from stores.fingerprint import sha256_file

RATE = 16_000  # samples per second in VGGish's input
PATCH = 15_360  # samples per patch: 96 steps of 160 samples, 0.96 s
PATCH_SHAPE = (96, 64)  # steps of 10 ms, mel bands
CHANNELS, HIDDEN, WIDTH = 64, 4096, 128  # original widths: first convolution, fully connected layers, output
PCA_FILE = "vggish_pca_params-970ea276.pth"  # expected next to the weights, under the release's file name
RELEASE = "https://github.com/harritaylor/torchvggish/releases/download/v0.1/"
RESAMPLER = "soxr HQ"


def build_vggish(channels: int = CHANNELS, hidden: int = HIDDEN, pre_relu: bool = False) -> nn.Module:
    """torchvggish's network with fresh weights: log-mel patches (n,1,96,64) float32 -> (n,128).

    channels: of the first convolution; the others are in proportion (c, 2c, 4c, 4c, 8c, 8c). hidden: width of the two
    fully connected layers. With 64 and 4096, the state dict has the names and shapes of vggish-10086976.pth.
    pre_relu: omit the final ReLU.
    """
    from torchvggish.torchvggish import VGG, make_layers

    with torch.device("meta"):  # its size is fixed at 72 M parameters: take the structure without the memory
        network = VGG(make_layers(), postprocess=False)
    layers: list[nn.Module] = []
    for layer in network.features:
        if isinstance(layer, nn.Conv2d):
            inputs = 1 if layer.in_channels == 1 else layer.in_channels * channels // CHANNELS
            layer = nn.Conv2d(inputs, layer.out_channels * channels // CHANNELS, kernel_size=3, padding=1)
        layers.append(layer)
    network.features = nn.Sequential(*layers)
    flat = 8 * channels * 6 * 4  # the last convolution's channels, on 96 x 64 halved four times
    widths = [flat, hidden, hidden, WIDTH]
    dense = [m for a, b in zip(widths, widths[1:], strict=False) for m in (nn.Linear(a, b), nn.ReLU(inplace=True))]
    network.embeddings = nn.Sequential(*(dense[:-1] if pre_relu else dense))
    return network


def log_mel(samples: np.ndarray) -> Tensor:
    """Audio (S,) in -1..1 at 16 kHz, whole seconds -> one log-mel patch per second, (S / 16000, 1, 96, 64) float32.

    Uses torchvggish's own front-end.
    """
    from torchvggish.vggish_input import waveform_to_examples

    patches = waveform_to_examples(samples, RATE).detach()  # (at least S / 16000, 1, 96, 64)
    return patches[: len(samples) // RATE]


def pad_or_trim(samples: np.ndarray, seconds: int) -> tuple[np.ndarray, np.ndarray]:
    """Audio (S,) at 16 kHz -> exactly (seconds * 16000,), padded with zeros at the end, and which patches are valid.

    The second array is bool (seconds,): False if less than half of the patch comes from the file.
    """
    wanted = seconds * RATE
    valid = np.arange(seconds) * PATCH + PATCH // 2 <= len(samples)
    return np.pad(samples[:wanted], (0, max(0, wanted - len(samples)))), valid


class VggishEncoder(OnDevice):
    """A video's audio -> audio (N,128), audio_valid (N,) bool, N seconds."""

    rate = RATE

    def __init__(self, config: AudioConfig, seconds: int, device: torch.device):
        """Raises RequestError, saying how to get them, if weights are missing."""
        self.config, self.seconds, self.device = config, seconds, device
        name = "vggish-10086976.pth"
        self.weights = resolve_file(config.weights, "VGGish's weights", f"download {RELEASE}{name}")
        self.pca: Path | None = None
        if config.postprocess:
            path = str(self.weights.with_name(PCA_FILE))
            self.pca = resolve_file(path, "VGGish's PCA, which postprocess needs", f"download {RELEASE}{PCA_FILE}")

    def fingerprint(self) -> dict:
        return {
            "encoder": "vggish",
            "weights_sha256": sha256_file(self.weights),
            "channels": self.config.channels,
            "hidden": self.config.hidden,
            "pre_relu": self.config.pre_relu,
            "postprocess": self.config.postprocess,
            "pca_sha256": sha256_file(self.pca) if self.pca else None,
            "rate": RATE,
            "resampler": RESAMPLER,
            "patch_samples": PATCH,
            "seconds": self.seconds,
            "dtype": self.config.dtype,
            "libraries": library_versions("torch", "torchvggish", "soxr"),
        }

    @cached_property
    def network(self) -> nn.Module:
        network = build_vggish(self.config.channels, self.config.hidden, self.config.pre_relu)
        what = f"a VGGish of {self.config.channels} channels and hidden width {self.config.hidden}"
        load_into(network, load_state_dict(self.weights), self.weights, what)
        return network.to(self.device).eval()

    @cached_property
    def postprocessor(self) -> Any:
        from torchvggish.torchvggish import Postprocessor

        assert self.pca is not None
        postprocessor = Postprocessor.__new__(Postprocessor)  # its __init__ would download the file again
        postprocessor._pca_matrix, postprocessor._pca_means = load_pca(self.pca)
        return postprocessor

    def load(self, source: Path) -> tuple[Tensor, np.ndarray]:
        """A wav of any rate and length -> patches (N,1,96,64) and their validity (N,) bool.

        Raises SamloveError, naming the path, if it cannot be read.
        """
        import soxr

        samples, rate = load_audio(source)
        if rate != RATE and len(samples):
            samples = soxr.resample(samples, rate, RATE)
        return self.prepare(samples)

    def prepare(self, samples: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """Audio (S,) at `rate`, of any length -> as `load`."""
        samples, valid = pad_or_trim(samples, self.seconds)
        return log_mel(samples), valid

    @torch.inference_mode()
    def encode(self, items: list[tuple[Tensor, np.ndarray]]) -> list[Arrays]:
        """One {audio (N,128) of the configured dtype, audio_valid (N,) bool} per item."""
        patches = torch.cat([patches for patches, _ in items]).to(self.device)  # (items * N, 1, 96, 64)
        embeddings = self.network(patches).cpu()  # (items * N, 128)
        if self.config.postprocess:
            embeddings = self.postprocessor.postprocess(embeddings).reshape(-1, WIDTH)  # it squeezes a single row
        audio = to_store("audio", embeddings, self.config.dtype).reshape(len(items), self.seconds, WIDTH)
        return [{"audio": a, "audio_valid": valid} for a, (_, valid) in zip(audio, items, strict=True)]


def load_pca(path: Path) -> tuple[Tensor, Tensor]:
    """The matrix (128,128) and means (128,1), float32, from AudioSet's PCA file, which holds NumPy arrays."""
    from numpy._core.multiarray import _reconstruct

    old_name = "numpy.core.multiarray._reconstruct"  # its place in NumPy when the file was written
    kinds: list[Any] = [np.ndarray, np.dtype, np.dtypes.Float32DType, np.dtypes.Float64DType, _reconstruct]
    with torch.serialization.safe_globals([*kinds, (_reconstruct, old_name)]):
        values = read_torch(path, f"download {RELEASE}{PCA_FILE}")
    try:
        if not isinstance(values, dict):
            raise TypeError(type(values).__name__)
        matrix = torch.as_tensor(values["pca_eigen_vectors"]).float()
        means = torch.as_tensor(values["pca_means"]).float().reshape(-1, 1)
    except (TypeError, KeyError, IndexError, ValueError, RuntimeError) as error:
        raise SamloveError(
            f"{path}: expected VGGish's PCA, arrays pca_eigen_vectors and pca_means, found something else; "
            f"download {RELEASE}{PCA_FILE}"
        ) from error
    if matrix.shape != (WIDTH, WIDTH) or means.shape != (WIDTH, 1):
        raise SamloveError(
            f"{path}: expected a PCA of {WIDTH} values, found {tuple(matrix.shape)}; download {RELEASE}{PCA_FILE}"
        )
    return matrix, means
