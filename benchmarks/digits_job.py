"""The network of the official PyTorch MNIST example, and delest's job for it: `Recipe()` as it is.

Source of the network and of the rivals' recipe: https://github.com/pytorch/examples/tree/main/mnist. Its 8,000 training
rows and 2,000 test rows are the same for all rivals; delest takes its validation and selection rows out of the 8,000.
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import delest


class Net(nn.Module):
    """Input [B, 1, 28, 28], output log-probabilities [B, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 32, 3), nn.Conv2d(32, 64, 3)
        self.dropout1, self.dropout2 = nn.Dropout(0.25), nn.Dropout(0.5)
        self.fc1, self.fc2 = nn.Linear(9216, 128), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        x = torch.flatten(self.dropout1(F.max_pool2d(x, 2)), 1)
        x = self.dropout2(F.relu(self.fc1(x)))
        return F.log_softmax(self.fc2(x), dim=1)


job = delest.Job(
    model=Net,
    data=os.environ.get("DIGITS"),  # an .npz with x_train, y_train, x_test, y_test
    batch_size=64,
    split=delest.Split(train=0.74, validation=0.03, selection=0.03, test=0.2),
    recipe=delest.Recipe(),
)
