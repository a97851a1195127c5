"""A digit classifier for videos, the judge of what the example models generate, and two measures made with it."""

import torch
from torch import nn


class DigitClassifier(nn.Module):
    """A small convolutional network on every frame; a video's logits are the mean over its frames."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.ReLU(),
        )
        self.head = nn.Linear(2 * width, 10)

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        """Returns logits (B, 10) of video (B, 1, F, H, W) or image (B, 1, H, W) in [-1, 1]."""
        return self.head(self.embed(video)).mean(dim=1)

    def embed(self, video: torch.Tensor) -> torch.Tensor:
        """Returns the features (B, F, 2 · width) of every frame; an image has one frame."""
        video = video.unsqueeze(2) if video.dim() == 4 else video
        features = self.features(video.transpose(1, 2).flatten(0, 1))
        return features.amax(dim=(-2, -1)).unflatten(0, video.shape[:3:2])


@torch.no_grad()
def accuracy(classifier: nn.Module, video: torch.Tensor, label: torch.Tensor) -> float:
    """Returns the fraction of videos (B, 1, F, H, W) or images (B, 1, H, W) recognized as their label (B,)."""
    return (classifier(video).argmax(dim=-1) == label).float().mean().item()


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Returns the Fréchet distance of the Gaussians with the mean and covariance of two sets of features.

    ‖μa − μb‖² + tr(Σa + Σb − 2·(Σa·Σb)^½). With Σ = RᵀR, of a QR decomposition, the trace of the square root is the
    sum of the singular values of Ra·Rbᵀ; so singular covariances, of features that are always 0, do no harm.

    >>> a = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    >>> round(frechet_distance(a, a + 3), 6)
    18.0

    Args:
        a, b: (N, K) and (M, K), such as `classifier.embed(x).mean(dim=1)` of images or videos x.

    Source: "FID" of Heusel et al., arXiv 1706.08500, Eq. 6, in the features of our classifier instead of Inception's.
    """
    (mean_a, root_a), (mean_b, root_b) = (_mean_and_root(x.double()) for x in (a, b))
    trace = root_a.square().sum() + root_b.square().sum() - 2 * torch.linalg.matrix_norm(root_a @ root_b.T, "nuc")
    return ((mean_a - mean_b).square().sum() + trace).item()


def _mean_and_root(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the mean (K,) of features (N, K), and R (min(N, K), K) with RᵀR their unbiased covariance."""
    mean = x.mean(dim=0)
    return mean, torch.linalg.qr(x - mean, mode="r").R / (len(x) - 1) ** 0.5
