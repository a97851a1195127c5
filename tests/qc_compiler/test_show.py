import pytest
import torch
from torch import nn

from capture import capture
from qc_compiler.show import show, show_type


class Stack(nn.Module):
    """As small as a model can be that has blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Mix()])

    def forward(self, x):
        return self.blocks[0](x)


class Mix(nn.Module):
    def forward(self, x):
        return x + nn.functional.scaled_dot_product_attention(x, x, x)


def test_a_graph_without_bodies():
    def model(x, w):
        a, b = torch.nn.functional.linear(x, w).chunk(2, dim=-1)
        return a + 2 * b, x.to(torch.bfloat16)

    gm = capture(model, torch.ones(3, 4), torch.ones(6, 4)).normalized()
    assert (
        show(gm)
        == """\
graph(%L_x_: f32[3, 4], %L_w_: f32[6, 4]):
  %linear = aten.linear(%L_x_, %L_w_) : f32[3, 6]
  %split = aten.split(%linear, 3, -1) : (f32[3, 3], f32[3, 3])
  %getitem = getitem(%split, 0) : f32[3, 3]
  %getitem_1 = getitem(%split, 1) : f32[3, 3]
  %mul = aten.mul(%getitem_1, 2) : f32[3, 3]
  %add = aten.add(%getitem, %mul) : f32[3, 3]
  %_to_copy = aten._to_copy(%L_x_, dtype=torch.bfloat16) : bf16[3, 4]
  return (%add, %_to_copy)"""
    )


def test_the_bodies_follow_the_graph_that_calls_them():
    gm = capture(Stack(), torch.ones(1, 2, 3, 4)).shared()
    assert (
        show(gm)
        == """\
graph(%L_x_: f32[1, 2, 3, 4]):
  %body_0 = get body_0
  %invoke_subgraph = invoke_subgraph(%body_0, body_0, %L_x_) : (f32[1, 2, 3, 4])
  %getitem = getitem(%invoke_subgraph, 0) : f32[1, 2, 3, 4]
  return (%getitem)
body body_0(%l_x_: f32[1, 2, 3, 4]):
  %scaled_dot_product_attention = aten.scaled_dot_product_attention(%l_x_, %l_x_, %l_x_) : f32[1, 2, 3, 4]
  %add = aten.add(%l_x_, %scaled_dot_product_attention) : f32[1, 2, 3, 4]
  return (%add)"""
    )


def test_keyword_arguments_and_symbolic_sizes():
    gm = capture(
        lambda x: torch.zeros(x.shape[0], dtype=torch.int64) + (x > 0).sum(), torch.ones(5, 2), dynamic=True
    ).normalized()
    text = show(gm)
    assert "dtype=torch.int64" in text
    assert "i64[s" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.empty(2, 3, dtype=torch.float8_e4m3fn), "f8e4m3[2, 3]"),
        (torch.empty((), dtype=torch.bool), "b1[]"),
        (torch.empty(1, dtype=torch.complex64), "torch.complex64[1]"),
        ((torch.empty(2), 3), "(f32[2], 3)"),
        (None, "None"),
    ],
)
def test_types(value, text):
    assert show_type(value) == text
