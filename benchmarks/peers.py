"""What a user would take instead, on the same models. Needs `pip install "quantcache[peers]"`.

- torchao 0.18: its int8 dynamic quantization: symmetric int8 codes, a scale for every row of a weight and for every
  token; NVFP4 weights, which are decoded before every product.
- cache-dit 1.5: DBCache (the first block computed always, the others where its residual moved, or at the steps of a
  mask), with TaylorSeer.
- diffusers 0.42, its hooks: FirstBlockCache, MagCache, TaylorSeer. PyramidAttentionBroadcast and FasterCache hook
  diffusers' own attention modules, of which the trained models have none.

Every cache is put around `stacked` blocks and compiled with `torch.compile`, which breaks the graph at the caches.
"""

import contextlib
import copy
import io
import json
import logging
import re
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import harness  # noqa: F401 (puts the examples on the path)
from sampling import NULL_LABEL
from stacked import stacked

Model = TypeVar("Model", bound=nn.Module)


class Cached:
    """A model behind a peer's cache, called as the model is.

    Args:
        model: With the cache in place.
        begin: Called before each trajectory.
        enter: Told the stream of each call, "cond" or "uncond".
    """

    def __init__(
        self, model: nn.Module, begin: Callable[[], Any], enter: Callable[[str], Any] = lambda stream: None
    ) -> None:
        self.module, self.begin, self.enter = model, begin, enter
        self.compiled: Any = torch.compile(model)

    def __call__(self, x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        self.enter("uncond" if bool((label == NULL_LABEL).all()) else "cond")
        return self.compiled(x, timestep, label)


def copy_of(model: Model) -> Model:
    """Returns a copy whose forward has code of its own.

    Dynamo remembers of code, not of a model, that a loop in it breaks the graph, and from then on runs it eagerly: the
    original as well, which is what all are compared with.
    """
    model = copy.deepcopy(model)
    forward: Any = type(model).forward
    code = forward.__code__.replace(co_name="forward_of_copy")
    own = FunctionType(code, forward.__globals__, "forward", forward.__defaults__, forward.__closure__)
    own.__kwdefaults__ = forward.__kwdefaults__
    model.__class__ = type(type(model).__name__, (type(model),), {"forward": own})
    return model


def cache_dit(model: nn.Module, steps: int, threshold: float, order: int = 0, mask: str = "") -> Cached:
    """Returns a copy behind cache-dit's DBCache, one block computed always; with TaylorSeer if `order` > 0.

    Args:
        threshold: Relative change of the first block's residual, below which the others are not computed.
        mask: The name of one of its masks of the steps, such as "ultra", which decides in place of the threshold.
    """
    try:
        import cache_dit as library
    except ImportError as error:
        raise ImportError('cache-dit cannot be imported: pip install "quantcache[peers]"') from error
    logging.getLogger("CACHE_DIT").setLevel(logging.ERROR)
    model = stacked(copy_of(model))
    adapter = library.BlockAdapter(
        transformer=model,
        blocks=model.blocks,
        blocks_name="blocks",
        forward_pattern=library.ForwardPattern.Pattern_3,
        check_forward_pattern=False,
        has_separate_cfg=True,
    )
    config = library.DBCacheConfig(
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        residual_diff_threshold=threshold,
        max_warmup_steps=4,
        num_inference_steps=steps,
        enable_separate_cfg=True,
        steps_computation_mask=library.steps_mask(mask_policy=mask, total_steps=steps) if mask else None,
        steps_computation_policy="static" if mask else "dynamic",
    )
    taylor = library.TaylorSeerCalibratorConfig(taylorseer_order=order) if order else None
    library.enable_cache(adapter, cache_config=config, calibrator_config=taylor)
    return Cached(model, lambda: library.refresh_context(model, num_inference_steps=steps))


def diffusers_hook(model: nn.Module, config: Any) -> Cached:
    """Returns a copy behind one of diffusers' caches, by its configuration."""
    from diffusers import hooks
    from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
    from diffusers.hooks.hooks import CacheContext, _set_cache_context

    model = stacked(copy_of(model))
    for block in model.blocks:
        TransformerBlockRegistry.register(type(block), TransformerBlockMetadata(return_hidden_states_index=0))
    apply = {
        hooks.FirstBlockCacheConfig: hooks.apply_first_block_cache,
        hooks.MagCacheConfig: hooks.apply_mag_cache,
        hooks.TaylorSeerCacheConfig: hooks.apply_taylorseer_cache,
    }[type(config)]
    apply(model, config)
    registry = hooks.HookRegistry.check_if_exists_or_initialize(model)
    return Cached(model, registry.reset_stateful_hooks, lambda stream: _set_cache_context(model, CacheContext(stream)))


def first_block_cache(model: nn.Module, threshold: float) -> Cached:
    from diffusers.hooks import FirstBlockCacheConfig

    return diffusers_hook(model, FirstBlockCacheConfig(threshold=threshold))


def taylorseer(model: nn.Module, interval: int, order: int = 1) -> Cached:
    """diffusers' TaylorSeer on the output of the last block; between computed steps the others are left out."""
    from diffusers.hooks import TaylorSeerCacheConfig

    last = len(stacked(copy_of(model)).blocks) - 1

    config = TaylorSeerCacheConfig(
        cache_interval=interval,
        max_order=order,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=[rf"blocks\.{last}"],
        skip_predict_identifiers=[rf"blocks\.{i}" for i in range(last)],
    )
    return diffusers_hook(model, config)


def mag_cache(model: nn.Module, steps: int, threshold: float, calibrate: Callable[[Any], Any]) -> Cached:
    """diffusers' MagCache; `calibrate` samples with the model it is given, to find its magnitude ratios."""
    from diffusers.hooks import MagCacheConfig

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        calibrate(diffusers_hook(model, MagCacheConfig(calibrate=True, num_inference_steps=steps)))
    ratios = next(json.loads(line) for line in printed.getvalue().splitlines() if line.startswith("[1.0"))
    return diffusers_hook(model, MagCacheConfig(threshold=threshold, num_inference_steps=steps, mag_ratios=ratios))


def torchao_int8_dynamic(model: Model) -> Model:
    """Returns a copy of a model whose blocks have torchao's int8 linears, where `quantize="w8a8"` has ours.

    Raises:
        ImportError: torchao is missing, or older than the configuration used here.
    """
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError as error:
        raise ImportError('torchao cannot be imported: pip install "quantcache[peers]"') from error

    model = copy.deepcopy(model)
    # torchao would otherwise change Inductor's settings for the whole process, and so what ours compiles to
    quantize_(model, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False), filter_fn=is_block_linear)
    return model


