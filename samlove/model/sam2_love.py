"""SAM2-LOVE: the fusion module and the light SAM 2 that its token prompts."""

import torch
from torch import Tensor, nn

from samlove.config import FusionConfig, Sam2Config
from samlove.model.fusion import Fusion
from samlove.model.sam2 import LEVELS, FirstFrame, LightSam2

POINT_LABELS = {"click": 1, "box_corner": 2}  # SAM 2's: a click on the object, a box's upper left corner


class SamLove(nn.Module):
    """The whole method, on precomputed features."""

    def __init__(self, fusion: Fusion, sam2: LightSam2):
        super().__init__()
        self.fusion = fusion
        self.sam2 = sam2

    @classmethod
    def build(cls, fusion: FusionConfig, sam2: Sam2Config, dims: dict[str, int]) -> "SamLove":
        """A new fusion module with the SAM 2 of `sam2.checkpoint`; dims as in `Fusion`.

        The prompt starts as the vector that SAM 2's prompt encoder adds to a click on an object, without a position,
        which is left to be learned. The mask decoder already reads this token as "an object here". A random start
        learned more slowly (same colour-only expressions, one frame, 3,840 samples: IoU 0.37 instead of 0.47).
        `fusion.prompt_start` can choose a box corner instead of a click.
        """
        light = LightSam2.load(sam2.config, sam2.checkpoint, sam2.cache_point)
        light.best_of_three = fusion.masks == "best_of_three"
        model = cls(Fusion(fusion, dims, light.prompt_dim), light)
        start = light.sam_prompt_encoder.point_embeddings[POINT_LABELS[fusion.prompt_start]]
        with torch.no_grad():
            model.fusion.prompt_bias.copy_(start.weight[0])
        return model

    def forward(self, batch: dict) -> FirstFrame:
        """The loader's batch -> SAM 2's answer on the first frame."""
        return self.sam2.first_frame({name: batch[name] for name in LEVELS}, self.token(batch))

    def token(self, batch: dict) -> Tensor:
        """The prompt tokens (B,1,prompt_dim) of a batch; reads only its audio, visual and text arrays."""
        return self.fusion(batch["audio"], batch["visual"], batch["text"], batch["text_mask"], batch["audio_valid"])
