"""The image encoders of the fusion transformer, by their name in visual.yaml."""

from samlove.features.encoders.clip_image import ClipImageEncoder
from samlove.features.encoders.timm_image import TimmEncoder

ENCODERS: dict[str, type[TimmEncoder] | type[ClipImageEncoder]] = {  # vit and timm are the same
    "vit": TimmEncoder,
    "timm": TimmEncoder,
    "clip": ClipImageEncoder,
}
