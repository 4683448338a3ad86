"""Numbers out of outcomes: of which networks, and of which of their measurements, a table or a figure speaks."""

from __future__ import annotations

from collections.abc import Sequence

from hessnb.experiments.results import Measurement, Outcome
from hessnb.experiments.spec import AttackAccuracy, SplitName
from hessnb.statistics import Interval, proportion


def clean(outcomes: Sequence[Outcome], split: SplitName = "test") -> list[float]:
    """Return the accuracies (%) on a split at the end of each training."""
    ended = [o.result.history[-1] for o in outcomes if o.result and o.result.status == "done"]
    return [100 * (epoch.train_accuracy if split == "train" else epoch.test_accuracy) for epoch in ended]


def attacks(outcomes: Sequence[Outcome]) -> list[AttackAccuracy]:
    """Return the accuracies under attack that were planned, whether measured or not, each once."""
    return list(dict.fromkeys(m for o in outcomes for m in o.task.measures if isinstance(m, AttackAccuracy)))


def attacked(
    outcomes: Sequence[Outcome], method: str, *, transferred: bool = False, **settings: object
) -> list[Measurement]:
    """Return what was measured on the whole test set under an attack with these fields of its `AttackSpec`.

    One a network that has it. The attack was made on the network itself, or, ``transferred``, on its parent; for a
    network without one both are the same.
    """
    found = []
    for outcome in outcomes:
        source = outcome.task.spec.parent if transferred else None
        there = (
            measurement
            for measure, measurement in outcome.measurements.items()
            if isinstance(measure, AttackAccuracy)
            and (measure.split, measure.n, measure.source, measure.attack.method) == ("test", None, source, method)
            and all(getattr(measure.attack, field) == value for field, value in settings.items())
        )
        found += [*there][:1]
    return found


def under(outcomes: Sequence[Outcome], method: str, *, transferred: bool = False, **settings: object) -> list[float]:
    """Return the accuracies (%) of `attacked`."""
    return percentages(attacked(outcomes, method, transferred=transferred, **settings))


def percentages(found: Sequence[Measurement]) -> list[float]:
    """Return the accuracies (%) that measurements hold."""
    return [100 * float(measurement.values["accuracy"]) for measurement in found]


def interval(accuracy: float, n: int) -> Interval:
    """Return Wilson's interval of the accuracy (a share) of one network over ``n`` test samples."""
    return proportion(round(accuracy * n), n)
