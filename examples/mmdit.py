"""A small multimodal diffusion transformer: images from captions, by joint attention of text and image tokens.

    words ───┐
             ├─▶ [ dual-stream block ] x num_dual ─▶ cat ─▶ [ single-stream block ] x num_single ─▶ final layer
    patches ─┘     two of all linears, one attention          one of all linears

The tokens of the text come first. Every block is modulated and gated by the timestep; what to draw the image learns
from the text tokens alone. Image tokens have two-dimensional rotary positions in coordinates of the canvas, [-1, 1]
whatever its size, so that a model trained on small images needs little training to work on large ones.

Source: SD3, arXiv 2403.03206, section 4 and figure 2 (dual-stream blocks, RMSNorm of queries and keys); FLUX,
`flux/modules/layers.py` (single-stream blocks, rotary positions with the text unrotated). Ours has a table of words
instead of text encoders, no pooled text in the modulation, separate linears for qkv and MLP in a single-stream block,
and works on pixels.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from stdit import Mlp, TimestepEmbedder, initialize_linears, modulate


@dataclass(frozen=True)
class MMDiTConfig:
    """The shape of the model.

    Attributes:
        num_dual: dual-stream blocks, which come first.
        num_single: single-stream blocks.
        width: features of a token, D; a multiple of 4 · `num_heads`.
        num_heads: attention heads a block.
        mlp_ratio: hidden features of the MLP over `width`.
        num_words: words of the vocabulary.
        num_tokens: words of a caption, T.
        channels: channels of the image, C.
        size: height and width of the image that the model was trained on last.
        patch: height and width of a patch.
    """

    num_dual: int = 2
    num_single: int = 4
    width: int = 144
    num_heads: int = 6
    mlp_ratio: int = 4
    num_words: int = 17
    num_tokens: int = 8
    channels: int = 1
    size: tuple[int, int] = (64, 64)
    patch: int = 2

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along height and width."""
        return self.size[0] // self.patch, self.size[1] // self.patch


