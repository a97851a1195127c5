"""The smallest models on which each pass fires."""

from collections.abc import Callable, Iterable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


def attend(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x)


class Mix(nn.Module):
    """y = x + attention(x): a block without weights."""

    def forward(self, x: Tensor) -> Tensor:
        return x + attend(x)


class Feed(nn.Module):
    """y = x + mlp(x): no attention."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x)


class Modulated(nn.Module):
    """y = x + attention(2 · norm(x) · w): its linear reads a function of the stream."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.query = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.layer_norm(x, (x.shape[-1],))
        h *= 2
        return x + F.scaled_dot_product_attention(self.query(h), x, x)


class Calls(nn.Module):
    """A block that is any function of a stream."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


class Stack(nn.Module):
    """Runs blocks one after the other."""

    def __init__(self, *blocks: nn.Module | Callable[..., Any]) -> None:
        super().__init__()
        modules: Iterable[nn.Module] = (b if isinstance(b, nn.Module) else Calls(b) for b in blocks)
        self.blocks = nn.ModuleList(modules)
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x
