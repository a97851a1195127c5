"""Train the example models and their judge on one CPU core.

    OMP_NUM_THREADS=1 python examples/train.py classifier
    OMP_NUM_THREADS=1 python examples/train.py stdit --minutes 50
    OMP_NUM_THREADS=1 python examples/train.py dit --minutes 40
    OMP_NUM_THREADS=1 python examples/train.py dit --minutes 20 --resume   # goes on from the last checkpoint

The learning rate follows a cosine over wall-clock time, so any `--minutes` gives a finished model. Averaged
weights are written every two minutes, as float16.
"""

import argparse
import copy
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from classifier import DigitClassifier, accuracy
from digits import NUM_DIGITS, moving_digits, placed_digits
from dit import DiT
from sampling import NULL_LABEL, WEIGHTS, load_classifier, sample, save_weights
from stdit import STDiT

SAVE_EVERY_S = 120
JUDGE_EVERY_S = 480
LABEL_DROPOUT = 0.1
HELD_OUT_SEED = 1_000_000


@dataclass(frozen=True)
class Task:
    """What a model is trained on: data(n, seed) → samples (n, C, …), labels (n,)."""

    build: Callable[[], STDiT | DiT]
    data: Callable[[int, int], tuple[torch.Tensor, torch.Tensor]]
    batch: int


TASKS = {"stdit": Task(STDiT, moving_digits, 16), "dit": Task(DiT, placed_digits, 64)}


def train_classifier(out: Path, steps: int = 600, batch: int = 64) -> DigitClassifier:
    """Trains the judge on the training images; prints its accuracy on videos of images it has never seen."""
    classifier = DigitClassifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    for step in range(steps):
        video, label = moving_digits(batch, seed=step)
        # two frames a video are enough, and four times faster than all eight
        loss = F.cross_entropy(classifier(video[:, :, :2]), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    classifier.eval()
    held_out = accuracy(classifier, *moving_digits(2000, HELD_OUT_SEED, held_out=True))
    print(f"classifier: {held_out:.1%} of 2000 held-out videos", flush=True)
    save_weights(classifier, out / "classifier.safetensors", {"width": 32}, torch.float32)
    return classifier


def flow_loss(model: STDiT | DiT, data: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Returns the mean squared error of the velocity on the straight path from data to noise.

    Timesteps are logit-normal (arXiv 2403.03206, section 3.1), one from each of B equally likely intervals,
    so that every batch sees all noise levels.
    """
    batch = data.shape[0]
    quantile = (torch.arange(batch) + torch.rand(batch)) / batch
    t = torch.special.ndtri(quantile.clamp(1e-4, 1 - 1e-4)).sigmoid()
    noise = torch.randn_like(data)
    x = torch.lerp(data, noise, t.view(-1, *[1] * (data.dim() - 1)))
    label = torch.where(torch.rand(batch) < LABEL_DROPOUT, NULL_LABEL, label)
    return F.mse_loss(model(x, 1000 * t, label), noise - data)


def train_model(name: str, classifier: DigitClassifier, out: Path, minutes: float, lr: float, resume: bool) -> None:
    """Trains a diffusion model for `minutes`, keeping an exponential average of its weights."""
    task, checkpoint = TASKS[name], Path("out", f"{name}.pt")
    model = task.build()
    config = model.config
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    step = 0
    if resume:
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    torch.manual_seed(step)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"model: {num_parameters / 1e6:.2f} M parameters, {config}", flush=True)

    def save() -> None:
        save_weights(average, out / f"{name}.safetensors", asdict(config), torch.float16)
        state = {"model": model.state_dict(), "average": average.state_dict()}
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        torch.save({**state, "optimizer": optimizer.state_dict(), "step": step}, checkpoint)

    def judge() -> float:
        label = torch.arange(40) % NUM_DIGITS
        size = tuple(task.data(1, 0)[0].shape[1:])
        return accuracy(classifier, sample(average, label, steps=20, size=size), label)

    start = saved = judged = time.monotonic()
    running_loss: float | None = None
    while (done := (time.monotonic() - start) / (60 * minutes)) < 1:
        warmup = min(1.0, (step + 1) / 100)
        for group in optimizer.param_groups:
            group["lr"] = lr * warmup * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))
        loss = flow_loss(model, *task.data(task.batch, step))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        decay = min(0.998, (step + 1) / (step + 20))
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)

        running_loss = loss.item() if running_loss is None else 0.98 * running_loss + 0.02 * loss.item()
        now = time.monotonic()
        if step % 50 == 0:
            print(f"step {step}, {(now - start) / 60:.1f} min: loss {running_loss:.4f}", flush=True)
        if now - saved > SAVE_EVERY_S:
            save()
            saved = time.monotonic()
        if now - judged > JUDGE_EVERY_S:
            print(f"step {step}: {judge():.1%} of 40 samples recognized", flush=True)
            judged = time.monotonic()
    save()
    print(f"step {step}, done: {judge():.1%} of 40 samples recognized", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("classifier", *TASKS))
    parser.add_argument("--minutes", type=float, default=50, help="wall-clock time for the diffusion model")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="where the weights go")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in out/")
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(0)
    if args.what == "classifier":
        train_classifier(args.out)
        return
    train_model(
        args.what, load_classifier(args.out / "classifier.safetensors"), args.out, args.minutes, args.lr, args.resume
    )


if __name__ == "__main__":
    main()
