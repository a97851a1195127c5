import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from safetensors.numpy import save_file

from capture import capture
from qc_compiler import plan as plan_module
from qc_compiler.attention import CACHED, FULL, INT8
from qc_compiler.backend import fingerprint
from qc_compiler.checksum import checksum
from qc_compiler.errors import PlanError
from qc_compiler.plan import TOKEN_ORDERS, HeadPlan, Plan, Quantization
from tiny_models import compile_eagerly, sample, tiny_dit

FINGERPRINT = "0123456789abcdef" * 4


def make(num_steps=3, num_regions=2, depth=2, streams=("0",), **changes):
    rng = np.random.default_rng(0)
    fields = {
        "fingerprint": FINGERPRINT,
        "level": "block",
        "regions": tuple(f"blocks.{i}" for i in range(num_regions)),
        "timesteps": tuple(float(1000 - 100 * i) for i in range(num_steps)),
        "compute": rng.random((len(streams), num_steps, num_regions)) < 0.5,
        "weights": rng.standard_normal((len(streams), num_steps, num_regions, depth)).astype(np.float32),
        "streams": streams,
        "measured": {"share": 0.33, "error": 0.01},
    }
    return Plan(**(fields | changes))


def assert_equal(a, b):
    for name in ("fingerprint", "level", "regions", "timesteps", "streams", "measured", "pruned", "reasons"):
        assert getattr(a, name) == getattr(b, name)
    for name in ("compute", "weights"):
        x, y = getattr(a, name), getattr(b, name)
        assert same(x, y)
    for name in ("compensation", "across"):
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None)
        assert x is None or same(x, y)
    p, q = a.attention, b.attention
    assert (p is None) == (q is None)
    assert p is None or ((p.layers, p.order) == (q.layers, q.order) and same(p.windows, q.windows))
    p, q = a.quantization, b.quantization
    assert (p is None) == (q is None)
    if p is not None:
        for name in ("recipe", "sites", "threshold", "regions"):
            assert getattr(p, name) == getattr(q, name)
        assert all(same(getattr(p, name), getattr(q, name)) for name in ("bits", "ratios", "alpha", "beta", "noise"))
        assert len(p.amax) == len(q.amax)
        assert all(map(same, p.amax, q.amax))


def same(x, y):
    return (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())


def quantization(num_sites=3, num_regions=2, **changes):
    rng = np.random.default_rng(1)
    fields = {
        "recipe": "importance+balance",
        "sites": tuple(f"blocks.{i}.mlp" for i in range(num_sites)),
        "bits": np.array([4, 8, 16] * num_sites, dtype=np.int8)[:num_sites],
        **{name: rng.random(num_sites, dtype=np.float32) for name in ("ratios", "alpha", "beta")},
        "threshold": 0.25,
        "amax": tuple(rng.random(3 + i, dtype=np.float32) for i in range(num_sites)),
        "noise": rng.random((2, num_regions), dtype=np.float32),
        "regions": tuple(f"blocks.{i}" for i in range(num_regions)),
    }
    return Quantization(**fields | changes)


def heads(*shape, layers=("blocks.0.attn", "blocks.1.attn"), order="time", **changes):
    """Windows of every kind; `shape` (S, N, A, H)."""
    shape = shape or (1, 3, len(layers), 4)
    windows = np.resize(np.array([FULL, CACHED, INT8, 1 / 8, 1.999], np.float32), shape)
    return HeadPlan(**{"layers": layers, "windows": windows, "order": order} | changes)


def without_schedule(num_steps=3, depth=1, **changes):
    return make(num_steps, 0, depth, **changes)


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


def floats(*shape):
    return npst.arrays(np.float32, shape, elements=st.floats(width=32, allow_nan=False, allow_infinity=False))


@st.composite
def quantizations(draw):
    num_sites, num_regions, widths = draw(st.integers(0, 3)), draw(st.integers(0, 2)), st.integers(0, 4)
    return Quantization(
        draw(names),
        tuple(draw(st.lists(names, min_size=num_sites, max_size=num_sites))),
        draw(npst.arrays(np.int8, num_sites)),
        *(draw(floats(num_sites)) for _ in range(3)),
        threshold=draw(finite),
        amax=tuple(draw(floats(draw(widths))) for _ in range(num_sites)) if draw(st.booleans()) else (),
        noise=draw(floats(draw(st.integers(1, 3)), num_regions)),
        regions=tuple(draw(st.lists(names, min_size=num_regions, max_size=num_regions))),
    )


