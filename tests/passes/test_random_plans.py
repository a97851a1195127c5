"""What runs is what the plan says: over random plans, counted by the linears that the graph really calls."""

import numpy as np
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from capture import branches
from driver import Driver, noise
from qc_compiler.graph import body_calls, body_of, placeholders
from qc_compiler.plan import Plan

BLOCKS = ("blocks.0", "blocks.1", "blocks.2")
IN_A_BLOCK, OUTSIDE = 5, 3  # linears of `tiny_dit`
DEPTH = 2


def num_linears(run):
    """Returns how many linears a run calls."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        run()
    return sum(event.name == "aten::linear" for event in recorded.events())


@st.composite
def plans(draw):
    has_output, num_steps = draw(st.booleans()), draw(st.integers(2, 5))
    regions = ("output", *BLOCKS) if has_output else BLOCKS
    shape = (1, num_steps, len(regions))
    compute = np.array(draw(st.lists(st.booleans(), min_size=shape[1] * shape[2], max_size=shape[1] * shape[2])))
    size = shape[1] * shape[2] * DEPTH
    weights = np.array(draw(st.lists(st.sampled_from([0.0, 0.0, 0.5, 1.0]), min_size=size, max_size=size)))
    never = draw(st.lists(st.sampled_from(BLOCKS), max_size=2, unique=True))
    compute, weights = compute.reshape(shape), weights.reshape(*shape, DEPTH).astype(np.float32)
    for name in draw(st.sampled_from([(), tuple(never[:1])])):  # never computed, and of nothing: pruned for good
        compute[..., regions.index(name)], weights[:, :, regions.index(name)] = False, 0
    if has_output:
        compute[:, :, 0] |= compute[:, :, 1:].any(axis=2)
        weights[:, :, 0, 0] = 1.0  # the output is never pruned
    timesteps = tuple(1000.0 - 100 * i for i in range(num_steps))
    level = "output+block" if has_output else "block"
    return Plan("", level, regions, timesteps, compute, weights, pruned=tuple(never[1:]))


def expected_rows(plan, names):
    """Yields for each step which regions of the graph are computed: what is planned, and what a slot lacks."""
    columns = plan.columns(names)
    filled = np.zeros(len(names), dtype=int)
    least = np.array([int(name == "output") for name in names])
    for compute, weights in zip(plan.compute[0][:, columns], plan.weights[0][:, columns]):
        needed = [max(np.flatnonzero(row) + 1, default=0) for row in weights]
        lacking = filled < np.maximum(least, needed)
        row = compute | lacking
        if names[0] == "output" and not compute[0]:
            row[:] = row[:] | lacking[0] if row[0] else False
        filled = np.minimum(filled + row, DEPTH)
        yield row


def assert_nothing_dangles(gm):
    """No op that nothing reads, and no slot of a block; those of the output are read by the host."""
    bodies = {body_of(gm, call) for call in body_calls(gm)}
    for graph in (gm, *bodies, *branches(gm)):
        dead = [node.name for node in graph.graph.nodes if node.op == "call_function" and not node.users]
        assert not dead, dead
    names = gm.meta["interface"].names
    slots = [node for node in placeholders(gm.graph) if node.name.startswith("slot_")]
    assert len(slots) == len(gm.meta["interface"].slots) * DEPTH
    unread = {names[int(node.name.split("_")[1])] for node in slots if not node.users}
    assert unread <= {"output"}


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(plans())
def test_what_runs_is_what_the_plan_says(plan):
    assume(set(plan.removed) != set(BLOCKS))
    driver = Driver(3, plan=plan)
    names = driver.graph.names
    assert [name for name in names if name != "output"] == [name for name in BLOCKS if name not in plan.removed]
    assert_nothing_dangles(driver.gm)
    for timestep, row in zip(plan.timesteps, expected_rows(plan, names), strict=True):
        found = num_linears(lambda timestep=timestep: driver(noise(), timestep))
        blocks = int(sum(on for name, on in zip(names, row) if name != "output"))
        is_called = names[0] != "output" or row[0]
        assert found == (OUTSIDE + IN_A_BLOCK * blocks if is_called else 0)
        assert (driver.decisions[-1] is not None) == is_called
