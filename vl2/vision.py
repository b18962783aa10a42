"""SigLIP vision tower: uint8 tiles to patch features.

Shape suffixes: N tiles, P patches of a tile (27 x 27 = 729), D width, H heads, K channels of a head.
"""

from __future__ import annotations

from typing import Any

import paddle
import paddle.nn.functional as F
from paddle import nn

from vl2 import cpu_kernels, ways
from vl2.arrays import empty, read
from vl2.attention import attention
from vl2.config import VisionConfig
from vl2.linear import Linear, linear
from vl2.recompute import recomputed

LAYER_NORM_EPS = 1e-6


class LayerNorm(nn.LayerNorm):
    """LayerNorm in float32 whatever the parameters are stored in."""

    def __init__(self, size: int):
        super().__init__(size, epsilon=LAYER_NORM_EPS)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        """[..., D] -> [..., D], in the input's dtype."""
        shape, weight, bias = [x.shape[-1]], self.weight.astype("float32"), self.bias.astype("float32")
        return F.layer_norm(x.astype("float32"), shape, weight, bias, LAYER_NORM_EPS).astype(x.dtype)


class VisionAttention(nn.Layer):
    """Self-attention of a block, q, k and v in one matrix."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.num_heads = config.heads
        self.qkv = Linear(config.width, 3 * config.width)
        self.proj = Linear(config.width, config.width)

    def forward(self, x_NPD: paddle.Tensor) -> paddle.Tensor:
        """N tiles of P patches: [N, P, D] -> [N, P, D]; every patch of a tile sees every other."""
        n, p, d = x_NPD.shape
        qkv = self.qkv(x_NPD).reshape([n * p, 3, self.num_heads, d // self.num_heads])
        q, k, v = qkv.unbind(axis=1)
        out = attention(q, k, v, [p] * n, [p] * n, scale=(d // self.num_heads) ** -0.5, causal=False)
        return self.proj(out.reshape([n, p, d]))


class VisionMLP(nn.Layer):
    """tanh-GELU MLP (the erf form is off by 1e-3 in the logits)."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.fc1 = Linear(width, inner)
        self.fc2 = Linear(inner, width)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        """[N, P, D] -> [N, P, D]."""
        return self.fc2(_gelu(self.fc1(x)))


def _gelu(x: paddle.Tensor) -> paddle.Tensor:
    """In its tanh form. [N, P, D] -> [N, P, D]."""
    if not ways.takes_float32_kernels(x) or not x.stop_gradient:
        return F.gelu(x, approximate=True)
    made, out = empty(x.shape)
    cpu_kernels.gelu(read(x).reshape(-1, x.shape[-1]), out.reshape(-1, x.shape[-1]))
    return made


class VisionBlock(nn.Layer):
    """Pre-norm transformer block."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.norm1 = LayerNorm(config.width)
        self.attn = VisionAttention(config)
        self.norm2 = LayerNorm(config.width)
        self.mlp = VisionMLP(config.width, config.mlp_width)

    def forward(self, x_NPD: paddle.Tensor) -> paddle.Tensor:
        """[N, P, D] -> [N, P, D]."""
        x_NPD = x_NPD + self.attn(self.norm1(x_NPD))
        return x_NPD + self.mlp(self.norm2(x_NPD))


def patches_of(tiles_N3XX: paddle.Tensor, dtype: Any, grid: int, patch: int) -> paddle.Tensor:
    """Normalised pixels of each patch: [N, 3, 384, 384] -> [N, P, 3 * 14 * 14].

    Like the convolution it drops the six pixels beyond the last patch.
    """
    n, used = tiles_N3XX.shape[0], grid * patch
    if ways.takes_kernels(tiles_N3XX.place) and dtype in ("float32", paddle.float32):
        made, out = empty([n, grid, grid, 3 * patch * patch])
        for tile, rows in zip(read(tiles_N3XX), out, strict=True):
            cpu_kernels.patches(tile, patch, rows)
        return made.reshape([n, grid * grid, 3 * patch * patch])
    pixels = ((tiles_N3XX.astype("float32") / 255.0 - 0.5) / 0.5).astype(dtype)
    patches = pixels[:, :, :used, :used].reshape([n, 3, grid, patch, grid, patch])
    return patches.transpose([0, 2, 4, 1, 3, 5]).reshape([n, grid * grid, 3 * patch * patch])


class PatchProjection(nn.Layer):
    """The 14 x 14 stride-14 convolution's parameters, [D, 3, 14, 14]; applied as one matrix product."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.weight = self.create_parameter([config.width, 3, config.patch_size, config.patch_size])
        self.bias = self.create_parameter([config.width], is_bias=True)

    def forward(self, patches: paddle.Tensor) -> paddle.Tensor:
        """Pixels of the patches, [N, P, 3 * 14 * 14] -> [N, P, D]."""
        # The bias apart: with it a GPU takes cublasLt's epilogue, and 588 rows are no multiple of the 8 that it likes.
        product = linear(patches, self.weight.flatten(1).transpose([1, 0]))
        return product + self.bias.astype(product.dtype)


class PatchEmbed(nn.Layer):
    """Holds `proj`, as the checkpoint names it."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.proj = PatchProjection(config)


class AttentionPool(nn.Layer):
    """SigLIP's pooling head: in every checkpoint, used by no DeepSeek-VL2, kept to be written back."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        width = config.width
        self.latent = self.create_parameter([1, 1, width])
        self.q = Linear(width, width)
        self.kv = Linear(width, 2 * width)
        self.proj = Linear(width, width)
        self.norm = LayerNorm(width)
        self.mlp = VisionMLP(width, config.mlp_width)


class VisionTower(nn.Layer):
    """SigLIP so400m 384/14 in shape; widths and depth from the config."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.recompute_every = 0
        self.patch_embed = PatchEmbed(config)
        self.pos_embed = self.create_parameter([1, config.grid**2, config.width])
        self.blocks = nn.LayerList([VisionBlock(config) for _ in range(config.layers)])
        self.norm = LayerNorm(config.width)
        self.attn_pool = AttentionPool(config)

    def embed(self, tiles_N3XX: paddle.Tensor, dtype: Any) -> paddle.Tensor:
        """Normalise and cut into patches: uint8 [N, 3, 384, 384] -> [N, P, D]. Pixel = (u8 / 255 - 0.5) / 0.5."""
        x_NPD = self.patch_embed.proj(patches_of(tiles_N3XX, dtype, self.config.grid, self.config.patch_size))
        return x_NPD + self.pos_embed.astype(dtype)

    def forward(self, tiles_N3XX: paddle.Tensor, dtype: Any) -> paddle.Tensor:
        """uint8 tiles [N, 3, 384, 384] -> features [N, P, D] in `dtype`."""
        x_NPD = self.embed(tiles_N3XX, dtype)
        for i, block in enumerate(self.blocks):
            again = self.recompute_every and i % self.recompute_every == 0 and paddle.is_grad_enabled()
            x_NPD = recomputed(block, x_NPD) if again else block(x_NPD)
        return self.norm(x_NPD)
