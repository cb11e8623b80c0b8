"""SAM2-LOVE: the fusion module and the light SAM2 that its token prompts."""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from samlove.fusion import Fusion

if TYPE_CHECKING:
    from samlove.sam2 import LightSam2

SAM2_ARRAYS = ("sam2_image_embed", "sam2_high_res_0", "sam2_high_res_1")


class SamLove(nn.Module):
    """The whole method over cached features.

    SAM2 is held in evaluation mode also while its decoder trains, so that it behaves exactly as at inference.
    """

    def __init__(self, fusion: Fusion, sam2: "LightSam2"):
        super().__init__()
        self.fusion = fusion
        self.sam2 = sam2

    def train(self, mode: bool = True) -> "SamLove":
        super().train(mode)
        self.sam2.eval()
        return self

    def forward(self, batch: dict) -> tuple[Tensor, Tensor]:
        """The loader's batch -> mask_logits (B,4h,4w) and object_score (B,) of the first frame, both raw."""
        return self.sam2.first_frame({name: batch[name] for name in SAM2_ARRAYS}, self.token(batch))

    def token(self, batch: dict) -> Tensor:
        """The prompt tokens (B,1,prompt_dim) of a batch; needs its audio, visual and text arrays only."""
        return self.fusion(batch["audio"], batch["visual"], batch["text"], batch["text_mask"], batch["audio_valid"])
