"""The two networks, in PyTorch. Both take images of shape (n, 64) and give logits of shape (n, 10).

Imported by the training workers only: torch stays out of the process that runs the pipeline.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from hedgerow_cloud.learn.data import CLASSES, PIXELS

SIDE = 8
TEACHER_CHANNELS = 64
TEACHER_WIDTH = 1024
STUDENT_WIDTHS = (384, 256)


class Teacher(nn.Module):
    """A convolutional network: two blocks of two 3x3 convolutions, then two dense layers."""

    def __init__(self) -> None:
        super().__init__()
        narrow, wide = TEACHER_CHANNELS, 2 * TEACHER_CHANNELS
        self.layers = nn.Sequential(
            *_convolution(1, narrow),
            *_convolution(narrow, narrow),
            nn.MaxPool2d(2),
            *_convolution(narrow, wide),
            *_convolution(wide, wide),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(wide * (SIDE // 4) ** 2, TEACHER_WIDTH),
            nn.ReLU(),
            nn.Linear(TEACHER_WIDTH, CLASSES),
        )

    def forward(self, image: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.layers(image.reshape(-1, 1, SIDE, SIDE))
        return logits


class Student(nn.Module):
    """Three dense layers: small, and all of it quantizes well."""

    def __init__(self) -> None:
        super().__init__()
        first, second = STUDENT_WIDTHS
        self.layers = nn.Sequential(
            nn.Linear(PIXELS, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU(), nn.Linear(second, CLASSES)
        )

    def forward(self, image: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.layers(image)
        return logits


NETWORKS: dict[str, type[nn.Module]] = {"teacher": Teacher, "student": Student}


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image turned by up to 15°, scaled by up to 15 % and moved by up to one pixel."""

    def uniform(limit: float) -> Tensor:
        return (torch.rand(len(images), generator=generator) * 2 - 1) * limit

    angle, scale = uniform(0.26), 1 + uniform(0.15)
    cosine, sine = torch.cos(angle) / scale, torch.sin(angle) / scale
    # Rows of the inverse transforms, in grid_sample's coordinates from -1 to 1 over the image's side.
    rows = [torch.stack([cosine, -sine, uniform(2 / SIDE)], 1), torch.stack([sine, cosine, uniform(2 / SIDE)], 1)]
    square = images.reshape(-1, 1, SIDE, SIDE)
    grid = functional.affine_grid(torch.stack(rows, 1), list(square.shape), align_corners=False)
    return functional.grid_sample(square, grid, align_corners=False).reshape(-1, PIXELS)


def _convolution(narrow: int, wide: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(narrow, wide, 3, padding=1), nn.BatchNorm2d(wide), nn.ReLU()
