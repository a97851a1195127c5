"""The transformers of diffusers, small and with random weights: real structures for the compiler to find its way in.

Every entry of `MODELS` makes a model of a `Size` and a function timestep (in 0 … 1000) → keyword arguments of its
forward.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import (
    get_2d_rotary_pos_embed,
    get_3d_rotary_pos_embed,
    get_3d_rotary_pos_embed_allegro,
)
from torch import Tensor, nn

Inputs = Callable[[float], dict[str, Any]]
TEXT = 6  # tokens of the prompt


@dataclass(frozen=True)
class Size:
    """Of a model: its heads and their width, how many blocks (in each stack), rows and columns of the latent image."""

    heads: int = 2
    head_width: int = 16
    depth: int = 3
    side: int = 8

    @property
    def width(self) -> int:
        return self.heads * self.head_width

    @property
    def grid(self) -> int:
        """Rows of patches."""
        return self.side // 2

    @property
    def rope(self) -> tuple[int, int, int]:
        """How a head is divided among the axes of a rotary embedding."""
        return self.head_width // 4, self.head_width // 4, self.head_width // 2


TINY = Size()


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives a model weights with which every block matters: gates that start at zero in training do not stay zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.data = noise / math.sqrt(math.prod(parameter.shape[1:]))
        else:
            parameter.data += 0.1 * noise
    return model.eval().requires_grad_(False)


def randn(*size: int, seed: int = 1) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def at(timestep: float, batch: int) -> Tensor:
    return torch.full((batch,), timestep)


def dit(size: Size = TINY) -> tuple[nn.Module, Inputs]:
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=size.heads,
        attention_head_dim=size.head_width,
        in_channels=4,
        num_layers=size.depth,
        sample_size=size.side,
        norm_num_groups=4,
        num_embeds_ada_norm=10,
    )
    x, labels = randn(2, 4, size.side, size.side), torch.tensor([1, 2])
    return randomize(model), lambda t: {"hidden_states": x, "timestep": at(t, 2).long(), "class_labels": labels}


def pixart_sigma(size: Size = TINY) -> tuple[nn.Module, Inputs]:
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=size.heads,
        attention_head_dim=size.head_width,
        num_layers=size.depth,
        cross_attention_dim=size.width,
        sample_size=size.side,
        caption_channels=24,
        use_additional_conditions=False,
        norm_num_groups=4,
    )
    x, text, mask = randn(2, 4, size.side, size.side), randn(2, TEXT, 24, seed=2), torch.ones(2, TEXT)
    mask[1, 4:] = 0
    return randomize(model), lambda t: {
        "hidden_states": x,
        "timestep": at(t, 2).long(),
        "encoder_hidden_states": text,
        "encoder_attention_mask": mask,
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def sd3(size: Size = TINY, **config: Any) -> tuple[nn.Module, Inputs]:
    model = diffusers.SD3Transformer2DModel(
        sample_size=size.side,
        in_channels=4,
        out_channels=4,
        num_layers=size.depth + 1,
        attention_head_dim=size.head_width,
        num_attention_heads=size.heads,
        joint_attention_dim=24,
        caption_projection_dim=size.width,
        pooled_projection_dim=20,
        pos_embed_max_size=size.side,
        **config,
    )
    x, text, pooled = randn(2, 4, size.side, size.side), randn(2, TEXT, 24, seed=2), randn(2, 20, seed=3)
    return randomize(model), lambda t: {
        "hidden_states": x,
        "timestep": at(t, 2),
        "encoder_hidden_states": text,
        "pooled_projections": pooled,
    }


def sd35(size: Size = TINY) -> tuple[nn.Module, Inputs]:
    """The first two blocks have a second attention over the image alone."""
    return sd3(size, dual_attention_layers=(0, 1), qk_norm="rms_norm")


def flux(size: Size = TINY) -> tuple[nn.Module, Inputs]:
    model = diffusers.FluxTransformer2DModel(
        in_channels=8,
        num_layers=size.depth - 1,
        num_single_layers=size.depth,
        attention_head_dim=size.head_width,
        num_attention_heads=size.heads,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        guidance_embeds=True,
        axes_dims_rope=size.rope,
    )
    pooled, guidance = randn(1, 20, seed=3), at(3.5, 1)
    return randomize(model), lambda t: _flux_like(t, size.grid) | {"pooled_projections": pooled, "guidance": guidance}


def _flux_like(timestep: float, side: int) -> dict[str, Any]:
    rows, columns = torch.meshgrid(torch.arange(float(side)), torch.arange(float(side)), indexing="ij")
    return {
        "hidden_states": randn(1, side**2, 8),
        "encoder_hidden_states": randn(1, TEXT, 24, seed=2),
        "timestep": at(timestep / 1000, 1),
        "img_ids": torch.stack([torch.zeros(side, side), rows, columns], dim=-1).reshape(-1, 3),
        "txt_ids": torch.zeros(TEXT, 3),
    }


def chroma(size: Size = TINY) -> tuple[nn.Module, Inputs]:
    model = diffusers.ChromaTransformer2DModel(
        in_channels=8,
        num_layers=size.depth - 1,
        num_single_layers=size.depth,
        attention_head_dim=size.head_width,
        num_attention_heads=size.heads,
        joint_attention_dim=24,
        axes_dims_rope=size.rope,
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=2,
    )
    mask = torch.ones(1, TEXT + size.grid**2, dtype=torch.bool)
    mask[:, 4:TEXT] = False
    return randomize(model), lambda t: _flux_like(t, size.grid) | {"attention_mask": mask}


def cogvideox(size: Size = TINY, rotary: bool = False) -> tuple[nn.Module, Inputs]:
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=size.heads,
        attention_head_dim=size.head_width,
        in_channels=4,
        out_channels=4,
        time_embed_dim=16,
        text_embed_dim=24,
        num_layers=size.depth,
        sample_width=size.side,
        sample_height=size.side,
        sample_frames=9,
        max_text_seq_length=TEXT,
        use_rotary_positional_embeddings=rotary,
    )
    x, text = randn(2, 3, 4, size.side, size.side), randn(2, TEXT, 24, seed=2)
    rope = (
        get_3d_rotary_pos_embed(size.head_width, ((0, 0), (size.grid, size.grid)), (size.grid, size.grid), 3)
        if rotary
        else None
    )
    return randomize(model), lambda t: {
        "hidden_states": x,
        "encoder_hidden_states": text,
        "timestep": at(t, 2).long(),
        "image_rotary_emb": rope,
    }


def hunyuan_dit(size: Size = TINY) -> tuple[nn.Module, Inputs]:
    """Blocks 4 and 5 take what left blocks 1 and 0, over long skip connections."""
    model = diffusers.HunyuanDiT2DModel(
        num_attention_heads=size.heads,
        attention_head_dim=size.head_width,
        in_channels=4,
        patch_size=2,
        sample_size=size.side,
        hidden_size=size.width,
        num_layers=2 * size.depth,
        mlp_ratio=2.0,
        cross_attention_dim=16,
        cross_attention_dim_t5=24,
        pooled_projection_dim=20,
        text_len=TEXT,
        text_len_t5=TEXT,
    )
    x, text, text_t5 = randn(2, 4, size.side, size.side), randn(2, TEXT, 16, seed=2), randn(2, TEXT, 24, seed=3)
    mask, sizes = torch.ones(2, TEXT, dtype=torch.long), torch.tensor([[64, 64, 64, 64, 0, 0]] * 2)
    mask[1, 4:] = 0
    rope = get_2d_rotary_pos_embed(size.head_width, ((0, 0), (size.grid, size.grid)), (size.grid, size.grid))
    return randomize(model), lambda t: {
        "hidden_states": x,
        "timestep": at(t, 2),
        "encoder_hidden_states": text,
        "text_embedding_mask": mask,
        "encoder_hidden_states_t5": text_t5,
        "text_embedding_mask_t5": mask,
        "image_meta_size": sizes,
        "style": torch.zeros(2, dtype=torch.long),
        "image_rotary_emb": rope,
    }


def latte(size: Size = TINY) -> tuple[nn.Module, Inputs]:
    model = diffusers.LatteTransformer3DModel(
        num_attention_heads=size.heads,
        attention_head_dim=size.head_width,
        in_channels=4,
        out_channels=4,
        num_layers=size.depth - 1,
        cross_attention_dim=size.width,
        attention_bias=True,
        sample_size=size.side,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        caption_channels=24,
        video_length=3,
    )
    x, text = randn(2, 4, 3, size.side, size.side), randn(2, TEXT, 24, seed=2)
    return randomize(model), lambda t: {
        "hidden_states": x,
        "timestep": at(t, 2).long(),
        "encoder_hidden_states": text,
    }


def allegro(size: Size = TINY) -> tuple[nn.Module, Inputs]:
    head_width = size.head_width * 3 // 2  # divides among three axes
    model = diffusers.AllegroTransformer3DModel(
        num_attention_heads=size.heads,
        attention_head_dim=head_width,
        in_channels=4,
        out_channels=4,
        num_layers=size.depth,
        cross_attention_dim=size.heads * head_width,
        sample_height=size.side,
        sample_width=size.side,
        sample_frames=3,
        caption_channels=24,
    )
    x, text = randn(2, 4, 3, size.side, size.side), randn(2, TEXT, 24, seed=2)
    text_mask = torch.ones(2, TEXT)
    text_mask[1, 4:] = 0
    *waves, frames, rows, columns = get_3d_rotary_pos_embed_allegro(
        head_width, ((0, 0), (size.grid, size.grid)), (size.grid, size.grid), 3
    )
    grid = torch.cartesian_prod(frames.long(), rows.long(), columns.long()).T.reshape(3, 1, -1).contiguous()
    return randomize(model), lambda t: {
        "hidden_states": x,
        "encoder_hidden_states": text,
        "timestep": at(t, 2).long(),
        "attention_mask": torch.ones(2, 3, size.side, size.side),
        "encoder_attention_mask": text_mask,
        "image_rotary_emb": (tuple(waves), tuple(grid)),
    }


def sana(size: Size = TINY) -> tuple[nn.Module, Inputs]:
    model = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=size.heads,
        attention_head_dim=size.head_width,
        num_layers=size.depth,
        num_cross_attention_heads=size.heads,
        cross_attention_head_dim=size.head_width,
        cross_attention_dim=size.width,
        caption_channels=24,
        sample_size=size.grid,
    )
    x, text, mask = randn(2, 4, size.grid, size.grid), randn(2, TEXT, 24, seed=2), torch.ones(2, TEXT)
    mask[1, 4:] = 0
    return randomize(model), lambda t: {
        "hidden_states": x,
        "encoder_hidden_states": text,
        "timestep": at(t, 2),
        "encoder_attention_mask": mask,
    }


MODELS: dict[str, Callable[..., tuple[nn.Module, Inputs]]] = {
    "DiT": dit,
    "PixArt-Sigma": pixart_sigma,
    "SD3": sd3,
    "SD3.5": sd35,
    "Flux": flux,
    "Chroma": chroma,
    "CogVideoX-2b": cogvideox,
    "CogVideoX-5b": functools.partial(cogvideox, rotary=True),
    "HunyuanDiT": hunyuan_dit,
    "Latte": latte,
    "Allegro": allegro,
    "Sana": sana,
}
