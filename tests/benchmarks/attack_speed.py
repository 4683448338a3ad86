"""Speed of hessnb's attacks: the closed form against conjugate gradients, and gradient attacks against foolbox.

    python tests/benchmarks/attack_speed.py [--only NAME ...] [--rounds 5] [--threads 1] [--publish FILE]

exact      L2HESS in closed form against 10 steps of conjugate gradients, hessnb's and plain (asked: 5 times as fast),
           and hessnb's against plain ones
gradient   FGSM against one gradient of the loss, which it needs (asked: no more than 1.1 gradients)
foolbox    FGSM, BIM with 10 steps and the L2 step against foolbox's (asked: none slower)
unrolled   FGSM of M1, C3 and CR, untrained, with hessnb's float64 convolution against the same with PyTorch's

Passes for a chunk of samples with c classes: the closed form takes one forward pass and c - 1 backward ones; hessnb's
CG one forward pass and two backward ones, and two passes for every product, one of them a derivative of the backward
pass. Plain CG is the textbook's, on products by PyTorch's own double backward, without hessnb's stop where curvature or
residual are at rounding: the two agree to 1e-5 of a pixel's range after three steps, and for many digits not after six.

The network is M1, trained here to a loss of 0.02 on 5,000 MNIST digits, the samples MNIST test digits. Runs alternate
in one process; ratios are the other's seconds over hessnb's, round by round. The gradient and foolbox compute in
float64 on a network that was converted before; by how much the results differ, each row says. The gradient is taken in
batches of the size that hessnb takes. Foolbox leaves batches to its caller, and is called both ways: with all digits
at once, and in the same batches. Against the gradient hessnb is given the float32 network, and its conversion counts.
So do its checks. Seconds are those of the processor, summed over threads. Nothing is asserted. Needs MNIST
(HESSNB_DATA) and foolbox: pip install -e '.[bench]'.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import foolbox
import peers
import torch
import torch.nn.functional as F
from curvature_speed import Row, compared, measure, network
from peers import alternate
from torch import Tensor, nn

from hessnb import data, models
from hessnb.attacks import fgsm, fgsm_iterated, l2_gradient, l2_hessian
from hessnb.curvature import kernels

BATCH = 50  # what hessnb takes on a CPU unless told otherwise
EPS = 0.1


def digits(chosen: argparse.Namespace) -> tuple[Tensor, Tensor]:
    test = data.load("mnist", n_test=chosen.digits).test
    # With the strides of (N, C, H, W), or the peers would pay for others, which hessnb straightens out.
    return test.images.clone(memory_format=torch.contiguous_format), test.labels


def in_float64() -> nn.Module:
    return copy.deepcopy(network()).double().requires_grad_(False)


def against(
    chosen: argparse.Namespace,
    name: str,
    what: str,
    peer: str,
    ours: Callable[[], Tensor],
    theirs: Callable[[], Tensor],
) -> Row:
    """Return the row of two attacks, run in turns after once for warming up."""
    subjects = {"ours": ours, "peer": theirs}
    alternate(1, subjects)
    seconds, found = alternate(chosen.rounds, subjects)
    row = compared(name, what, peer, seconds["ours"], seconds["peer"])
    apart = float((found["ours"].double() - found["peer"].double()).abs().max())
    return {**row, "notes": [f"the results differ by at most {apart:.1e}"]}


def plain_cg(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> Tensor:
    """Return the digits after a step of L2HESS by conjugate gradients as one writes them down first."""
    parts = []
    for part, labels in zip(x.double().split(BATCH), y.split(BATCH), strict=True):
        leaf = part.clone().requires_grad_()
        loss = F.cross_entropy(model(leaf), labels, reduction="sum")
        (g,) = torch.autograd.grad(loss, leaf, create_graph=True)
        r = p = F.normalize(g.detach().flatten(1), eps=0.0)
        s, left = torch.zeros_like(r), (r * r).sum(1)
        for _ in range(steps):
            hp = torch.autograd.grad(g, leaf, p.view_as(g), retain_graph=True)[0].flatten(1)
            alpha = torch.nan_to_num(left / (p * hp).sum(1), 0.0, 0.0, 0.0)
            s, r = s + alpha[:, None] * p, r - alpha[:, None] * hp
            before, left = left, (r * r).sum(1)
            p = r + torch.nan_to_num(left / before)[:, None] * p
        radius = EPS * part[0].numel() ** 0.5
        parts.append((part + radius * F.normalize(s, eps=0.0).view_as(part)).clamp(0, 1))
    return torch.cat(parts)


def exact(chosen: argparse.Namespace) -> list[Row]:
    x, y = digits(chosen)
    iterated = partial(l2_hessian, network(), x, y, eps=EPS)
    closed = partial(iterated, solver="exact")
    plain = partial(plain_cg, in_float64(), x, y, 10)
    m1 = f"M1, {chosen.digits:,} digits"
    closed_form, plainly = f"L2HESS in closed form, {m1}", "10 steps of CG by PyTorch's own double backward"
    return [
        against(chosen, "attack-exact", closed_form, "10 steps of CG, hessnb's", closed, iterated),
        against(chosen, "attack-exact-plain", closed_form, plainly, closed, plain),
        against(chosen, "attack-cg", f"L2HESS by 10 steps of CG, {m1}", plainly, iterated, plain),
    ]


def gradient(chosen: argparse.Namespace) -> list[Row]:
    x, y = digits(chosen)
    model = in_float64()

    def one_gradient() -> Tensor:
        parts = []
        for part, labels in zip(x.double().split(BATCH), y.split(BATCH), strict=True):
            leaf = part.clone().requires_grad_()
            (g,) = torch.autograd.grad(F.cross_entropy(model(leaf), labels, reduction="sum"), leaf)
            parts.append(g)
        return torch.cat(parts)

    what = f"FGSM, M1, {chosen.digits:,} digits"
    ours = partial(fgsm, network(), x, y, eps=EPS)
    row = against(chosen, "attack-gradient", what, "one gradient of the loss", ours, one_gradient)
    row["notes"] = [f"in gradients: {1 / row['ratio']['median']:.3g}"]
    return [row]


def foolbox_attacks(chosen: argparse.Namespace) -> list[Row]:
    x, y = digits(chosen)
    bounded = foolbox.PyTorchModel(in_float64(), bounds=(0, 1), device="cpu")
    radius = EPS * x[0].numel() ** 0.5
    attacks: dict[str, tuple[Callable[..., Tensor], Any, float]] = {
        "fgsm": (fgsm, foolbox.attacks.LinfFastGradientAttack(), EPS),
        "bim": (fgsm_iterated, foolbox.attacks.LinfBasicIterativeAttack(rel_stepsize=0.1, steps=10), EPS),
        "l2": (l2_gradient, foolbox.attacks.L2FastGradientAttack(), radius),
    }
    rows = []
    for name, (ours, attack, epsilon) in attacks.items():

        def theirs(batch: int, attack: Any = attack, epsilon: float = epsilon) -> Tensor:
            parts = zip(x.double().split(batch), y.split(batch), strict=True)
            return torch.cat([attack.run(bounded, part, labels, epsilon=epsilon) for part, labels in parts])

        # In float64 on both sides, so that the results can be compared.
        mine = partial(ours, in_float64(), x.double(), y, eps=EPS)
        what = f"{name.upper()}, M1, {chosen.digits:,} digits"
        for batch, how in (chosen.digits, "all digits in one call"), (BATCH, f"called with {BATCH} at a time"):
            peer = f"{peers.version('foolbox')}, {how}"
            rows.append(against(chosen, f"attack-foolbox-{name}-{batch}", what, peer, mine, partial(theirs, batch)))
    return rows


def unrolled(chosen: argparse.Namespace) -> list[Row]:
    rows = []
    for name, dataset, n in ("M1", "mnist", chosen.digits), ("C3", "cifar10", 150), ("CR", "cifar100", 150):
        test = data.load(dataset, n_test=n).test
        ours = partial(fgsm, models.build(name, seed=0), test.images, test.labels, eps=0.02)

        def theirs(ours: Callable[[], Tensor] = ours) -> Tensor:
            with mock.patch.object(kernels, "_is_ordinary", return_value=False):
                return ours()

        what = f"FGSM in float64, {name}, {n:,} {dataset} test images"
        rows.append(
            against(chosen, f"attack-unrolled-{name}", what, "the same with PyTorch's convolutions", ours, theirs)
        )
    return rows


ROWS: dict[str, Callable[[argparse.Namespace], list[Row]]] = {
    "exact": exact,
    "gradient": gradient,
    "foolbox": foolbox_attacks,
    "unrolled": unrolled,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="NAME", help="rows to measure")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--digits", type=int, default=1000, help="MNIST test digits")
    parser.add_argument("--publish", type=Path, metavar="FILE", help="JSON file to put the rows into")
    chosen = parser.parse_args()
    measure(chosen, ROWS)


if __name__ == "__main__":
    main()
