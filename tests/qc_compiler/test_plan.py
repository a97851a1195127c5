import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from safetensors.numpy import save_file

from qc_compiler import plan as plan_module
from qc_compiler.errors import PlanError
from qc_compiler.plan import Plan

FINGERPRINT = "0123456789abcdef" * 4


def make(num_steps=3, num_regions=2, depth=2, streams=("0",), **changes):
    rng = np.random.default_rng(0)
    fields = {
        "fingerprint": FINGERPRINT,
        "level": "block",
        "regions": tuple(f"blocks.{i}" for i in range(num_regions)),
        "timesteps": tuple(float(1000 - 100 * i) for i in range(num_steps)),
        "compute": rng.random((num_steps, num_regions)) < 0.5,
        "weights": rng.standard_normal((len(streams), num_steps, num_regions, depth)).astype(np.float32),
        "streams": streams,
        "measured": {"share": 0.33, "error": 0.01},
    }
    return Plan(**(fields | changes))


def assert_equal(a, b):
    for name in ("fingerprint", "level", "regions", "timesteps", "streams", "measured"):
        assert getattr(a, name) == getattr(b, name)
    for name in ("compute", "weights"):
        x, y = getattr(a, name), getattr(b, name)
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("plans")


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "plan.safetensors"
    make().save(path)
    return path


names = st.text(max_size=12)
finite = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def plans(draw):
    num_steps, num_regions, depth = (draw(st.integers(1, 4)) for _ in range(3))
    streams = tuple(draw(st.lists(names, min_size=1, max_size=3, unique=True)))
    return Plan(
        fingerprint=draw(names),
        level=draw(names),
        regions=tuple(draw(st.lists(names, min_size=num_regions, max_size=num_regions))),
        timesteps=tuple(draw(st.lists(finite, min_size=num_steps, max_size=num_steps))),
        compute=draw(npst.arrays(np.bool_, (num_steps, num_regions))),
        weights=draw(
            npst.arrays(
                np.float32,
                (len(streams), num_steps, num_regions, depth),
                elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
            )
        ),
        streams=streams,
        measured=draw(st.dictionaries(names, finite, max_size=3)),
    )


@settings(max_examples=200, deadline=None)
@given(plans())
def test_what_is_saved_is_loaded_bit_for_bit(folder, plan):
    plan.save(folder / "random")
    assert_equal(Plan.load(folder / "random"), plan)


def test_saving_twice_gives_the_same_file(path):
    before = path.read_bytes()
    Plan.load(str(path)).save(path)
    assert path.read_bytes() == before


# -- damaged files


def test_a_missing_file(tmp_path):
    with pytest.raises(PlanError, match=r"no plan at .*nowhere: expected a file written by Plan\.save"):
        Plan.load(tmp_path / "nowhere")


def test_a_folder(tmp_path):
    with pytest.raises(PlanError, match="no plan at"):
        Plan.load(tmp_path)


def test_a_file_cut_short_anywhere(path):
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(PlanError, match="is damaged or no safetensors file"):
            Plan.load(path)


def test_a_file_with_something_behind_it(path):
    path.write_bytes(path.read_bytes() + b"\0" * 8)
    with pytest.raises(PlanError, match="is damaged or no safetensors file"):
        Plan.load(path)


def test_a_byte_changed_anywhere_is_noticed_or_harmless(path):
    """Only the padding and the spelling of the header may differ without a change of the plan."""
    whole, plan, harmless = path.read_bytes(), Plan.load(path), 0
    for at in range(len(whole)):
        for bits in (0x01, 0x20, 0x80, 0xFF):
            damaged = bytearray(whole)
            damaged[at] ^= bits
            path.write_bytes(damaged)
            try:
                assert_equal(Plan.load(path), plan)
                harmless += 1
            except PlanError:
                pass
    assert harmless < 0.05 * 4 * len(whole)


def test_a_flipped_bit_in_the_data_says_that_the_file_was_changed(path):
    whole = bytearray(path.read_bytes())
    whole[-1] ^= 1
    path.write_bytes(whole)
    with pytest.raises(PlanError, match=r"was changed since it was written \(checksum differs\): calibrate again"):
        Plan.load(path)


def test_another_safetensors_file(tmp_path):
    save_file({"weights": np.zeros(3, "f4")}, tmp_path / "model")
    with pytest.raises(PlanError, match="is a safetensors file without a plan in its header"):
        Plan.load(tmp_path / "model")


def test_no_safetensors_file_at_all(tmp_path):
    (tmp_path / "text").write_text("hello, I am no plan at all, just some text")
    with pytest.raises(PlanError, match="is damaged or no safetensors file"):
        Plan.load(tmp_path / "text")