def rotary_grid(num_text: int, rows: int, columns: int, features: int, max_frequency: float = 16.0) -> torch.Tensor:
    """Returns cosines and sines (2, T + N, features / 2) of the angles of all tokens; the text's angles are 0.

    A quarter of a head's features turns with a patch's row, and a quarter with its column, from -1 to 1 over the
    image, at frequencies from 1 to `max_frequency` radians: two neighbours of a grid of 32 differ by at most 1.
    """
    row, column = (torch.linspace(-1 + 1 / n, 1 - 1 / n, n) for n in (rows, columns))
    frequency = max_frequency ** torch.linspace(0, 1, features // 4)
    place = torch.stack(torch.meshgrid(row, column, indexing="ij"), dim=-1).view(-1, 2, 1)
    angle = F.pad((place * frequency).flatten(1), (0, 0, num_text, 0))
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    """Rotates pairs of features of x (B, heads, N, D / heads) by the angles of `rotary_grid`."""
    cos, sin = rotary.to(x.dtype).unbind(0)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class QKV(nn.Module):
    """Queries, keys and values of tokens (B, N, D), each (B, heads, N, D / heads); queries and keys normalized."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.linear = nn.Linear(width, 3 * width)
        self.norm_q = nn.RMSNorm(width // num_heads, eps=1e-6)
        self.norm_k = nn.RMSNorm(width // num_heads, eps=1e-6)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = self.linear(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.norm_q(q), self.norm_k(k), v


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    """Attends with rotary positions: queries, keys, values (B, heads, N, D / heads) → (B, N, D)."""
    out = F.scaled_dot_product_attention(rotate(q, rotary), rotate(k, rotary), v)
    return out.transpose(1, 2).flatten(2)


class Stream(nn.Module):
    """The text's or the image's half of a dual-stream block: all but the attention."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        width = config.width
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.qkv = QKV(width, config.num_heads)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, config.mlp_ratio * width)
        self.modulation = nn.Linear(width, 6 * width)

    def before(self, x: torch.Tensor, c: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """Returns queries, keys, values of x (B, N, D), and the four modulations (B, 1, D) that `after` needs."""
        shift, scale, *rest = self.modulation(F.silu(c)).unsqueeze(1).chunk(6, dim=-1)
        return self.qkv(modulate(self.norm1(x), shift, scale)), tuple(rest)

    def after(self, x: torch.Tensor, out: torch.Tensor, modulation: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Adds the attention's output (B, N, D) and the MLP to x (B, N, D)."""
        gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation
        x = x + gate_msa * self.proj(out)
        return x + gate_mlp * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class DualStreamBlock(nn.Module):
    """Attention and MLP, where text and image share nothing but the attention; it starts as the identity."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.text = Stream(config)
        self.image = Stream(config)

    def forward(
        self, text: torch.Tensor, image: torch.Tensor, c: torch.Tensor, rotary: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Transforms text (B, T, D) and image (B, N, D) under the condition c (B, D), with `rotary_grid`'s angles."""
        text_qkv, text_modulation = self.text.before(text, c)
        image_qkv, image_modulation = self.image.before(image, c)
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(text_qkv, image_qkv, strict=True))
        text_out, image_out = attend(q, k, v, rotary).split([text.shape[1], image.shape[1]], dim=1)
        return self.text.after(text, text_out, text_modulation), self.image.after(image, image_out, image_modulation)


class SingleStreamBlock(nn.Module):
    """Attention and MLP side by side, from one modulated input to one linear; it starts as the identity."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        width, hidden = config.width, config.mlp_ratio * config.width
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.qkv = QKV(width, config.num_heads)
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(width + hidden, width)
        self.modulation = nn.Linear(width, 3 * width)

    def forward(self, x: torch.Tensor, c: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
        """Transforms tokens x (B, T + N, D) under the condition c (B, D), with the angles of `rotary_grid`."""
        shift, scale, gate = self.modulation(F.silu(c)).unsqueeze(1).chunk(3, dim=-1)
        h = modulate(self.norm(x), shift, scale)
        return x + gate * self.fc2(torch.cat([attend(*self.qkv(h), rotary), self.act(self.fc1(h))], dim=-1))


class MMDiT(nn.Module):
    """The denoiser: noisy image, timestep and caption → velocity."""

    rotary: torch.Tensor

    def __init__(self, config: MMDiTConfig = MMDiTConfig()) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.register_buffer("rotary", self.rotary_of(config.grid), persistent=False)
        self.patch_embed = nn.Conv2d(config.channels, width, config.patch, stride=config.patch)
        self.word_embed = nn.Embedding(config.num_words, width)
        self.word_pos = nn.Parameter(torch.randn(config.num_tokens, width))
        self.t_embedder = TimestepEmbedder(width)
        self.dual_blocks = nn.ModuleList(DualStreamBlock(config) for _ in range(config.num_dual))
        self.single_blocks = nn.ModuleList(SingleStreamBlock(config) for _ in range(config.num_single))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, config.patch**2 * config.channels)
        initialize_linears(self, small=("t_embedder",), zero=("modulation", "head"))

    def rotary_of(self, grid: tuple[int, int]) -> torch.Tensor:
        """Returns the angles of text and image tokens for images of `grid` patches."""
        return rotary_grid(self.config.num_tokens, *grid, self.config.width // self.config.num_heads)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, caption: torch.Tensor) -> torch.Tensor:
        """Predicts the velocity of the flow.

        Args:
            x: noisy image (B, C, H, W), of any height and width that are multiples of the patch's.
            timestep: (B,), float in [0, 1000]; 1000 is pure noise.
            caption: words (B, T), int64; all `captions.PAD` for "no caption".

        Returns:
            Velocity dx/dt (B, C, H, W), where t runs from 0 (data) to 1 (noise).
        """
        batch, tokens = caption.shape
        patch = self.config.patch
        rows, columns = x.shape[2] // patch, x.shape[3] // patch
        rotary = self.rotary if (rows, columns) == self.config.grid else self.rotary_of((rows, columns)).to(x.device)
        c = self.t_embedder(timestep, x.dtype)
        text = self.word_embed(caption) + self.word_pos
        image = self.patch_embed(x).flatten(2).transpose(1, 2)
        for block in self.dual_blocks:
            text, image = block(text, image, c, rotary)
        x = torch.cat([text, image], dim=1)
        for block in self.single_blocks:
            x = block(x, c, rotary)
        shift, scale = self.modulation(F.silu(c)).unsqueeze(1).chunk(2, dim=-1)
        x = self.head(modulate(self.norm(x[:, tokens:]), shift, scale))
        x = x.view(batch, rows, columns, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(batch, -1, rows * patch, columns * patch)
