import copy
import gc
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qc_compiler
from qc_compiler import Plan
from qc_compiler.errors import OptionError, PackedFileError, PlanError, QuantCacheError
from qc_compiler.formats.schemes import SCHEMES
from qc_compiler.packing import PackedLinear, weight_bytes
from qc_compiler.plan import Quantization
from qc_compiler.registry import runtime_of
from tiny_models import TinyDiT, compile_eagerly, eager_backend, sample, tiny_dit

X, T = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0)), torch.full((2,), 500.0)
SCHEME = pytest.mark.parametrize("scheme", SCHEMES)


def run(model, x=X, t=T):
    with torch.no_grad():
        return model(x, t)


class Wide(nn.Module):
    def __init__(self, width=256, depth=2):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.Linear(4 * width, width)) for _ in range(depth)
        )
        self.eval().requires_grad_(False)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


# -- what a packed model computes


@SCHEME
def test_a_packed_model_computes_what_the_option_quantize_means(scheme):
    """Eagerly, and compiled without further options, as the float model with `quantize` does."""
    model = tiny_dit(2)
    options = {"cache": "off", "quantize": scheme, "emulate": True}
    expected = run(compile_eagerly(model, options))
    packed = qc_compiler.pack_(copy.deepcopy(model), scheme)
    for block in packed.blocks:  # the option leaves modulations alone, packing does not
        block.modulation = copy.deepcopy(model.blocks[list(packed.blocks).index(block)].modulation)
    assert torch.equal(run(packed), expected)
    assert torch.equal(run(compile_eagerly(packed, {"cache": "off", "emulate": True, "quantize": scheme})), expected)


def test_compiled_without_options_it_runs_the_kernel():
    packed = qc_compiler.pack_(tiny_dit(2), "w8a8")
    expected = run(packed)
    seen = []

    def backend(gm, inputs):
        from qc_compiler.backend import quantcache

        def keep(graph, **_):
            seen.append(graph)
            return graph

        return quantcache(gm, inputs, options={}, compile_guarded=keep)

    found = run(torch.compile(packed, backend=backend, fullgraph=True))
    text = qc_compiler.show.show(seen[0])
    assert "quantcache.int8_matmul" in text
    assert "quantcache.dequantize" not in text
    assert (found - expected).abs().max() / expected.abs().max() < 0.02  # ±63 in place of ±127


def test_a_modulation_keeps_its_activations():
    packed = PackedLinear(nn.Linear(64, 32).requires_grad_(False), SCHEMES["nvfp4"])
    row = torch.randn(3, 64)
    assert torch.equal(packed(row), torch.nn.functional.linear(row, packed.dequantize(), packed.bias))


# -- memory


def test_the_float_weights_are_gone():
    model = Wide()
    weights = [weakref.ref(m.weight) for m in model.modules() if isinstance(m, nn.Linear)]
    assert len(weights) == 4
    qc_compiler.pack_(model, "nvfp4")
    gc.collect()
    assert [ref() for ref in weights] == [None] * 4
    names = [name for name, p in model.named_parameters()]
    assert not any(name.endswith("weight") for name in names)


@pytest.mark.parametrize(
    ("scheme", "bits"), [("w8a8", 8 + 32 / 256), ("w4a8", 4 + 32 / 128), ("fp8", 8 + 32 / 256), ("nvfp4", 4.5)]
)
def test_bytes_are_those_of_the_format(scheme, bits):
    model = Wide().to(torch.bfloat16)
    elements = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    biases = 2 * sum(m.bias.numel() for m in model.modules() if isinstance(m, nn.Linear))
    assert weight_bytes(model) == 2 * elements + biases
    qc_compiler.pack_(model, scheme)
    assert weight_bytes(model) - biases == pytest.approx(elements * bits / 8, rel=0.02)


