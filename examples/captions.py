"""Captioned digits: one or two of scikit-learn's digits on a canvas, and a caption such as "a three above a seven"."""

import torch
import torch.nn.functional as F
from torch import nn

from digits import NUM_DIGITS, NUM_HELD_OUT, digit_images

# The word of digit d is token d, and the padding is the null label of guidance: a caption of padding says nothing.
PAD = NUM_DIGITS
NUMERALS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDS = (*NUMERALS, "<pad>", "a", "above", "below", "left", "right", "of")
NUM_TOKENS = 8
RELATIONS = ("", "above", "below", "left of", "right of")
TOWARDS = torch.tensor([[0, 0], [0, -1], [0, 1], [-1, 0], [1, 0]])  # from the second digit to the first, as x, y
DIGIT_SIZE = (0.38, 0.48)  # of the canvas, whose height and width are 1
JITTER = 0.12
JUDGED_AT = 20  # pixels of the canvas for the classifier, which knows digits of eight


def tokenize(caption: str) -> torch.Tensor:
    """Returns the tokens (T,) = (8,), int64, of a caption; "an" is the same word as "a".

    >>> tokenize("a three left of a seven")
    tensor([11,  3, 14, 16, 11,  7, 10, 10])
    """
    tokens = [WORDS.index(word) for word in caption.replace("an ", "a ").split()]
    return torch.tensor(tokens + [PAD] * (NUM_TOKENS - len(tokens)))


def describe(relation: torch.Tensor, digits: torch.Tensor) -> torch.Tensor:
    """Returns captions (n, T) of scenes with a relation (n,), an index of `RELATIONS`, between two digits (n, 2)."""
    templates = torch.stack([tokenize(f"a zero {words} a zero" if words else "a zero") for words in RELATIONS])
    tokens, is_digit = templates[relation], templates[relation] < NUM_DIGITS
    tokens[:, 1] = digits[:, 0]
    return torch.where(is_digit & (torch.arange(NUM_TOKENS) > 1), digits[:, 1:], tokens)


def understand(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns relation (n,) and digits (n, 2) of captions (n, T), the second digit -1 where there is only one."""
    word = torch.tensor([WORDS.index(words.split()[0]) if words else PAD for words in RELATIONS])
    relation = (tokens[:, 2:3] == word).int().argmax(dim=1)
    second = tokens[:, 3:].where(tokens[:, 3:] < NUM_DIGITS, -1).amax(dim=1)
    return relation, torch.stack([tokens[:, 1], second], dim=1)


def _pixels(size: int) -> torch.Tensor:
    """Returns the centres (size, size, 2) of all pixels as x, y in a canvas of height and width 1."""
    centre = (torch.arange(size) + 0.5) / size
    return torch.stack(torch.meshgrid(centre, centre, indexing="xy"), dim=-1)


def captioned_digits(n: int, seed: int, *, size: int = 64, held_out: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws `n` images of one or two digits, and their captions.

    Each of two digits stays in its half of the canvas, at a random place and of a random size.

    Args:
        n: number of images.
        seed: the same seed draws the same scenes, whatever the size.
        size: height and width of the images, H and W, in pixels.
        held_out: draw from the 360 images of digits that training never sees, instead of from the 1437 others.

    Returns:
        image (n, 1, H, W), float32 in [-1, 1], background -1; tokens (n, T), int64.
    """
    generator = torch.Generator().manual_seed(seed)
    images, labels = digit_images()
    first, last = (0, NUM_HELD_OUT) if held_out else (NUM_HELD_OUT, len(images))
    index = torch.randint(first, last, (n, 2), generator=generator)
    relation = torch.randint(len(RELATIONS), (n,), generator=generator)

    # a digit's height and width (n, 2, 1), and its centre (n, 2, 2) as x, y
    smallest, largest = DIGIT_SIZE
    extent = smallest + (largest - smallest) * torch.rand(n, 2, 1, generator=generator)
    towards = TOWARDS[relation].unsqueeze(1) * torch.tensor([[1], [-1]])
    along = extent / 2 + (0.5 - extent) * torch.rand(n, 2, 1, generator=generator)
    across = JITTER * (2 * torch.rand(n, 2, 2, generator=generator) - 1)
    centre = 0.5 + torch.where(towards == 0, across, towards * along)

    grid = (_pixels(size) - centre.view(2 * n, 1, 1, 2)) / (extent.view(2 * n, 1, 1, 1) / 2)
    digit = images[index.flatten()].unsqueeze(1)
    digit = F.grid_sample(digit, grid, "bicubic", align_corners=False).clamp(0, 1).view(n, 2, size, size)
    digit[relation == 0, 1] = 0
    return digit.amax(dim=1, keepdim=True) * 2 - 1, describe(relation, labels[index])


@torch.no_grad()
def caption_accuracy(classifier: nn.Module, image: torch.Tensor, tokens: torch.Tensor) -> float:
    """Returns the fraction of the captions' digits that are recognized in the half of the image where they belong.

    Args:
        classifier: a `DigitClassifier`.
        image: (n, 1, H, W) in [-1, 1].
        tokens: captions (n, T).
    """
    relation, digits = understand(tokens)
    image = F.interpolate(image, (JUDGED_AT, JUDGED_AT), mode="bilinear", antialias=True, align_corners=False)
    side = torch.einsum("nc,hwc->nhw", TOWARDS[relation].float(), _pixels(JUDGED_AT) - 0.5).unsqueeze(1)
    halves = torch.cat([image.where(side >= 0, -1), image.where(side < 0, -1)])
    recognized = classifier(halves).argmax(dim=-1).view(2, -1).T
    return (recognized == digits)[digits >= 0].float().mean().item()
