"""A session and a backend of the smallest kind, and data that a tiny network learns in moments."""

import contextlib

import numpy as np
import torch
from torch import nn

from delest.backends.torch.export import export_network
from delest.data import Feed, fit_preprocessing
from delest.records.batch import Outputs


class Session:
    """A trained module, as the pipeline sees it."""

    def __init__(self, module):
        self.module = module

    @contextlib.contextmanager
    def answering(self):
        yield self.predict

    def predict(self, inputs):
        with torch.inference_mode():
            if isinstance(inputs, dict):
                return self.module.eval()(**{name: torch.as_tensor(array) for name, array in inputs.items()}).numpy()
            return self.module.eval()(torch.as_tensor(inputs)).numpy()

    def outputs(self, feed):
        for batch in feed.ordered():
            outputs = self.predict(batch.inputs)
            yield Outputs(outputs, batch.targets, self.losses(outputs, batch.targets), batch.index)

    def losses(self, outputs, targets):
        if targets.dtype == np.int64:
            return nn.functional.cross_entropy(torch.as_tensor(outputs), torch.as_tensor(targets), reduction="none").numpy()
        return (outputs.reshape(-1) - targets) ** 2

    def parameters(self):
        return sum(parameter.numel() for parameter in self.module.parameters())

    def weights(self):
        return {name: value.numpy() for name, value in self.module.state_dict().items()}


class Backend:
    """Exports a session's module."""

    name = "torch"
    runtime = "PyTorch eager"

    def export(self, session, inputs, path):
        export_network(session.module, inputs, path)


class Network(nn.Module):
    """A small convolutional network."""

    def __init__(self, channels, classes):
        super().__init__()
        self.first = nn.Conv2d(channels, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.second = nn.Conv2d(16, 64, 3, padding=1)
        self.head = nn.Linear(64, classes)

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        return self.head(torch.relu(self.second(x)).mean((2, 3)))


class Table(nn.Module):
    """Numbers beside embedded categories."""

    def __init__(self, schema):
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(column.cardinality, 4) for column in schema.categories)
        self.hidden = nn.Linear(schema.number_width + 4 * len(schema.categories), 64)
        self.head = nn.Linear(64, 1)

    def forward(self, numbers, categories):
        embedded = [embedding(categories[:, k]) for k, embedding in enumerate(self.embeddings)]
        return self.head(torch.relu(self.hidden(torch.cat([numbers, *embedded], 1))))


def make_feeds(source, **rows):
    """Feeds of consecutive rows by role, and the preprocessing fitted on the training rows."""
    starts = np.cumsum([0, *rows.values()])
    parts = {role: np.arange(starts[k], starts[k + 1]) for k, role in enumerate(rows)}
    preprocessing = fit_preprocessing(source, parts["train"])
    return {role: Feed(source, index, preprocessing, batch_size=64) for role, index in parts.items()}, preprocessing


def fit(module, feed, epochs, lr=0.01):
    """Train a module, plainly."""
    optimizer = torch.optim.Adam(module.parameters(), lr)
    for epoch in range(epochs):
        for batch in feed.epoch(epoch):
            optimizer.zero_grad()
            named = batch.inputs if isinstance(batch.inputs, dict) else {"x": batch.inputs}
            outputs = module(**{name: torch.as_tensor(array) for name, array in named.items()})
            targets = torch.as_tensor(batch.targets)
            loss = nn.functional.cross_entropy if targets.dtype == torch.int64 else nn.functional.mse_loss
            loss(outputs.reshape(len(targets)) if loss is nn.functional.mse_loss else outputs, targets).backward()
            optimizer.step()
    return Session(module.eval())
