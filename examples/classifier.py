"""A digit classifier for videos: the judge of what the example model generates."""

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
