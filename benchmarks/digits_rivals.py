"""The rivals of `digits.py`: each trains the official MNIST example's network and prints its test accuracy as JSON.

    python digits_rivals.py RIVAL --data FILE --seed N

`plain` is the official example's loop and recipe (Adadelta 1.0, StepLR 0.7, batch 64, 14 epochs, a per-sample DataLoader,
a test after each epoch); `lightning` the same in Lightning; `plain with delest's recipe` that loop with what
`delest.Recipe()` stands for, to tell the recipe's gain from the loop's.
"""

from __future__ import annotations

import argparse
import json
import warnings
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from digits_job import Net
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from delest.backends.torch.optimizers import DEFAULT_DECAY, DEFAULT_LR, groups_of
from delest.job import Recipe
from delest.training.schedules import Schedule

EPOCHS, BATCH = 14, 64


class Digits(Dataset):
    """One row at a time, turned into a normalised tensor when asked for, as torchvision's MNIST does."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        image = torch.from_numpy(self.images[i]).unsqueeze(0).to(torch.float32).div(255)
        return image.sub(0.1307).div(0.3081), int(self.labels[i])


def accuracy(model: Net, loader: DataLoader) -> float:
    model.eval()
    with torch.no_grad():
        correct = sum(int((model(x).argmax(1) == y).sum()) for x, y in loader)
    return correct / len(loader.dataset)  # type: ignore[arg-type]


def train_plain(train: Digits, test: Digits) -> float:
    model = Net()
    optimizer = torch.optim.Adadelta(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.7)
    loader, testing = DataLoader(train, BATCH, shuffle=True), DataLoader(test, 1000)
    for _ in range(EPOCHS):
        model.train()
        for x, y in loader:
            optimizer.zero_grad()
            F.nll_loss(model(x), y).backward()
            optimizer.step()
        result = accuracy(model, testing)
        schedule.step()
    return result


def train_with_our_recipe(train: Digits, test: Digits) -> float:
    recipe, model = Recipe(), Net()
    cut = round(len(train) * 0.74 / 0.80)  # validation and selection rows are kept out, as delest keeps them
    order = torch.randperm(len(train)).numpy()
    kept, held = (
        Digits(train.images[part], train.labels[part]) for part in (order[:cut], order[cut : (cut + len(train)) // 2])
    )
    loader, validating = DataLoader(kept, BATCH, shuffle=True), DataLoader(held, 1000)
    lr = DEFAULT_LR["adamw"]
    optimizer = torch.optim.AdamW(groups_of(model, DEFAULT_DECAY["adamw"]), lr=lr)
    epochs = recipe.epochs_for(len(kept), BATCH)
    schedule, step = Schedule.of(recipe, epochs * len(loader)), 0
    for _ in range(epochs):
        model.train()
        for x, y in loader:
            for group in optimizer.param_groups:
                group["lr"] = lr * schedule.rate(step)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y, label_smoothing=recipe.label_smoothing).backward()
            optimizer.step()
            step += 1
        accuracy(model, validating)
    return accuracy(model, DataLoader(test, 1000))


def train_lightning(train: Digits, test: Digits) -> float:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.correct = Net(), 0

        def training_step(self, batch: Any, _: int) -> Tensor:
            return F.nll_loss(self.model(batch[0]), batch[1])

        def on_validation_epoch_start(self) -> None:
            self.correct = 0

        def validation_step(self, batch: Any, _: int) -> None:
            self.correct += int((self.model(batch[0]).argmax(1) == batch[1]).sum())

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.Adadelta(self.parameters(), lr=1.0)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.7)]

    module = Module()
    trainer = lightning.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, DataLoader(train, BATCH, shuffle=True), DataLoader(test, 1000))
    return module.correct / len(test)


RIVALS = {"plain": train_plain, "lightning": train_lightning, "plain with delest's recipe": train_with_our_recipe}


def main() -> None:
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser()
    parser.add_argument("rival", choices=RIVALS)
    parser.add_argument("--data", required=True)
    parser.add_argument("--seed", type=int, required=True)
    options = parser.parse_args()
    data = np.load(options.data)
    torch.manual_seed(options.seed)
    train, test = Digits(data["x_train"], data["y_train"]), Digits(data["x_test"], data["y_test"])
    print(json.dumps({"accuracy": RIVALS[options.rival](train, test)}))


if __name__ == "__main__":
    main()