@st.composite
def head_plans(draw, num_streams, num_steps):
    num_layers, codes = draw(st.integers(0, 3)), st.sampled_from([FULL, CACHED, INT8])
    shares = st.floats(0, 2, width=32, exclude_min=True, exclude_max=True)
    return HeadPlan(
        tuple(draw(st.lists(names, min_size=num_layers, max_size=num_layers))),
        draw(npst.arrays(np.float32, (num_streams, num_steps, num_layers, 2), elements=codes | shares)),
        draw(st.sampled_from(TOKEN_ORDERS)),
    )


@st.composite
def plans(draw):
    num_regions = draw(st.integers(0, 3))
    num_steps, depth, channels = (draw(st.integers(1, 4)) for _ in range(3))
    streams = tuple(draw(st.lists(names, min_size=1, max_size=3, unique=True)))
    return Plan(
        fingerprint=draw(names),
        level=draw(names),
        regions=tuple(draw(st.lists(names, min_size=num_regions, max_size=num_regions))),
        timesteps=tuple(draw(st.lists(finite, min_size=num_steps, max_size=num_steps))),
        compute=draw(npst.arrays(np.bool_, (len(streams), num_steps, num_regions))),
        weights=draw(
            npst.arrays(
                np.float32,
                (len(streams), num_steps, num_regions, depth),
                elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
            )
        ),
        streams=streams,
        measured=draw(st.dictionaries(names, finite, max_size=3)),
        quantization=draw(st.none() | quantizations()),
        compensation=draw(st.none() | floats(len(streams), num_steps, channels, 2)),
        attention=draw(st.none() | head_plans(len(streams), num_steps)),
        across=draw(st.none() | floats(len(streams), num_steps, 1 + depth)),
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
        "quantization": None,
        "attention": None,
        "pruned": [],
        "reasons": [],
    }
    arrays = {"compute": np.ones((1, 1, 1), np.uint8), "weights": np.ones((1, 1, 1, 1), np.float32)}
    fields["checksum"] = checksum(fields, sorted(arrays.items()))
    return arrays, fields | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 1}, "plan version 1, this quantcache reads 4: calibrate again"),
        ({"version": 9, "a field": "of the future"}, "plan version 9, this quantcache reads 4: calibrate again"),
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
        {"compute": np.ones((3, 2), bool)},
        {"compute": np.ones((1, 2, 2), bool)},
        {"weights": np.ones((1, 3, 1, 2), np.float32)},
        {"weights": np.ones((3, 2, 2), np.float32)},
        {"weights": np.ones((2, 3, 2, 1), np.float32)},
        {"timesteps": (1.0,)},
    ],
)
def test_arrays_must_fit_the_steps_and_regions(changes):
    with pytest.raises(PlanError, match=r"regions needs compute .* and weights .*, got"):
        make(**changes)


@pytest.mark.parametrize("changes", [{"depth": 0}, {"num_steps": 0}, {"streams": ()}])
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


def scheduled(computed, **changes):
    """A plan of 10 steps, 1000, 900 … 100, that computes some of them."""
    compute = np.isin(np.arange(10), computed)[None, :, None]
    weights = np.where(compute[..., None], 0, changes.pop("weights", np.float32([0.6, 0.3, 0.1])))
    changes = {"across": np.ones((1, 10, 4), dtype=np.float32), "level": "output", "regions": ("output",)} | changes
    return make(num_steps=10, num_regions=1, depth=3, compute=compute, weights=weights, **changes)


