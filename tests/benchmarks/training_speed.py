"""Training speed of M1 on MNIST: hessnb's loop against the usual DataLoader loop, same network, alternating runs.

    python tests/benchmarks/training_speed.py [--batch-size 64] [--steps 300] [--rounds 5]

The usual loop is torchvision's MNIST with ToTensor, a shuffling DataLoader, SGD with momentum. Its pixels, batches and
optimiser are those of hessnb's loop; only the way the data come differs. The median over the rounds and the ratio round
by round are printed; nothing is asserted. Needs MNIST (HESSNB_DATA).
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

from hessnb import data
from hessnb.data import Split, _torchvision_class
from hessnb.models import build
from hessnb.training import train_epoch


class Mnist(Dataset[tuple[torch.Tensor, int]]):
    """MNIST as torchvision hands it out: each sample an image object, then ToTensor."""

    def __init__(self, split: Split) -> None:
        _torchvision_class("mnist")  # makes torchvision importable
        from torchvision.transforms import ToTensor

        self.images: Any = (split.images[:, 0] * 255).round().to(torch.uint8).numpy()
        self.labels = split.labels.tolist()
        self.transform = ToTensor()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image: torch.Tensor = self.transform(Image.fromarray(np.asarray(self.images[index])))
        return image, self.labels[index]


def network() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = build("M1", seed=0)
    return model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def ours(split: Split, batch_size: int, steps: int) -> float:
    """Return samples per second."""
    model, optimizer = network()
    order = torch.randperm(len(split))[: steps * batch_size]
    started = time.perf_counter()
    train_epoch(model, split, optimizer, batch_size, order)
    return len(order) / (time.perf_counter() - started)


def usual(dataset: Mnist, batch_size: int, steps: int, workers: int) -> float:
    """Return samples per second; the workers' start is not counted."""
    model, optimizer = network()
    loader = DataLoader(dataset, batch_size=batch_size, shuffle=True, num_workers=workers)
    batches = iter(loader)
    next(batches)
    started = time.perf_counter()
    for _, (images, labels) in zip(range(steps), batches, strict=False):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return steps * batch_size / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    split = data.load("mnist").train
    dataset = Mnist(split)
    rates: dict[str, list[float]] = {"hessnb": [], "DataLoader": [], "DataLoader, 2 workers": []}
    for _ in range(chosen.rounds):
        rates["hessnb"].append(ours(split, chosen.batch_size, chosen.steps))
        rates["DataLoader"].append(usual(dataset, chosen.batch_size, chosen.steps, 0))
        rates["DataLoader, 2 workers"].append(usual(dataset, chosen.batch_size, chosen.steps, 2))
    print(f"M1, batch {chosen.batch_size}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for name, values in rates.items():
        ratios = [mine / other for mine, other in zip(rates["hessnb"], values, strict=True)]
        print(
            f"{name:22} {statistics.median(values):7,.0f} samples/s, "
            f"hessnb is {statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