def test_moving_and_casting_keeps_codes_and_scales():
    packed = qc_compiler.pack_(Wide(), "nvfp4")
    before = {name: b.clone() for name, b in packed.named_buffers()}
    packed.to(torch.bfloat16)
    for name, buffer in packed.named_buffers():
        assert buffer.dtype == before[name].dtype
        assert torch.equal(buffer.reshape(-1).view(torch.uint8), before[name].reshape(-1).view(torch.uint8))
    assert packed.blocks[0][0].bias.dtype == torch.bfloat16
    assert packed(torch.randn(1, 3, 256, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert packed.blocks[0][0].dequantize().dtype == torch.bfloat16


# -- files


@SCHEME
def test_a_saved_model_loads_into_one_on_the_meta_device(scheme, tmp_path, monkeypatch):
    model = qc_compiler.pack_(tiny_dit(2), scheme)
    expected = run(model)
    qc_compiler.save_packed(model, tmp_path / "m.safetensors")
    with torch.device("meta"):
        empty = tiny_dit(2)
    loaded = qc_compiler.load_packed(empty, tmp_path / "m.safetensors")
    assert not [t for t in (*loaded.parameters(), *loaded.buffers()) if t.is_meta]
    assert torch.equal(run(loaded), expected)
    assert weight_bytes(loaded) == weight_bytes(model)
    assert not loaded.training


def test_a_file_of_another_model_is_refused_and_the_model_unchanged(tmp_path):
    path = tmp_path / "m.safetensors"
    qc_compiler.save_packed(qc_compiler.pack_(Wide(64), "w8a8"), path)
    other = Wide(32)
    before = {name: p.clone() for name, p in other.named_parameters()}
    with pytest.raises(PackedFileError, match="is for another model"):
        qc_compiler.load_packed(other, path)
    with pytest.raises(PackedFileError, match="which is no linear of this TinyDiT"):
        qc_compiler.load_packed(tiny_dit(1), path)
    assert all(torch.equal(p, before[name]) for name, p in other.named_parameters())


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    qc_compiler.save_packed(qc_compiler.pack_(Wide(64), "w8a8"), path)
    whole = path.read_bytes()
    for damaged, message in [
        (whole[: len(whole) // 2], "damaged"),
        (b"", "damaged"),
        (whole.replace(b"int8", b"intX"), "header is invalid"),
        (whole.replace(b'\\"version\\":4', b'\\"version\\":7'), "version 7"),
        (whole[:-1] + bytes([whole[-1] ^ 1]), "checksum differs"),
        (whole.replace(b'\\"rotation\\":false', b'\\"rotation\\":true '), "checksum differs"),
        (whole.replace(b"quantcache_packed", b"quantcache_pucked"), "no packed model"),
        (whole.replace(b"float32", b"is_grad"), "invalid"),
    ]:
        assert damaged != whole
        path.write_bytes(damaged)
        with pytest.raises(PackedFileError, match=message):
            qc_compiler.load_packed(Wide(64), path)
    with pytest.raises(PackedFileError, match="no packed model at"):
        qc_compiler.load_packed(Wide(64), tmp_path / "missing")


# -- by a plan


def backend(gm, example_inputs, options=None):
    return eager_backend(gm, example_inputs, options=options)


class Separate(nn.Module):
    """A transformer whose queries, keys and values are linears of their own."""

    def __init__(self, width=64, depth=2):
        super().__init__()
        self.blocks = nn.ModuleList(SeparateBlock(width) for _ in range(depth))
        self.eval().requires_grad_(False)

    def forward(self, x, t):
        x = x * torch.cos(t)[:, None, None]
        for block in self.blocks:
            x = block(x)
        return x


class SeparateBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.gain = nn.Parameter(1.0 + 20 * (torch.arange(width) == 3))

    def forward(self, x):
        h = F.layer_norm(x, x.shape[-1:]) * self.gain
        return x + F.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h))


def sample_separate(m):
    x = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for step in range(4):
            x = x - 0.1 * m(x, torch.full((2,), 1.0 - 0.2 * step))
    return x


@pytest.mark.parametrize("recipe", ["importance", "w4a8+balance", "importance+balance+rotation", "dmpq"])
def test_a_plan_packs_what_it_would_quantize(recipe, tmp_path):
    model, x, t = Separate(), torch.randn(2, 8, 64), torch.full((2,), 0.5)
    plan = qc_compiler.calibrate(model, sample_separate, None, quantize=recipe, backend=backend, progress=False)
    expected = run(compile_eagerly(model, {"cache": "off", "emulate": True, "plan": plan}), x, t)
    packed = qc_compiler.pack_(copy.deepcopy(model), plan)
    assert any(isinstance(child, PackedLinear) for child in packed.modules())
    assert torch.equal(run(packed, x, t), expected)
    assert not torch.equal(expected, run(model, x, t))
    qc_compiler.save_packed(packed, tmp_path / "m.safetensors")
    with torch.device("meta"):
        empty = Separate()
    loaded = qc_compiler.load_packed(empty, tmp_path / "m.safetensors")
    assert torch.equal(run(loaded, x, t), expected)


def test_a_packed_model_chooses_as_its_plan_says():
    """The plan fits the packed model, whose activations switch between the formats while its weights stay."""
    model = tiny_dit(2)
    kwargs = {"quantize": "dmpq", "backend": backend, "budget": 2, "progress": False}
    plan = qc_compiler.calibrate(model, lambda m: sample(m, 8), 0.5, **kwargs)
    expected = sample(compile_eagerly(model, {"plan": plan, "emulate": True}), 8)
    compiled = compile_eagerly(qc_compiler.pack_(copy.deepcopy(model), plan), {"plan": plan, "emulate": True})
    assert torch.equal(sample(compiled, 8), expected)
    shares = qc_compiler.summary(compiled).precision_shares
    assert set(shares) == {"nvfp4/nvfp4", "nvfp4/uint8"}
    assert min(shares.values()) > 0


def test_activations_chosen_online_are_packed_in_their_finest_format():
    model = tiny_dit(2)
    kwargs = {"quantize": "importance+online", "backend": backend, "progress": False}
    plan = qc_compiler.calibrate(model, lambda m: sample(m, 8), None, **kwargs)
    options = {"plan": plan, "emulate": True, "cache": "off"}
    expected = sample(compile_eagerly(model, options), 8)
    compiled = compile_eagerly(qc_compiler.pack_(copy.deepcopy(model), plan), options)
    assert torch.equal(sample(compiled, 8), expected)
    assert len(qc_compiler.summary(compiled).precision_shares) > 1


def test_readers_of_one_input_are_balanced_together_within_their_block_only():
    """Keys of every block read the same text, so their inputs have equal ranges; their weights are their own."""

    class Cross(nn.Module):
        def __init__(self, gain):
            super().__init__()
            self.q, self.kv = nn.Linear(32, 32), nn.Linear(32, 64)
            self.kv.weight.data *= gain

        def forward(self, x, text):
            k, v = self.kv(text).chunk(2, -1)
            return x + F.scaled_dot_product_attention(self.q(F.layer_norm(x, (32,))), k, v)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Cross(gain) for gain in (1.0, 30.0))

        def forward(self, x, t, text):
            x = x * torch.cos(t)[:, None, None]
            for block in self.blocks:
                x = block(x, text)
            return x

    torch.manual_seed(0)
    model, text, t = Model().eval().requires_grad_(False), torch.randn(2, 4, 32), torch.full((2,), 0.5)

    def generate(m):
        x = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0))
        for step in range(4):
            x = x - 0.1 * m(x, t - 0.1 * step, text)
        return x

    plan = qc_compiler.calibrate(model, generate, None, quantize="w4a8+balance", backend=backend, progress=False)
    expected = generate(compile_eagerly(model, {"cache": "off", "emulate": True, "plan": plan}))
    assert torch.equal(generate(qc_compiler.pack_(copy.deepcopy(model), plan)), expected)


