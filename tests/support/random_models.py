"""Random small transformers, and a reference that caches them in plain torch: no graph, no pass, no cond.

The model calls its blocks, and the blocks their branches, through `Recorder.run`. By itself that only calls the
function. A `Reference` steps in between and does what the decisions say.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

TOKENS, TEXT, BATCH = 6, 3, 2


@dataclass(frozen=True)
class BlockSpec:
    """One block: its kind, whether it is gated and modulated by the timestep, and whether it updates in place."""

    kind: str  # sequential, parallel, fused (one stream); joint (two streams)
    gated: bool
    in_place: bool


@dataclass(frozen=True)
class ModelSpec:
    """A model: its blocks, the glue after each of them, its width and whether the last prompt is read."""

    blocks: tuple[BlockSpec, ...]
    glue: tuple[str, ...]
    width: int
    num_heads: int
    reads_prompt: bool
    seed: int

    @property
    def two_streams(self) -> bool:
        return any(block.kind == "joint" for block in self.blocks)


GLUE = ("none", "scale", "add", "norm", "tanh")


@st.composite
def model_specs(draw: Any) -> ModelSpec:
    depth = draw(st.integers(1, 4))
    two_streams = draw(st.booleans())
    alike = draw(st.booleans())
    kinds = st.just("joint") if two_streams else st.sampled_from(("sequential", "parallel", "fused"))
    block = st.builds(BlockSpec, kinds, st.booleans(), st.booleans())
    blocks = [draw(block)] * depth if alike else draw(st.lists(block, min_size=depth, max_size=depth))
    return ModelSpec(
        tuple(blocks),
        tuple(draw(st.lists(st.sampled_from(GLUE), min_size=depth, max_size=depth))),
        draw(st.sampled_from((8, 16))),
        draw(st.sampled_from((1, 2, 4))),
        draw(st.booleans()),
        draw(st.integers(0, 1000)),
    )


class Attend(nn.Module):
    def __init__(self, width: int, num_heads: int, num_streams: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.ModuleDict({str(i): nn.Linear(width, 3 * width) for i in range(num_streams)})
        self.out = nn.ModuleDict({str(i): nn.Linear(width, width) for i in range(num_streams)})

    def forward(self, *streams: Tensor) -> tuple[Tensor, ...]:
        batch, _, width = streams[0].shape
        joined = torch.cat([self.qkv[str(i)](x) for i, x in enumerate(streams)], dim=1)
        q, k, v = joined.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, -1, width)
        parts = mixed.split([x.shape[1] for x in streams], dim=1)
        return tuple(self.out[str(i)](part) for i, part in enumerate(parts))


def run_plainly(name: str, function: Callable[..., Any], *streams: Tensor) -> Any:
    return function(*streams)


class RandomBlock(nn.Module):
    def __init__(self, spec: BlockSpec, width: int, num_heads: int) -> None:
        super().__init__()
        self.spec, self.width = spec, width
        self.num_streams = 2 if spec.kind == "joint" else 1
        self.attend = Attend(width, num_heads, self.num_streams)
        self.feed = nn.ModuleDict(
            {
                str(i): nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
                for i in range(self.num_streams)
            }
        )
        self.modulate = nn.Linear(width, 4 * width * self.num_streams) if spec.gated else None
        self.join = nn.Linear(2 * width, width) if spec.kind == "fused" else None
        self.run: Callable[..., Any] = run_plainly

    def norm(self, x: Tensor, scale: Tensor | None) -> Tensor:
        h = F.layer_norm(x, (self.width,))
        if scale is None:
            return h
        if self.spec.in_place:
            h *= 1 + scale
            return h
        return h * (1 + scale)

    def forward(self, x: Tensor, temb: Tensor, prompt: Tensor | None = None) -> Any:
        parts: Sequence[Tensor | None] = [None] * 8
        if self.modulate is not None:
            parts = list(self.modulate(F.silu(temb))[:, None].chunk(4 * self.num_streams, dim=-1))
        scale, gate, scale2, gate2, *others = parts

        def gated(y: Tensor, by: Tensor | None) -> Tensor:
            return y if by is None else by * y

        def mlp(i: int, x: Tensor, scale: Tensor | None, gate: Tensor | None) -> tuple[Tensor]:
            return (gated(self.feed[str(i)](self.norm(x, scale)), gate),)

        def attention(x: Tensor) -> tuple[Tensor]:
            return (gated(self.attend(self.norm(x, scale))[0], gate),)

        if self.spec.kind == "joint":
            assert prompt is not None
            c_scale, c_gate, c_scale2, c_gate2 = others

            def joint(x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
                a, b = self.attend(self.norm(x, scale), self.norm(c, c_scale))
                return gated(a, gate), gated(b, c_gate)

            a, b = self.run("attention", joint, x, prompt)
            x, prompt = x + a, prompt + b
            (a,) = self.run("mlp1", lambda x: mlp(0, x, scale2, gate2), x)
            (b,) = self.run("mlp2", lambda c: mlp(1, c, c_scale2, c_gate2), prompt)
            return x + a, prompt + b
        if self.spec.kind == "fused":
            assert self.join is not None
            join = self.join

            def both(x: Tensor) -> tuple[Tensor]:
                h = self.norm(x, scale)
                return (gated(join(torch.cat([self.attend(h)[0], F.gelu(self.feed["0"](h))], dim=-1)), gate),)

            (a,) = self.run("attention", both, x)
            return x + a
        (a,) = self.run("attention", attention, x)
        if self.spec.kind == "parallel":
            (b,) = self.run("mlp1", lambda x: mlp(0, x, scale2, gate2), x)
            return x + a + b
        x = x + a
        (b,) = self.run("mlp1", lambda x: mlp(0, x, scale2, gate2), x)
        return x + b


class RandomModel(nn.Module):
    """forward(x (B, N, 4), timestep (B,), prompt (B, T, width)) → (B, N, 4)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        torch.manual_seed(spec.seed)
        self.spec = spec
        self.embed, self.head = nn.Linear(4, spec.width), nn.Linear(spec.width, 4)
        self.blocks = nn.ModuleList(RandomBlock(block, spec.width, spec.num_heads) for block in spec.blocks)
        self.offset = nn.Parameter(torch.randn(spec.width))
        self.run: Callable[..., Any] = run_plainly
        self.eval().requires_grad_(False)

    def glue(self, kind: str, x: Tensor) -> Tensor:
        match kind:
            case "scale":
                return x * 1.25
            case "add":
                return x + self.offset
            case "norm":
                return F.layer_norm(x, x.shape[-1:])
            case "tanh":
                return 3 * torch.tanh(x / 3)
        return x

    def forward(self, x: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        angles = timestep[:, None] / 1000 * torch.arange(1, self.spec.width // 2 + 1)
        temb = torch.cat([angles.sin(), angles.cos()], dim=-1)
        x = self.embed(x)
        for i, (block, glue) in enumerate(zip(self.blocks, self.spec.glue)):
            if self.spec.two_streams:
                x, prompt = self.run(f"blocks.{i}", lambda x, c, block=block: block(x, temb, c), x, prompt)
            else:
                (x,) = self.run(f"blocks.{i}", lambda x, block=block: (block(x, temb),), x)
            x = self.glue(glue, x)
        if self.spec.reads_prompt:
            x = x + prompt.mean(dim=1, keepdim=True)
        return self.head(x)


Slots = dict[str, list[list[Tensor]]]


class Reference:
    """Runs a random model as decisions and weights say, in plain torch.

    Args:
        model: What to run; it is left as it was.
        level: `block` or `sublayer`.
        compute: For each region whether it is computed.
        weights: For each region the weights of its slots, newest first.
        slots: For each region the tensors of its slots, newest first; told from one another by their shapes.

    Attributes:
        fresh: For each computed region its new slots.
    """

    def __init__(
        self,
        model: RandomModel,
        level: str,
        compute: dict[str, bool],
        weights: dict[str, Sequence[float]],
        slots: Slots,
    ) -> None:
        self.model, self.level = model, level
        self.compute, self.weights, self.slots = compute, weights, slots
        self.fresh: dict[str, list[Tensor]] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        try:
            if self.level == "block":
                self.model.run = self.block
            else:
                for i, block in enumerate(self.model.blocks):
                    block.run = self.branch(i)  # type: ignore[assignment]
            with torch.no_grad():
                return self.model(*inputs)
        finally:
            self.model.run = run_plainly
            for block in self.model.blocks:
                block.run = run_plainly  # type: ignore[assignment]

    def block(self, name: str, function: Callable[..., Any], *streams: Tensor) -> Any:
        if self.compute[name]:
            results = function(*streams)
            self.fresh[name] = [y - x for x, y in zip(streams, results)]
            return results
        return tuple(x + self.extrapolated(name, x) for x in streams)

    def branch(self, number: int) -> Callable[..., Any]:
        def run(kind: str, function: Callable[..., Any], *streams: Tensor) -> Any:
            name = self.region(number, kind)
            if name is None or self.compute[name]:
                results = function(*streams)
                if name is not None:
                    self.fresh[name] = list(results)
                return results
            return tuple(self.extrapolated(name, x) for x in streams)

        return run

    def region(self, number: int, kind: str) -> str | None:
        """Returns the region of a branch; None where the graph has none, since nothing reads what it adds."""
        names = [f"blocks.{number}/{suffix}" for suffix in (kind, f"joint-{kind}", kind.rstrip("1"))]
        return next((name for name in names if name in self.compute), None)

    def extrapolated(self, name: str, like: Tensor) -> Tensor:
        total = torch.zeros_like(like)
        for weight, tensors in zip(self.weights[name], self.slots[name]):
            mine = [t for t in tensors if t.shape == like.shape]
            total = total + weight * mine[0] if mine else total  # a stream that nothing reads has no slot
        return total
