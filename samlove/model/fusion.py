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
  Eq. 1. Only the first [seg] token prompts SAM 2 (section 4.4).
- **Initialisation.** Tokens and time embeddings: truncated normal, std 0.02. Linear layers: Xavier, as in ViT, so that
  narrow models start at the same scale as wide ones.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from samlove.config import FusionConfig

INIT_STD = 0.02
NORM_EPS = 1e-5  # nn.LayerNorm's own


class Block(nn.Module):
    """One pre-norm transformer block (Eq. 2).

    `bias` is added to the attention scores: 0 at tokens that may be attended to, -inf at padding.
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_ratio * dim), nn.GELU(), nn.Linear(mlp_ratio * dim, dim))

    def forward(self, z: Tensor, bias: Tensor) -> Tensor:
        """z (B,S,D), bias (B,1,1,S) of the dtype of the keys -> (B,S,D)."""
        return self.attend(z, self.read(z), bias)

    def read(self, z: Tensor) -> Tensor:
        """Queries, keys and values of tokens (...,S,D), which depend on no other token: (...,S,3D)."""
        return self.qkv(self.norm1(z))

    def attend(self, z: Tensor, qkv: Tensor, bias: Tensor) -> Tensor:
        """The rest of `forward`; qkv (B,S,3D) as from `read(z)`."""
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # 3 x (B,H,S,D/H)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        z = z + self.out(attended.transpose(1, 2).flatten(2))
        return z + self.mlp(self.norm2(z))


class FirstTokens:
    """The first tokens of a block's output, without approximation. Holds for one step what its calls share.

    With few queries, there is no need to compute keys and values for all tokens: q.(W_k x) = (W_k^T q).x, and the
    weighted sum of W_v x is W_v times the weighted sum of x. Key biases add the same amount to every score of a query
    and cancel in the softmax; value biases pass through, because the weights sum to 1.
    """

    def __init__(self, block: Block) -> None:
        self.block = block
        H, D = block.heads, block.out.in_features
        w_q, w_k, w_v = block.qkv.weight.chunk(3)  # 3 x (D,D)
        b_q, _, b_v = block.qkv.bias.chunk(3)
        scale = (D // H) ** -0.5
        self.w_q, self.b_q = w_q * scale, b_q * scale
        self.w_k, self.w_v = w_k.view(H, -1, D), w_v.view(H, -1, D).transpose(1, 2)  # (H,D/H,D), (H,D,D/H)
        self.b_out = F.linear(b_v, block.out.weight, block.out.bias)

    def __call__(self, z: Tensor, x: Tensor, bias: Tensor) -> Tensor:
        """z (B,K,D): the first K tokens; x (B,S,D): all tokens after norm1; bias (B,1,S) -> (B,K,D)."""
        B, K, D = z.shape
        H = self.block.heads
        q = F.linear(x[:, :K], self.w_q, self.b_q).view(B * K, H, -1).transpose(0, 1)  # (H,B*K,D/H)
        q = (q @ self.w_k).transpose(0, 1).reshape(B, K * H, D)
        x = x.to(q.dtype)
        weights = torch.baddbmm(bias, q, x.transpose(1, 2)).softmax(-1)  # (B,K*H,S)
        mean = (weights.to(x.dtype) @ x).view(B * K, H, D).transpose(0, 1)  # (H,B*K,D)
        attended = (mean @ self.w_v).transpose(0, 1).reshape(B, K, D)
        z = z + F.linear(attended, self.block.out.weight, self.b_out)
        return z + self.block.mlp(self.block.norm2(z))


class OneBlockLoop(torch.autograd.Function):
    """The loop over frames of a model of one block. Gradients of weights are computed once, after the loop.

    Autograd would compute them for each frame and add them. Norms have no weights here: `fold` makes those part of the
    linear layers that follow.
    """

    @staticmethod
    def forward(ctx: Any, seg: Tensor, clip: Tensor, patches: Tensor, bias: Tensor, *layers: Tensor) -> Tensor:
        """seg (B,K,D); clip (B,C,D) and patches (N,B,P,D), normalised; bias (N,B,1,K+C+P); layers as from `fold`.

        All but seg have the dtype of the matrix products. Returns [seg] after the last frame, (B,K,D).
        """
        w_q, b_q, w_v, b_v, w_1, b_1, w_2, b_2 = layers
        (B, K, D), N = seg.shape, len(patches)
        x = torch.cat([patches.new_empty(N, B, K, D), clip.expand(N, -1, -1, -1), patches], dim=2)
        steps = []
        for tokens, b in zip(x, bias, strict=True):
            n, *of_n = torch.native_layer_norm(seg, (D,), None, None, NORM_EPS)
            n = n.to(x.dtype)
            tokens[:, :K] = n
            q = F.linear(n, w_q, b_q).view(B, -1, D)  # (B,K*H,D)
            p = torch.baddbmm(b, q, tokens.mT).softmax(-1, dtype=seg.dtype)  # (B,K*H,K+C+P)
            m = (p.to(x.dtype) @ tokens).view(B, K, -1)  # (B,K,H*D)
            z = seg + F.linear(m, w_v, b_v)
            y, *of_y = torch.native_layer_norm(z, (D,), None, None, NORM_EPS)
            y = y.to(x.dtype)
            h = F.linear(y, w_1, b_1)
            u = F.gelu(h)
            steps += [seg, *of_n, n, q, p, m, z, *of_y, y, h, u]
            seg = z + F.linear(u, w_2, b_2)
        ctx.save_for_backward(x, w_q, w_v, w_1, w_2, *steps)
        ctx.tokens = K, clip.shape[1], patches.shape[2]
        return seg

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_seg: Tensor) -> tuple[Tensor | None, ...]:
        x, w_q, w_v, w_1, w_2, *steps = ctx.saved_tensors
        N, B, _, D = x.shape
        K = ctx.tokens[0]
        d_x, found = torch.empty_like(x), []
        for i in reversed(range(N)):
            seg, mean_n, std_n, n, q, p, m, z, mean_z, std_z, y, h, u = steps[13 * i : 13 * (i + 1)]
            d_u = d_seg.to(x.dtype)
            d_h = torch.ops.aten.gelu_backward(d_u @ w_2, h)
            d_z = d_seg + _norm_backward(d_h @ w_1, z, mean_z, std_z)
            d_o = d_z.to(x.dtype)
            d_m = (d_o @ w_v).view(B, -1, D)
            d_p = (d_m @ x[i].mT).to(p.dtype)
            d_s = torch.ops.aten._softmax_backward_data(d_p, p, -1, p.dtype).to(x.dtype)
            d_q = (d_s @ x[i]).view(B, K, -1)
            torch.bmm(p.to(x.dtype).mT, d_m, out=d_x[i]).baddbmm_(d_s.mT, q)
            d_seg = d_z + _norm_backward(d_x[i, :, :K] + d_q @ w_q, seg, mean_n, std_n)
            found.append((d_q, n, d_o, m, d_h, y, d_u, u))
        d_layers = []
        outs_and_ins = [torch.stack(parts).flatten(0, 2) for parts in zip(*found, strict=True)]  # (N*B*K,width) each
        for out, into in zip(outs_and_ins[::2], outs_and_ins[1::2], strict=True):
            d_layers += [out.T @ into, out.sum(0)]
        _, d_clip, d_patches = d_x.split(ctx.tokens, dim=2)
        return d_seg, d_clip.sum(0), d_patches, None, *d_layers


def _norm_backward(gradient: Tensor, x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """The gradient of x, given that of its norm without weights; mean and inverse std as native_layer_norm gives."""
    norm_backward = torch.ops.aten.native_layer_norm_backward
    return norm_backward(gradient.to(x.dtype), x, x.shape[-1:], mean, std, None, None, [True, False, False])[0]


def fold(block: Block) -> tuple[Tensor, ...]:
    """The weights and biases of four layers that make up `FirstTokens` on tokens normalised without weights.

    In turn: token -> q.W_k of all heads, D -> H*D; weighted means of all heads -> output, H*D -> D; the two of the MLP.
    """
    H, D = block.heads, block.out.in_features
    norm1, norm2, first, second = block.norm1, block.norm2, block.mlp[0], block.mlp[2]
    assert isinstance(first, nn.Linear) and isinstance(second, nn.Linear)
    w_q, w_k, w_v = (block.qkv.weight * norm1.weight).view(3, H, -1, D)  # (H,D/H,D) each
    b_q, _, b_v = F.linear(norm1.bias, block.qkv.weight, block.qkv.bias).chunk(3)
    w_k = w_k * (D // H) ** -0.5
    to_q = w_k.mT @ w_q  # (H,D,D)
    b_to_q = b_q.view(H, 1, -1) @ w_k
    to_out = block.out.weight.view(D, H, -1).transpose(0, 1) @ w_v  # (H,D,D)
    b_to_out = F.linear(b_v, block.out.weight, block.out.bias)
    layers = (
        (to_q.flatten(0, 1), b_to_q.flatten()),
        (to_out.transpose(0, 1).flatten(1), b_to_out),
        (first.weight * norm2.weight, F.linear(norm2.bias, first.weight, first.bias)),
        (second.weight, second.bias),
    )
    return tuple(tensor.to(to_q.dtype) for layer in layers for tensor in layer)


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
        self.time = nn.Parameter(torch.empty(dims["frames"], D)) if config.time_embedding else None
        self.blocks = nn.ModuleList(Block(D, config.heads, config.mlp_ratio) for _ in range(config.blocks))
        self.head = nn.Sequential(nn.LayerNorm(D), _mlp(D, D, prompt_dim))
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        for token in (self.seg, self.aud, self.vis, self.time):
            if token is not None:
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
        if self.config.accumulate_cls:
            clip = torch.cat([clip, cls], dim=1)
            former = torch.ones(N, N, dtype=torch.bool, device=known.device).tril()
            known = torch.cat([known[:, None].expand(B, N, -1), former.expand(B, N, N)], dim=2)
        else:
            known = known[:, None].expand(B, N, -1)  # (B,N,C), C the tokens of clip and [his]

        seg = self.seg.expand(B, K, D)
        first, last = self.blocks[0], self.blocks[-1]
        if first is last:
            layers = fold(last)
            clip, patches = (F.layer_norm(tokens, (D,), eps=NORM_EPS).to(layers[0].dtype) for tokens in (clip, patches))
            bias = _bias(F.pad(known, (K, P), value=True), clip.dtype)[:, :, None].transpose(0, 1)  # (N,B,1,K+C+P)
            return OneBlockLoop.apply(seg, clip, patches.transpose(0, 1), bias, *layers)[:, :1]

        def by_frame(of_clip: Tensor, of_patches: Tensor) -> tuple[Tensor, ...]:
            """(B,C,X) and (B,N,P,X) -> N x (B,C+P,X)."""
            return torch.cat([of_clip[:, None].expand(B, N, -1, -1), of_patches], dim=2).unbind(1)

        finish = FirstTokens(last)
        others = by_frame(first.read(clip), first.read(patches))
        bias = _bias(F.pad(known, (K, P), value=True), others[0].dtype)[:, :, None].unbind(1)  # N x (B,1,K+C+P)
        for z, qkv, b in zip(by_frame(clip, patches), others, bias, strict=True):
            z = first.attend(torch.cat([seg, z], dim=1), torch.cat([first.read(seg), qkv], dim=1), b[:, None])
            for block in self.blocks[1:-1]:
                z = block(z, b[:, None])
            seg = finish(z[:, :K], last.norm1(z), b)
        return seg[:, :1]

    def _mean(self, clip: Tensor, patches: Tensor, cls: Tensor, known: Tensor) -> Tensor:
        """Table 5's alternative to [seg]: the mean output over one sequence with all frames, (B,1,D).

        The mean excludes padding. The sequence includes the [cls] of every frame if `accumulate_cls` is set.
        """
        his = cls if self.config.accumulate_cls else cls[:, :0]
        z = torch.cat([clip, patches.flatten(1, 2), his], dim=1)
        known = F.pad(known, (0, z.shape[1] - known.shape[1]), value=True)  # (B,S)
        qkv = self.blocks[0].read(z)
        bias = _bias(known, qkv.dtype)[:, None, None]
        z = self.blocks[0].attend(z, qkv, bias)
        for block in self.blocks[1:]:
            z = block(z, bias)
        weight = known[..., None].to(z.dtype)  # (B,S,1)
        return (z * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """The MLP of Eq. 1."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def _bias(known: Tensor, dtype: torch.dtype) -> Tensor:
    """What to add to attention scores: 0 where `known`, -inf at padding, of the same shape."""
    return torch.zeros_like(known, dtype=dtype).masked_fill_(~known, float("-inf"))
