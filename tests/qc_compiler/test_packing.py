import copy
import gc
import weakref

import pytest
import torch
from torch import nn

import qc_compiler
from qc_compiler.errors import OptionError, PackedFileError, QuantCacheError
from qc_compiler.formats.schemes import SCHEMES
from qc_compiler.packing import PackedLinear, weight_bytes
from tiny_models import compile_eagerly, tiny_dit

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
        (whole.replace(b'\\"version\\":1', b'\\"version\\":7'), "version 7"),
        (whole.replace(b"quantcache_packed", b"quantcache_pucked"), "no packed model"),
        (whole.replace(b"float32", b"is_grad"), "invalid"),
    ]:
        assert damaged != whole
        path.write_bytes(damaged)
        with pytest.raises(PackedFileError, match=message):
            qc_compiler.load_packed(Wide(64), path)
    with pytest.raises(PackedFileError, match="no packed model at"):
        qc_compiler.load_packed(Wide(64), tmp_path / "missing")


# -- mistakes


def test_mistakes_are_named():
    with pytest.raises(OptionError, match="did you mean 'nvfp4'"):
        qc_compiler.pack_(Wide(), "nvfp")
    with pytest.raises(QuantCacheError, match="is packed already"):
        qc_compiler.pack_(qc_compiler.pack_(Wide(), "w8a8"), "w8a8")
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
