"""Token propagation in a model of one block, the fastest case: a loop over frames with a gradient written by hand.

It computes what `samlove.model.block.FirstTokens` computes for each frame. Letters in shape comments: B batch, N
frames, P patches per frame, K [seg] tokens, C tokens that all frames share, D width, H heads.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from samlove.model.block import Block

NORM_EPS = 1e-5  # nn.LayerNorm's own


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