def test_a_plan_for_other_steps():
    numbered = np.arange(10, dtype=np.float32)[None, :, None, None] * np.float32([1, 0, 0.1])
    across = np.arange(10, dtype=np.float32)[None, :, None] * np.float32([1, -1, 0, 0])
    plan = scheduled([0, 3, 4, 9], weights=numbered, across=across).retimed([1000, 820, 640, 460, 280, 100])
    assert plan.timesteps == (1000, 820, 640, 460, 280, 100)
    assert np.flatnonzero(plan.compute).tolist() == [0, 2, 5]  # 700 and 600 both lie nearest to 640
    stands_for = [1.5, 4 + 5 / 3, 4 + 10 / 3]  # half of the way from 0 to 3, a third and two of that from 4 to 9
    np.testing.assert_allclose(plan.weights[0, [1, 3, 4], 0], np.outer(stands_for, [1, 0, 0.1]), rtol=1e-5)
    np.testing.assert_allclose(plan.across[0, [1, 3, 4]], np.outer(stands_for, [1, -1, 0, 0]), rtol=1e-5)
    assert not plan.weights[plan.compute].any()
    assert plan.measured == {"share": 0.5}
    assert plan.reasons == ("re-timed from 10 steps to 6: weights are read between those fitted",)


def test_where_a_plan_skipped_nothing_its_new_steps_are_on_a_line():
    plan = scheduled([0, 3, 4, 9]).retimed([1000 - 50 * i for i in range(19)])
    assert np.flatnonzero(plan.compute).tolist() == [0, 6, 8, 18]
    np.testing.assert_allclose(plan.weights[0, 7, 0], [7 / 6, -1 / 6, 0], rtol=1e-5)  # at 650, from 700 and 1000
    np.testing.assert_allclose(plan.weights[0, 3, 0], [0.6, 0.3, 0.1], rtol=1e-5)
    assert not plan.across[0, 7].any()


def test_a_plan_for_other_steps_keeps_what_it_prunes_and_what_its_heads_do():
    windows = np.full((1, 10, 1, 2), FULL, dtype=np.float32)
    windows[0, 5:] = CACHED
    compute = np.ones((1, 10, 2), dtype=bool)
    compute[0, :, 1] = False
    weights = np.zeros((1, 10, 2, 1), dtype=np.float32)
    heads = HeadPlan(("blocks.0.attn",), windows)
    plan = make(num_steps=10, depth=1, compute=compute, weights=weights, attention=heads).retimed([990, 510, 90])
    assert plan.compute[0].tolist() == [[True, False]] * 3
    assert not plan.weights.any()
    assert plan.removed == ("blocks.1",)
    assert plan.attention.windows[0, :, 0, 0].tolist() == [FULL, CACHED, CACHED]


def test_a_plan_for_its_own_steps_computes_the_same():
    plan = scheduled([0, 2, 7])
    assert same(plan.retimed(plan.timesteps).compute, plan.compute)


@pytest.mark.parametrize("timesteps", [[], [1000, float("nan")], [1000, 1000], [[1000, 500]]])
def test_timesteps_that_are_none(timesteps):
    with pytest.raises(PlanError, match=r"timesteps=\[.*\]: expected finite numbers, each another"):
        make().retimed(timesteps)
    with pytest.raises(PlanError, match="the plan has no steps"):
        Plan.without_schedule(FINGERPRINT).retimed([1000, 500])


def test_streams_have_rows_of_their_own_and_unknown_ones_those_of_the_first():
    plan = make(streams=("cond", "uncond"))
    assert [plan.index_of(stream) for stream in ("cond", "uncond", "7")] == [0, 1, 0]


@pytest.mark.parametrize("shape", [(1, 3, 2), (2, 3, 3), (1, 2, 3), (1, 3)])
def test_what_is_mixed_in_fits_streams_steps_and_depth(shape):
    with pytest.raises(PlanError, match=r"needs across \(1, 3, 3\), got"):
        make(across=np.zeros(shape, np.float32))


def test_what_is_mixed_in_is_finite():
    with pytest.raises(PlanError, match="not all finite"):
        make(across=np.full((1, 3, 3), np.nan, np.float32))


def test_sizes():
    plan = make(num_steps=5, depth=3)
    assert (plan.num_steps, plan.depth) == (5, 3)


# -- what is known of the linears, and the compensation


@pytest.fixture
def full(tmp_path):
    path = tmp_path / "full.safetensors"
    whole().save(path)
    return path


def whole():
    return make(
        quantization=quantization(), compensation=np.ones((1, 3, 4, 2), np.float32), attention=heads(1, 3, 2, 4)
    )


