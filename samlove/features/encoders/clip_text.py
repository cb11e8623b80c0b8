"""CLIP's text encoder (Radford et al., 2021) through transformers: the alternative in Table 2."""

from typing import Any

from samlove.features.encoders.roberta import RobertaEncoder
from samlove.features.encoders.transformers_folder import CLIP, load_network


class ClipTextEncoder(RobertaEncoder):
    """An expression -> text (L,d), after the last norm and before the projection, and text_mask (L,) bool.

    Padding and truncation are as in RobertaEncoder. The weights may be a whole CLIP or only its text encoder.
    """

    what, name = "CLIP", CLIP
    model_types = ("clip", "clip_text_model")
    family = "CLIPTokenizer"
    ids = ()  # OpenAI's config.json has others

    def _load_network(self) -> Any:
        from transformers import CLIPTextModel

        return load_network(CLIPTextModel, self.folder)

    def _longest(self, config: Any) -> int:
        return config.max_position_embeddings
