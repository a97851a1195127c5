"""Properties of the whole rewrite, over random transformers, decisions and trajectories.

Dynamo takes half a second a model, so every drawn model is tried at every level, with several drawn decisions and
trajectories each: 25 × 8 = 200 examples a level.
"""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from capture import apply, branches, capture
from driver import noise
from passes import GuardRegions, Normalize, ShareBodies
from qc_compiler.backend import _guarded_graph
from qc_compiler.options import parse_options
from qc_compiler.runtime import Pilot, Runtime
from qc_compiler.show import show
from qc_compiler.statistics import Statistic, ratios
from random_models import BATCH, TEXT, TOKENS, RandomModel, Reference, model_specs

LEVELS = ("network", "block", "sublayer")
MODELS, EXAMPLES_A_MODEL = 25, 8


class Rewritten:
    """A random model and its graph at one level, ready to be called."""

    def __init__(self, model, args, captured, level, depth):
        self.model, self.args, self.captured = model, args, captured
        self.gm = captured.after(Normalize(), ShareBodies(), GuardRegions(level, depth=depth))
        self.interface = self.gm.meta["interface"]
        self.names = [region.name for region in self.interface.regions]

    def positions(self, args):
        """Returns the graph's inputs with other arguments in the place of those that it was captured with."""
        found = {id(old): new for old, new in zip(self.args, args)}
        return [found.get(id(value), value) for value in self.captured.inputs]

    def __call__(self, args, compute, weights, slots):
        """Returns output, statistics and, for each region, its new slots."""
        flat = [t for name in self.names for tensors in slots[name] for t in tensors]
        decisions = torch.tensor([compute[name] for name in self.names])
        steering = torch.tensor([list(weights[name]) for name in self.names], dtype=torch.float32)
        with torch.no_grad():
            output, *rest = self.gm(*self.positions(args), decisions, steering, *flat)
        sums, values = rest[: len(self.names)], rest[len(self.names) :]
        rows = ratios(torch.stack(sums).numpy())
        fresh = {name: [] for name in self.names}
        for slot, value in zip(self.interface.slots, values):
            fresh[self.names[slot.region]].append(value)
        return output, rows, fresh

    def shapes(self, name):
        row = self.names.index(name)
        return [shape for slot in self.interface.slots if slot.region == row for shape in slot.shapes]


def inputs(width, seed=0, timestep=1000.0):
    x, prompt = noise(seed, BATCH, TOKENS, 4), noise(seed + 1, BATCH, TEXT, width)
    return x, torch.full((BATCH,), timestep), prompt


def plain(rewritten, args):
    with torch.no_grad():
        return rewritten.model(*args)


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()) + 1e-7)


def filled(rewritten, draw, depth):
    """Returns random slots, and decisions and weights drawn for them."""
    names = rewritten.names
    compute = dict(zip(names, draw(st.lists(st.booleans(), min_size=len(names), max_size=len(names)))))
    row = st.lists(st.floats(-2, 2, width=16), min_size=depth, max_size=depth)
    weights = {name: draw(row) for name in names}
    slots = {
        name: [[noise(draw(st.integers(0, 99)), *shape) for shape in rewritten.shapes(name)] for _ in range(depth)]
        for name in names
    }
    return compute, weights, slots


def check_steps(rewritten, level, depth, draw):
    """Invariants 1 and 2 and the algebra of reuse: y = x + Σ w·slot, region by region. Returns the decisions."""
    compute, weights, slots = filled(rewritten, draw, depth)
    args = inputs(rewritten.model.spec.width, draw(st.integers(0, 99)), draw(st.integers(0, 1000)))
    output, rows, fresh = rewritten(args, compute, weights, slots)
    reference = Reference(rewritten.model, level, compute, weights, slots)
    assert_close(output, reference(*args))
    for row, name in zip(rows, rewritten.names):
        if not compute[name]:
            continue
        for value in fresh[name]:
            assert_close(value, next(t for t in reference.fresh[name] if t.shape == value.shape))
        change = sum((new - old).abs().sum() for new, old in zip(fresh[name], slots[name][0]))
        size = sum(old.abs().sum() for old in slots[name][0])
        assert row[Statistic.CHANGE].item() == pytest.approx(float(change / size), rel=1e-4)
    everything = dict.fromkeys(rewritten.names, True)
    assert_close(rewritten(args, everything, weights, slots)[0], plain(rewritten, args))
    return tuple(compute.values())


