"""Models small enough to trace in a blink, and a way to run the backend without Inductor."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qc_compiler.backend import quantcache


def eager(gm: Any, *_: Any, **__: Any) -> Any:
    """Runs a rewritten graph as it stands: milliseconds instead of seconds, and exact."""
    return gm


def eager_backend(gm: Any, example_inputs: Any, *, options: Any = None) -> Any:
    """The backend with everything but Inductor."""
    return quantcache(gm, example_inputs, options=options, compile_plain=eager, compile_guarded=eager)


def compile_eagerly(model: Any, options: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    """`torch.compile(model, backend="quantcache", options=...)` without Inductor."""
    return torch.compile(model, backend=lambda gm, ex: eager_backend(gm, ex, options=options), fullgraph=True, **kwargs)


class Attention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x_BNC: Tensor) -> Tensor:
        batch, tokens, width = x_BNC.shape
        q, k, v = self.qkv(x_BNC).reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width))


class Block(nn.Module):
    """An adaLN block; it updates in place and chunks its modulation, as real ones do."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.attn = Attention(width, num_heads)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(approximate="tanh"), nn.Linear(2 * width, width))
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x_BNC: Tensor, temb_BC: Tensor) -> Tensor:
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(F.silu(temb_BC))[:, None].chunk(6, dim=-1)
        h = F.layer_norm(x_BNC, x_BNC.shape[-1:]) * (1 + scale) + shift
        x_BNC = x_BNC + gate * self.attn(h)
        h = F.layer_norm(x_BNC, x_BNC.shape[-1:])
        h *= 1 + scale2
        h += shift2
        return x_BNC + gate2 * self.mlp(h)


class TinyDiT(nn.Module):
    """forward(x (B, N, 8), timestep (B,)) → (B, N, 8)."""

    def __init__(self, depth: int = 3, width: int = 32, num_heads: int = 4) -> None:
        super().__init__()
        self.embed, self.time = nn.Linear(8, width), nn.Linear(16, width)
        self.blocks = nn.ModuleList(Block(width, num_heads) for _ in range(depth))
        self.head = nn.Linear(width, 8)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        angles = timestep.float()[:, None] * torch.exp(-torch.arange(8, device=x.device))
        temb = self.time(torch.cat([angles.sin(), angles.cos()], dim=-1).to(x.dtype))
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, temb)
        return self.head(x)


def tiny_dit(depth: int = 3, seed: int = 0) -> TinyDiT:
    torch.manual_seed(seed)
    return TinyDiT(depth).eval().requires_grad_(False)


def sample(model: Any, num_steps: int = 8, seed: int = 0, batch: int = 2, tokens: int = 16) -> Tensor:
    """Euler steps of a made-up flow from t = 1000 down; returns (num_steps, B, N, 8), the model's predictions."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, 8, generator=generator)
    predictions = []
    with torch.no_grad():
        for step in range(num_steps):
            timestep = torch.full((batch,), 1000.0 * (1 - step / num_steps))
            predictions.append(model(x, timestep))
            x = x - predictions[-1] / num_steps
    return torch.stack(predictions)


def guided(model: Any, rows: slice = slice(2), num_steps: int = 12) -> Tensor:
    """Euler steps with two streams, of which the second sees another input; returns (2, 16, 8), or rows of that.

    Twelve, or the first of those.
    """
    x = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(3))[rows]
    with torch.no_grad():
        for i in range(num_steps):
            t = torch.full((len(x),), 1000.0 * (1 - i / 12))
            cond, uncond = model(x, t), model(0.9 * x, t)
            x = x - (uncond + 2 * (cond - uncond)) / 12
    return x


def predictions(model: Any, num_steps: int) -> Tensor:
    """Returns what the model says of inputs that do not depend on it, (num_steps, 2, 16, 8)."""
    x = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        steps = [model(x * (1 - 0.1 * i), torch.full((2,), 1000.0 - 100 * i)) for i in range(num_steps)]
    return torch.stack(steps)