def test_all_that_calibration_found_is_loaded_again(full):
    loaded = Plan.load(full)
    assert_equal(loaded, whole())
    assert [amax.shape for amax in loaded.quantization.amax] == [(3,), (4,), (5,)]
    before = full.read_bytes()
    loaded.save(full)
    assert full.read_bytes() == before


def test_arrays_in_another_order_are_saved_as_they_are(tmp_path):
    """An array that is a transpose in memory is the same array in the file."""
    noise, correction = np.arange(6, dtype=np.float32).reshape(2, 3).T, np.ones((1, 3, 4, 2), np.float32)
    correction[..., 0] = np.arange(12).reshape(3, 4)
    plan = make(quantization=quantization(noise=noise), compensation=np.asfortranarray(correction))
    plan.save(tmp_path / "a")
    loaded = Plan.load(tmp_path / "a")
    assert (loaded.quantization.noise == noise).all()
    assert (loaded.compensation == correction).all()


def test_damage_to_what_is_known_of_the_linears_is_noticed(full):
    """Every bit of the arrays counts."""
    whole = full.read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")
    for at in range(begin, len(whole)):
        full.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(PlanError, match="checksum differs"):
            Plan.load(full)


@pytest.mark.parametrize("word", ["importance+balance", "blocks.1.mlp", "0.25", "blocks.1.attn"])
def test_damage_to_their_header_is_noticed(full, word):
    whole = full.read_bytes()
    assert word.encode() in whole
    full.write_bytes(whole.replace(word.encode(), word.replace("1", "2").replace("5", "6").replace("b", "d").encode()))
    with pytest.raises(PlanError, match="checksum differs"):
        Plan.load(full)


@pytest.mark.parametrize("missing", ["bits", "noise", "amax", "windows"])
def test_a_file_without_one_of_their_arrays(tmp_path, missing, monkeypatch):
    """Even where the checksum is right."""
    save = plan_module.save_file

    def spoiled(arrays, path, metadata):
        fields = json.loads(metadata["quantcache_plan"])
        fields.pop("checksum")
        kept = {name: array for name, array in arrays.items() if name != missing}
        fields["checksum"] = checksum(fields, sorted(kept.items()))
        save(kept, path, metadata={"quantcache_plan": json.dumps(fields)})

    monkeypatch.setattr(plan_module, "save_file", spoiled)
    whole().save(tmp_path / "a")
    with pytest.raises(PlanError, match="calibrate again"):
        Plan.load(tmp_path / "a")


@pytest.mark.parametrize("name", ["bits", "ratios", "alpha", "beta"])
@pytest.mark.parametrize("shape", [(2,), (4,), (), (3, 1)])
def test_there_is_one_number_for_each_linear(name, shape):
    with pytest.raises(PlanError, match=f"a plan for 3 linears needs as many {name}: calibrate again"):
        quantization(**{name: np.zeros(shape, np.float32)})


@pytest.mark.parametrize(
    "changes",
    [
        {"amax": (np.ones(3, np.float32),)},
        {"noise": np.zeros((2, 3), np.float32)},
        {"noise": np.zeros(2, np.float32)},
        {"noise": np.zeros((2, 2, 1), np.float32)},
        {"regions": ()},
    ],
)
def test_ranges_and_noise_belong_to_linears_and_regions(changes):
    with pytest.raises(PlanError, match="ranges or noise do not belong to its linears and regions: calibrate again"):
        quantization(**changes)


@pytest.mark.parametrize("shape", [(1, 3, 4), (2, 3, 4, 2), (1, 2, 4, 2), (1, 3, 4, 3), (1, 3, 4, 2, 1), (3, 4, 2)])
def test_a_compensation_of_another_shape(shape):
    with pytest.raises(PlanError, match=r"a plan of 1 streams and 3 steps cannot hold a compensation .*: calibrate"):
        make(compensation=np.ones(shape, np.float32))


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_a_compensation_is_finite(bad):
    with pytest.raises(PlanError, match="cannot hold a compensation"):
        make(compensation=np.full((1, 3, 4, 2), bad, np.float32))


def test_outliers_are_above_a_ratio_of_25():
    known = quantization(ratios=np.array([25.0, 25.1, np.nan], np.float32))
    assert known.has_outliers.tolist() == [False, True, False]


