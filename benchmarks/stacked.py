"""The trained models with one list of blocks x → x, the form that the peers' caches ask for; the same weights.

diffusers' hooks also ask that the argument be called `hidden_states`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import harness  # noqa: F401 (puts the examples on the path)
from mmdit import MMDiT
from stdit import STDiT, modulate


def stacked(model: nn.Module) -> nn.Module:
    """Returns a model with the list `blocks`, each of which maps `hidden_states` to the like of it."""
    if isinstance(model, STDiT):
        return StackedSTDiT(model)
    if isinstance(model, MMDiT):
        return StackedMMDiT(model)
    model.blocks = nn.ModuleList(map(Block, model.blocks))
    return model


class Block(nn.Module):
    """A block that is of that form already."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden_states: Tensor, *conditions: Tensor) -> Tensor:
        return self.block(hidden_states, *conditions)


class SpatialTemporal(nn.Module):
    """A spatial block and the temporal one after it; the first of them tells the frames where they stand."""

    def __init__(self, spatial: nn.Module, temporal: nn.Module, frames: int, is_first: bool) -> None:
        super().__init__()
        self.spatial, self.temporal, self.frames, self.is_first = spatial, temporal, frames, is_first

    def forward(self, hidden_states: Tensor, y: Tensor, t: Tensor, temporal_pos: Tensor) -> Tensor:
        """Transforms tokens (B * F, S, D). All blocks have the same arguments: cache-dit gives them the first one's."""
        (_, patches, width), frames, batch = hidden_states.shape, self.frames, len(t)
        x = self.spatial(hidden_states, y, t.repeat_interleave(frames, dim=0))
        x = x.view(batch, frames, patches, width).transpose(1, 2).reshape(batch * patches, frames, width)
        if self.is_first:
            x = x + temporal_pos
        x = self.temporal(x, y, t.repeat_interleave(patches, dim=0))
        return x.view(batch, patches, frames, width).transpose(1, 2).reshape(batch * frames, patches, width)


class StackedSTDiT(nn.Module):
    def __init__(self, model: STDiT) -> None:
        super().__init__()
        self.inner = [model]  # not a child: its lists of blocks would be found as well
        pairs = zip(model.spatial_blocks, model.temporal_blocks, strict=True)
        frames = model.config.grid[0]
        self.blocks = nn.ModuleList(SpatialTemporal(*pair, frames, i == 0) for i, pair in enumerate(pairs))

    def forward(self, x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        (inner,) = self.inner
        batch, (frames, rows, columns) = len(x), inner.config.grid
        t_emb = inner.t_embedder(timestep, x.dtype)
        t, y = inner.t_block(t_emb), inner.y_embedder(label)
        x = inner.patch_embed(x).flatten(3).permute(0, 2, 3, 1)
        x = x.reshape(batch * frames, rows * columns, -1) + inner.spatial_pos
        for block in self.blocks:
            x = block(x, y, t, inner.temporal_pos)
        return inner.unpatchify(inner.final_layer(x.reshape(batch, frames * rows * columns, -1), t_emb))


class Joint(nn.Module):
    """A dual-stream block on text and image tokens in one sequence."""

    def __init__(self, dual: nn.Module, tokens: int) -> None:
        super().__init__()
        self.dual, self.tokens = dual, tokens

    def forward(self, hidden_states: Tensor, c: Tensor, rotary: Tensor) -> Tensor:
        text, image = hidden_states[:, : self.tokens], hidden_states[:, self.tokens :]
        return torch.cat(self.dual(text, image, c, rotary), dim=1)


class StackedMMDiT(nn.Module):
    def __init__(self, model: MMDiT) -> None:
        super().__init__()
        self.inner = [model]
        joint = (Joint(block, model.config.num_tokens) for block in model.dual_blocks)
        self.blocks = nn.ModuleList([*joint, *map(Block, model.single_blocks)])

    def forward(self, x: Tensor, timestep: Tensor, caption: Tensor) -> Tensor:
        (inner,) = self.inner
        (batch, tokens), patch, (rows, columns) = caption.shape, inner.config.patch, inner.config.grid
        c = inner.t_embedder(timestep, x.dtype)
        text = inner.word_embed(caption) + inner.word_pos
        x = torch.cat([text, inner.patch_embed(x).flatten(2).transpose(1, 2)], dim=1)
        for block in self.blocks:
            x = block(x, c, inner.rotary)
        shift, scale = inner.modulation(F.silu(c)).unsqueeze(1).chunk(2, dim=-1)
        x = inner.head(modulate(inner.norm(x[:, tokens:]), shift, scale))
        x = x.view(batch, rows, columns, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(batch, -1, rows * patch, columns * patch)
