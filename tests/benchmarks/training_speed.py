"""Training speed: hessnb's steps against the usual DataLoader loop, same network and device, alternating runs.

    python tests/benchmarks/training_speed.py [--network M1] [--batch-size 64] [--device cpu] [--seeds 1]
                                              [--steps 300] [--rounds 5]

The usual loop is torchvision's data set with ToTensor, a shuffling DataLoader, SGD with momentum. Its pixels, batches
and optimiser are those of hessnb's steps; what differs is the way the data come and, on CUDA, that a step is captured.
With --seeds, steps of so many networks together are timed too. The median over the rounds, seconds per epoch of the
whole training set, and the ratio round by round are printed; nothing is asserted. Needs the network's data set
(HESSNB_DATA).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

from hessnb import data
from hessnb.data import Split, _torchvision_class
from hessnb.experiments.provenance import device_name
from hessnb.models import build
from hessnb.steps import Steps, minibatch_step, time_when_done
from hessnb.together import Stacked
from hessnb.training import Recipe

DATA = {"M1": "mnist", "C1": "cifar10", "C2": "cifar10", "C3": "cifar10", "CR": "cifar100"}
LR, MOMENTUM = 0.01, 0.9


class Pictures(Dataset[tuple[torch.Tensor, int]]):
    """A data set as torchvision hands it out: each sample an image object, then ToTensor."""

    def __init__(self, split: Split) -> None:
        _torchvision_class("mnist")  # makes torchvision importable
        from torchvision.transforms import ToTensor

        pixels = (split.images.permute(0, 2, 3, 1).squeeze(-1) * 255).round()
        self.images: Any = pixels.to(torch.uint8).cpu().numpy()
        self.labels = split.labels.tolist()
        self.transform = ToTensor()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image: torch.Tensor = self.transform(Image.fromarray(np.asarray(self.images[index])))
        return image, self.labels[index]


def network(chosen: argparse.Namespace) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = build(chosen.network, seed=0, width=4.0 if chosen.network == "CR" else 1.0).to(chosen.device).train()
    return model, torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)


def seconds(chosen: argparse.Namespace, steps: Steps, order: torch.Tensor) -> float:
    """Return the seconds of steps in an order of samples, after one that captures the step."""
    steps.epoch(order[..., : chosen.batch_size], chosen.batch_size, LR)
    started = time_when_done(torch.device(chosen.device))
    steps.epoch(order, chosen.batch_size, LR)
    return time_when_done(torch.device(chosen.device)) - started


def ours(split: Split, chosen: argparse.Namespace) -> float:
    """Return samples per second."""
    model, optimizer = network(chosen)
    order = torch.randperm(len(split))[: chosen.steps * chosen.batch_size]
    steps = Steps(minibatch_step(model, split, optimizer), optimizer, list(model.buffers()))
    return len(order) / seconds(chosen, steps, order)


def together(split: Split, chosen: argparse.Namespace) -> float:
    """Return samples per second, those of all networks counted."""
    models = [network(chosen)[0] for _ in range(chosen.seeds)]
    stacked = Stacked(models, [[] for _ in models], Recipe(chosen.batch_size, LR, MOMENTUM, max_epochs=1, seed=0))
    orders = torch.stack([torch.randperm(len(split))[: chosen.steps * chosen.batch_size] for _ in models])
    steps = Steps(stacked.step_on(split), stacked.optimizer, list(stacked.buffers.values()))
    return orders.numel() / seconds(chosen, steps, orders)


def usual(dataset: Pictures, chosen: argparse.Namespace, workers: int) -> float:
    """Return samples per second; the workers' start is not counted."""
    model, optimizer = network(chosen)
    loader = DataLoader(
        dataset, batch_size=chosen.batch_size, shuffle=True, num_workers=workers, pin_memory=chosen.device != "cpu"
    )
    batches, samples = iter(loader), 0
    next(batches)
    started = time_when_done(torch.device(chosen.device))
    for _, (images, labels) in zip(range(chosen.steps), batches, strict=False):
        images, labels = images.to(chosen.device, non_blocking=True), labels.to(chosen.device, non_blocking=True)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        samples += len(labels)
    return samples / (time_when_done(torch.device(chosen.device)) - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=DATA, default="M1")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    split = data.load(DATA[chosen.network], device=chosen.device).train
    dataset = Pictures(split)
    runs: dict[str, Callable[[], float]] = {"hessnb": lambda: ours(split, chosen)}
    if chosen.seeds > 1:
        runs[f"hessnb, {chosen.seeds} seeds together"] = lambda: together(split, chosen)
    runs |= {
        "DataLoader": lambda: usual(dataset, chosen, 0),
        "DataLoader, 2 workers": lambda: usual(dataset, chosen, 2),
    }
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(chosen.rounds):
        for name, run in runs.items():
            rates[name].append(run())
    where = f"{torch.get_num_threads()} threads" if chosen.device == "cpu" else device_name(torch.device(chosen.device))
    print(f"{chosen.network}, batch {chosen.batch_size}, {where}, torch {torch.__version__}")
    for name, values in rates.items():
        ratios = [mine / other for mine, other in zip(rates["hessnb"], values, strict=True)]
        rate = statistics.median(values)
        print(
            f"{name:26} {rate:9,.0f} samples/s, {len(split) / rate:7.2f} s per epoch, "
            f"hessnb is {statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