def test_subclasses_of_linear_stay_and_a_linear_in_two_blocks_is_packed_once():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = Wide(64, 3)
    model.blocks[0][0] = Scaled(64, 256)
    model.blocks[2][0] = model.blocks[1][0]
    qc_compiler.pack_(model, "w8a8")
    assert type(model.blocks[0][0]) is Scaled
    assert isinstance(model.blocks[1][0], PackedLinear)
    assert model.blocks[2][0] is model.blocks[1][0]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_linear_in_two_blocks_is_loaded_into_both(device, tmp_path):
    model, loaded = Wide(64, 2), Wide(64, 2).to(device)
    for both in (model, loaded):
        both.blocks[1][0] = both.blocks[0][0]
    qc_compiler.save_packed(qc_compiler.pack_(model, "w8a8"), tmp_path / "a")
    qc_compiler.load_packed(loaded, tmp_path / "a")
    assert loaded.blocks[1][0] is loaded.blocks[0][0]
    assert isinstance(loaded.blocks[0][0], PackedLinear)


def test_the_branch_of_a_packed_linear_is_not_quantized_again():
    packed, x = qc_compiler.pack_(tiny_dit(2), "w4a8+rank32"), {"cache": "off", "emulate": True}
    assert torch.equal(run(compile_eagerly(packed, x | {"quantize": "w8a8"})), run(packed))


