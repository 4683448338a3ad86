"""Carry out tasks: train what is not trained, measure what is not measured, and keep each result in the store."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from hessnb import data, models, training
from hessnb.curvature import HessianOperator, Progress, lanczos
from hessnb.errors import RunFailed
from hessnb.experiments.grid import Task, artefact, load_profile
from hessnb.experiments.provenance import provenance
from hessnb.experiments.spec import DataSpec, Measure, RunSpec, Spectrum
from hessnb.experiments.store import Measurement, Results, RunResult, Store
from hessnb.training import State

# Samples per minibatch of a Hessian-vector product: on a CPU the fastest of 100 to 2,500 for M1; a GPU wants more.
HESSIAN_BATCH = {"cpu": 250, "cuda": 2000}

# Called with what is being done ("M1-mnist-b64-s0: training"), the share that is done, and a detail ("loss 0.012").
Report = Callable[[str, float, str], None]


def _silent(what: str, share: float, detail: str) -> None:
    pass


@dataclass(frozen=True)
class Outcome:
    """One task and what is there of it: the ended training, if any, and the measurements, by their measure."""

    task: Task
    result: RunResult | None
    measurements: dict[Measure, Measurement]

    @property
    def complete(self) -> bool:
        """Whether nothing is left to compute: all measures are there, or the training failed for good."""
        if self.result is None:
            return False
        return self.result.status == "failed" or set(self.task.measures) <= self.measurements.keys()

    def eigenvalues(self, split: str) -> list[float]:
        """Return the Hessian eigenvalues measured on a split, the largest magnitude first; empty when not measured."""
        found = [m for measure, m in self.measurements.items() if measure.split == split]
        return list(found[0].values["eigenvalues"]) if found else []


def look_up(source: Results, tasks: Sequence[Task]) -> list[Outcome]:
    """Return what a store or the record holds of each task; computes nothing."""
    outcomes = []
    for task in tasks:
        found = {measure: source.measurement(task.spec, measure) for measure in task.measures}
        there = {measure: measurement for measure, measurement in found.items() if measurement is not None}
        outcomes.append(Outcome(task, source.result(task.spec), there))
    return outcomes


def compute(
    store: Store, tasks: Sequence[Task], *, device: str | torch.device = "cpu", report: Report = _silent
) -> list[Outcome]:
    """Compute what is missing of each task, in order, and return all outcomes.

    A training that diverges is kept as failed and the next task goes on. Raises InputError for data, a device or a
    store that cannot be used.
    """
    where = data.check_device(device)
    for task in tasks:
        result = train_run(store, task.spec, device=where, report=report)
        if result.status == "done":
            for measure in task.measures:
                measure_run(store, task.spec, measure, device=where, report=report)
    return look_up(store, tasks)


def results(
    name: str,
    *,
    profile: str = "quick",
    seeds: int | None = None,
    device: str = "cpu",
    store: str | Path | None = None,
) -> list[Outcome]:
    """Return what an artefact shows, computing what the store lacks: the one call that a notebook makes.

    Raises InputError for an unknown name, and RunFailed when a training diverged.
    """
    tasks = artefact(name).tasks(load_profile(profile), seeds)
    outcomes = compute(Store(store), tasks, device=device)
    for outcome in outcomes:
        if outcome.result is not None and outcome.result.status == "failed":
            raise RunFailed(f"{outcome.task.spec.label}: {outcome.result.reason}")
    return outcomes


def train_run(
    store: Store, spec: RunSpec, *, device: torch.device | str = "cpu", report: Report = _silent
) -> RunResult:
    """Return the ended training of ``spec``, after training it, or going on with it, if the store lacks it."""
    if found := store.result(spec):
        return found
    where = data.check_device(device)
    splits = load_data(spec.data, str(where))
    label = f"{spec.label}: training"
    report(label, 0.0, "")
    with store.lock(spec):
        if found := store.result(spec):  # another process has ended it while this one waited
            return found
        recipe = spec.recipe
        state = store.checkpoint(spec)
        model = new_model(spec, len(splits.classes)).to(where)

        def after_epoch(state: State) -> None:
            store.save_checkpoint(spec, state)
            last = state.history[-1]
            report(label, _share_done(state, recipe), f"epoch {last.epoch}, loss {last.train_loss:.4f}")

        try:
            state = training.train(model, splits, recipe, state=state, on_epoch=after_epoch)
            reached = training.reached_target(state.history, recipe)
            reason = "loss target reached" if reached else f"{recipe.max_epochs} epochs done"
            status = "done"
        except training.Diverged as error:
            state, status, reason = error.state, "failed", str(error)
        seconds = sum(epoch.seconds for epoch in state.history)
        result = RunResult(
            spec=spec,
            status="done" if status == "done" else "failed",
            reason=reason,
            history=state.history,
            provenance=provenance(device=where, seed=recipe.seed, seconds=seconds),
        )
        store.save_result(result, state)
    report(label, 1.0, reason)
    return result


def measure_run(
    store: Store, spec: RunSpec, measure: Measure, *, device: torch.device | str = "cpu", report: Report = _silent
) -> Measurement:
    """Return what ``measure`` gives on the trained network of ``spec``, computing it if the store lacks it."""
    if found := store.measurement(spec, measure):
        return found
    where = data.check_device(device)
    with store.lock(spec):
        if found := store.measurement(spec, measure):
            return found
        started = time.perf_counter()
        label = f"{spec.label}: {measure.label}"
        report(label, 0.0, "")
        values = _spectrum(trained_model(store, spec, where), spec, measure, where, report, label)
        seconds = time.perf_counter() - started
        measurement = Measurement(measure, values, provenance(device=where, seed=spec.recipe.seed, seconds=seconds))
        store.save_measurement(spec, measurement)
    report(label, 1.0, "")
    return measurement


def new_model(spec: RunSpec, num_classes: int) -> nn.Module:
    """Return the untrained network of ``spec``, its initial weights drawn from the recipe's seed."""
    return models.build(
        spec.model.name,
        num_classes=num_classes,
        width=1.0 if spec.model.width is None else spec.model.width,
        variant=spec.model.variant,
        seed=spec.recipe.seed,
    )


