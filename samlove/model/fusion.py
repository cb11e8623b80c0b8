"""The fusion module of section 3.2: compresses audio, text and video into the token that prompts SAM 2.

Letters in shape comments: B batch, N frames (= seconds), L text tokens, P patches per frame, K [seg] tokens,
D width, H heads, S tokens per sequence, C tokens that all frames share.

The paper leaves five points open. This module decides them as follows:

- **Positions.** The transformer has no position embeddings (section 4.4: no RoPE). ViT patches and RoBERTa tokens
  already carry positions, but VGGish's seconds do not, and nothing tells the model at which second a frame was taken.
  One learned embedding per second is therefore added to that second's audio token and to the patches and [cls] of that
  second's frame. "The first to sound" needs the order of the sounds, and the model can match a sound with the frame of
  the same second.
- **[his].** At frame i it holds [cls] of frames 0..i, following Eq. 4; the text's "all the previous frames" would
  leave out i. Including frame i costs one token, and V_i then holds patches only.
- **Heads.** 8 by default (`FusionConfig.heads`): 128 channels per head at the paper's width of 1024.
- **Output head.** LayerNorm (pre-norm blocks leave the residual stream unnormalised), then Linear, ReLU, Linear, as in
  Eq. 1 (with `projections: linear`, one Linear). Only the first [seg] token prompts SAM 2 (section 4.4).
- **Initialisation.** Tokens and time embeddings: truncated normal, std 0.02. Linear layers: Xavier, as in ViT, so that
  narrow models start at the same scale as wide ones. In models of several blocks, the weights that write to the
  residual stream are divided by the square root of the number of writes to [seg], as in GPT-2: two per block and
  frame. Without this, a model of two blocks hardly learned anything in its first epochs. A model of one block learns
  as fast without it, and relies more on the audio.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samlove.config import FusionConfig
from samlove.model.block import Block, FirstTokens
from samlove.model.one_block import NORM_EPS, OneBlockLoop, fold

INIT_STD = 0.02


class Fusion(nn.Module):
    """Projections (Eq. 1), fusion transformer (Eq. 2, 3), token propagation and accumulation (Eq. 4)."""

    def __init__(self, config: FusionConfig, dims: dict[str, int], prompt_dim: int):
        """dims: {"audio": dA, "visual": dV, "text": dT, "frames": N}, as in the loader."""
        super().__init__()
        self.config = config
        D = config.dim
        project = _mlp if config.projections == "mlp" else _linear
        self.project_audio = project(dims["audio"], D, D)
        self.project_visual = project(dims["visual"], D, D)
        self.project_text = project(dims["text"], D, D)
        self.seg = nn.Parameter(torch.empty(config.seg_tokens, D))
        self.aud = nn.Parameter(torch.empty(1, D))
        self.vis = nn.Parameter(torch.empty(1, D))
        self.time = nn.Parameter(torch.empty(dims["frames"], D)) if config.time_embedding else None
        self.blocks = nn.ModuleList(Block(D, config.heads, config.mlp_ratio) for _ in range(config.blocks))
        self.head = nn.Sequential(nn.LayerNorm(D), project(D, D, prompt_dim))
        self._initialise(dims["frames"])

    @torch.no_grad()
    def _initialise(self, frames: int) -> None:
        for token in (self.seg, self.aud, self.vis, self.time):
            if token is not None:
                nn.init.trunc_normal_(token, std=INIT_STD)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        if len(self.blocks) > 1:
            writes = 2 * len(self.blocks) * frames  # to the residual stream of [seg]
            for block in self._blocks:
                for layer in (block.out, block.mlp[-1]):
                    assert isinstance(layer, nn.Linear)
                    layer.weight.mul_(writes**-0.5)

    @property
    def _blocks(self) -> list[Block]:
        return cast(list[Block], list(self.blocks))

    @property
    def prompt_bias(self) -> Tensor:
        """(prompt_dim,): the prompt token's value if the sequence contributes nothing."""
        *_, last = self.head.modules()
        assert isinstance(last, nn.Linear)
        return last.bias

    def forward(
        self, audio: Tensor, visual: Tensor, text: Tensor, text_mask: Tensor, audio_valid: Tensor | None = None
    ) -> Tensor:
        """The prompt token of each sample.

        audio (B,N,dA) float; visual (B,N,1+P,dV) float, [cls] first; text (B,L,dT) float;
        text_mask (B,L) bool, True at tokens; audio_valid (B,N) bool, False at padded seconds
        (None: no padding). Padding is never attended to.
        Returns (B,1,prompt_dim) float.
        """
        B = len(audio)
        time = self.time if self.time is not None else audio.new_zeros(1, 1)
        A = self.project_audio(audio) + time
        T = self.project_text(text)
        V = self.project_visual(visual) + time[..., None, :]  # (B,N,1+P,D): all frames at once
        clip = torch.cat([A, self.aud.expand(B, 1, -1), T, self.vis.expand(B, 1, -1)], dim=1)
        heard = torch.ones_like(audio[..., 0], dtype=torch.bool) if audio_valid is None else audio_valid
        marker = heard.new_ones(B, 1)
        known = torch.cat([heard, marker, text_mask, marker], dim=1)  # (B,N+1+L+1), False at padding
        propagate = self._propagate if self.config.prompt == "seg" else self._mean
        return self.head(propagate(clip, V[:, :, 1:], V[:, :, 0], known))

    def _propagate(self, clip: Tensor, patches: Tensor, cls: Tensor, known: Tensor) -> Tensor:
        """Propagate [seg]. clip (B,N+1+L+1,D), patches (B,N,P,D), cls (B,N,D) -> the first [seg] (B,1,D).

        The tokens of a frame are [seg], clip, [his] and the frame's patches; without positions, their order has no
        effect. What does not depend on [seg] is computed before the loop, once for all frames. [his] has the [cls] of
        all frames, and a mask hides those of later ones: shapes are then the same in every step.
        """
        B, N, P, D = patches.shape
        K = self.config.seg_tokens
        known = known[:, None].expand(B, N, -1)  # (B,N,C), C the tokens of clip and [his]
        if self.config.accumulate_cls:
            clip = torch.cat([clip, cls], dim=1)
            former = torch.ones(N, N, dtype=torch.bool, device=known.device).tril()
            known = torch.cat([known, former.expand(B, N, N)], dim=2)
        known = F.pad(known, (K, P), value=True)  # (B,N,K+C+P)
        seg = self.seg.expand(B, K, D)
        last = self._blocks[-1]
        if len(self._blocks) == 1:
            layers = fold(last)
            clip, patches = (F.layer_norm(tokens, (D,), eps=NORM_EPS).to(layers[0].dtype) for tokens in (clip, patches))
            bias = _bias(known, clip.dtype)[:, :, None].transpose(0, 1)  # (N,B,1,K+C+P)
            return OneBlockLoop.apply(seg, clip, patches.transpose(0, 1), bias, *layers)[:, :1]
        first, *middle = self._blocks[:-1]
        finish = FirstTokens(last)
        read = _by_frame(first.read(clip), first.read(patches))
        bias = _bias(known, read.dtype)[:, :, None, None]  # (B,N,1,1,K+C+P)
        for z, qkv, b in zip(_by_frame(clip, patches).unbind(1), read.unbind(1), bias.unbind(1), strict=True):
            z = first.attend(torch.cat([seg, z], dim=1), torch.cat([first.read(seg), qkv], dim=1), b)
            for block in middle:
                z = block(z, b)
            seg = finish(z[:, :K], last.norm1(z), b[:, 0])
        return seg[:, :1]

    def _mean(self, clip: Tensor, patches: Tensor, cls: Tensor, known: Tensor) -> Tensor:
        """Table 5's alternative to [seg]: the mean output over one sequence with all frames, (B,1,D).

        The mean excludes padding. The sequence includes the [cls] of every frame if `accumulate_cls` is set.
        """
        his = cls if self.config.accumulate_cls else cls[:, :0]
        z = torch.cat([clip, patches.flatten(1, 2), his], dim=1)
        known = F.pad(known, (0, z.shape[1] - known.shape[1]), value=True)  # (B,S)
        first, *others = self._blocks
        qkv = first.read(z)
        bias = _bias(known, qkv.dtype)[:, None, None]
        z = first.attend(z, qkv, bias)
        for block in others:
            z = block(z, bias)
        weight = known[..., None].to(z.dtype)  # (B,S,1)
        return (z * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)


def _by_frame(of_clip: Tensor, of_patches: Tensor) -> Tensor:
    """What each frame's tokens have: (B,C,X) of those that all frames share, (B,N,P,X) of patches -> (B,N,C+P,X)."""
    shared = of_clip[:, None].expand(-1, of_patches.shape[1], -1, -1)
    return torch.cat([shared, of_patches], dim=2)


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """The MLP of Eq. 1."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def _linear(inputs: int, _: int, outputs: int) -> nn.Linear:
    """What takes the MLP's place with `projections: linear`."""
    return nn.Linear(inputs, outputs)


def _bias(known: Tensor, dtype: torch.dtype) -> Tensor:
    """What to add to attention scores: 0 where `known`, -inf at padding, of the same shape."""
    return torch.zeros_like(known, dtype=dtype).masked_fill_(~known, float("-inf"))
