"""The attack explorer: a picture, an attack and its size; what is added, what comes out, and what it is taken for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache

from torch import Tensor, nn

from hessnb.attacks import ATTACKS, BEYOND
from hessnb.data import Split
from hessnb.errors import InputError, whole_number
from hessnb.models import inference
from hessnb.widgets import pixels
from hessnb.widgets.explorer import Choice, Explorer, escaped

_PICTURES = """<div class="hessnb-row">
<div><img src="{clean}" alt="The picture before: {truth}"><small>before</small></div>
<div><img src="{change}" alt="The change: red is brighter, blue darker"><small>change, up to {most}</small>
</div><div><img src="{after}" alt="The picture after, taken for {taken}"><small>after</small></div>
</div>"""
_ROW = """<tr><th scope="row">{name}</th><td><span class="hessnb-bar"><i style="width:calc({{b{i}}} * .6%)"></i>
<span>{{b{i}}} %</span></span></td><td><span class="hessnb-bar after"><i style="width:calc({{a{i}}} * .6%)"></i>
<span>{{a{i}}} %</span></span></td></tr>"""


def attack_explorer(
    model: nn.Module,
    images: Split,
    classes: Sequence[str],
    *,
    attacks: Mapping[str, Callable[..., Tensor]] | None = None,
    eps: Sequence[float] = (0.02, 0.05, 0.1, 0.2, 0.3),
    finer: int = 5,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Explorer:
    """Return an explorer of attacks on the ``images`` (N, C, H, W), with the class probabilities before and after.

    ``attacks``: by name, all of `ATTACKS` and `BEYOND` unless given. ``eps``: ascending sizes that are ready-made;
    live there is also none, and there are ``finer`` - 1 sizes between two. Attacks are clipped to ``bounds``.

    Raises InputError for no images, sizes that are not positive or do not ascend, ``finer`` below 1, classes that are
    not the network's, and where the attacks do.
    """
    chosen_attacks = dict((ATTACKS | BEYOND) if attacks is None else attacks)
    x, y = images.images, images.labels
    if not len(y):
        raise InputError("no images: give at least one to attack")
    if not eps or any(b <= a for a, b in zip([0.0, *eps], eps, strict=False)):
        raise InputError(f"eps = {tuple(eps)}: give sizes above 0 in ascending order")
    whole_number("finer", finer)
    before = _probabilities(model, x)
    if before.shape[1] != len(classes):
        raise InputError(f"{len(classes)} classes for a network of {before.shape[1]} outputs: give the name of each")
    names, labels = list(chosen_attacks), [escaped(name) for name in classes]
    sizes = [a + (b - a) * k / finer for a, b in zip([0.0, *eps], eps, strict=False) for k in range(finer)] + [eps[-1]]

    @cache
    def attacked(attack: int, size: int) -> tuple[Tensor, Tensor]:
        """Return all images as an attack of a size leaves them, and the probabilities (N, c) that they then get."""
        ends = chosen_attacks[names[attack]](model, x, y, eps=sizes[size], bounds=bounds)
        return ends, _probabilities(model, ends)

    def fields(chosen: tuple[int, ...]) -> dict[str, str]:
        if not chosen:
            return {}
        i, *rest = chosen
        if not rest:
            return {
                "clean": pixels.picture(x[i]),
                "truth": labels[int(y[i])],
                **{f"b{c}": _percent(p) for c, p in enumerate(before[i].tolist())},
            }
        if len(rest) < 2:
            return {}
        ends, after = (part[i] for part in attacked(*rest))
        return {
            "said": f"{escaped(names[rest[0]])}, ε = {sizes[rest[1]]:.3g}: {_verdict(before[i], labels)} becomes "
            f"{_verdict(after, labels)}.",
            "change": pixels.change(ends - x[i]),
            "after": pixels.picture(ends),
            "most": f"{float((ends - x[i]).abs().max()):.2g}",
            "taken": labels[int(after.argmax())],
            **{f"a{c}": _percent(p) for c, p in enumerate(after.tolist())},
        }

    rows = "".join(_ROW.format(name=label, i=i) for i, label in enumerate(labels))
    table = (
        '<table><thead><tr><th scope="col">class</th><th scope="col">before</th><th scope="col">after</th></tr></thead>'
        f"<tbody>{rows}</tbody></table>"
    )
    ready = tuple(range(finer, len(sizes), finer))
    choices = [
        Choice("image", tuple(f"{i + 1}: {labels[int(label)]}" for i, label in enumerate(y))),
        Choice("attack", tuple(map(escaped, names))),
        Choice("ε", tuple(f"{size:.3g}" for size in sizes), ready, ready[len(ready) // 2], slider=True),
    ]
    return Explorer("Attack explorer", choices, _PICTURES + table, fields)


def _probabilities(model: nn.Module, x: Tensor) -> Tensor:
    """Return the class probabilities (N, c), float64 on the CPU."""
    with inference(model) as forward:
        return forward(x).double().softmax(1).cpu()


def _verdict(probabilities: Tensor, labels: Sequence[str]) -> str:
    return f"{labels[int(probabilities.argmax())]} ({_percent(float(probabilities.max()))}\N{NO-BREAK SPACE}%)"


def _percent(p: float) -> str:
    return f"{100 * p:.1f}"
