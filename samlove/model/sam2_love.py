"""SAM2-LOVE: the fusion module and the light SAM2 that its token prompts."""

import torch
from torch import Tensor, nn

from samlove.config import FusionConfig, Sam2Config
from samlove.model.fusion import Fusion
from samlove.model.sam2 import LEVELS, LightSam2

POSITIVE_CLICK = 1  # among SAM2's point labels


class SamLove(nn.Module):
    """The whole method over cached features."""

    def __init__(self, fusion: Fusion, sam2: LightSam2):
        super().__init__()
        self.fusion = fusion
        self.sam2 = sam2

    @classmethod
    def build(cls, fusion: FusionConfig, sam2: Sam2Config, dims: dict[str, int]) -> "SamLove":
        """A fresh fusion module over the SAM2 of `sam2.checkpoint`; dims as `Fusion` takes them.

        The prompt starts as what SAM2's prompt encoder adds to a click on an object, its place left to be learnt: a
        token that the mask decoder already reads as "an object here". From a random start, learning took longer
        (the same colour-only expressions, one frame, 3,840 samples: IoU 0.47 against 0.37).
        """
        light = LightSam2.load(sam2.config, sam2.checkpoint, sam2.cache_point)
        model = cls(Fusion(fusion, dims, light.prompt_dim), light)
        with torch.no_grad():
            model.fusion.prompt_bias.copy_(light.sam_prompt_encoder.point_embeddings[POSITIVE_CLICK].weight[0])
        return model

    def forward(self, batch: dict) -> tuple[Tensor, Tensor]:
        """The loader's batch -> mask_logits (B,4h,4w) and object_score (B,) of the first frame, both raw."""
        return self.sam2.first_frame({name: batch[name] for name in LEVELS}, self.token(batch))

    def token(self, batch: dict) -> Tensor:
        """The prompt tokens (B,1,prompt_dim) of a batch; needs its audio, visual and text arrays only."""
        return self.fusion(batch["audio"], batch["visual"], batch["text"], batch["text_mask"], batch["audio_valid"])