def test_the_noise_of_a_region_is_its_own_or_that_of_its_block():
    known = quantization()
    assert [known.region_of(name) for name in ("blocks.1", "blocks.0/attn", "blocks.1/mlp", "output", "blocks.2")] == [
        1, 0, 1, None, None,
    ]  # fmt: skip


# -- what heads do


def test_plans_that_say_the_same_of_heads_have_one_digest():
    plan = make(attention=heads())
    assert plan.digest == make(attention=heads()).digest
    other = heads().windows.copy()
    other[0, 2, 1, 3] = FULL if other[0, 2, 1, 3] != FULL else CACHED
    changes = [None, heads(windows=other), heads(order="raster"), heads(layers=("blocks.0.attn", "blocks.1.attn2"))]
    assert len({plan.digest, *(make(attention=changed).digest for changed in changes)}) == 5


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -0.5, -3.0, 2.0, 64.0])
def test_windows_are_shares_or_codes(bad):
    windows = heads().windows.copy()
    windows[0, 1, 0, 2] = bad
    with pytest.raises(PlanError, match=r"a plan for 2 attentions cannot hold windows .*out of range: calibrate again"):
        heads(windows=windows)


@pytest.mark.parametrize("shape", [(3, 2, 4), (1, 3, 1, 4), (1, 3, 3, 4), (1, 1, 3, 2, 4)])
def test_windows_have_an_axis_for_the_layers(shape):
    with pytest.raises(PlanError, match="a plan for 2 attentions cannot hold windows"):
        heads(windows=np.full(shape, FULL, np.float32))


def test_an_order_of_tokens_has_a_name():
    with pytest.raises(PlanError, match="the plan's order of tokens is 'frames', not one of raster, time"):
        heads(order="frames")


@pytest.mark.parametrize("shape", [(2, 3, 2, 4), (1, 2, 2, 4), (1, 4, 2, 4)])
def test_heads_are_for_the_streams_and_steps_of_the_plan(shape):
    with pytest.raises(PlanError, match=r"a plan of 1 streams and 3 steps cannot hold heads for \(.*\): calibrate"):
        make(attention=heads(*shape))


def test_heads_that_are_left_open_are_for_any_steps():
    blank = heads(layers=(), windows=np.zeros((1, 1, 0, 0), np.float32))
    assert make(attention=blank).attention is blank


def test_damage_to_the_windows_in_a_file_is_refused(tmp_path, monkeypatch):
    """Windows that no plan can hold, in a file whose checksum is right."""
    monkeypatch.setattr(HeadPlan, "__post_init__", lambda _: None)
    make(attention=heads(windows=np.full((1, 3, 2, 4), 7, np.float32))).save(tmp_path / "a")
    monkeypatch.undo()
    with pytest.raises(PlanError, match="out of range: calibrate again"):
        Plan.load(tmp_path / "a")


def test_the_kept_heads_of_a_layer_are_those_that_any_step_of_any_stream_caches():
    windows = np.full((2, 3, 2, 4), FULL, np.float32)
    windows[0, 1, 0, 3] = windows[1, 2, 0, 1] = windows[1, 0, 0, 1] = CACHED
    plan = heads(windows=windows)
    assert (plan.kept("blocks.0.attn", 4), plan.kept("blocks.1.attn", 2)) == ((1, 3), ())
    for layer, num_heads in (("blocks.0.attn", 5), ("blocks.0.attn", 3)):
        with pytest.raises(PlanError, match=f"blocks.0.attn has {num_heads} heads, the plan is for another number"):
            plan.kept(layer, num_heads)
    with pytest.raises(PlanError, match="nothing about the attention 'blocks.2.attn': calibrate this model"):
        plan.kept("blocks.2.attn", 4)


def test_a_model_may_be_compiled_for_two_plans():
    """Dynamo compares the options of the two; arrays have no one truth value."""
    plans = [make(attention=heads(), quantization=quantization()) for _ in range(2)]
    assert plans[0] != plans[1]
    assert plans[0].digest == plans[1].digest
    assert len({*plans, *plans}) == 2


# -- plans without a schedule


