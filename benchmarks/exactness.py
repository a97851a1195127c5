"""What must be exactly equal, and what must never recompile, with real Inductor.

1. `preset: exact` is bit-identical to `backend="inductor"`; with all guards in place and every decision "compute" the
   result is within 1e-5 relative in float32: on the example model and on the diffusers models of the test suite.
2. One graph and no recompilation over a 50-step trajectory, a second one, two guidance streams, a changed threshold.

    python benchmarks/exactness.py
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import qc_compiler
from harness import header, table, write
from sampling import load_model, sample

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))
TIMESTEPS = (900.0, 700.0)


def main() -> None:
    rows = []
    for name, model, call in models():
        outputs = {}
        for label, backend, options in (
            ("inductor", "inductor", None),
            ("exact", "quantcache", {"preset": "exact"}),
            ("block", "quantcache", {"cache": "static", "interval": 1, "level": "block", "strict": True}),
            ("sublayer", "quantcache", {"cache": "static", "interval": 1, "level": "sublayer", "strict": True}),
            ("network", "quantcache", {"cache": "static", "interval": 1, "level": "network", "strict": True}),
        ):
            compiled = torch.compile(model, backend=backend, options=options, fullgraph=True)
            with torch.no_grad():
                outputs[label] = torch.cat([call(compiled, timestep).flatten() for timestep in TIMESTEPS])
            torch._dynamo.reset()
        reference = outputs.pop("inductor")
        identical = "yes" if torch.equal(outputs.pop("exact"), reference) else "NO"
        errors = [f"{((out - reference).abs().max() / reference.abs().max()).item():.1e}" for out in outputs.values()]
        rows.append((name, identical, *errors))
        print(*rows[-1], flush=True)
    text = header("Exactness: nothing on, and everything computed", "python benchmarks/exactness.py")
    headings = (
        "model",
        "exact: bit-identical",
        *(f"{level}, all computed" for level in ("block", "sublayer", "network")),
    )
    text += f"\nErrors: largest difference from Inductor over the largest value.\n\n{table(headings, rows)}"
    text += f"\n## Graphs\n\n{recompilations()}"
    write("exactness.md", text)


def models() -> list[tuple[str, nn.Module, Callable[..., Tensor]]]:
    """Returns name, model and a function of (model, timestep) for the example and the diffusers models."""
    from diffusers_models import MODELS

    example = load_model().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(2, 1, 8, 16, 16, generator=generator), torch.tensor([1, 2])
    found: list[tuple[str, nn.Module, Callable[..., Tensor]]] = [
        ("example STDiT", example, lambda model, t: model(x, torch.full((2,), t), labels))
    ]
    for name, build in MODELS.items():
        model, inputs = build()
        found.append((name, model, lambda model, t, inputs=inputs: model(**inputs(t), return_dict=False)[0]))
    return found


def recompilations() -> str:
    """Counts what Dynamo compiles over trajectories, streams and a changed threshold."""
    model = load_model().requires_grad_(False)
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(
        model, backend="quantcache", fullgraph=True, options={"cache": "tdc", "level": "block", "cache_order": 1}
    )
    rows = []
    label = torch.arange(2)
    for what, guidance, threshold in (
        ("50 steps", 1.0, 0.4),
        ("a second trajectory", 1.0, 0.4),
        ("two guidance streams", 2.0, 0.4),
        ("another threshold", 1.0, 0.1),
    ):
        if threshold != 0.4:
            qc_compiler.configure(compiled, threshold=threshold)
        sample(compiled, label, 50, guidance=guidance)
        share = qc_compiler.summary(compiled).computed_share
        rows.append((what, torch._dynamo.utils.counters["stats"]["unique_graphs"], f"{share:.2f}"))
    return table(("after", "graphs compiled so far", "computed share"), rows)


if __name__ == "__main__":
    main()