def test_packing_frees_what_was_prepared_for_the_float_weights():
    model = tiny_dit(2)
    compiled = compile_eagerly(model, {"cache": "off", "emulate": True, "quantize": "w8a8"})
    run(compiled)
    (weights,) = runtime_of(model).prepared.values()
    assert weights.nbytes > 0
    qc_compiler.pack_(model, "w8a8")
    assert weights.nbytes == 0


def test_rank_and_rotation_without_a_plan():
    model = tiny_dit(2)
    options = {"cache": "off", "quantize": "nvfp4+rotation+rank4", "emulate": True}
    expected = run(compile_eagerly(model, options))
    packed = qc_compiler.pack_(copy.deepcopy(model), "nvfp4+rotation+rank4")
    for block, original in zip(packed.blocks, model.blocks):
        block.modulation = original.modulation
    torch.testing.assert_close(run(packed), expected, rtol=0, atol=1e-6)


# -- mistakes


def test_mistakes_are_named():
    with pytest.raises(OptionError, match="did you mean 'nvfp4'"):
        qc_compiler.pack_(Wide(), "nvfp")
    with pytest.raises(OptionError, match=r"pack_\(model, 'importance'\) needs a plan: calibrate"):
        qc_compiler.pack_(Wide(), "importance")
    with pytest.raises(OptionError, match=r"pack_\(model, 'dmpq'\): it chooses at every step"):
        qc_compiler.pack_(Wide(), "dmpq")
    with pytest.raises(PlanError, match="the plan says nothing about linears: calibrate"):
        qc_compiler.pack_(Wide(), Plan("", "output", (), (), np.zeros((1, 0, 0), bool), np.zeros((1, 0, 0, 1), "f4")))
    with pytest.raises(QuantCacheError, match="is packed already"):
        qc_compiler.pack_(qc_compiler.pack_(Wide(), "w8a8"), "nvfp4")
    with pytest.raises(QuantCacheError, match=r"no nn.Linear inside an nn.ModuleList"):
        qc_compiler.pack_(nn.Linear(4, 4), "w8a8")
    with pytest.raises(QuantCacheError, match="is not packed"):
        qc_compiler.save_packed(Wide(), "x")


# -- LoRA


class LoRA(nn.Module):
    def __init__(self, base, rank=4):
        super().__init__()
        self.base = base
        self.a = nn.Linear(base.in_features, rank, bias=False)
        self.b = nn.Linear(rank, base.out_features, bias=False)
        self.requires_grad_(False)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


@SCHEME
def test_a_lora_branch_on_a_packed_linear(scheme):
    model = qc_compiler.pack_(tiny_dit(2), scheme)
    for block in model.blocks:
        block.mlp[0] = LoRA(block.mlp[0])
    expected = run(model)
    compiled = compile_eagerly(model, {"cache": "off", "quantize": scheme, "emulate": True})
    assert torch.equal(run(compiled), expected)
    with torch.no_grad():
        model.blocks[0].mlp[0].b.weight.mul_(3)
    assert torch.equal(run(compiled), run(model))
    assert not torch.equal(run(compiled), expected)


