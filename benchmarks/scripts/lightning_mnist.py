"""The same kind of images by Lightning: a module, a Trainer, validation after each epoch."""

import argparse
import logging
import tempfile
import warnings

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=120)
parser.add_argument("--batch-size", type=int, default=64)
parser.add_argument("--memory", help="a budget that delest's callback holds")
options = parser.parse_args()

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class LitClassifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(
            nn.Conv2d(1, 16, 3),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * 12 * 12, 128),
            nn.ReLU(),
            nn.Dropout(0.25),
            nn.Linear(128, 10),
        )

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.cross_entropy(self.model(x), y)
        print(f"loss {loss.item()!r}")
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", nn.functional.cross_entropy(self.model(x), y))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


L.seed_everything(0, verbose=False)
images = torch.randn(options.steps * options.batch_size // 2, 1, 28, 28)
labels = images.flatten(1)[:, :10].argmax(1)
train_loader = DataLoader(TensorDataset(images, labels), batch_size=options.batch_size, shuffle=True)
val_loader = DataLoader(TensorDataset(images[:512], labels[:512]), batch_size=options.batch_size)

with tempfile.TemporaryDirectory() as folder:
    callbacks = []
    if options.memory:
        from delest.frameworks.lightning import DelestCallback

        callbacks.append(DelestCallback(options.memory, out=f"{folder}/run"))
    trainer = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        default_root_dir=folder,
        callbacks=callbacks,
    )
    trainer.fit(LitClassifier(), train_loader, val_loader)
print(f"val_loss {trainer.callback_metrics['val_loss'].item()!r}")
