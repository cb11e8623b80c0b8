"""A transformer block (Eq. 2), and the same block if only its first tokens are wanted.

Letters in shape comments as in samlove.model.fusion: B batch, K [seg] tokens, D width, H heads, S tokens per sequence.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
