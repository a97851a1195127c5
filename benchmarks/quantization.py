"""Quality of quantized models, without any cache: the trained video DiT and the trained image DiT, 50 steps.

Same seeds and labels for all; PSNR and SSIM against the full precision, accuracy of the digit classifier. Formats are
emulated in plain torch (`emulate=True`), so that every one can be measured on every device: quality only, no speed.

    python benchmarks/quantization.py
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from harness import header, table, write
from sampling import load_classifier, load_dit, load_model, psnr, sample, ssim

STEPS, SEED, GUIDANCE = 50, 7, 2.0
SCHEMES = (
    "w8a8",
    "fp8",
    "w4a8",
    "w4a6",
    "w4a6+rotation",
    "w4a6+rank32",
    "nvfp4",
    "nvfp4+rotation",
    "nvfp4+rank32",
    "dmpq",
)
MODELS: dict[str, tuple[Callable[[], Any], int, tuple[int, ...]]] = {
    "video DiT": (load_model, 20, (1, 8, 16, 16)),
    "image DiT": (load_dit, 100, (1, 16, 16)),
}


def main() -> None:
    text = header("Quality of quantized models", "python benchmarks/quantization.py")
    for name, (load, batch, size) in MODELS.items():
        text += f"\n## {name}, {STEPS} steps, guidance {GUIDANCE}, {batch} samples\n\n{compare(load(), batch, size)}"
    write("quantization.md", text)


def compare(model: Any, batch: int, size: tuple[int, ...]) -> str:
    from classifier import accuracy  # `harness` has put the examples on the path by now

    model.requires_grad_(False)
    label, classifier = torch.arange(batch) % 10, load_classifier()

    def generate(compiled: Callable[..., Tensor]) -> Tensor:
        return sample(compiled, label, STEPS, SEED, GUIDANCE, size)

    reference = generate(model)
    rows = [("full precision", "∞", "1.0000", f"{accuracy(classifier, reference, label):.1%}")]
    for scheme in SCHEMES:
        options = {"cache": "off", "quantize": scheme, "emulate": True}
        found = generate(torch.compile(model, backend="quantcache", options=options))
        recognized = accuracy(classifier, found, label)
        quality = psnr(found, reference), ssim(as_video(found), as_video(reference))
        rows.append((scheme, f"{quality[0]:.1f}", f"{quality[1]:.4f}", f"{recognized:.1%}"))
        print(rows[-1], flush=True)
        torch._dynamo.reset()
    return table(("scheme", "PSNR dB", "SSIM", "recognized"), rows)


def as_video(x: Tensor) -> Tensor:
    return x.unsqueeze(2) if x.dim() == 4 else x


if __name__ == "__main__":
    main()