def test_a_plan_without_regions_has_no_schedule(tmp_path):
    plan = without_schedule(quantization=quantization())
    assert not plan.has_schedule
    assert make().has_schedule
    plan.save(tmp_path / "a")
    assert_equal(Plan.load(tmp_path / "a"), plan)
    plan.check_model(FINGERPRINT, ("blocks.0", "blocks.1"))
    with pytest.raises(PlanError, match="calibrate this model"):
        plan.check_model("f" * 64, ("blocks.0", "blocks.1"))


LINEARS = [f"blocks.{i}.{name}" for i in range(2) for name in ("attn.qkv", "attn.out", "mlp.0", "mlp.2")]


@pytest.fixture
def plan_for_dit():
    """Makes plans without a schedule for `tiny_dit(2)`."""
    gm = capture(tiny_dit(2), torch.zeros(2, 16, 8), torch.ones(2)).normalized()
    torch._dynamo.reset()

    def made(recipe, bits=8, **changes):
        known = quantization(
            8,
            recipe=recipe,
            sites=tuple(LINEARS),
            bits=np.array(np.broadcast_to(bits, 8), np.int8),
            amax=tuple(np.full(width, 2.0, np.float32) for width in (32, 32, 32, 64) * 2)
            if "balance" in recipe
            else (),
            **{"noise": np.zeros((1, 2), np.float32)} | changes,
        )
        return without_schedule(fingerprint=fingerprint(gm), quantization=known)

    return made


def run(**options):
    torch._dynamo.reset()
    return sample(compile_eagerly(tiny_dit(2), {"cache": "off", "emulate": True} | options))


def test_eight_bits_for_every_weight_are_w8a8(plan_for_dit, tmp_path):
    plan_for_dit("importance").save(tmp_path / "a")
    found = run(plan=tmp_path / "a")
    assert torch.equal(found, run(quantize="w8a8"))
    assert not torch.equal(found, run())


def test_the_bits_of_a_plan_are_those_of_the_weights(plan_for_dit):
    assert torch.equal(run(plan=plan_for_dit("importance", 4)), run(quantize="w4a8"))
    assert torch.equal(run(plan=plan_for_dit("importance", 16)), run())
    mixed = run(plan=plan_for_dit("importance", [4, 4, 4, 4, 8, 8, 8, 8]))
    assert not any(torch.equal(mixed, run(quantize=name)) for name in ("w8a8", "w4a8"))


def test_the_ranges_of_a_plan_survive_the_file(plan_for_dit, tmp_path):
    plan = plan_for_dit("w8a8+balance")
    plan.save(tmp_path / "a")
    found = run(plan=tmp_path / "a")
    assert torch.equal(found, run(plan=plan))
    assert not torch.equal(found, run(quantize="w8a8"))


@pytest.mark.parametrize("options", [{}, {"cache": "static"}])
def test_a_plan_for_another_model_is_refused_whatever_it_holds(options):
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="calibrate this model"):
        run(plan=without_schedule(quantization=quantization(recipe="importance")), **options)


def test_a_plan_file_that_was_written_anew_is_read_anew(tmp_path, plan_for_dit):
    path, plan = tmp_path / "plan", plan_for_dit("importance", 8)
    plan.save(path)
    assert torch.equal(run(plan=str(path)), run(plan=plan))
    other = plan_for_dit("importance", 4)
    assert (other.digest == plan.digest, plan_for_dit("importance", 8).digest == plan.digest) == (False, True)
    other.save(path)
    assert torch.equal(run(plan=str(path)), run(plan=other))


# -- what is pruned


def pruning(compute, weights=None, regions=("a", "b"), **changes):
    rows = np.array(compute, dtype=bool)
    factors = np.zeros((1, *rows.shape, 1), "f4") if weights is None else np.array(weights, "f4")[None, ..., None]
    fields = {"regions": regions, "timesteps": tuple(map(float, range(len(rows)))), "compute": rows[None]}
    return make(**{**fields, "weights": factors} | changes)


def test_the_names_are_saved_and_count_in_the_digest(tmp_path):
    plan = make(pruned=("blocks.1", "blocks.0/mlp"))
    plan.save(tmp_path / "a")
    assert_equal(Plan.load(tmp_path / "a"), plan)
    assert len({make(pruned=names).digest for names in ((), ("blocks.1",), ("blocks.1", "blocks.0/mlp"))}) == 3


