"""Images by a small convolutional network, as PyTorch's introductory tutorial writes it: a loop over a DataLoader."""

import argparse

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=120)
parser.add_argument("--batch-size", type=int, default=64)
options = parser.parse_args()

torch.manual_seed(0)
images = torch.randn(options.steps * options.batch_size // 2, 1, 28, 28)
labels = images.flatten(1)[:, :10].argmax(1)
train_loader = DataLoader(TensorDataset(images, labels), batch_size=options.batch_size, shuffle=True)
test_loader = DataLoader(TensorDataset(images[:512], labels[:512]), batch_size=options.batch_size)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3)
        self.conv2 = nn.Conv2d(16, 32, 3)
        self.dropout = nn.Dropout(0.25)
        self.fc1 = nn.Linear(32 * 12 * 12, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x):
        x = torch.relu(self.conv1(x))
        x = torch.max_pool2d(torch.relu(self.conv2(x)), 2)
        x = torch.relu(self.fc1(self.dropout(torch.flatten(x, 1))))
        return self.fc2(x)


model = Net()
loss_fn = nn.CrossEntropyLoss()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

for epoch in range(2):
    model.train()
    for inputs, targets in train_loader:
        loss = loss_fn(model(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"loss {loss.item()!r}")
    model.eval()
    correct = 0
    with torch.no_grad():
        for inputs, targets in test_loader:
            correct += (model(inputs).argmax(1) == targets).sum().item()
    print(f"epoch {epoch}: {correct} of 512 right")
