"""What each linear needs: measured on calibration samples, without gradients.

Sensitivity of a linear l at b bits (AIGQ), with e its error in the model's prediction v when l alone is quantized:

    numerical    ‖ŷ_l − y_l‖² / ‖y_l‖²            of the linear's own output
    perceptual   P = ‖e‖² / ‖v‖²                  of what is seen: the prediction
    temporal     T = (1 + c) / (1 − c)            c = cos(e_t, e_{t+1}): errors that stay alike from step to step add up
                                                  along the trajectory, others average out (a first-order process)

`importance` minimizes Σ P·T under its budget of bits; the numerical term alone serves where there is no calibration.

DMPQ: α, β of E = α·Γ_{t−1} + β by least squares for each linear, E = √(‖e_low‖² − ‖e_high‖²) / ‖v‖ what it costs to
leave the linear alone in the lower precision (the weight's error is in both); the threshold so that the wanted share of
linears takes the higher one. With the error of the linear's own output for E, DMPQ was no better than a fixed choice of
as many linears: a large error there may not matter.
PDR: which inputs have max|X| / mean|X| > 25.
Noise floor of a region at a precision: mean|n_{t+1} − n_t| / mean|Δ_t|, n what quantization adds to its residual Δ.

Sources: QuantCache, arXiv 2503.06545, Eq. 7, whose terms have no formulas there, so these are ours; 6Bit-Diffusion,
arXiv 2603.18742.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor

from ..allocation import WIDTHS, BlockErrors, allocate
from ..formats.schemes import PLAIN, WEIGHTS, Recipe, Scheme, recipe_of
from ..formats.transforms import shared_scales
from ..plan import OUTLIER_RATIO, Quantization
from .sites import Observed, RoundedLinear, Site, SiteRunner, exact

MAX_COSINE = 0.95  # of errors one step apart: T is at most 39
TERMS = ("perceptual", "temporal")
Pairs = Sequence[tuple[tuple[Any, ...], tuple[Any, ...]]]


class Measurement:
    """Runs a model on pairs of batches, the second one step later, and asks what quantization does.

    Args:
        runner: Of the model's graph.
        pairs: Inputs of the graph.
    """

    def __init__(self, runner: SiteRunner, pairs: Pairs, progress: bool = False) -> None:
        self.runner, self.pairs, self._progress = runner, pairs, progress
        self.num_calls = 2 * len(pairs)  # of the whole model, quantized or not
        self._scores: dict[Any, dict[str, NDArray[np.float64]]] = {}
        self.sites = runner.sites
        self.weights: dict[str, Tensor] = {}
        self.amax: dict[str, Tensor] = {}
        self.ratios: dict[str, float] = {}
        self._known: dict[tuple[str, Scheme], RoundedLinear] = {}
        self.exact = [(runner.run(now, self._look), runner.run(later, self._look)) for now, later in pairs]

    def _look(self, site: Site, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.detach().abs().reshape(-1, x.shape[-1]).float()
        amax, ratio = rows.amax(dim=0), float(rows.max() / rows.mean().clamp(min=1e-12))
        self.weights[site.name] = weight
        self.amax[site.name] = torch.maximum(amax, self.amax.get(site.name, amax))
        self.ratios[site.name] = max(ratio, self.ratios.get(site.name, 0.0))
        return exact(site, x, weight, bias)

    def rounded(self, site: Site, scheme: Scheme) -> RoundedLinear:
        if (site.name, scheme) not in self._known:
            scales = None
            if scheme.balance:
                scales = shared_scales(self.amax[site.name], [self.weights[name] for name in site.shares])
            self._known[site.name, scheme] = RoundedLinear(self.weights[site.name], scheme, scales)
        return self._known[site.name, scheme]

    def forget(self) -> None:
        """Frees the rounded weights."""
        self._known.clear()

    def quantized_runs(self, scheme_of: Callable[[Site], Scheme | None]) -> list[tuple[Observed, Observed]]:
        """Returns the runs of all pairs with the linears quantized as asked, None leaving one alone."""

        def hook(site: Site, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            scheme = scheme_of(site)
            return exact(site, x, weight, bias) if scheme is None else self.rounded(site, scheme)(x, bias)

        self.num_calls += 2 * len(self.pairs)
        return [(self.runner.run(now, hook), self.runner.run(later, hook)) for now, later in self.pairs]

    def sensitivity(self, scheme: Scheme, terms: Sequence[str] = TERMS) -> dict[str, NDArray[np.float64]]:
        """Returns for each linear its score at each width, float64 (len(WIDTHS),).

        Args:
            scheme: What is done to the linears; each weight takes its width's format.
            terms: The factors of the score: `numerical`, `perceptual`, `temporal`.
        """
        if (scheme, terms) in self._scores:
            return self._scores[scheme, terms]
        found = {}
        for site in track(self.sites, "sensitivities", disable=not self._progress, transient=True):
            scores = np.zeros(len(WIDTHS))
            for i, width in enumerate(WIDTHS):
                if (narrow := _with_weight(scheme, width)) is not None:
                    scores[i] = self._score(site, narrow, terms)
            self.forget()
            found[site.name] = scores
        self._scores[scheme, terms] = found
        return found

    def _score(self, site: Site, scheme: Scheme, terms: Sequence[str]) -> float:
        score = 1.0
        if "numerical" in terms:
            score *= float(np.square(self.local_errors(site, scheme)).mean())
        if not {"perceptual", "temporal"} & set(terms):
            return score
        now, later = self.output_errors(site, scheme)
        if "perceptual" in terms:
            score *= float(_relative(now, torch.cat([true.output for true, _ in self.exact])).square().mean())
        if "temporal" in terms:
            cosine = float(torch.cosine_similarity(now.flatten(1), later.flatten(1)).mean().clamp(0, MAX_COSINE))
            score *= (1 + cosine) / (1 - cosine)
        return score

    def output_errors(self, site: Site, scheme: Scheme) -> tuple[Tensor, Tensor]:
        """Returns the error of the prediction with one linear quantized, for all samples and for their next steps."""
        runs = self.quantized_runs(lambda other: scheme if other.name == site.name else None)
        pairs = [(a.output - x.output, b.output - y.output) for (a, b), (x, y) in zip(runs, self.exact)]
        return torch.cat([now for now, _ in pairs]), torch.cat([later for _, later in pairs])

    def local_errors(self, site: Site, scheme: Scheme) -> NDArray[np.float64]:
        """Returns ‖ŷ − y‖ / ‖y‖ of a linear for every sample's next step, with exact inputs."""
        found: list[Tensor] = []

        def hook(other: Site, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            y = exact(other, x, weight, bias)
            if other.name == site.name:
                size = len(self.exact[0][0].output)
                error = self.rounded(site, scheme)(x, bias) - y
                found.append(_relative(error.reshape(size, -1), y.reshape(size, -1)))
            return y

        for _, later in self.pairs:
            self.runner.run(later, hook)
        return torch.cat(found).double().cpu().numpy()

    def gammas(self) -> dict[str, NDArray[np.float64]]:
        """Returns for each block Γ = relL1(y, x) of every sample, whose frames may lie side by side in its batch."""

        def ratio(run: Observed, block: str) -> Tensor:
            rows = (run.residuals[block], run.before[block])
            added, stream = (x.reshape(len(run.output), -1).abs().mean(1) for x in rows)
            return added / stream

        blocks = self.exact[0][0].residuals
        return {
            block: torch.cat([ratio(now, block) for now, _ in self.exact]).double().cpu().numpy() for block in blocks
        }

    def noise(self, scheme_of: Callable[[Site], Scheme | None]) -> dict[str, float]:
        """Returns the noise floor of `output`, `network` and every block, with all linears quantized."""
        found: dict[str, list[float]] = {}
        for run, true in zip(self.quantized_runs(scheme_of), self.exact):
            noises = [{k: a - b for (k, a), b in zip(_residuals(q), _values(_residuals(f)))} for q, f in zip(run, true)]
            for name, residual in _residuals(true[0]):
                change = (noises[1][name] - noises[0][name]).abs().mean()
                found.setdefault(name, []).append(float(change / residual.abs().mean().clamp(min=1e-12)))
        return {name: float(np.mean(values)) for name, values in found.items()}


def measure(known: Measurement, recipe: str, mean_bits: float) -> Quantization:
    """Returns what calibration can say of the linears, for a value of the option `quantize`."""
    how = recipe_of(recipe)
    names = [site.name for site in known.sites]
    bits = _allocation(known, how, mean_bits) if how.allocated else dict.fromkeys(names, 0)
    ratios = np.array([known.ratios[name] for name in names], dtype=np.float32)
    alpha, beta, threshold = np.ones(len(names)), np.zeros(len(names)), 0.5
    schemes = how.schemes
    if how.rule == "dmpq":
        alpha, beta, threshold = _prediction(known, how, mean_bits)
        if (ratios > OUTLIER_RATIO).any():
            schemes += (Scheme(schemes[-1].weight, PLAIN),)

    def allocated(scheme: Scheme) -> Callable[[Site], Scheme | None]:
        return lambda site: _with_weight(scheme, bits[site.name]) if how.allocated else scheme

    noises = [known.noise(allocated(scheme)) for scheme in schemes]
    known.forget()
    return Quantization(
        recipe,
        tuple(names),
        np.array([bits[name] for name in names], dtype=np.int8),
        ratios,
        alpha.astype(np.float32),
        beta.astype(np.float32),
        float(threshold),
        tuple(known.amax[name].cpu().numpy() for name in names) if schemes[0].balance else (),
        np.array([list(noise.values()) for noise in noises], dtype=np.float32),
        tuple(noises[0]),
    )


def _allocation(known: Measurement, how: Recipe, mean_bits: float) -> dict[str, int]:
    scores = known.sensitivity(how.schemes[-1] if how.rule is None else how.schemes[-2])
    blocks = []
    for block in dict.fromkeys(site.block for site in known.sites):
        sites = [site for site in known.sites if site.block == block]
        names = tuple(site.name for site in sites)
        sizes = np.array([known.weights[name].numel() for name in names], dtype=np.int64)
        blocks.append(BlockErrors(sites[0].body, names, sizes, np.stack([scores[name] for name in names])))
    return allocate(blocks, mean_bits)


def _prediction(
    known: Measurement, how: Recipe, mean_bits: float
) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """Returns α and β of each linear, and the threshold at which activations take `mean_bits` between 4 and 8."""
    gammas, later = known.gammas(), torch.cat([true.output for _, true in known.exact])
    lines = []
    for site in known.sites:
        low, high = (_relative(known.output_errors(site, scheme)[1], later).square() for scheme in how.schemes)
        errors = (low - high).clamp(min=0).sqrt().double().cpu().numpy()
        lines.append(_line(gammas[site.block], errors))
    alpha, beta = np.array(lines).reshape(-1, 2).T
    predicted = np.concatenate([a * gammas[site.block] + b for site, (a, b) in zip(known.sites, lines)])
    share = float(np.clip((8 - mean_bits) / 4, 0, 1))  # of the linears, that stay in four bits
    return alpha, beta, max(0.0, float(np.quantile(predicted, share)))


def _line(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[float, float]:
    """Returns slope and intercept of the least squares line; a flat one where x does not vary."""
    spread = x - x.mean()
    power = float(spread @ spread)
    slope = float(spread @ y) / power if power > 1e-12 else 0.0
    return slope, float(y.mean()) - slope * float(x.mean())


def _with_weight(scheme: Scheme, width: int) -> Scheme | None:
    return replace(scheme, weight=WEIGHTS[width]) if width in WEIGHTS else None


def _relative(error: Tensor, value: Tensor) -> Tensor:
    """Returns ‖error‖ / ‖value‖ of each sample, (B,)."""
    return error.flatten(1).norm(dim=1) / value.flatten(1).norm(dim=1).clamp(min=1e-12)


def _residuals(run: Observed) -> list[tuple[str, Tensor]]:
    blocks = list(run.residuals.items())
    network = (run.before[blocks[-1][0]] + blocks[-1][1]) - run.before[blocks[0][0]] if _alike(run) else blocks[-1][1]
    return [("output", run.output.flatten(1)), ("network", network), *blocks]


def _values(pairs: list[tuple[str, Tensor]]) -> list[Tensor]:
    return [value for _, value in pairs]


def _alike(run: Observed) -> bool:
    """Whether the first and the last block have the same streams, so that the network's residual can be told."""
    shapes = [x.shape for x in run.before.values()]
    return shapes[0] == shapes[-1]