def check_network(rewritten, depth, draw):
    """The network is computed, or extrapolated, as a whole."""
    _, weights, slots = filled(rewritten, draw, depth)
    args = inputs(rewritten.model.spec.width, draw(st.integers(0, 99)))
    output, _, fresh = rewritten(args, {"network": True}, weights, slots)
    assert_close(output, plain(rewritten, args))
    # Reusing with weight 1 what was just computed from the same input is the model again …
    once = {"network": [1.0] + [0.0] * (depth - 1)}
    repeated = {"network": [fresh["network"], *slots["network"][1:]]}
    again, _, _ = rewritten(args, {"network": False}, once, repeated)
    assert_close(again, output)
    # … and of two slots each counts with its own weight.
    if depth > 1:
        thirds = {"network": [0.75, 0.25] + [0.0] * (depth - 2)}
        split = [[2 * t for t in fresh["network"]], [-2 * t for t in fresh["network"]]]  # 0.75·2 − 0.25·2 = 1
        assert_close(rewritten(args, {"network": False}, thirds, {"network": split + slots["network"][2:]})[0], output)


def check_graph(rewritten, level, depth):
    """Invariants 3 and 5: nothing is left to do for the passes, and no branch returns its input."""
    gm, text = rewritten.gm, show(rewritten.gm)
    for graph_pass in (ShareBodies(), GuardRegions(level, depth=depth)):
        assert apply(graph_pass, gm).changed == 0
        assert show(gm) == text
    assert len(branches(gm)) > 0
    for branch in branches(gm):
        assert_owns_its_results(branch)


def assert_owns_its_results(branch):
    """Runs a branch for real: its results share no memory with its operands or with one another."""
    operands = [torch.rand(tuple(node.meta["val"].shape)) for node in branch.graph.find_nodes(op="placeholder")]
    results = branch(*operands)
    taken = {operand.untyped_storage().data_ptr() for operand in operands}
    for result in results:
        storage = result.untyped_storage().data_ptr()
        assert storage not in taken
        taken.add(storage)


class DrawingPilot(Pilot):
    """Decides in place of the rule, as drawn."""

    def __init__(self, names, depth, draw):
        self.names, self.depth, self.draw = names, depth, draw

    def decide(self, graph, position, state, inputs, before):
        row = st.lists(st.booleans(), min_size=len(self.names), max_size=len(self.names))
        return np.array(self.draw(row)), self.draw(rows_of_weights(len(self.names), self.depth)), None


def rows_of_weights(regions, depth):
    rows = st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0, 1.5]), min_size=regions * depth, max_size=regions * depth)
    return rows.map(lambda values: np.array(values, dtype=np.float32).reshape(regions, depth))


def check_trajectory(rewritten, level, depth, draw):
    """Step after step the runtime hands each region the slots that it filled, newest first, in each stream."""
    runtime = Runtime(parse_options({"cache": "static", "level": level, "cache_order": depth - 1}))
    count = len(rewritten.captured.inputs)
    graph = _guarded_graph(rewritten.gm, count, runtime)
    runtime.pilot, called = DrawingPilot(rewritten.names, depth, draw), []

    def compiled(*args):
        called.append((args[count].tolist(), args[count + 1].tolist()))
        return rewritten.gm(*args)

    graph.compiled = compiled
    gaps = draw(st.lists(st.integers(1, 100), min_size=1, max_size=4))
    num_streams = draw(st.integers(1, 2))
    kept = [{name: [] for name in rewritten.names} for _ in range(num_streams)]
    for timestep in 1000.0 - np.cumsum([0, *gaps]):
        for number in range(num_streams):
            args = inputs(rewritten.model.spec.width, 7 * number, float(timestep))
            with torch.no_grad():
                (output,) = graph(*rewritten.positions(args))
            compute, weights = (dict(zip(rewritten.names, row)) for row in called[-1])
            slots = kept[number]
            for name, row in weights.items():  # a weight for a slot that is not filled yet means: compute
                assert compute[name] or not any(row[len(slots[name]) :])
            reference = Reference(rewritten.model, level, compute, weights, slots)
            assert_close(output, reference(*args))
            for name, fresh in reference.fresh.items():
                slots[name] = [fresh, *slots[name]][:depth]


def test_random_transformers():
    seen = {level: [] for level in LEVELS}

    @settings(
        max_examples=MODELS,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking would compile for minutes
    )
    @given(model_specs(), st.integers(1, 3), st.data())
    def check(spec, depth, data):
        model, args = RandomModel(spec), inputs(spec.width)
        torch._dynamo.reset()
        captured = capture(model, *args)
        for level in LEVELS:
            note(f"level {level}")
            rewritten = Rewritten(model, args, captured, level, depth)
            check_graph(rewritten, level, depth)
            for _ in range(EXAMPLES_A_MODEL):
                if level == "network":
                    check_network(rewritten, depth, data.draw)
                    seen[level].append(())
                else:
                    seen[level].append(check_steps(rewritten, level, depth, data.draw))
                    check_trajectory(rewritten, level, depth, data.draw)

    check()
    assert all(len(decisions) >= 200 for decisions in seen.values())
    for level in ("block", "sublayer"):
        assert {True, False} <= {all(decision) for decision in seen[level]}
        assert any(not any(decision) for decision in seen[level])
