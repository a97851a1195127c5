"""A small class-conditional diffusion transformer for images, with the blocks of DiT-XL/2 (adaLN-Zero).

    patches ─▶ [ attention, MLP ] x depth ─▶ final layer ─▶ velocity
                  each modulated and gated by its own linear of (timestep + label)

Source: DiT, arXiv 2212.09748, section 3.2, block "adaLN-Zero". Ours predicts a rectified flow's velocity instead of
noise and variance, and works on pixels.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from stdit import Mlp, SelfAttention, TimestepEmbedder, initialize_linears, modulate, sincos_grid


@dataclass(frozen=True)
class DiTConfig:
    """The shape of the model.

    Attributes:
        depth: number of blocks.
        width: features of a token, D; a multiple of 4 and of `num_heads`.
        num_heads: attention heads a block.
        mlp_ratio: hidden features of the MLP over `width`.
        num_classes: labels are 0 … num_classes - 1; `num_classes` itself is the null label of guidance.
        channels: channels of the image, C.
        size: height and width of the image.
        patch: height and width of a patch.
    """

    depth: int = 6
    width: int = 128
    num_heads: int = 4
    mlp_ratio: int = 4
    num_classes: int = 10
    channels: int = 1
    size: tuple[int, int] = (16, 16)
    patch: int = 2

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along height and width."""
        return self.size[0] // self.patch, self.size[1] // self.patch


class DiTBlock(nn.Module):
    """Attention and MLP, each modulated and gated; its gates start at zero, so that it starts as the identity."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.width
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = SelfAttention(width, config.num_heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, config.mlp_ratio * width)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """Transforms tokens x (B, N, D) under the condition c (B, D)."""
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = (
            self.modulation(F.silu(c)).unsqueeze(1).chunk(6, dim=-1)
        )
        x = x + gate_msa * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        return x + gate_mlp * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class DiT(nn.Module):
    """The denoiser: noisy image, timestep and label → velocity."""

    pos: torch.Tensor

    def __init__(self, config: DiTConfig = DiTConfig()) -> None:
        super().__init__()
        self.config = config
        width = config.width
        rows, columns = config.grid
        self.patch_embed = nn.Conv2d(config.channels, width, config.patch, stride=config.patch)
        self.register_buffer("pos", sincos_grid(rows, columns, width), persistent=False)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = nn.Embedding(config.num_classes + 1, width)
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, config.patch**2 * config.channels)
        initialize_linears(self, small=("t_embedder",), zero=("modulation", "head"))

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Predicts the velocity of the flow.

        Args:
            x: noisy image (B, C, H, W).
            timestep: (B,), float in [0, 1000]; 1000 is pure noise.
            label: (B,), int64; `config.num_classes` for "no label".

        Returns:
            Velocity dx/dt (B, C, H, W), where t runs from 0 (data) to 1 (noise).
        """
        c = self.t_embedder(timestep, x.dtype) + self.y_embedder(label)
        x = self.patch_embed(x).flatten(2).transpose(1, 2) + self.pos
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.modulation(F.silu(c)).unsqueeze(1).chunk(2, dim=-1)
        x = self.head(modulate(self.norm(x), shift, scale))
        (rows, columns), patch = self.config.grid, self.config.patch
        x = x.view(len(x), rows, columns, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(len(x), -1, *self.config.size)
