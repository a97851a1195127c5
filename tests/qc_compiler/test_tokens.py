"""Small blocks, all in one model; what real models look like is in test_diffusers_models.py."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from capture import capture
from qc_compiler.graph import body_calls, body_of, placeholders
from qc_compiler.tokens import Segment, TokenLayouts, num_text_of

SDPA = torch.ops.aten.scaled_dot_product_attention.default
NORM = F.layer_norm
VISION, TEXT = 6, 4


def layout(text):
    """`4t 6v` are four tokens of text, then six of vision."""
    return tuple(Segment(int(part[:-1]), part[-1] == "v") for part in text.split())


def rotated(x):
    left, right = x.chunk(2, dim=-1)
    return x * 0.5 + torch.cat([-right, left], dim=-1) * torch.linspace(0, 1, x.shape[1])[:, None]


BLOCKS = {  # what attention reads, of a sample and a prompt: queries, or queries and keys; and where it comes from
    "the sample": (lambda x, p: x, "6v"),
    "the prompt": (lambda x, p: p, "4t"),
    "text first": (lambda x, p: torch.cat([p, x], 1), "4t 6v"),
    "text last": (lambda x, p: torch.cat([x, p], dim=-2), "6v 4t"),
    "text in the middle": (lambda x, p: torch.cat([x[:, :2], p, x[:, 2:]], 1), "2v 4t 4v"),
    "text on both sides": (lambda x, p: torch.cat([p, x, p], 1), "4t 6v 4t"),
    "neighbours of a kind": (lambda x, p: torch.cat([p, p[:, :1], x, x], 1), "5t 12v"),
    "joined along the channels": (lambda x, p: torch.cat([x, x * 2], -1), "6v"),
    "a slice": (lambda x, p: torch.cat([p, x], 1)[:, 1:], "3t 6v"),
    "a slice without text": (lambda x, p: torch.cat([p, x], 1)[:, TEXT:], "6v"),
    "a slice from the end": (lambda x, p: torch.cat([x, p], 1)[:, -5:], "1v 4t"),
    "a slice of the channels": (lambda x, p: torch.cat([p, x], 1)[..., 2:6], "4t 6v"),
    "every second": (lambda x, p: x[:, ::2], "3v"),
    "a split": (lambda x, p: torch.cat(torch.cat([p, x], 1).split([TEXT, VISION], 1)[::-1], 1), "6v 4t"),
    "a split of the text": (lambda x, p: torch.cat(torch.cat([p, x], 1).split([3, 7], 1)[::-1], 1), "1t 6v 3t"),
    "a split of the channels": (lambda x, p: torch.cat([p, x], 1).split([4, 4], -1)[1], "4t 6v"),
    "chunks": (lambda x, p: torch.cat([p, x], 1).chunk(2, 1)[1], "5v"),
    "stacked and taken apart": (lambda x, p: torch.cat([p, x], 1).unflatten(-1, (2, 4)).unbind(2)[1], "4t 6v"),
    "selected": (lambda x, p: torch.cat([p, x], 1).unflatten(-1, (2, 4)).permute(2, 0, 1, 3)[1], "4t 6v"),
    "views": (lambda x, p: torch.cat([p, x], 1).view(1, 10, 2, 4).flatten(2).unsqueeze(1).squeeze(1), "4t 6v"),
    "transposed": (lambda x, p: torch.cat([p, x], 1).transpose(1, 2).contiguous().transpose(-2, -1), "4t 6v"),
    "rows and columns made one": (lambda x, p: x.view(1, 2, 3, 8).transpose(1, 2).reshape(1, 6, 8), "6v"),
    "normed and scaled by the prompt": (lambda x, p: NORM(x, (8,)) * (1 + p.mean(1, keepdim=True)), "6v"),
    "normed and scaled by the sample": (lambda x, p: NORM(p, (8,)) * (1 + x.mean(1, keepdim=True)), "4t"),
    "rotated": (lambda x, p: rotated(torch.cat([x, p], 1)), "6v 4t"),
    "repeated": (lambda x, p: p[:, :1].expand(1, 6, 8) + 0, "6t"),
    "as many of both": (lambda x, p: (x[:, :TEXT], p), "4v", "4t"),
    "as many in another order": (lambda x, p: (torch.cat([x, p], 1), torch.cat([p, x], 1)), "6v 4t", "4t 6v"),
}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block(reads) for reads, *_ in BLOCKS.values())

    def forward(self, x, prompt):
        for block in self.blocks:
            x = block(x, prompt)
        return x


class Block(nn.Module):
    def __init__(self, reads):
        super().__init__()
        self.reads = reads

    def forward(self, x, prompt):
        read = self.reads(x, prompt)
        q, k = read if isinstance(read, tuple) else (read, read)
        q, k = (tokens.unflatten(-1, (2, -1)).transpose(1, 2) for tokens in (q, k))
        return x + F.scaled_dot_product_attention(q, k, k).mean(dim=(1, 2, 3), keepdim=True)[0]


@pytest.fixture(scope="module")
def found():
    """Returns for each block the layouts of its queries and its keys."""
    gm = capture(Model(), torch.randn(1, VISION, 8), torch.randn(1, TEXT, 8)).shared()
    latent = next(node for node in placeholders(gm.graph) if node.meta["val"].shape[1] == VISION)
    layouts, calls = TokenLayouts(gm, latent), body_calls(gm)
    reads = {}
    for name, call in zip(BLOCKS, calls, strict=True):
        (node,) = body_of(gm, call).graph.find_nodes(op="call_function", target=SDPA)
        reads[name] = [layouts.of(call, arg, 2) for arg in node.args[:2]]
    return reads


@pytest.mark.parametrize("name", BLOCKS)
def test_tokens_are_followed_to_where_they_come_from(found, name):
    _, queries, *keys = BLOCKS[name]
    assert found[name] == [layout(queries), layout(keys[0] if keys else queries)]


@pytest.mark.parametrize(
    ("tokens", "num_text"),
    [("6v", 0), ("4t 6v", 4), ("6v 4t", -4), ("4t", None), ("2v 4t 4v", None), ("4t 6v 4t", None)],
)
def test_text_is_first_or_last(tokens, num_text):
    assert num_text_of(layout(tokens)) == num_text
