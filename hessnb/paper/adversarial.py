"""Tables 3 and 4 of the paper, ours beside the published numbers: five adversarial trainings under five attacks."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from hessnb.attacks import ATTACKS
from hessnb.experiments.results import Outcome
from hessnb.experiments.spec import RunSpec
from hessnb.paper.origins import origins
from hessnb.paper.outcomes import clean, under
from hessnb.paper.published import published
from hessnb.paper.recorded import Recorded, papers_own, profiles
from hessnb.paper.tables import NOT_MEASURED, PROFILE, Table, mean_and_spread
from hessnb.robustness import checklist

ORIGINAL = "ORI"
CONTROL = "control"


def transfer(table: str, outcomes: Sequence[Outcome], *, name: str, caption: str) -> Table:
    """Return ``table`` ("table3" or "table4"): accuracies (%) on sets built from the original network.

    One row a network, one column a set: ours, the paper's in brackets; several seeds give mean and standard deviation.
    Recorded outcomes of the paper's scale also get the difference in the brackets, and all recorded ones their origins.
    """
    return _table(table, outcomes, name, caption, white_box=False)


def white_box(table: str, outcomes: Sequence[Outcome], *, name: str, caption: str) -> Table:
    """Return the table that the paper does not have: each network under each attack made on that network itself."""
    return _table(table, outcomes, name, caption, white_box=True)


def network_name(spec: RunSpec) -> str:
    """Return the paper's index of a network, "ORI" or the attack that it was trained under, or "control"."""
    return spec.attack.method if spec.attack else CONTROL if spec.parent else ORIGINAL


def of_first_seed(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Return the outcomes of the lowest seed of which something was measured, in the order of the paper's networks."""
    measured = [o.task.spec.recipe.seed for o in outcomes if o.measurements]
    seed = min(measured, default=0)
    order = [ORIGINAL, *ATTACKS, CONTROL]
    chosen = [o for o in outcomes if o.task.spec.recipe.seed == seed]
    return sorted(chosen, key=lambda o: order.index(network_name(o.task.spec)))


def checks(
    model: nn.Module,
    attack: Callable[..., Tensor],
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    surrogate: nn.Module | None = None,
    name: str,
    caption: str,
) -> Table:
    """Return `hessnb.robustness.checklist` as a table."""
    lines = checklist(model, attack, x, y, eps=eps, surrogate=surrogate)
    rows = [(check.question, "yes" if check.passed else "no", check.evidence) for check in lines]
    return Table(name, caption, ("Check", "Passed", "Accuracies"), tuple(rows))


def _table(table: str, outcomes: Sequence[Outcome], name: str, caption: str, *, white_box: bool) -> Table:
    paper = published(table)
    from_record = any(isinstance(o, Recorded) for o in outcomes)
    rows = []
    for network in (ORIGINAL, *ATTACKS):
        runs = [o for o in outcomes if network_name(o.task.spec) == network]
        columns = {"clean": clean(runs)}
        columns |= {method: under(runs, method, transferred=not white_box) for method in ATTACKS}
        each = [[value for m in ATTACKS for value in under([o], m, transferred=not white_box)] for o in runs]
        # Of the networks that were measured under all of them, or the means would be of different attacks.
        columns["mean"] = [statistics.fmean(of_run) for of_run in each if len(of_run) == len(ATTACKS)]
        cells = []
        for column in ("clean", *ATTACKS, "mean"):
            shown = mean_and_spread(columns[column], "{:.1f}")
            beside = (
                "" if white_box or shown == NOT_MEASURED else _beside(columns[column], paper[column][network], runs)
            )
            cells.append(shown + beside)
        rows.append((network, *cells, *((profiles(runs),) if from_record else ())))
    header = ("Network", "clean", *ATTACKS, "mean of attacks", *((PROFILE,) if from_record else ()))
    return Table(name, caption, header, tuple(rows), origins(outcomes))


def _beside(ours: Sequence[float], paper: float, runs: Sequence[Outcome]) -> str:
    """Return the paper's number in brackets, with the difference to it where our scale is the paper's."""
    if not papers_own(runs):
        return f" ({paper:.1f})"
    return f" ({paper:.1f}; {statistics.mean(ours) - paper:+.1f})"
