"""Carry out tasks: train what is not trained, measure what is not measured, and keep each result in the store."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from hessnb import data, models, training
from hessnb.curvature import EigenResult, HessianOperator, KrylovState, Progress, lanczos, power_iteration
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

    def eigenvalues(self, split: str, parameters: str | None = None) -> list[float]:
        """Return the Hessian eigenvalues measured on a split, the largest magnitude first; empty when not measured.

        ``parameters`` names the block that they belong to, None the whole Hessian.
        """
        found = [
            m.values["eigenvalues"]
            for measure, m in self.measurements.items()
            if isinstance(measure, Spectrum) and measure.split == split and measure.parameters == parameters
        ]
        return list(max(found, key=len, default=[]))


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
        model = trained_model(store, spec, where)
        operator = _operator(model, spec, measure, where)
        if isinstance(measure, Spectrum):
            found_pairs = _lanczos(operator, store, spec, measure, report, label)
        else:
            found_pairs = power_iteration(operator, measure.k, measure.tol)
        values: dict[str, object] = {
            "eigenvalues": found_pairs.eigenvalues.tolist(),
            "residuals": found_pairs.residuals.tolist(),
            "n_matvecs": found_pairs.n_matvecs,
            "converged": found_pairs.converged,
            "n_samples": operator.n_samples,
        }
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


def _operator(model: nn.Module, spec: RunSpec, measure: Measure, device: torch.device) -> HessianOperator:
    splits = load_data(spec.data, str(device))
    split = splits.train if measure.split == "train" else splits.test
    block = [measure.parameters] if isinstance(measure, Spectrum) and measure.parameters else None
    return HessianOperator(model, F.cross_entropy, split.batches(HESSIAN_BATCH[device.type]), parameters=block)


def _lanczos(
    operator: HessianOperator, store: Store, spec: RunSpec, measure: Spectrum, report: Report, label: str
) -> EigenResult:
    """Solve for a spectrum, going on from what the store kept of an interrupted solve."""

    def progress(told: Progress) -> None:
        share = 0.0 if told.remaining is None else told.n_matvecs / (told.n_matvecs + told.remaining)
        report(label, share, str(told))

    def save(state: KrylovState) -> None:
        store.save_partial(spec, measure, {field.name: getattr(state, field.name) for field in fields(KrylovState)})

    kept = store.partial(spec, measure)
    state = KrylovState(**kept) if kept else None
    return lanczos(operator, measure.k, measure.tol, progress=progress, state=state, save=save)


def _share_done(state: State, recipe: training.Recipe) -> float:
    """Return how much of a training is done: its epochs, or how far the loss has come to its target on a log scale."""
    share = state.epoch / recipe.max_epochs
    if recipe.loss_target is not None:
        start, now = math.log(10.0), state.history[-1].train_loss
        share = max(share, min(1.0, math.log(start / now) / math.log(start / recipe.loss_target)))
    return max(0.0, share)
