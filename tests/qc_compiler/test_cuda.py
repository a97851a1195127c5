"""The whole way on a GPU; everything it consists of is tested without one, too."""

import pytest
import torch

from tiny_models import tiny_dit


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", ["w8a8", "w8a8+rotation", "w4a8", "fp8", "fp8+rotation", "nvfp4"])
def test_a_compiled_model_in_kernels_is_the_emulated_one(scheme, dtype, kernels_win):
    model = tiny_dit(2).to("cuda", dtype)
    x, t = torch.randn(2, 16, 8, device="cuda", dtype=dtype), torch.ones(2, device="cuda")
    found = []
    for emulate in (True, False):
        torch._dynamo.reset()
        options = {"cache": "off", "quantize": scheme, "emulate": emulate, "strict": True}
        with torch.no_grad():
            found.append(torch.compile(model, backend="quantcache", options=options)(x, t).double())
    # codes at a tie differ by one, and with bfloat16 in between by a few
    assert (found[1] - found[0]).norm() <= 0.03 * found[0].norm()
