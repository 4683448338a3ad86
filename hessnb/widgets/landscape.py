"""The landscape explorer: move a trained network along a direction and see its loss, accuracy and answers change."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessnb.curvature import HessianOperator, lanczos
from hessnb.data import Split, Splits
from hessnb.errors import InputError, whole_number
from hessnb.landscape import Landscape, along, displaced, random_direction
from hessnb.models import inference
from hessnb.widgets import pixels
from hessnb.widgets.explorer import Choice, Explorer, escaped

_BATCH = 500
_PICTURES = 6
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 390, 10, 190  # of the plot, in a box of 400 by 230
_LOWEST = 1e-6  # a loss below is drawn there
_SETS = {"train": "training set", "test": "test set"}
_TICK = '<text x="{x:g}" y="{y:g}" text-anchor="{anchor}">{text}</text>'
_CURVES = """<svg viewBox="0 0 400 230" role="img"
 aria-label="Loss on a log axis along the direction, a mark at t = {t}">
<g stroke="currentColor" opacity=".25">GRID</g>AXES
<line x1="{x}" x2="{x}" y1="10" y2="190" stroke="currentColor" stroke-dasharray="2 3"/>
<path d="{path_train}" fill="none" stroke="var(--first)" stroke-width="2"/>
<path d="{path_test}" fill="none" stroke="var(--second)" stroke-width="2" stroke-dasharray="6 3"/>
<circle cx="{x}" cy="{y_train}" r="5" fill="var(--first)"/>
<rect x="-4" y="-4" width="8" height="8" transform="translate({x} {y_test})" fill="var(--second)"/></svg>"""
_ROW = """<tr><th scope="row"><svg viewBox="0 0 24 8" style="width:2em;display:inline" aria-hidden="true">
<path d="M0 4H24" stroke="var(--{colour})" stroke-width="2"{dash}/></svg> {name}</th>
<td>{{loss_{key}}}</td><td>{{accuracy_{key}}}</td></tr>"""


def landscape_explorer(
    models: Mapping[str, nn.Module],
    directions: Mapping[str, Mapping[str, Tensor]],
    splits: Splits,
    *,
    positions: Sequence[float] | Tensor | None = None,
    finer: int = 5,
    n_samples: int = 200,
    by: str = "batch size",
) -> Explorer:
    """Return an explorer of the weights theta + t d: loss and accuracy on both sets, and what test pictures pass for.

    ``models``: trained networks by what they differ in, which ``by`` names. ``directions``: for each of them the same
    names and flat vectors (n,), used at the length they have. ``positions``: ascending t that are ready-made, -1 to 1
    unless given; live there are ``finer`` - 1 between two. The first ``n_samples`` of each set are evaluated, and the
    first six of the test set are shown.

    Raises InputError for no networks, directions that are not the same for all, positions that do not ascend,
    ``finer`` below 1, and where `hessnb.landscape.along` does.
    """
    networks, names = list(models), list(next(iter(directions.values()), {}))
    if not networks or not names or any(list(directions.get(network, {})) != names for network in networks):
        raise InputError("give at least one network, and for each of them directions of the same names in one order")
    at = torch.as_tensor([n / 20 for n in range(-20, 21)] if positions is None else positions, dtype=torch.float64)
    if at.ndim != 1 or len(at) < 2 or not bool((at.diff() > 0).all()):
        raise InputError("the positions do not ascend: give at least two numbers, each larger than the one before")
    whole_number("finer", finer)
    shares = torch.arange(finer, dtype=torch.float64) / finer
    fine = torch.cat([torch.lerp(at[:-1, None], at[1:, None], shares).flatten(), at[-1:]]).tolist()
    shown = [_tidy(t) for t in fine]
    parts = {"train": splits.train.head(n_samples), "test": splits.test.head(n_samples)}
    sets = {key: part.batches(_BATCH) for key, part in parts.items()}
    examples = splits.test.head(_PICTURES)
    curves = {
        (network, name): along(models[network], F.cross_entropy, sets, directions[network][name], at)
        for network in networks
        for name in names
    }
    scale = _Scale((float(at[0]), float(at[-1])), list(curves.values()))

    def point(network: str, name: str, position: int) -> dict[str, tuple[float, float]]:
        """Return the loss and the accuracy on each set, computed unless it is a point of the curve."""
        index, between = divmod(position, finer)
        curve = curves[network, name]
        if between:
            curve = along(models[network], F.cross_entropy, sets, directions[network][name], [fine[position]])
            index = 0
        return {key: (float(curve.losses[key][index]), float(curve.accuracies[key][index])) for key in sets}

    def fields(chosen: tuple[int, ...]) -> dict[str, str]:
        if len(chosen) < 2:
            return {}
        network, name = networks[chosen[0]], names[chosen[1]]
        if len(chosen) == 2:
            return {f"path_{key}": scale.path(at, losses) for key, losses in curves[network, name].losses.items()}
        values, t = point(network, name, chosen[2]), fine[chosen[2]]
        with inference(displaced(models[network], directions[network][name], t)) as forward:
            answers = forward(examples.images).double().softmax(1)
        return {
            "said": f"{escaped(by)} {escaped(network)}, {escaped(name)}, t = {shown[chosen[2]]}: "
            + "; ".join(
                f"{_SETS[key]}: loss {loss:.3g}, {100 * right:.1f}\N{NO-BREAK SPACE}% right"
                for key, (loss, right) in values.items()
            ),
            "t": shown[chosen[2]],
            "x": f"{scale.x(t):.1f}",
            **{f"y_{key}": scale.y(loss) for key, (loss, _) in values.items()},
            **{f"loss_{key}": f"{loss:.3g}" for key, (loss, _) in values.items()},
            **{f"accuracy_{key}": f"{100 * right:.1f} %" for key, (_, right) in values.items()},
            **{
                f"answer{i}": f"{'✓' if guess == truth else '✗'} {escaped(splits.classes[guess])} ({100 * p:.0f} %)"
                for i, (guess, p, truth) in enumerate(
                    zip(answers.argmax(1).tolist(), answers.amax(1).tolist(), examples.labels.tolist(), strict=True)
                )
            },
        }

    choices = [
        Choice(escaped(by), tuple(map(escaped, networks))),
        Choice("direction", tuple(map(escaped, names))),
        Choice("t", tuple(shown), tuple(range(0, len(fine), finer)), finer * int(at.abs().argmin()), slider=True),
    ]
    rows = _table({key: len(part) for key, part in parts.items()})
    template = scale.template() + rows + _pictures(examples, splits.classes)
    return Explorer("Landscape explorer", choices, template, fields)


def leading_directions(model: nn.Module, split: Split, *, seed: int = 0) -> dict[str, Tensor]:
    """Return directions (n,) for `landscape_explorer`: two eigenvectors of the Hessian on ``split``, and a random one.

    The eigenvectors, of length one, belong to the two eigenvalues largest in magnitude; the random direction is
    filter-normalised (Li et al., 2018), so that its length is about that of the weights.
    """
    found = lanczos(HessianOperator(model, F.cross_entropy, split.batches(_BATCH)), k=2, tol=1e-2)
    first, second = found.eigenvectors
    chance = random_direction(model, torch.Generator().manual_seed(seed), filter_normalised=True)
    return {"first eigenvector": first, "second eigenvector": second, "random, filter-normalised": chance}


class _Scale:
    """From positions and losses to the box of the picture; one log axis for all curves, so that they compare."""

    def __init__(self, ends: tuple[float, float], curves: Sequence[Landscape]) -> None:
        self.ends = ends
        losses = torch.cat([losses for curve in curves for losses in curve.losses.values()])
        losses = losses[torch.isfinite(losses)].clamp_min(_LOWEST)
        low, high = (float(losses.min()), float(losses.max())) if len(losses) else (1.0, 1.0)
        self.low = math.floor(math.log10(low))
        self.high = max(math.ceil(math.log10(high)), self.low + 1)

    def x(self, t: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * (t - self.ends[0]) / (self.ends[1] - self.ends[0])

    def y(self, loss: float) -> str:
        """Return the height; far outside the picture for a loss that is infinite or not a number."""
        if not math.isfinite(loss):
            return "-99"
        share = (math.log10(max(loss, _LOWEST)) - self.low) / (self.high - self.low)
        return f"{_BOTTOM - (_BOTTOM - _TOP) * share:.1f}"

    def path(self, positions: Tensor, losses: Tensor) -> str:
        """Return a curve through the finite losses, broken where one is not."""
        words, pen = [], "M"
        for t, loss in zip(positions.tolist(), losses.tolist(), strict=True):
            if math.isfinite(loss):
                words.append(f"{pen}{self.x(t):.1f} {self.y(loss)}")
            pen = "L" if math.isfinite(loss) else "M"
        return "".join(words)

    def template(self) -> str:
        """Return the drawing with the fields of a state left open."""
        step = -(-(self.high - self.low) // 6)
        heights = {n: float(self.y(10.0**n)) for n in range(self.low, self.high + 1, step)}
        grid = "".join(f'<path d="M{_LEFT} {y:g}H{_RIGHT}"/>' for y in heights.values())
        ticks = [_TICK.format(x=_LEFT - 5, y=y + 4, anchor="end", text=f"{10.0**n:g}") for n, y in heights.items()]
        middle = sum(self.ends) / 2
        for t in (self.ends[0], middle, self.ends[1]):
            ticks.append(_TICK.format(x=self.x(t), y=_BOTTOM + 15, anchor="middle", text=_tidy(t)))
        label = _TICK.format(
            x=(_LEFT + _RIGHT) / 2, y=_BOTTOM + 33, anchor="middle", text="position t: loss at θ + t d"
        )
        return _CURVES.replace("GRID", grid).replace("AXES", "".join(ticks) + label)


def _table(sizes: Mapping[str, int]) -> str:
    lines = {"train": ("first", ""), "test": ("second", ' stroke-dasharray="6 3"')}
    rows = "".join(
        _ROW.format(key=key, name=f"{name} ({sizes[key]:,})", colour=lines[key][0], dash=lines[key][1])
        for key, name in _SETS.items()
    )
    head = "".join(f'<th scope="col">{text}</th>' for text in ("set (samples)", "loss", "accuracy"))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _pictures(examples: Split, classes: Sequence[str]) -> str:
    tiles = "".join(
        f'<div><img src="{pixels.picture(image)}" alt="Test picture of class {escaped(classes[label])}">'
        f"<small>{{answer{i}}}</small></div>"
        for i, (image, label) in enumerate(zip(examples.images, examples.labels.tolist(), strict=True))
    )
    return f'<div class="hessnb-row many">{tiles}</div>'


def _tidy(t: float) -> str:
    return f"{t:.4g}".replace("-", "\N{MINUS SIGN}") if abs(t) > 1e-9 else "0"
