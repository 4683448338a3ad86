"""What is there, what is missing, and about how long the rest will take on this machine."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hessnb.experiments.grid import ARTEFACTS
from hessnb.experiments.profile import Profile
from hessnb.experiments.run import Outcome, look_up
from hessnb.experiments.spec import RunSpec
from hessnb.experiments.store import Store


@dataclass(frozen=True)
class Line:
    """One artefact under one profile: how much of it is there, and what is left in words."""

    artefact: str
    profile: str
    seeds: int
    runs: int
    runs_done: int
    measures: int
    measures_done: int
    left: str

    @property
    def state(self) -> str:
        """there, partly there, or missing."""
        if (self.runs_done, self.measures_done) == (self.runs, self.measures):
            return "there"
        return "partly there" if self.runs_done else "missing"


def lines(store: Store, profile: Profile, seeds: int | None = None) -> Iterator[Line]:
    """Return one line for each artefact of the grid under a profile."""
    speed = _Speed(store)
    for artefact in ARTEFACTS.values():
        outcomes = look_up(store, artefact.tasks(profile, seeds))
        yield Line(
            artefact=artefact.name,
            profile=profile.name,
            seeds=len({o.task.spec.recipe.seed for o in outcomes}),
            runs=len(outcomes),
            runs_done=sum(o.result is not None for o in outcomes),
            measures=sum(len(o.task.measures) for o in outcomes),
            measures_done=sum(len(o.measurements) for o in outcomes),
            left=_in_words([speed.seconds_left(store, o) for o in outcomes if not o.complete]),
        )


class _Speed:
    """Estimates from the runs of the same network and data that the store holds.

    A training to a loss target takes about the same number of optimiser steps at every batch size, so its epochs grow
    with the batch size; an epoch takes about the same time at every batch size, and so does a spectrum.
    """

    def __init__(self, store: Store) -> None:
        self._epoch_seconds: dict[tuple[Any, ...], list[float]] = {}
        self._epochs_per_batch: dict[tuple[Any, ...], list[float]] = {}
        for result in store.results():
            kind = _kind(result.spec)
            self._epoch_seconds.setdefault(kind, []).append(statistics.median(e.seconds for e in result.history))
            share = len(result.history) / result.spec.recipe.batch_size
            self._epochs_per_batch.setdefault(kind, []).append(share)
        self._measure_seconds: dict[tuple[Any, ...], list[float]] = {}
        for result in store.results():
            for found in store.measurements(result.spec):
                kind = (*_kind(result.spec), found.measure.label)
                self._measure_seconds.setdefault(kind, []).append(found.provenance["seconds"])

    def seconds_left(self, store: Store, outcome: Outcome) -> float | None:
        """Return the estimated seconds of what is missing, or None when nothing like it has been run here."""
        spec, kind = outcome.task.spec, _kind(outcome.task.spec)
        seconds = 0.0
        if outcome.result is None:
            if kind not in self._epoch_seconds:
                return None
            expected = float(spec.recipe.max_epochs)
            if spec.recipe.loss_target is not None:
                expected = min(expected, statistics.median(self._epochs_per_batch[kind]) * spec.recipe.batch_size)
            under_way = store.checkpoint(spec)
            done = under_way.epoch if under_way else 0
            seconds += max(1.0, expected - done) * statistics.median(self._epoch_seconds[kind])
        for measure in set(outcome.task.measures) - outcome.measurements.keys():
            if (*kind, measure.label) not in self._measure_seconds:
                return None
            seconds += statistics.median(self._measure_seconds[(*kind, measure.label)])
        return seconds


def _kind(spec: RunSpec) -> tuple[Any, ...]:
    return (spec.data, spec.model, spec.recipe.loss_target, spec.attack)


def _in_words(seconds: list[float | None]) -> str:
    known = [s for s in seconds if s is not None]
    unknown = len(seconds) - len(known)
    if not seconds:
        return "nothing"
    if not known:
        return "not known: nothing like it has been run here"
    total = sum(known)
    text = f"{total:.0f} s" if total < 120 else f"{total / 60:.0f} min" if total < 7200 else f"{total / 3600:.1f} h"
    return f"about {text}" + (f", and {unknown} network(s) without an estimate" if unknown else "")
