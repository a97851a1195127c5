"""Captioned digits, the model that draws them, and their judge."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from captions import (
    NUM_TOKENS,
    PAD,
    RELATIONS,
    TOWARDS,
    WORDS,
    caption_accuracy,
    captioned_digits,
    describe,
    tokenize,
    understand,
)
from mmdit import MMDiT, MMDiTConfig, rotary_grid, rotate
from sampling import NULL_LABEL, WEIGHTS, load_classifier, load_mmdit, sample
from tiny_models import compile_eagerly
from train import flow_loss

TINY = MMDiTConfig(num_dual=1, num_single=2, width=48, num_heads=2, size=(8, 8))
TIMESTEP = torch.tensor([1000.0, 20.0])
CAPTION = torch.stack([tokenize("a three above an eight"), tokenize("a zero")])


def untrained(config=TINY):
    """Returns a model with random weights everywhere: as it is made, gates and head are zero."""
    generator = torch.Generator().manual_seed(0)
    model = MMDiT(config).requires_grad_(False)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    return model


def noise(*size):
    return torch.randn(2, 1, *size, generator=torch.Generator().manual_seed(1))


# captions and scenes


def test_every_caption_is_understood_as_it_was_described():
    relation = torch.arange(len(RELATIONS)).repeat_interleave(100)
    digits = torch.cartesian_prod(torch.arange(10), torch.arange(10)).repeat(len(RELATIONS), 1)
    tokens = describe(relation, digits)
    understood, found = understand(tokens)
    assert torch.equal(understood, relation)
    assert torch.equal(found[:, 0], digits[:, 0])
    assert torch.equal(found[:, 1], digits[:, 1].where(relation > 0, -1))
    spoken = [" ".join(WORDS[token] for token in caption if token != PAD) for caption in tokens.tolist()]
    assert len(set(spoken)) == 10 + 400
    assert all(torch.equal(tokenize(text), caption) for text, caption in zip(spoken, tokens, strict=True))


@pytest.mark.parametrize("size", [16, 64])
def test_each_half_of_a_scene_has_the_ink_that_its_caption_says(size):
    image, tokens = captioned_digits(50, 0, size=size)
    relation, digits = understand(tokens)
    assert set(relation.tolist()) == set(range(len(RELATIONS)))
    ink = (image[:, 0] + 1).double()
    half = size // 2
    top, bottom = ink[:, :half].sum((1, 2)), ink[:, half:].sum((1, 2))
    left, right = ink[:, :, :half].sum((1, 2)), ink[:, :, half:].sum((1, 2))
    whole = ink.sum((1, 2))
    for i, (dx, dy) in enumerate(TOWARDS[relation].tolist()):
        if dx or dy:
            assert min([top, bottom] if dy else [left, right], key=lambda part: part[i])[i] > 0.15 * whole[i]
        assert whole[i] > 0
    assert (digits[:, 1] < 0).equal(relation == 0)


def test_a_scene_of_another_size_is_the_same_picture():
    (small, tokens), (large, same) = (captioned_digits(20, 3, size=size) for size in (32, 128))
    assert torch.equal(tokens, same)
    assert (F.avg_pool2d(large, 4) - small).abs().mean() < 0.02
    others = captioned_digits(20, 4, size=32)[0]
    assert (F.avg_pool2d(large, 4) - others).abs().mean() > 0.1


def test_the_seed_decides_and_digits_are_held_out():
    first, again, other, held_out = (
        captioned_digits(4, seed, size=16, held_out=held)[0]
        for seed, held in ((0, False), (0, False), (1, False), (0, True))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, held_out)


@pytest.mark.parametrize("size", [16, 64])
def test_the_judge_knows_digits_and_places(size):
    classifier = load_classifier()
    image, tokens = captioned_digits(300, 0, size=size, held_out=True)
    assert caption_accuracy(classifier, image, tokens) > 0.95
    relation, digits = understand(tokens)
    opposite = torch.tensor([0, 2, 1, 4, 3])[relation]
    two = digits[:, 0] != digits[:, 1]
    wrong = describe(opposite, digits)[two & (relation > 0)]
    assert caption_accuracy(classifier, image[two & (relation > 0)], wrong) < 0.1


# the model


def test_the_vocabulary_fits_and_its_padding_is_the_null_label():
    assert (TINY.num_words, TINY.num_tokens, PAD) == (len(WORDS), NUM_TOKENS, NULL_LABEL)


def test_it_starts_with_no_velocity_and_blocks_that_do_nothing():
    model = MMDiT(TINY)
    assert not model(noise(8, 8), TIMESTEP, CAPTION).any()
    text, image, c = torch.randn(2, 8, 48), torch.randn(2, 16, 48), torch.randn(2, 48)
    same_text, same_image = model.dual_blocks[0](text, image, c, model.rotary)
    assert torch.equal(same_text, text)
    assert torch.equal(same_image, image)
    assert torch.equal(model.single_blocks[0](image, c, model.rotary[:, 8:]), image)


@pytest.mark.parametrize("size", [(8, 8), (16, 16), (4, 12)])
def test_it_takes_images_of_any_size(size):
    model, resized = untrained(), untrained(MMDiTConfig(num_dual=1, num_single=2, width=48, num_heads=2, size=size))
    velocity = model(noise(*size), TIMESTEP, CAPTION)
    assert velocity.shape == (2, 1, *size)
    assert torch.equal(velocity, resized(noise(*size), TIMESTEP, CAPTION))


def test_text_comes_first(monkeypatch):
    """Every attention has the words' queries, keys and values before the patches', and only patches are turned."""
    seen = []
    attention = F.scaled_dot_product_attention

    def record(q, k, v):
        seen.append((q, k, v))
        return attention(q, k, v)

    model = untrained()
    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    model(noise(8, 8), TIMESTEP, CAPTION)
    model(noise(8, 8), TIMESTEP, CAPTION.flip(0))
    assert [part.shape for call in seen for part in call] == [(2, 2, NUM_TOKENS + 16, 24)] * 18
    for part, other in zip(seen[0], seen[3], strict=True):  # of the first block, before text and image have met
        assert not torch.equal(part[:, :, :NUM_TOKENS], other[:, :, :NUM_TOKENS])
        assert torch.equal(part[:, :, NUM_TOKENS:], other[:, :, NUM_TOKENS:])


def test_the_caption_reaches_the_image_through_attention():
    model, x = untrained(), noise(8, 8)
    velocity = model(x, TIMESTEP, CAPTION)
    swapped = CAPTION.clone()
    swapped[0, [1, 4]] = CAPTION[0, [4, 1]]  # "an eight above a three"
    assert not torch.allclose(model(x, TIMESTEP, swapped)[0], velocity[0], rtol=0, atol=1e-5)
    assert torch.allclose(model(x, TIMESTEP, swapped)[1], velocity[1])


def test_rotations_keep_lengths_and_scores_depend_on_the_distance():
    """A query turned by its place, times a key turned by its, is a function of the difference of both places."""
    rotary = rotary_grid(NUM_TOKENS, 6, 6, 24)
    q, k = torch.randn(2, 1, 1, 1, 24, generator=torch.Generator().manual_seed(0)).expand(2, 1, 1, NUM_TOKENS + 36, 24)
    turned_q, turned_k = rotate(q, rotary), rotate(k, rotary)
    assert torch.allclose(turned_q.norm(dim=-1), q.norm(dim=-1))
    assert torch.equal(turned_q[:, :, :NUM_TOKENS], q[:, :, :NUM_TOKENS])
    scores = (turned_q @ turned_k.mT)[0, 0, NUM_TOKENS:, NUM_TOKENS:].view(6, 6, 6, 6)
    assert torch.allclose(scores[0, 0, 2, 3], scores[3, 1, 5, 4], atol=1e-5)
    assert not torch.allclose(scores[0, 0, 2, 3], scores[0, 0, 3, 2], atol=1e-5)


def test_a_coarser_grid_lies_between_the_places_of_a_finer_one():
    fine, coarse = (rotary_grid(0, 2 * n, 2 * n, 24)[1].asin().view(2 * n, 2 * n, 12) for n in (4, 2))
    slowest = (0, 6)  # one frequency of row and of column: 1, so that the sine's argument is the place itself
    assert torch.allclose(F.avg_pool2d(fine[..., slowest].permute(2, 0, 1), 2), coarse[..., slowest].permute(2, 0, 1))


def test_it_learns_from_captions():
    torch.manual_seed(0)
    model = MMDiT(TINY)
    image, tokens = captioned_digits(16, 0, size=8)
    flow_loss(model, image, tokens, shift=4.0).backward()
    assert model.head.weight.grad.any()


def test_it_compiles():
    model, x = untrained(), noise(8, 8)
    compiled = compile_eagerly(model, {"cache": "static", "level": "network"})
    with torch.no_grad():
        assert torch.equal(compiled(x, TIMESTEP, CAPTION), model(x, TIMESTEP, CAPTION))


# sampling


def test_guidance_needs_the_null_caption():
    calls = []

    def model(x, timestep, caption):
        calls.append(caption)
        return x

    first, again = (sample(model, CAPTION, steps=2, guidance=3.0, size=(1, 8, 8), shift=4.0) for _ in range(2))
    assert torch.equal(first, again)
    assert first.shape == (2, 1, 8, 8)
    assert torch.equal(calls[0], CAPTION)
    assert torch.equal(calls[1], torch.full_like(CAPTION, PAD))


@pytest.mark.parametrize(
    ("shift", "times"), [(1.0, [1000.0, 750.0, 500.0, 250.0]), (3.0, [1000.0, 900.0, 750.0, 500.0])]
)
def test_a_shift_moves_steps_towards_the_noise(shift, times):
    seen = []

    def model(x, timestep, caption):
        seen.append(timestep[0].item())
        return x

    sample(model, CAPTION, steps=4, size=(1, 8, 8), shift=shift)
    assert seen == pytest.approx(times)


def test_the_trained_model_draws_what_captions_say():
    model = load_mmdit()
    assert model.config.grid == (32, 32)
    assert (WEIGHTS / "mmdit.safetensors").stat().st_size <= 10e6
    captions = ("a three above an eight", "a zero left of a one", "a seven", "a four below a two")
    tokens = torch.stack([tokenize(caption) for caption in captions])
    images = sample(model, tokens, steps=8, guidance=2.5, size=(1, *model.config.size), shift=4.0)
    assert caption_accuracy(load_classifier(), images, tokens) > 0.7  # at least five of seven digits