@pytest.mark.parametrize("how", ["w4a8+rank32", "w4a8+balance"])
def test_a_packed_model_can_change_its_precision(how):
    model = tiny_dit(2)
    plan = qc_compiler.calibrate(
        model, sample, None, quantize=how, samples=2, emulate=True, progress=False, backend=eager_backend
    )
    packed = qc_compiler.pack_(model, plan)
    expected = run(packed)
    y = run(packed.to(torch.bfloat16), X.bfloat16())
    assert y.dtype == torch.bfloat16
    assert torch.allclose(y.float(), expected, rtol=0, atol=0.05 * float(expected.abs().max()))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
        self.head.weight = self.embed.weight
        self.blocks = nn.ModuleList([nn.Linear(64, 64)])

    def forward(self, x):
        return self.head(self.blocks[0](self.embed(x)))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tied_weights_stay_tied(device, tmp_path):
    packed = qc_compiler.pack_(Tied().requires_grad_(False), "nvfp4")
    qc_compiler.save_packed(packed, tmp_path / "tied.safetensors")
    with torch.device(device):
        loaded = Tied().requires_grad_(False)
    qc_compiler.load_packed(loaded, tmp_path / "tied.safetensors")
    x = torch.randn(1, 4, 64)
    assert loaded.head.weight is loaded.embed.weight
    assert torch.allclose(loaded(x), packed(x), rtol=0, atol=1e-5)


def test_a_model_that_was_calibrated_gives_its_float_weights_back():
    model = tiny_dit(2)
    plan = qc_compiler.calibrate(
        model, sample, None, quantize="w4a8", samples=2, emulate=True, progress=False, backend=eager_backend
    )
    weight = weakref.ref(model.blocks[0].attn.qkv.weight)
    qc_compiler.pack_(model, plan)
    gc.collect()
    assert weight() is None


# -- blocks that a plan removes

PRUNING = Plan.without_schedule("", pruned=("blocks.1", "blocks.2/mlp"))
ONE_BLOCK = Plan.without_schedule("", pruned=("blocks.1",))


def test_removed_blocks_are_freed_and_the_compiled_model_is_the_same():
    model = tiny_dit(3)
    options = {"cache": "static", "interval": 1, "plan": PRUNING}
    before, size = compile_eagerly(model, options), weight_bytes(model)
    expected = sample(before, 2)
    fingerprint = runtime_of(model).fingerprint
    assert qc_compiler.pack_(model, PRUNING) is model
    freed = [*model.blocks[1].parameters(), *model.blocks[2].mlp.parameters()]
    assert weight_bytes(model) == size - sum(p.nbytes for p in freed) + 4 * len(freed)
    assert all(p.isnan().all() for p in freed)
    torch._dynamo.reset()
    assert torch.equal(sample(compile_eagerly(model, options), 2), expected)
    assert runtime_of(model).fingerprint == fingerprint
    assert run(model).isnan().all()  # without the plan


def test_weights_of_a_sublayer_are_known_once_the_plan_has_run():
    model = tiny_dit(3)
    with pytest.warns(UserWarning, match="pack_ keeps the weights of blocks.2/mlp: only a graph tells"):
        qc_compiler.pack_(model, PRUNING)
    assert not model.blocks[2].mlp[0].weight.isnan().any()
    sample(compile_eagerly(model, {"cache": "off", "plan": Plan.without_schedule("", pruned=("blocks.0/mlp",))}), 2)
    with pytest.warns(UserWarning, match="blocks.2/mlp"):  # what ran is another plan
        qc_compiler.pack_(model, PRUNING)
    assert not model.blocks[0].mlp[0].weight.isnan().any()


class WithPenalty(TinyDiT):
    """Has a second graph, without blocks, that reads a weight of what the first one may lose."""

    def forward(self, x, timestep, penalty=False):
        return self.blocks[2].mlp[0].weight.norm() if penalty else super().forward(x, timestep)


