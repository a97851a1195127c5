"""A small spatial-temporal diffusion transformer in the manner of Open-Sora 1.x and Latte.

A video becomes tokens (B, F, S, D): F frames of S patches. Spatial blocks attend within a frame, temporal
blocks along one patch position through time; the two alternate, with a reshape between them:

    patches ─▶ [ spatial (B*F, S, D) ─▶ temporal (B*S, F, D) ] x depth ─▶ final layer ─▶ velocity

Every block is modulated by the timestep (adaLN-single: one shared projection, one small table a block) and
attends to a few condition tokens made from the label.

Source: Open-Sora, `opensora/models/stdit/`; PixArt-alpha, arXiv 2310.00426, section 2.3 (adaLN-single). Ours
differs in a label where those have a text; the separate temporal blocks are those of Latte, arXiv 2401.03048,
variant 1.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class STDiTConfig:
    """The shape of the model.

    Attributes:
        depth: number of spatial blocks, and of temporal blocks.
        width: features of a token, D; a multiple of 4 and of `num_heads`.
        num_heads: attention heads a block.
        mlp_ratio: hidden features of the MLP over `width`.
        num_classes: labels are 0 … num_classes - 1; `num_classes` itself is the null label of guidance.
        num_condition_tokens: tokens that a label is turned into.
        channels: channels of the video, C.
        size: frames, height and width of the video.
        patch: frames, height and width of a patch.
    """

    depth: int = 6
    width: int = 128
    num_heads: int = 4
    mlp_ratio: int = 4
    num_classes: int = 10
    num_condition_tokens: int = 4
    channels: int = 1
    size: tuple[int, int, int] = (8, 16, 16)
    patch: tuple[int, int, int] = (1, 4, 4)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Patches along time, height and width."""
        frames, height, width = (size // patch for size, patch in zip(self.size, self.patch, strict=True))
        return frames, height, width


def sincos(position: torch.Tensor, width: int, max_period: float = 10_000.0) -> torch.Tensor:
    """Embeds positions (N,) as sines and cosines (N, width) of geometrically spaced frequencies."""
    half = width // 2
    frequency = torch.exp(
        torch.arange(half, device=position.device, dtype=torch.float32) * (-math.log(max_period) / half)
    )
    angle = position.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def sincos_grid(rows: int, columns: int, width: int) -> torch.Tensor:
    """Returns embeddings (1, rows · columns, width) of the places of a grid: half of the features row, half column."""
    row = sincos(torch.arange(rows), width // 2)[:, None].expand(-1, columns, -1)
    column = sincos(torch.arange(columns), width // 2)[None].expand(rows, -1, -1)
    return torch.cat([row, column], dim=-1).reshape(1, rows * columns, width)


def initialize_linears(model: nn.Module, small: tuple[str, ...], zero: tuple[str, ...]) -> None:
    """Initializes all linears: Xavier, but for names that begin with one of `small` or end with one of `zero`."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        nn.init.zeros_(module.bias)
        if name.startswith(small):
            nn.init.normal_(module.weight, std=0.02)
        elif name.endswith(zero):
            nn.init.zeros_(module.weight)
        else:
            nn.init.xavier_uniform_(module.weight)


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Returns x (B, N, D) scaled and shifted by (B, 1, D)."""
    return x * (1 + scale) + shift


class TimestepEmbedder(nn.Module):
    """Sinusoidal embedding and MLP: timestep (B,) in [0, 1000] → (B, D)."""

    def __init__(self, width: int, num_frequencies: int = 256) -> None:
        super().__init__()
        self.num_frequencies = num_frequencies
        self.mlp = nn.Sequential(nn.Linear(num_frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, timestep: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return self.mlp(sincos(timestep, self.num_frequencies).to(dtype))


class LabelEmbedder(nn.Module):
    """Turns a label (B,) into condition tokens (B, L, D), where a text model would encode a prompt."""

    def __init__(self, num_classes: int, num_tokens: int, width: int) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.table = nn.Embedding(num_classes + 1, num_tokens * width)
        self.proj = Mlp(width, width)

    def forward(self, label: torch.Tensor) -> torch.Tensor:
        return self.proj(self.table(label).unflatten(-1, (self.num_tokens, -1)))


class Mlp(nn.Module):
    """Linear, GELU (tanh), linear: (…, D) → (…, D)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))


class SelfAttention(nn.Module):
    """Multi-head self-attention over N of (B, N, D)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, heads, N, D / heads)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, width))


class CrossAttention(nn.Module):
    """Multi-head attention from tokens x (B*G, N, D) to condition tokens y (B, L, D).

    G groups (frames, or patch positions) share the condition of their video, so all G*N tokens are queries
    of one sequence; there is no order among queries.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = y.shape
        head = width // self.num_heads
        q = self.q(x).view(batch, -1, self.num_heads, head).transpose(1, 2)
        k, v = self.kv(y).view(batch, tokens, 2, self.num_heads, head).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(x.shape))


class STDiTBlock(nn.Module):
    """Self-attention, cross-attention and MLP; the first and last modulated and gated by the timestep."""

    def __init__(self, config: STDiTConfig) -> None:
        super().__init__()
        width, num_heads = config.width, config.num_heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = SelfAttention(width, num_heads)
        self.cross_attn = CrossAttention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, config.mlp_ratio * width)
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)

    def forward(self, x: torch.Tensor, y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Transforms tokens.

        Args:
            x: tokens (B*G, N, D).
            y: condition tokens (B, L, D).
            t: shared modulation (B*G, 6*D).

        Returns:
            Tokens (B*G, N, D).
        """
        modulation = self.scale_shift_table + t.unflatten(-1, (6, -1))
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=1)
        x = x + gate_msa * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        x = x + self.cross_attn(x, y)
        return x + gate_mlp * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    """Modulated projection to the pixels of a patch: (B, N, D) → (B, N, patch pixels * C)."""

    def __init__(self, width: int, out_features: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.linear = nn.Linear(width, out_features)

    def forward(self, x: torch.Tensor, t_emb: torch.Tensor) -> torch.Tensor:
        shift, scale = (self.scale_shift_table + t_emb.unsqueeze(1)).chunk(2, dim=1)
        return self.linear(modulate(self.norm(x), shift, scale))


class STDiT(nn.Module):
    """The denoiser: noisy video, timestep and label → velocity."""

    spatial_pos: torch.Tensor
    temporal_pos: torch.Tensor

    def __init__(self, config: STDiTConfig = STDiTConfig()) -> None:
        super().__init__()
        self.config = config
        width = config.width
        frames, rows, columns = config.grid

        self.patch_embed = nn.Conv3d(config.channels, width, config.patch, stride=config.patch)
        self.register_buffer("spatial_pos", sincos_grid(rows, columns, width), persistent=False)
        self.register_buffer("temporal_pos", sincos(torch.arange(frames), width)[None], persistent=False)

        self.t_embedder = TimestepEmbedder(width)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.y_embedder = LabelEmbedder(config.num_classes, config.num_condition_tokens, width)
        self.spatial_blocks = nn.ModuleList(STDiTBlock(config) for _ in range(config.depth))
        self.temporal_blocks = nn.ModuleList(STDiTBlock(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(width, math.prod(config.patch) * config.channels)
        initialize_linears(self, small=("t_embedder", "t_block"), zero=("cross_attn.proj", "final_layer.linear"))

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Predicts the velocity of the flow.

        Args:
            x: noisy video (B, C, F, H, W).
            timestep: (B,), float in [0, 1000]; 1000 is pure noise.
            label: (B,), int64; `config.num_classes` for "no label".

        Returns:
            Velocity dx/dt (B, C, F, H, W), where t runs from 0 (data) to 1 (noise).
        """
        batch = x.shape[0]
        frames, rows, columns = self.config.grid
        patches = rows * columns

        t_emb = self.t_embedder(timestep, x.dtype)
        t = self.t_block(t_emb)
        t_spatial = t.repeat_interleave(frames, dim=0)
        t_temporal = t.repeat_interleave(patches, dim=0)
        y = self.y_embedder(label)

        x = self.patch_embed(x).flatten(3).permute(0, 2, 3, 1)  # (B, F, S, D)
        x = x.reshape(batch * frames, patches, -1) + self.spatial_pos
        for i, (spatial, temporal) in enumerate(zip(self.spatial_blocks, self.temporal_blocks, strict=True)):
            x = spatial(x, y, t_spatial)
            x = x.view(batch, frames, patches, -1).transpose(1, 2).reshape(batch * patches, frames, -1)
            if i == 0:
                x = x + self.temporal_pos
            x = temporal(x, y, t_temporal)
            x = x.view(batch, patches, frames, -1).transpose(1, 2).reshape(batch * frames, patches, -1)

        x = self.final_layer(x.reshape(batch, frames * patches, -1), t_emb)
        return self.unpatchify(x)

    def unpatchify(self, x: torch.Tensor) -> torch.Tensor:
        """Puts patches (B, F'*S, patch pixels * C) back into a video (B, C, F, H, W)."""
        x = x.view(x.shape[0], *self.config.grid, *self.config.patch, self.config.channels)
        x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)  # b f h w pf ph pw c → b c f pf h ph w pw
        return x.reshape(x.shape[0], self.config.channels, *self.config.size)
