"""CLIP's text tower (Radford et al., 2021) through transformers: the alternative of Table 2."""

from typing import Any

from samlove.features.encoders.roberta import RobertaEncoder
from samlove.features.encoders.transformers_folder import CLIP, load_network


class ClipTextEncoder(RobertaEncoder):
    """A text -> text (L,d) after the tower's last norm, before its projection, and text_mask (L,), as RobertaEncoder.

    The weights may be a whole CLIP or its text tower alone.
    """

    what, name = "CLIP", CLIP

    def _load_network(self) -> Any:
        from transformers import CLIPTextModel

        return load_network(CLIPTextModel, self.folder)

    def _longest(self, config: Any) -> int:
        return config.max_position_embeddings