def trained_model(store: Store, spec: RunSpec, device: torch.device | str = "cpu") -> nn.Module:
    """Return the trained network of ``spec`` in eval mode; raise InputError if the store does not have it."""
    weights = store.weights(spec)
    model = new_model(spec, len(load_data(spec.data, str(device)).classes))
    model.load_state_dict(weights)
    return model.to(device).eval()


@lru_cache(maxsize=2)
def load_data(spec: DataSpec, device: str) -> data.Splits:
    """Return the data of a specification on a device; the last two are kept in memory."""
    return data.load(spec.name, n_train=spec.n_train, n_test=spec.n_test, device=device)


def _spectrum(
    model: nn.Module, spec: RunSpec, measure: Spectrum, device: torch.device, report: Report, label: str
) -> dict[str, object]:
    splits = load_data(spec.data, str(device))
    split = splits.train if measure.split == "train" else splits.test
    operator = HessianOperator(model, F.cross_entropy, split.batches(HESSIAN_BATCH[device.type]))

    def progress(told: Progress) -> None:
        share = 0.0 if told.remaining is None else told.n_matvecs / (told.n_matvecs + told.remaining)
        report(label, share, str(told))

    found = lanczos(operator, measure.k, measure.tol, progress=progress)
    return {
        "eigenvalues": found.eigenvalues.tolist(),
        "residuals": found.residuals.tolist(),
        "n_matvecs": found.n_matvecs,
        "converged": found.converged,
        "n_samples": operator.n_samples,
    }


def _share_done(state: State, recipe: training.Recipe) -> float:
    """Return how much of a training is done: its epochs, or how far the loss has come to its target on a log scale."""
    share = state.epoch / recipe.max_epochs
    if recipe.loss_target is not None:
        start, now = math.log(10.0), state.history[-1].train_loss
        share = max(share, min(1.0, math.log(start / now) / math.log(start / recipe.loss_target)))
    return max(0.0, share)
