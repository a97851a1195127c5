"""What makes weights and activations easier to quantize, without changing their product.

rotation   x·wᵀ = (x·H)·(w·H)ᵀ            H orthogonal and symmetric, a Hadamard matrix on blocks of the width
balancing  x·wᵀ = (x / s)·(w·s)ᵀ          s_j = max|x_j|^α / max|w_j|^(1−α)
low rank   w = up·down + r                the branch in full precision, the residual r quantized

Sources: QuaRot, arXiv 2404.00456 (rotation); SmoothQuant, arXiv 2211.10438, Eq. 4; SVDQuant, arXiv 2411.05007, Eq. 5.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

TINY = 1e-12
LARGEST = 1e3  # of the scales of balancing


def hadamard(size: int, device: torch.device | None = None) -> Tensor:
    """Returns Sylvester's Hadamard matrix (size, size) in float32, scaled to be orthogonal; size is a power of two.

    >>> hadamard(2)
    tensor([[ 0.7071,  0.7071],
            [ 0.7071, -0.7071]])
    """
    index = torch.arange(size, device=device)
    common = index[:, None] & index[None, :]
    parity = torch.zeros_like(common)
    for bit in range(size.bit_length() - 1):
        parity = parity ^ (common >> bit & 1)
    return (1 - 2 * parity).float() * size**-0.5


def rotation_size(width: int, largest: int = 128) -> int:
    """Returns the largest power of two, up to `largest`, that divides the width; 1 where there is nothing to rotate.

    >>> rotation_size(1152), rotation_size(96), rotation_size(33)
    (128, 32, 1)
    """
    return min(width & -width, largest)


def rotate(x: Tensor, matrix: Tensor) -> Tensor:
    """Returns x (…, K) with every block of its last dimension multiplied by `matrix` (B, B), in the dtype of x."""
    blocks = x.float().unflatten(-1, (-1, matrix.shape[0]))
    return (blocks @ matrix).flatten(-2).to(x.dtype)


def balancing_scales(x_amax: Tensor, w_amax: Tensor, alpha: float = 0.5) -> Tensor:
    """Returns SmoothQuant's s (K,) for the largest magnitudes of activations (K,) and of weight columns (K,).

    A channel that is always zero, on either side, keeps the scale 1; none goes beyond 1000, which float16 still holds.
    """
    scales = x_amax.float() ** alpha / w_amax.float().clamp(min=TINY) ** (1 - alpha)
    return torch.where((x_amax > 0) & (w_amax > 0), scales, 1.0).clamp(1 / LARGEST, LARGEST)


def shared_scales(x_amax: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Returns s (K,) for an input that several linears read: of their weights (N, K) the largest column counts."""
    return balancing_scales(x_amax, torch.stack([weight.abs().amax(dim=0) for weight in weights]).amax(dim=0))


def low_rank(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns up (N, r), down (r, K) and the residual (N, K) of a weight: its largest singular directions apart."""
    u, s, v = torch.linalg.svd(weight.float(), full_matrices=False)
    root = s[:rank].sqrt()
    up, down = u[:, :rank] * root, root[:, None] * v[:rank]
    residual = weight.float() - up @ down
    return up.to(weight.dtype).contiguous(), down.to(weight.dtype).contiguous(), residual.to(weight.dtype)
