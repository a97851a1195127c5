"""Train the example models and their judge on one CPU core.

    OMP_NUM_THREADS=1 python examples/train.py classifier
    OMP_NUM_THREADS=1 python examples/train.py stdit --minutes 50
    OMP_NUM_THREADS=1 python examples/train.py dit --minutes 40
    OMP_NUM_THREADS=1 python examples/train.py mmdit --minutes 60
    OMP_NUM_THREADS=1 python examples/train.py dit --minutes 60 --resume   # from its checkpoint, to 60 minutes in all

The learning rate follows a cosine over the time that the core works on it, so any `--minutes` gives a finished model,
and a busy machine the same one later. Averaged weights are written every two minutes, as float16.
"""

import argparse
import copy
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from captions import caption_accuracy, captioned_digits
from classifier import DigitClassifier, accuracy
from digits import moving_digits, placed_digits
from dit import DiT
from mmdit import MMDiT
from sampling import NULL_LABEL, WEIGHTS, load_classifier, sample, save_weights, shift_times
from stdit import STDiT

SAVE_EVERY_S = 120
JUDGE_EVERY_S = 480
LABEL_DROPOUT = 0.1
HELD_OUT_SEED = 1_000_000


@dataclass(frozen=True)
class Stage:
    """A part of the training: data(n, seed) → samples (n, C, …), labels (n,) or captions (n, T).

    `until` is the share of all minutes after which it ends, `shift` that of the timesteps, as `sample` has it.
    """

    data: Callable[[int, int], tuple[torch.Tensor, torch.Tensor]]
    batch: int
    until: float = 1.0
    shift: float = 1.0


@dataclass(frozen=True)
class Task:
    """What a model is trained on, in stages, and accuracy(classifier, samples, labels), its judge."""

    build: Callable[[], STDiT | DiT | MMDiT]
    stages: tuple[Stage, ...]
    accuracy: Callable[[DigitClassifier, torch.Tensor, torch.Tensor], float] = accuracy


# Most of what a caption means is learned at an eighth of the cost, and finer images are learned from coarser ones.
# An image of s times the pixels a side averages noise over s² times as many, so its timesteps are shifted by s.
MMDIT_STAGES = (
    Stage(partial(captioned_digits, size=16), 32, until=0.37),
    Stage(partial(captioned_digits, size=32), 12, until=0.62, shift=2.0),
    Stage(partial(captioned_digits, size=64), 4, shift=4.0),
)
TASKS = {
    "stdit": Task(STDiT, (Stage(moving_digits, 16),)),
    "dit": Task(DiT, (Stage(placed_digits, 64),)),
    "mmdit": Task(MMDiT, MMDIT_STAGES, caption_accuracy),
}


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


def flow_loss(model: nn.Module, data: torch.Tensor, label: torch.Tensor, shift: float = 1.0) -> torch.Tensor:
    """Returns the mean squared error of the velocity on the straight path from data to noise.

    Timesteps are logit-normal (arXiv 2403.03206, section 3.1), one from each of B equally likely intervals,
    so that every batch sees all noise levels. Labels are (B,), or captions (B, T).
    """
    batch = data.shape[0]
    quantile = (torch.arange(batch) + torch.rand(batch)) / batch
    t = shift_times(torch.special.ndtri(quantile.clamp(1e-4, 1 - 1e-4)).sigmoid(), shift)
    noise = torch.randn_like(data)
    x = torch.lerp(data, noise, t.view(-1, *[1] * (data.dim() - 1)))
    label = torch.where(torch.rand(batch, *[1] * (label.dim() - 1)) < LABEL_DROPOUT, NULL_LABEL, label)
    return F.mse_loss(model(x, 1000 * t, label), noise - data)


def train_model(name: str, classifier: DigitClassifier, out: Path, minutes: float, lr: float, resume: bool) -> None:
    """Trains a diffusion model for `minutes` in all, keeping an exponential average of its weights."""
    task, checkpoint = TASKS[name], Path("out", f"{name}.pt")
    model = task.build()
    config = model.config
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    step, first_step, elapsed_s = 0, 0, 0.0
    if resume:
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step, first_step, elapsed_s = state["step"], state["first_step"], state["elapsed_s"]
    torch.manual_seed(step)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"model: {num_parameters / 1e6:.2f} M parameters, {config}", flush=True)

    def save() -> None:
        save_weights(average, out / f"{name}.safetensors", asdict(config), torch.float16)
        modules = {"model": model, "average": average, "optimizer": optimizer}
        state = {name: module.state_dict() for name, module in modules.items()}
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        torch.save({**state, "step": step, "first_step": first_step, "elapsed_s": elapsed_s}, checkpoint)

    def stage_at(done: float) -> Stage:
        return next((stage for stage in task.stages if done < stage.until), task.stages[-1])

    def judge(stage: Stage) -> float:
        data, label = stage.data(min(40, 4 * stage.batch), HELD_OUT_SEED)
        video = sample(average, label, steps=20, size=tuple(data.shape[1:]), shift=stage.shift)
        return task.accuracy(classifier, video, label)

    start = time.process_time() - elapsed_s
    saved = judged = time.process_time()
    stage, running_loss = stage_at(elapsed_s / (60 * minutes)), None
    while (done := elapsed_s / (60 * minutes)) < 1:
        if stage is not (stage := stage_at(done)):
            first_step = step
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 100) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))
        loss = flow_loss(model, *stage.data(stage.batch, step), stage.shift)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        # the average soon forgets what was before this stage
        step, steps = step + 1, step + 1 - first_step
        decay = min(0.998, steps / (steps + 20))
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)

        running_loss = loss.item() if running_loss is None else 0.98 * running_loss + 0.02 * loss.item()
        now = time.process_time()
        elapsed_s = now - start
        if step % 50 == 0:
            print(f"step {step}, {elapsed_s / 60:.1f} min: loss {running_loss:.4f}", flush=True)
        if now - saved > SAVE_EVERY_S:
            save()
            saved = time.process_time()
        if now - judged > JUDGE_EVERY_S:
            print(f"step {step}: {judge(stage):.1%} of the digits recognized", flush=True)
            judged = time.process_time()
    save()
    print(f"step {step}, done: {judge(task.stages[-1]):.1%} of the digits recognized", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("classifier", *TASKS))
    parser.add_argument("--minutes", type=float, default=50, help="CPU time for the diffusion model, in all")
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
