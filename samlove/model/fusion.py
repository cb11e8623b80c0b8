"""The fusion module of section 3.2: compresses audio, text and video into the token that prompts SAM 2.

Letters in shape comments: B batch, N frames (= seconds), L text tokens, P patches per frame, K [seg] tokens,
D width, H heads, S tokens per sequence.

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
  Eq. 1. Only the first [seg] token prompts SAM 2 (section 4.4).
- **Initialisation.** Tokens and time embeddings: truncated normal, std 0.02. Linear layers: Xavier, as in ViT, so that
  narrow models start at the same scale as wide ones.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samlove.config import FusionConfig

INIT_STD = 0.02


class Block(nn.Module):
    """One pre-norm transformer block (Eq. 2)."""

    def __init__(self, dim: int, heads: int, mlp_ratio: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_ratio * dim), nn.GELU(), nn.Linear(mlp_ratio * dim, dim))

    def forward(self, z: Tensor, mask: Tensor, first: int | None = None) -> Tensor:
        """z (B,S,D), mask (B,1,1,S) bool, True at tokens that may be attended to -> (B,S,D).

        With `first`, computes and returns only the first `first` tokens of that result, (B,first,D).
        """
        z = z + self._attend(z, mask) if first is None else z[:, :first] + self._attend_first(z, mask, first)
        return z + self.mlp(self.norm2(z))

    def _attend(self, z: Tensor, mask: Tensor) -> Tensor:
        B, S, D = z.shape
        qkv = self.qkv(self.norm1(z)).view(B, S, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # 3 x (B,H,S,D/H)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(attended.transpose(1, 2).reshape(B, S, D))

    def _attend_first(self, z: Tensor, mask: Tensor, first: int) -> Tensor:
        """The first `first` tokens of `_attend`, without approximation: (B,first,D).

        With few queries, there is no need to compute keys and values for all tokens: q.(W_k x) = (W_k^T q).x, and the
        weighted sum of W_v x is W_v times the weighted sum of x. Key biases add the same amount to every score of a
        query and cancel in the softmax; value biases pass through, because the weights sum to 1.
        """
        B, _, D = z.shape
        H, d = self.heads, D // self.heads
        x = self.norm1(z)
        w_q, w_k, w_v = self.qkv.weight.chunk(3)  # 3 x (D,D)
        b_q, _, b_v = self.qkv.bias.chunk(3)
        q = F.linear(x[:, :first], w_q, b_q).view(B, first, H, d) * d**-0.5
        q = torch.einsum("bfhd,hdx->bfhx", q, w_k.view(H, d, D)).flatten(1, 2)  # (B,first*H,D)
        scores = (q @ x.transpose(1, 2)).masked_fill(~mask.squeeze(1), float("-inf"))  # (B,first*H,S)
        mean = (scores.softmax(-1) @ x).view(B, first, H, D)
        attended = torch.einsum("bfhx,hdx->bfhd", mean, w_v.view(H, d, D)).flatten(2)  # (B,first,D)
        return self.out(attended + b_v)


class Fusion(nn.Module):
    """Projections (Eq. 1), fusion transformer (Eq. 2, 3), token propagation and accumulation (Eq. 4)."""

    def __init__(self, config: FusionConfig, dims: dict[str, int], prompt_dim: int):
        """dims: {"audio": dA, "visual": dV, "text": dT, "frames": N}, as in the loader."""
        super().__init__()
        self.config = config
        D = config.dim
        self.project_audio = _mlp(dims["audio"], D, D)
        self.project_visual = _mlp(dims["visual"], D, D)
        self.project_text = _mlp(dims["text"], D, D)
        self.seg = nn.Parameter(torch.empty(config.seg_tokens, D))
        self.aud = nn.Parameter(torch.empty(1, D))
        self.vis = nn.Parameter(torch.empty(1, D))
        self.time = nn.Parameter(torch.empty(dims["frames"], D))
        self.blocks = nn.ModuleList(Block(D, config.heads, config.mlp_ratio) for _ in range(config.blocks))
        self.head = nn.Sequential(nn.LayerNorm(D), _mlp(D, D, prompt_dim))
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        for token in (self.seg, self.aud, self.vis, self.time):
            nn.init.trunc_normal_(token, std=INIT_STD)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    @property
    def prompt_bias(self) -> Tensor:
        """(prompt_dim,): the prompt token's value if the sequence contributes nothing."""
        last = self.head.get_submodule("1.2")
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
        A = self.project_audio(audio) + self.time
        T = self.project_text(text)
        V = self.project_visual(visual) + self.time[:, None]  # (B,N,1+P,D): all frames at once
        clip = torch.cat([A, self.aud.expand(B, 1, -1), T, self.vis.expand(B, 1, -1)], dim=1)
        heard = torch.ones_like(audio[..., 0], dtype=torch.bool) if audio_valid is None else audio_valid
        marker = heard.new_ones(B, 1)
        known = torch.cat([heard, marker, text_mask, marker], dim=1)  # (B,N+1+L+1), False at padding
        propagate = self._propagate if self.config.prompt == "seg" else self._mean
        return self.head(propagate(clip, V[:, :, 1:], V[:, :, 0], known))

    def _propagate(self, clip: Tensor, patches: Tensor, cls: Tensor, known: Tensor) -> Tensor:
        """Propagate [seg]. clip (B,N+1+L+1,D), patches (B,N,P,D), cls (B,N,D) -> the first [seg] (B,1,D)."""
        B, _, P, D = patches.shape
        K = self.config.seg_tokens
        seg = self.seg.expand(B, K, D)
        for i, frame in enumerate(patches.unbind(1)):
            his = cls[:, : i + 1] if self.config.accumulate_cls else cls[:, :0]
            z = torch.cat([seg, clip, frame, his], dim=1)
            mask = _attention_mask(known, before=K, after=P + his.shape[1])
            for block in self.blocks[:-1]:
                z = block(z, mask)
            seg = self.blocks[-1](z, mask, first=K)
        return seg[:, :1]

    def _mean(self, clip: Tensor, patches: Tensor, cls: Tensor, known: Tensor) -> Tensor:
        """Table 5's alternative to [seg]: the mean output over one sequence with all frames, (B,1,D).

        The mean excludes padding. The sequence includes the [cls] of every frame if `accumulate_cls` is set.
        """
        his = cls if self.config.accumulate_cls else cls[:, :0]
        z = torch.cat([clip, patches.flatten(1, 2), his], dim=1)
        mask = _attention_mask(known, before=0, after=z.shape[1] - clip.shape[1])
        for block in self.blocks:
            z = block(z, mask)
        weight = mask[:, 0].transpose(1, 2).to(z.dtype)  # (B,S,1)
        return (z * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """The MLP of Eq. 1."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def _attention_mask(known: Tensor, before: int, after: int) -> Tensor:
    """The attention mask (B,1,1,S) of a sequence: `known` covers its middle; the ends are never padding."""
    return F.pad(known, (before, after), value=True)[:, None, None]
