"""10,000 real handwritten digits, 28x28 pixels, ten classes.

    delest run examples/digits.py

The data are shipped beside this file (MNIST by Y. LeCun, C. Cortes and C. Burges, CC BY-SA 3.0; see data/README.md).
"""

from pathlib import Path

from torch import Tensor, nn

import delest


class Digits(nn.Module):
    """Three convolutions and one hidden layer: 220,000 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 5, stride=2, padding=2, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
        )
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(64 * 7 * 7, 64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 10))

    def forward(self, images: Tensor) -> Tensor:  # [B, 1, 28, 28] -> [B, 10]
        return self.head(self.features(images))


job = delest.Job(model=Digits, data=Path(__file__).parent / "data" / "mnist10k.npz", name="digits")