def test_a_file_of_the_version_before_is_refused_by_its_version(tmp_path):
    arrays, fields = header(version=3)
    del fields["pruned"]
    save_file(arrays, tmp_path / "a", metadata={"quantcache_plan": json.dumps(fields)})
    with pytest.raises(PlanError, match="plan version 3, this quantcache reads 4"):
        Plan.load(tmp_path / "a")


@pytest.mark.parametrize("pruned", ["blocks.1", ["blocks.1"], (1,)])
def test_pruned_is_a_tuple_of_names(pruned):
    with pytest.raises(PlanError, match="expected a tuple of names"):
        make(pruned=pruned)


def test_what_is_never_computed_and_has_no_weight_is_removed():
    assert pruning([[1, 0], [1, 0]]).removed == ("b",)
    assert pruning([[1, 0], [1, 1]]).removed == ()
    assert pruning([[1, 0], [1, 0]], [[0, 0], [0, 0.5]]).removed == ()
    assert pruning([[1, 0], [1, 0]], pruned=("c", "b")).removed == ("c", "b")


def test_a_weight_in_one_stream_keeps_a_region():
    weights = np.zeros((2, 2, 2, 1), "f4")
    weights[1, 0, 1] = 1
    rows = np.array([[[1, 0], [1, 0]]] * 2, bool)
    fields = {"regions": ("a", "b"), "timesteps": (1.0, 0.0), "compute": rows, "streams": ("x", "y")}
    assert make(**fields, weights=weights).removed == ()
    assert make(**fields, weights=0 * weights).removed == ("b",)


@pytest.mark.parametrize(
    ("pruned", "regions", "fits"),
    [
        ((), ("a", "b"), True),
        ((), ("b", "a"), True),
        ((), ("a",), False),
        ((), ("a", "b", "c"), False),
        (("b",), ("a",), True),
        (("b/mlp",), ("a",), True),
        (("c",), ("a",), False),
    ],
)
def test_a_graph_may_lack_what_is_removed_and_nothing_else(pruned, regions, fits):
    plan = make(pruned=pruned, regions=("a", "b"), compute=np.ones((1, 3, 2), bool))
    if fits:
        plan.check_model(FINGERPRINT, regions)
        assert [plan.regions[column] for column in plan.columns(regions)] == list(regions)
    else:
        with pytest.raises(PlanError, match="calibrate this model"):
            plan.check_model(FINGERPRINT, regions)


def test_sublayers_leave_with_their_block():
    plan = make(1, 2, regions=("a/attention", "b/mlp"), pruned=("b",), compute=np.ones((1, 1, 2), bool))
    plan.check_model(FINGERPRINT, ("a/attention",))


def test_what_cannot_be_pruned_is_refused_with_its_step():
    plan = pruning([[1, 1], [1, 0]])
    plan.check_model(FINGERPRINT, ("a", "b"))
    with pytest.raises(PlanError, match="prunes 'b' at step 1, but a result of it is no residual"):
        plan.check_model(FINGERPRINT, ("a", "b"), ("b",))


def test_fewer_steps_whose_timesteps_the_plan_has_are_refused_and_retimed_run():
    """4 steps are every second of the plan's 8; a trajectory that begins later (image to image) is none of those."""
    model = tiny_dit(2)
    torch._dynamo.reset()
    plan = scheduled([0, 3, 4, 9], fingerprint="").retimed([1000 - 125 * i for i in range(8)])
    planned = compile_eagerly(model, {"plan": plan})
    assert torch.equal(sample(planned)[0], sample(model)[0])
    with pytest.raises(PlanError, match=r"step 2 has the timestep of step 3 of the plan's 8: .* plan.retimed"):
        sample(planned, 4)
    torch._dynamo.reset()
    found = sample(compile_eagerly(model, {"plan": plan.retimed([1000, 750, 500, 250])}), 4)
    assert torch.equal(found[0], sample(model, 4)[0])
    x, computed = torch.randn(2, 16, 8), []
    for timestep in (500.0, 375.0, 250.0):
        computed.append(planned(x, torch.full((2,), timestep)))
    assert not torch.equal(computed[0], computed[2])
