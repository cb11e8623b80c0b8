"""The audio encoders, by their name in audio.yaml."""

from samlove.features.encoders.audio_transformers import TransformersAudioEncoder
from samlove.features.encoders.vggish import VggishEncoder

ENCODERS: dict[str, type[VggishEncoder] | type[TransformersAudioEncoder]] = {
    "vggish": VggishEncoder,
    "transformers": TransformersAudioEncoder,
}