def torchao_nvfp4_weights(model: Model) -> Model:
    """Returns a copy of a model whose blocks have torchao's linears with NVFP4 weights.

    Raises:
        ImportError: torchao is missing.
    """
    from torchao.prototype.mx_formats import NVFP4WeightOnlyConfig
    from torchao.quantization import quantize_

    model = copy.deepcopy(model)
    quantize_(model, NVFP4WeightOnlyConfig(), filter_fn=is_block_linear)
    return model


@contextlib.contextmanager
def fast_int_mm() -> Iterator[None]:
    """Replaces `torch._int_mm`, 80× slower than float32 on a CPU without VNNI, by a float32 product.

    Exact up to 1040 inputs, whose sum of products stays below 2²⁴.
    """
    original = torch._int_mm
    torch._int_mm = lambda a, b: (a.float() @ b.float()).int()  # type: ignore[assignment]
    try:
        yield
    finally:
        torch._int_mm = original  # type: ignore[assignment]


def is_block_linear(module: nn.Module, name: str) -> bool:
    """Says whether a module is a linear in a list of blocks that sees more than one row a sample.

    >>> [is_block_linear(nn.Linear(4, 4), name) for name in ("spatial_blocks.0.attn.qkv", "t_block.1")]
    [True, False]
    >>> is_block_linear(nn.Linear(4, 4), "blocks.0.modulation")  # one row a sample
    False
    """
    in_block = re.match(r"(\w+_)?blocks\.\d+\.", name) is not None
    return isinstance(module, nn.Linear) and in_block and not name.endswith("modulation")
