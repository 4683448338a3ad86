"""How long trainings and measures take on this machine, learnt from what the store holds, and time in words."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from hessnb.errors import InputError
from hessnb.experiments.provenance import device_name
from hessnb.experiments.results import Measurement, RunResult
from hessnb.experiments.spec import Measure, RunSpec
from hessnb.experiments.store import Store
from hessnb.training import Epoch

# Seconds or epochs seen, by what they belong to and by batch size.
_Seen = dict[tuple[Any, ...], dict[int, list[float]]]


class Estimates:
    """Estimates from what a store holds; None where nothing like it is there.

    Seconds are taken from results of the same processor only. An epoch takes about as long as one of another run of the
    same network, data and attack at the nearest batch size. A training to a loss target takes as many epochs as others
    of the same batch size did, else about the same number of optimiser steps as those of the nearest one. A measure
    takes as long as the same measure of other runs of the same network and data, else as others of its kind.
    """

    def __init__(self, store: Store, device: torch.device) -> None:
        self._device = device_name(device)
        self._epoch_seconds: _Seen = {}
        self._lengths: _Seen = {}
        self._measures: dict[tuple[Any, ...], list[float]] = {}
        self._histories: dict[RunSpec, list[Epoch]] = {}
        self.failed: set[RunSpec] = set()
        for result in store.results():
            self.learn_run(result)
            for measurement in store.measurements(result.spec):
                self.learn_measurement(result.spec, measurement)
        for spec, history, processor in store.under_way():
            if processor in (None, self._device):
                self.learn_history(spec, history)

    def learn_run(self, result: RunResult) -> None:
        """Learn from a training that has ended."""
        spec = result.spec
        if result.provenance.get("device") == self._device:
            self._learn_epochs(spec, result.history)
        if result.status == "failed":
            self.failed.add(spec)
        else:
            _by_size(self._lengths, _course(spec), spec).append(len(result.history))
        self._histories.pop(spec, None)

    def learn_history(self, spec: RunSpec, history: list[Epoch]) -> None:
        """Learn from the epochs of a training under way."""
        self._learn_epochs(spec, history)
        self._histories[spec] = history

    def learn_measurement(self, spec: RunSpec, measurement: Measurement) -> None:
        """Learn from a measurement."""
        if measurement.provenance.get("device") == self._device:
            for kind in _kinds(spec, measurement.measure):
                self._measures.setdefault(kind, []).append(measurement.provenance["seconds"])

    def epoch(self, spec: RunSpec) -> float | None:
        """Return the seconds of the next epoch of a training."""
        if history := self._histories.get(spec):
            return _typical(history[-5:])
        size = spec.recipe.batch_size
        seen = self._epoch_seconds.get(_step(spec), {})
        return statistics.median(seen[_nearest(seen, size)]) if seen else None

    def training(self, spec: RunSpec) -> float | None:
        """Return the seconds that are left of a training."""
        seconds, history = self.epoch(spec), self._histories.get(spec, [])
        length = self._length(spec, history)
        return None if seconds is None or length is None else seconds * max(1.0, length - len(history))

    def measure(self, spec: RunSpec, measure: Measure) -> float | None:
        """Return the seconds of a measure from its beginning to its end."""
        seen = (self._measures.get(kind) for kind in _kinds(spec, measure))
        return next((statistics.median(seconds) for seconds in seen if seconds), None)

    def _learn_epochs(self, spec: RunSpec, history: list[Epoch]) -> None:
        if history:
            _by_size(self._epoch_seconds, _step(spec), spec).append(_typical(history))

    def _length(self, spec: RunSpec, history: list[Epoch]) -> float | None:
        """Return the number of epochs after which a training will have ended."""
        recipe = spec.recipe
        if recipe.loss_target is None:
            return float(recipe.max_epochs)
        if seen := self._lengths.get(_course(spec), {}):
            size = _nearest(seen, recipe.batch_size)
            length = statistics.median(seen[size]) * recipe.batch_size / size
        elif len(history) > 1:
            length = _crossing([epoch.train_loss for epoch in history], recipe.loss_target)
        else:
            return None
        return min(float(recipe.max_epochs), max(length, len(history) + 1.0))


def _crossing(losses: list[float], target: float) -> float:
    """Return the epoch at which the loss reaches the target, its logarithm falling on as over the last half of them."""
    start = losses[len(losses) // 2 - 1]
    fall = math.log(start / losses[-1]) / (len(losses) - len(losses) // 2) if losses[-1] > 0 else math.inf
    return len(losses) + math.log(losses[-1] / target) / fall if fall > 0 and losses[-1] > target else math.inf


def _typical(history: Sequence[Epoch]) -> float:
    return statistics.median(epoch.seconds for epoch in history)


def _by_size(seen: _Seen, kind: tuple[Any, ...], spec: RunSpec) -> list[float]:
    return seen.setdefault(kind, {}).setdefault(spec.recipe.batch_size, [])


def _nearest(sizes: Iterable[int], size: int) -> int:
    return min(sizes, key=lambda other: abs(math.log(other / size)))


def _step(spec: RunSpec) -> tuple[Any, ...]:
    """Return what the seconds of an epoch depend on, the batch size aside."""
    return (spec.data, spec.model, spec.attack)


def _course(spec: RunSpec) -> tuple[Any, ...]:
    """Return what the number of epochs depends on, the batch size aside."""
    return (*_step(spec), replace(spec.recipe, batch_size=1, seed=0))


def _kinds(spec: RunSpec, measure: Measure) -> list[tuple[Any, ...]]:
    """Return what the seconds of a measure depend on: more exactly first, then roughly."""
    attack = getattr(measure, "attack", None)
    method = (attack.method, attack.cg_steps, attack.solver) if attack else None
    roughly = (measure.kind, getattr(measure, "split", None), method)
    return [(spec.data, spec.model, measure.label), (spec.data, spec.model, roughly)]


# -- time in words -------------------------------------------------------------------------------------------------


_YEAR = 366 * 24 * 3600


def seconds_of(text: str) -> float:
    """Return the seconds that a time like 90s, 9m or 2h30m stands for; raise InputError for anything else."""
    found = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?", text.strip())
    seconds = sum(float(n) * unit for n, unit in zip(found.groups(), (3600, 60, 1), strict=True) if n) if found else 0.0
    if not 0 < seconds <= _YEAR:
        raise InputError(f"time {text!r} cannot be read, or is longer than a year: write it like 90s, 9m or 2h30m")
    return seconds


def in_words(seconds: float) -> str:
    """Return a time in seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
