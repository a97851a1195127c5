"""Moving digits: scikit-learn's 8x8 handwritten digits, wandering over a small canvas between its edges."""

from functools import cache

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

NUM_DIGITS = 10
NUM_FRAMES = 8
CANVAS = 16
DIGIT = 8
MAX_SPEED = 0.75  # pixels a frame, along each axis
NUM_HELD_OUT = 360


@cache
def digit_images() -> tuple[torch.Tensor, torch.Tensor]:
    """Returns all images (1797, 8, 8) in [0, 1] and labels (1797,), shuffled the same way every time."""
    bunch = load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0))
    image = torch.from_numpy(bunch.images).float() / 16
    return image[order], torch.from_numpy(bunch.target).long()[order]


def _bounce(position: torch.Tensor, limit: float) -> torch.Tensor:
    """Folds positions on a line into [0, limit], as if they were reflected at both ends.

    >>> _bounce(torch.tensor([-1.0, 3.0, 9.0, 17.0]), 8.0)
    tensor([1., 3., 7., 1.])
    """
    return limit - (limit - position % (2 * limit)).abs()


def moving_digits(n: int, seed: int, *, held_out: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws `n` videos of one digit each, moving at a constant velocity.

    Args:
        n: number of videos.
        seed: the same seed draws the same videos.
        held_out: draw from the 360 images that training never sees, instead of from the 1437 others.

    Returns:
        video (n, 1, F, H, W) = (n, 1, 8, 16, 16), float32 in [-1, 1], background -1; label (n,), int64.
    """
    generator = torch.Generator().manual_seed(seed)
    images, labels = digit_images()
    first, last = (0, NUM_HELD_OUT) if held_out else (NUM_HELD_OUT, len(images))
    index = torch.randint(first, last, (n,), generator=generator)

    # top left corner of the digit in every frame, in pixels: (n, F, 2) as x, y
    limit = CANVAS - DIGIT
    start = torch.rand(n, 1, 2, generator=generator) * limit
    velocity = (torch.rand(n, 1, 2, generator=generator) * 2 - 1) * MAX_SPEED
    corner = _bounce(start + velocity * torch.arange(NUM_FRAMES).view(1, -1, 1), limit)

    # the position in the digit that every canvas pixel shows, scaled so that the digit's pixels span [-1, 1]
    pixel = torch.stack(torch.meshgrid(torch.arange(CANVAS), torch.arange(CANVAS), indexing="xy"), dim=-1)
    grid = (pixel - corner.view(n * NUM_FRAMES, 1, 1, 2)) * (2 / (DIGIT - 1)) - 1
    digit = images[index].repeat_interleave(NUM_FRAMES, dim=0).unsqueeze(1)
    frames = F.grid_sample(digit, grid, align_corners=True)  # bilinear; zero outside the digit
    return frames.view(n, 1, NUM_FRAMES, CANVAS, CANVAS) * 2 - 1, labels[index]


def placed_digits(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws `n` images of one digit each, somewhere on the canvas: (n, 1, 16, 16) in [-1, 1], label (n,)."""
    video, label = moving_digits(n, seed)
    return video[:, :, 0], label