def test_what_another_graph_of_the_model_reads_stays():
    model, plan = WithPenalty().eval().requires_grad_(False), Plan.without_schedule("", pruned=("blocks.2/mlp",))
    compiled = compile_eagerly(model, {"cache": "off", "plan": plan})
    run(compiled)
    with pytest.warns(UserWarning, match="no transformer blocks were found"):
        compiled(X, T, penalty=True)
    qc_compiler.pack_(compiled, plan)
    assert not model.blocks[2].mlp[0].weight.isnan().any()
    assert model.blocks[2].mlp[2].weight.isnan().all()


def test_the_others_are_packed_as_the_plan_says():
    sites = tuple(f"blocks.{i}.mlp.{j}" for i in range(3) for j in (0, 2))
    one = np.ones(6, np.float32)
    known = Quantization("w8a8", sites, np.full(6, 8, np.int8), one, one, one)
    model = qc_compiler.pack_(tiny_dit(3), Plan.without_schedule("", quantization=known, pruned=("blocks.1",)))
    packed = [name for name, child in model.named_modules() if isinstance(child, PackedLinear)]
    assert packed == [site for site in sites if not site.startswith("blocks.1.")]
    assert all(p.isnan().all() for p in model.blocks[1].parameters())
    assert not any(p.isnan().any() for p in (*model.blocks[0].parameters(), *model.blocks[2].parameters()))


def test_what_is_shared_with_a_block_that_stays_stays():
    model = tiny_dit(3)
    model.blocks[1].mlp = model.blocks[0].mlp
    model.blocks[1].attn.qkv.weight = model.head.weight = nn.Parameter(torch.ones(96, 32), False)
    qc_compiler.pack_(model, ONE_BLOCK)
    assert not model.blocks[0].mlp[0].weight.isnan().any()
    assert not model.head.weight.isnan().any()
    assert model.blocks[1].attn.out.weight.isnan().all()


def test_freed_blocks_are_saved_by_their_names(tmp_path):
    model = qc_compiler.pack_(tiny_dit(3).to(torch.bfloat16), ONE_BLOCK)
    qc_compiler.save_packed(model, tmp_path / "a")
    assert (tmp_path / "a").stat().st_size < weight_bytes(model) + 8000
    with torch.device("meta"):
        loaded = tiny_dit(3)
    qc_compiler.load_packed(loaded, tmp_path / "a")
    assert weight_bytes(loaded) == weight_bytes(model)
    for (name, found), (_, expected) in zip(loaded.named_parameters(), model.named_parameters()):
        assert (found.dtype, found.stride()) == (expected.dtype, expected.stride()), name
        assert torch.equal(found.nan_to_num(), expected.nan_to_num())
        assert found.isnan().any() == name.startswith("blocks.1.")


def test_a_freed_block_that_was_cast_is_known_as_freed(tmp_path):
    """Casting gives its weights memory again."""
    model = qc_compiler.pack_(tiny_dit(3), ONE_BLOCK).to(torch.bfloat16)
    qc_compiler.save_packed(model, tmp_path / "a")
    loaded = qc_compiler.load_packed(tiny_dit(3), tmp_path / "a")
    assert weight_bytes(loaded) < weight_bytes(model)
    assert loaded.blocks[1].attn.qkv.weight.isnan().all()


def test_a_file_that_frees_what_the_model_does_not_have(tmp_path):
    qc_compiler.save_packed(qc_compiler.pack_(tiny_dit(3), ONE_BLOCK), tmp_path / "a")
    with pytest.raises(PackedFileError, match=r"has no blocks\.1\."):
        qc_compiler.load_packed(tiny_dit(1), tmp_path / "a")


def test_a_removed_block_that_the_model_does_not_have():
    with pytest.raises(PlanError, match="prunes 'blocks.7', which this TinyDiT does not have"):
        qc_compiler.pack_(tiny_dit(2), Plan.without_schedule("", pruned=("blocks.7",)))
