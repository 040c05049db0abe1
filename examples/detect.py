"""Digits scattered over scenes of 128x128 pixels: where are they, and which?

    delest run examples/detect.py
    delest shrink runs/detect-001 --max-drop 1% --time 3min

A detector has several losses at once and boxes for targets, so its job brings its own `step`, `predict` and `metric`. The scenes are
made here of the digits beside this file (see data/README.md), once; the digits of train, validation, selection and test are apart.
"""

from pathlib import Path
from tempfile import gettempdir

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import delest
from delest.detection import MeanAveragePrecision, overlap
from delest.records.batch import Batch

SIDE, PLACES, CELLS = 128, 3, 8  # pixels; at most 3x3 digits a scene; the grid of the network's answers
CELL = SIDE // CELLS
DIGITS = {"train": 6000, "validation": 1000, "selection": 1500, "test": 1500}
SCENES = {"train": 4000, "validation": 400, "selection": 1500, "test": 1000}


def scatter(digits: np.ndarray, labels: np.ndarray, scenes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noisy scenes uint8 [scenes, 128, 128, 1] and boxes float32 [scenes, 9, 5]: x1, y1, x2, y2 in pixels and the class, -1 for none."""
    random = np.random.default_rng(seed)
    pitch, (height, width) = SIDE // PLACES, digits.shape[1:]
    there = random.random((scenes, PLACES**2)) < 0.5
    scene, place = np.nonzero(there)
    which = random.integers(0, len(digits), len(scene))
    top = place // PLACES * pitch + random.integers(0, pitch - height + 1, len(scene))
    left = place % PLACES * pitch + random.integers(0, pitch - width + 1, len(scene))
    images = random.integers(0, 48, (scenes, SIDE, SIDE), np.uint8)
    rows, columns = top[:, None] + np.arange(height), left[:, None] + np.arange(width)
    where = scene[:, None, None], rows[:, :, None], columns[:, None, :]
    images[where] = np.maximum(images[where], digits[which])
    inked = digits[which] > 64
    across, down = inked.any(1), inked.any(2)
    box = (
        left + across.argmax(1),
        top + down.argmax(1),
        left + width - across[:, ::-1].argmax(1),
        top + height - down[:, ::-1].argmax(1),
    )
    boxes = np.full((scenes, PLACES**2, 5), -1, np.float32)
    boxes[scene, place] = np.stack([*box, labels[which]], axis=1)
    return images[..., None], boxes


def write_scenes(folder: Path) -> Path:
    """Scenes and boxes by role as .npy files, which are read row by row; once."""
    if not folder.exists():
        data = np.load(Path(__file__).parent / "data" / "mnist10k.npz")
        digits, labels = data["images"], data["labels"]
        order = np.random.default_rng(0).permutation(len(digits))
        unfinished = folder.with_suffix(".part")
        unfinished.mkdir(exist_ok=True)
        for number, (role, rows) in enumerate(zip(SCENES, np.split(order, np.cumsum(list(DIGITS.values())))[:4], strict=True)):
            images, boxes = scatter(digits[rows], labels[rows], SCENES[role], number)
            np.save(unfinished / f"images_{role}.npy", images)
            np.save(unfinished / f"boxes_{role}.npy", boxes)
        unfinished.rename(folder)
    return folder


class Detector(nn.Module):
    """Seven convolutions, the last of which answers for each cell of 16x16 pixels: 640,000 parameters."""

    def __init__(self) -> None:
        super().__init__()
        widths = (
            (1, 16, 5, 2),
            (16, 32, 3, 2),
            (32, 64, 3, 2),
            (64, 96, 3, 1),
            (96, 128, 3, 2),
            (128, 192, 3, 1),
            (192, 128, 3, 1),
        )
        self.body = nn.Sequential(*(self.block(*width) for width in widths))
        self.head = nn.Conv2d(128, 15, 1)  # objectness; distances from the cell's middle to the four sides; ten classes

    @staticmethod
    def block(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
        convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:  # [B, 1, 128, 128] -> [B, 15, 8, 8]
        return self.head(self.body(images))


def step(model: nn.Module, batch: Batch) -> Tensor:
    """Mean over scenes: the cell in which a digit's middle lies learns its box and class, each cell whether it has one."""
    answers = model(batch.inputs).flatten(2).float()  # [B, 15, 64]
    boxes, classes = batch.targets[..., :4], batch.targets[..., 4].long()  # [B, K, 4] and [B, K]
    there = (classes >= 0).float()
    middles = ((boxes[..., :2] + boxes[..., 2:]) / 2 // CELL).long().clamp(0, CELLS - 1)
    cells = middles[..., 1] * CELLS + middles[..., 0]
    wanted = torch.zeros_like(answers[:, 0]).scatter_reduce(1, cells, there, "amax")
    objectness = F.binary_cross_entropy_with_logits(answers[:, 0], wanted, reduction="none").sum(1)
    chosen = answers.gather(2, cells[:, None].expand(-1, 15, -1))  # [B, 15, K]
    sides = (boxes - (middles.repeat(1, 1, 2) + 0.5) * CELL).transpose(1, 2) / CELL
    distance = F.smooth_l1_loss(chosen[:, 1:5], sides, reduction="none", beta=0.1).sum(1)
    kind = F.cross_entropy(chosen[:, 5:], classes.clamp_min(0), reduction="none")
    return (objectness + ((distance + kind) * there).sum(1)).mean()


def predict(model: nn.Module, images: Tensor) -> Tensor:
    return model(images)


def decode(outputs: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Boxes, scores and classes of each scene from answers [B, 15, 8, 8]; of two boxes of one digit the surer one."""
    answers = outputs.reshape(len(outputs), 15, -1).transpose(0, 2, 1).astype(np.float64)  # [B, 64, 15]
    shares = np.exp(answers[..., 5:] - answers[..., 5:].max(-1, keepdims=True))
    scores = (shares.max(-1) / shares.sum(-1)) / (1 + np.exp(-answers[..., 0]))
    y, x = np.divmod(np.arange(CELLS**2), CELLS)
    boxes = (answers[..., 1:5] + np.stack([x, y, x, y], axis=1) + 0.5) * CELL
    found = []
    for box, score, kind in zip(boxes, scores, answers[..., 5:].argmax(-1), strict=True):
        left = np.flatnonzero(score > 0.02)
        left, kept = left[np.argsort(-score[left], kind="stable")], []
        while len(left):
            kept.append(left[0])
            left = left[1:][overlap(box[left[0]], box[left[1:]]) < 0.5]
        found.append((box[kept], score[kept], kind[kept]))
    return found


job = delest.Job(
    model=Detector,
    data=write_scenes(Path(gettempdir()) / "delest-scenes"),
    target="boxes",
    step=step,
    predict=predict,
    metric=MeanAveragePrecision(decode, name="mAP@0.5"),
    batch_size=32,
    recipe=delest.Recipe(epochs=8),
    name="detect",
)
