"""Carry out tasks: train what is not trained, measure what is not measured, and keep each result in the store."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from hessnb import data, training
from hessnb.errors import InputError, RunFailed
from hessnb.experiments.grid import Task, artefact
from hessnb.experiments.measure import Report, measured, silent
from hessnb.experiments.networks import attack_function, load_data, new_model, trained_model
from hessnb.experiments.profile import load_profile
from hessnb.experiments.provenance import provenance
from hessnb.experiments.results import Measurement, Outcome, RunResult, look_up
from hessnb.experiments.spec import Measure, RunSpec
from hessnb.experiments.store import Spent, Store
from hessnb.pace import Pace
from hessnb.together import is_faster_together, train_together
from hessnb.training import State

# Measures that go on from where they were interrupted, by kind, and the most seconds of work that an interruption costs
# them: what iterates keeps its state once a minute, a landscape keeps each of its points.
RESUMED = {
    "spectrum": 60.0,
    "density": 60.0,
    "sharpness": 60.0,
    "loss_line": 0.0,
    "loss_plane": 0.0,
    "interpolation": 0.0,
}


def compute(
    store: Store, tasks: Sequence[Task], *, device: str | torch.device = "cpu", report: Report = silent
) -> list[Outcome]:
    """Compute what is missing of each task, in order, and return all outcomes.

    A network that another process is at work on is left for last, so that two that need the same share the work. A
    training that fails is kept as failed and the next task goes on; one that would go on from it is not begun. Raises
    InputError for data, a device or a store that cannot be used.
    """
    where = data.check_device(device)
    for task in _held_last(store, tasks):
        mates = mates_of(task.spec, (other.spec for other in tasks))
        try:
            result = train_run(store, task.spec, mates=mates, device=where, report=report)
        except RunFailed:  # its parent did
            continue
        if result.status == "done":
            for measure in task.measures:
                measure_run(store, task.spec, measure, device=where, report=report)
    return look_up(store, tasks)


def _held_last(store: Store, tasks: Sequence[Task]) -> Iterator[Task]:
    held = []
    for task in tasks:
        if store.is_held(task.spec):
            held.append(task)
        else:
            yield task
    yield from held


def results(
    name: str,
    *,
    profile: str = "quick",
    seeds: int | None = None,
    device: str = "cpu",
    store: str | Path | None = None,
) -> list[Outcome]:
    """Return what an artefact shows, computing what the store lacks: the one call that a notebook makes.

    Raises InputError for an unknown name, and RunFailed when a training failed.
    """
    tasks = artefact(name).tasks(load_profile(profile), seeds)
    return all_trained(compute(Store(store), tasks, device=device))


def all_trained(outcomes: list[Outcome]) -> list[Outcome]:
    """Return what `compute` has returned; raise RunFailed, naming the network, where a training has failed."""
    for outcome in outcomes:
        spec, result = outcome.task.spec, outcome.result
        if result is None and spec.parent:
            raise RunFailed(f"{spec.label}: the training of {spec.parent.label}, from which it goes on, has failed")
        if result is not None and result.status == "failed":
            raise RunFailed(f"{spec.label}: {result.reason}")
    return outcomes


def train_run(
    store: Store,
    spec: RunSpec,
    *,
    mates: Sequence[RunSpec] = (),
    device: torch.device | str = "cpu",
    report: Report = silent,
    wait: bool = True,
) -> RunResult:
    """Return the ended training of ``spec``, after training it, or going on with it, if the store lacks it.

    While another process is at it, this one waits; without ``wait`` it raises `Held`. On CUDA its ``mates`` (see
    `mates_of`) are trained along with it if that takes less time than one after the other.
    """
    if found := store.result(spec):
        return found
    where = data.check_device(device)
    splits = load_data(spec.data, str(where))
    report(f"{spec.label}: training", 0.0, "")
    if mates and where.type == "cuda" and _train_together(store, [spec, *mates], splits, where, report):
        return train_run(store, spec, device=where, report=report, wait=wait)
    with store.lock(spec, wait=wait):
        if found := store.result(spec):  # another process has ended it while this one waited
            return found
        if spec.parent is None:
            model = new_model(spec, len(splits.classes)).to(where)
        else:
            parent = train_run(store, spec.parent, device=where, report=report, wait=wait)
            if parent.status == "failed":
                raise RunFailed(f"{spec.label}: its parent failed: {parent.reason}")
            model = trained_model(store, spec.parent, where)
        ended: State | training.TrainingFailed
        try:
            ended = training.train(
                model,
                splits,
                spec.recipe,
                perturbation=attack_function(spec.attack) if spec.attack else None,
                state=store.checkpoint(spec),
                on_epoch=_Checkpoints(store, spec, report).after_epoch,
            )
        except training.TrainingFailed as failed:
            ended = failed
        return _end(store, spec, ended, where, report)


def mates_of(spec: RunSpec, others: Iterable[RunSpec]) -> list[RunSpec]:
    """Return those of ``others`` that can be trained together with ``spec``: the same but for the seed."""
    if spec.attack or spec.parent or spec.recipe.decay_every:
        return []
    same = (spec.data, spec.model, None, None)
    alike = [other for other in others if (other.data, other.model, other.attack, other.parent) == same]
    return [other for other in alike if other != spec and replace(other.recipe, seed=spec.recipe.seed) == spec.recipe]


def _train_together(
    store: Store, specs: Sequence[RunSpec], splits: data.Splits, device: torch.device, report: Report
) -> bool:
    """Train together what the store lacks and no other process is at work on; return False if that is not faster."""
    with ExitStack() as stack:
        locked = []
        for spec in specs:
            with suppress(InputError):
                stack.enter_context(store.lock(spec, wait=False))
                locked.append(spec)
        lacking = [spec for spec in locked if store.result(spec) is None]
        models = [new_model(spec, len(splits.classes)).to(device) for spec in lacking]
        if len(lacking) < 2 or not is_faster_together(models, splits.train, lacking[0].recipe):
            return False
        keep = [_Checkpoints(store, spec, report) for spec in lacking]
        ended = train_together(
            models,
            splits,
            [spec.recipe for spec in lacking],
            states=[store.checkpoint(spec) or State() for spec in lacking],
            on_epoch=lambda i, state: keep[i].after_epoch(state),
        )
        seeds = [spec.recipe.seed for spec in lacking]
        for spec, state in zip(lacking, ended, strict=True):
            _end(store, spec, state, device, report, seeds_together=seeds)
    return True


def _end(
    store: Store,
    spec: RunSpec,
    ended: State | training.TrainingFailed,
    device: torch.device,
    report: Report,
    **more: object,
) -> RunResult:
    """Keep an ended training as a result, with ``more`` in its provenance."""
    state = ended if isinstance(ended, State) else ended.state
    if isinstance(ended, training.TrainingFailed):
        reason = str(ended)
    elif training.reached_target(state.history, spec.recipe):
        reason = "loss target reached"
    else:
        reason = f"{spec.recipe.max_epochs} epochs done"
    seconds = sum(epoch.seconds for epoch in state.history)
    result = RunResult(
        spec=spec,
        status="done" if isinstance(ended, State) else "failed",
        reason=reason,
        history=state.history,
        provenance=provenance(device=device, seed=spec.recipe.seed, seconds=seconds, **more),
    )
    store.save_result(result, state)
    report(f"{spec.label}: training", 1.0, reason)
    return result


class _Checkpoints:
    """Keeps what there is of a training and reports it, epoch for epoch, for at most a twentieth of the time."""

    def __init__(self, store: Store, spec: RunSpec, report: Report) -> None:
        self._store, self._spec, self._report = store, spec, report
        self._pace = Pace(1e-9)  # after the first epoch, and then as often as its share of the time allows

    def after_epoch(self, state: State) -> None:
        """Keep the state if the last time is long enough ago, or if the report ends the training here."""
        if kept := self._pace.is_due():
            self._keep(state)
        last = state.history[-1]
        share = _share_done(state, self._spec.recipe)
        try:
            self._report(f"{self._spec.label}: training", share, f"epoch {last.epoch}, loss {last.train_loss:.4f}")
        except BaseException:
            if not kept:
                self._keep(state)
            raise

    def _keep(self, state: State) -> None:
        self._store.save_checkpoint(self._spec, state)
        self._pace.saved()


def measure_run(
    store: Store,
    spec: RunSpec,
    measure: Measure,
    *,
    device: torch.device | str = "cpu",
    report: Report = silent,
    on_save: Callable[[], None] = lambda: None,
    wait: bool = True,
) -> Measurement:
    """Return what ``measure`` gives on the trained network of ``spec``, computing it if the store lacks it.

    ``wait`` is that of `train_run`. ``on_save`` is called when the state of an unfinished solve has been kept: what it
    raises costs nothing.
    """
    if found := store.measurement(spec, measure):
        return found
    where = data.check_device(device)
    with store.lock(spec, wait=wait):
        if found := store.measurement(spec, measure):
            return found
        label = f"{spec.label}: {measure.label}"
        report(label, 0.0, "")
        with _worked(store, spec, measure) as seconds:
            values = measured(_UnderWay(store, seconds, on_save), spec, measure, where, report, label)
            came_from = provenance(device=where, seed=spec.recipe.seed, seconds=seconds())
        measurement = Measurement(measure, values, came_from)
        store.save_measurement(spec, measurement)
    report(label, 1.0, "")
    return measurement


class _UnderWay(Store):
    """The store as a measure under way sees it: with its state it keeps the seconds of work that led there."""

    def __init__(self, store: Store, seconds: Callable[[], float], on_save: Callable[[], None]) -> None:
        super().__init__(store.root)
        self._seconds, self._on_save = seconds, on_save

    def save_partial(self, spec: RunSpec, measure: Measure, tensors: dict[str, Tensor]) -> None:
        """Keep what is there of a measure under way; see the class."""
        super().save_partial(spec, measure, tensors)
        self.save_spent(spec, measure, Spent(kept=self._seconds()))
        self._on_save()


@contextmanager
def _worked(store: Store, spec: RunSpec, measure: Measure) -> Iterator[Callable[[], float]]:
    """Give a function that returns the seconds of work on a measure so far, those before an interruption included.

    What is interrupted leaves its seconds in the store: of a landscape, which keeps each point, all of them; of the
    rest those of an attempt that kept nothing, for they are the least that it takes to get further.
    """
    started, earlier = time.perf_counter(), store.spent(spec, measure)

    def seconds() -> float:
        return time.perf_counter() - started + earlier.kept

    try:
        yield seconds
    except BaseException:
        with suppress(InputError):  # the disk may be full, and that is being said already
            if RESUMED.get(measure.kind) == 0.0:
                store.save_spent(spec, measure, Spent(kept=seconds()))
            elif store.spent(spec, measure) == earlier:  # there was no save
                lost = max(earlier.lost, seconds() - earlier.kept)
                store.save_spent(spec, measure, replace(earlier, lost=round(lost, 3)))
        raise


def _share_done(state: State, recipe: training.Recipe) -> float:
    """Return how much of a training is done: its epochs, or how far the loss has come to its target on a log scale."""
    if training.reached_target(state.history, recipe):
        return 1.0
    share = state.epoch / recipe.max_epochs
    if recipe.loss_target is not None:
        start, now = math.log(10.0), state.history[-1].train_loss
        if recipe.loss_target < now < start:
            share = max(share, math.log(start / now) / math.log(start / recipe.loss_target))
    return share