def header(**changes):
    fields = {
        "version": plan_module.VERSION,
        "fingerprint": FINGERPRINT,
        "level": "block",
        "regions": ["a"],
        "streams": ["0"],
        "timesteps": [1.0],
        "measured": {},
    }
    arrays = {"compute": np.ones((1, 1), np.uint8), "weights": np.ones((1, 1, 1, 1), np.float32)}
    fields["checksum"] = plan_module._checksum(fields, arrays)
    return arrays, fields | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "plan version 2, this quantcache reads 1: calibrate again"),
        ({"version": "1"}, "the plan's header is invalid: "),
        ({"regions": "a"}, "the plan's header is invalid: "),
        ({"timesteps": ["1"]}, "the plan's header is invalid: "),
        ({"unknown": 1}, "the plan's header is invalid: Extra inputs"),
        ({"level": "network"}, "checksum differs"),
        ({"timesteps": [2.0]}, "checksum differs"),
    ],
)
def test_a_header_that_says_something_else(tmp_path, changes, message):
    arrays, fields = header(**changes)
    save_file(arrays, tmp_path / "a", metadata={"quantcache_plan": json.dumps(fields)})
    with pytest.raises(PlanError, match=message):
        Plan.load(tmp_path / "a")


def test_that_header_without_changes_is_a_plan(tmp_path):
    arrays, fields = header()
    save_file(arrays, tmp_path / "a", metadata={"quantcache_plan": json.dumps(fields)})
    assert Plan.load(tmp_path / "a").regions == ("a",)


def test_a_tensor_too_many(tmp_path):
    arrays, fields = header()
    save_file(arrays | {"more": np.ones(1)}, tmp_path / "a", metadata={"quantcache_plan": json.dumps(fields)})
    with pytest.raises(PlanError, match="checksum differs"):
        Plan.load(tmp_path / "a")


# -- plans that do not fit


@pytest.mark.parametrize(
    "changes",
    [
        {"compute": np.ones((2, 2), bool)},
        {"weights": np.ones((1, 3, 1, 2), np.float32)},
        {"weights": np.ones((3, 2, 2), np.float32)},
        {"weights": np.ones((2, 3, 2, 1), np.float32)},
        {"timesteps": (1.0,)},
    ],
)
def test_arrays_must_fit_the_steps_and_regions(changes):
    with pytest.raises(PlanError, match=r"regions needs compute .* and weights .*, got"):
        make(**changes)


@pytest.mark.parametrize("changes", [{"depth": 0}, {"num_steps": 0}, {"num_regions": 0}, {"streams": ()}])
def test_a_plan_is_not_empty(changes):
    with pytest.raises(PlanError, match="a plan needs a stream, a step, a region and a depth"):
        make(**changes)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_are_finite(bad):
    weights = np.ones((1, 3, 2, 2), np.float32)
    weights[0, 1, 1, 0] = bad
    with pytest.raises(PlanError, match="weights are not all finite: calibrate again"):
        make(weights=weights)


def test_another_model():
    plan = make()
    plan.check_model(FINGERPRINT, ("blocks.0", "blocks.1"))
    with pytest.raises(PlanError, match=r"2 regions and fingerprint 0123456789ab, this model has 2 and ffffffffffff"):
        plan.check_model("f" * 64, ("blocks.0", "blocks.1"))
    with pytest.raises(PlanError, match=r"2 regions .* this model has 1 .*: calibrate this model"):
        plan.check_model(FINGERPRINT, ("blocks.0",))


def test_the_step_of_a_timestep():
    plan = make(num_steps=4)
    assert [plan.step_of(t) for t in (1000.0, 900.0, 800.4, 700.0)] == [0, 1, 2, 3]


@pytest.mark.parametrize("timestep", [950.0, 1002.0, 650.0, float("nan"), float("inf")])
def test_a_timestep_of_another_schedule(timestep):
    with pytest.raises(PlanError, match=r"which is none of the plan's 4 steps \(1000, 900 … 700\): calibrate for this"):
        make(num_steps=4).step_of(timestep)


def test_streams_have_weights_of_their_own_and_unknown_ones_those_of_the_first():
    plan = make(streams=("cond", "uncond"))
    assert (plan.weights_of("uncond", 1) == plan.weights[1, 1]).all()
    assert (plan.weights_of("cond", 1) == plan.weights[0, 1]).all()
    assert (plan.weights_of("7", 2) == plan.weights[0, 2]).all()


def test_sizes():
    plan = make(num_steps=5, depth=3)
    assert (plan.num_steps, plan.depth) == (5, 3)
