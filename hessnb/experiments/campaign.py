"""A campaign: the missing work in the order of its value for the book, piece by piece, within a time limit."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from types import FrameType

import torch

from hessnb import data
from hessnb.attacks.auto import MISSING
from hessnb.errors import Held
from hessnb.experiments.estimate import Estimates, in_words
from hessnb.experiments.grid import Task
from hessnb.experiments.measure import Report, silent
from hessnb.experiments.run import RESUMED, mates_of, measure_run, train_run
from hessnb.experiments.spec import AUTOATTACK, AttackAccuracy, Measure, RunSpec
from hessnb.experiments.store import Spent, Store

# What a measure costs before one like it has been seen, in epochs of its network's training; for the order alone.
_EPOCHS = {
    "attack_accuracy": 2.0,
    "input_curvature": 5.0,
    "interpolation": 15.0,
    "loss_line": 25.0,
    "spectrum": 150.0,
    "density": 200.0,
    "loss_plane": 300.0,
    "sharpness": 500.0,
    "power_iteration": 1000.0,
}

# A measure that costs at most this many epochs is cheap: it follows its network at once.
_CHEAP = 10.0

# Estimates are stretched by this share and these seconds when they are held against what is left of the time.
_STRETCH, _SLACK = 1.1, 0.5

# Seconds between two looks at whether another process has let go.
_POLL = 0.5

# Seconds of one step of a measure that goes on from where it was interrupted, beside the time between two saves.
_STEP = 10.0


@dataclass(frozen=True)
class Refusal:
    """What cannot be computed, and why; ``impossible`` whatever the time, or only within this time limit."""

    line: str
    impossible: bool


class OutOfTime(BaseException):
    """The time limit is reached; not an Exception, so that nobody on the way takes it for a fault of theirs."""


@dataclass(frozen=True)
class Unit:
    """A training, or with ``measure`` a measure: what is either finished or not."""

    spec: RunSpec
    measure: Measure | None = None

    @property
    def label(self) -> str:
        """A short readable name."""
        return f"{self.spec.label}: {self.measure.label if self.measure else 'training'}"

    @property
    def name(self) -> str:
        """What `Store.names` calls it once it is finished."""
        return self.measure.slug if self.measure else "run"

    @property
    def needs(self) -> list[RunSpec]:
        """The networks that must be trained before."""
        if self.measure is None:
            return [self.spec.parent] if self.spec.parent else []
        return [self.spec, *(value for value in vars(self.measure).values() if isinstance(value, RunSpec))]


@dataclass(frozen=True)
class Rest:
    """What is not finished: how many of how many units, the seconds of those with an estimate, how many have none.

    ``trainings_lost`` have failed, or go on from one that has; ``measures_lost`` are theirs. Neither are left.
    """

    trainings: int
    trainings_left: int
    trainings_lost: int
    measures: int
    measures_left: int
    measures_lost: int
    seconds: float
    unknown: int

    @property
    def left(self) -> str:
        """How long it takes, in words; at least so long where some of it has no estimate."""
        units = self.trainings_left + self.measures_left
        if not units:
            return "nothing"
        if self.unknown == units:
            return "not known yet"
        return f"{'at least' if self.unknown else 'about'} {in_words(self.seconds)}"


def units(tasks: Sequence[Task]) -> list[Unit]:
    """Return all units of some tasks, each once, and after what it needs."""
    found: dict[Unit, None] = {}

    def add(unit: Unit) -> None:
        if unit not in found:
            for needed in unit.needs:
                add(Unit(needed))
            found[unit] = None

    for task in tasks:
        add(Unit(task.spec))
        for measure in task.measures:
            add(Unit(task.spec, measure))
    return list(found)


def finished(store: Store, failed: set[RunSpec]) -> Callable[[Unit], bool]:
    """Return a function that says whether a store holds a unit, or will never do so as a training has failed.

    It lists each run's folder once and reads no file.
    """

    @cache
    def names(spec: RunSpec) -> frozenset[str]:
        return store.names(spec)

    def is_finished(unit: Unit) -> bool:
        return unit.name in names(unit.spec) or is_hopeless(unit, failed)

    return is_finished


def is_hopeless(unit: Unit, failed: set[RunSpec]) -> bool:
    """Return whether a unit needs a training that has failed, or the child of one."""
    return any(needed in failed or is_hopeless(Unit(needed), failed) for needed in unit.needs)


def rest(store: Store, tasks: Sequence[Task], estimates: Estimates) -> Rest:
    """Return what of some tasks a store lacks, and about how long that takes."""
    wanted, is_finished = units(tasks), finished(store, estimates.failed)
    missing = [unit for unit in wanted if not is_finished(unit)]
    seconds = [_seconds(store, unit, estimates) for unit in missing]
    return Rest(
        trainings=sum(unit.measure is None for unit in wanted),
        trainings_left=sum(unit.measure is None for unit in missing),
        trainings_lost=sum(
            unit.measure is None and (unit.spec in estimates.failed or is_hopeless(unit, estimates.failed))
            for unit in wanted
        ),
        measures=sum(unit.measure is not None for unit in wanted),
        measures_left=sum(unit.measure is not None for unit in missing),
        measures_lost=sum(unit.measure is not None and is_hopeless(unit, estimates.failed) for unit in wanted),
        seconds=sum(s for s in seconds if s is not None),
        unknown=sum(s is None for s in seconds),
    )


def ordered(wanted: Sequence[Unit], estimates: Estimates) -> list[Unit]:
    """Return units by their value for the book.

    All of one seed before the next; of a seed each training, followed by its network's cheap measures, before the
    expensive measures, and of these the cheaper ones first. ``wanted`` has each unit after what it needs, and so has
    the result.
    """
    missing = set(wanted)

    def cost(unit: Unit) -> float:
        """Return the seconds of a measure and of those that it is taken along."""
        if unit.measure is None or unit not in missing:
            return 0.0
        known = estimates.measure(unit.spec, unit.measure)
        if known is None:
            known = _EPOCHS[unit.measure.kind] * (estimates.epoch(unit.spec) or 1.0)
        along = [value for value in vars(unit.measure).values() if isinstance(value, Measure)]
        return known + sum(cost(Unit(unit.spec, measure)) for measure in along)

    def place(numbered: tuple[int, Unit]) -> tuple[int, float, int]:
        number, unit = numbered
        seconds = cost(unit)
        expensive = seconds > _CHEAP * (estimates.epoch(unit.spec) or 1.0)
        return unit.spec.recipe.seed, seconds if expensive else 0.0, number

    return [unit for _, unit in sorted(enumerate(wanted), key=place)]


def carry_out(
    store: Store,
    tasks: Sequence[Task],
    *,
    device: str | torch.device = "cpu",
    budget: float | None = None,
    report: Report = silent,
) -> list[Refusal]:
    """Compute what a store lacks of some tasks, and return what cannot be computed.

    After ``budget`` seconds it has returned: it starts no epoch and no measure that, by its estimate, would not end in
    time, and stops trainings between epochs and eigen-solves between saves. Should an estimate be wrong, or missing, an
    alarm stops what is under way, and the seconds it had are remembered. What is then left is known by `rest`, and a
    later call goes on from there. A training that fails is kept as failed, and what does not need it goes on. What
    another process is at work on is put off to the end, so that two can share the work.

    Raises InputError for data, a device or a store that cannot be used.
    """
    where = data.check_device(device)
    clock = _Clock(budget)
    estimates = Estimates(store, where)
    work = _Work(store, where, clock, estimates, report)
    is_finished = finished(store, estimates.failed)
    todo = ordered([unit for unit in units(tasks) if not is_finished(unit)], estimates)
    refused, put_off = list[Refusal](), list[Unit]()
    with suppress(OutOfTime), clock.alarm():
        while (todo or put_off) and clock.left > 0:
            if not todo:
                todo, put_off = put_off, []
                work.wait_for_one_of(todo)
            if work.is_elsewhere(todo[0]):
                put_off.append(todo.pop(0))
                continue
            unit = todo.pop(0)
            if refusal := work.obstacle(unit):
                refused.append(refusal)
                continue
            try:
                if work.is_ready(unit) and work.do(unit, [other.spec for other in todo if other.measure is None]):
                    todo = ordered(todo, estimates)
            except Held:  # by a process that was faster
                put_off.append(unit)
    return refused


class _Work:
    """Carries out units while there is time."""

    def __init__(self, store: Store, device: torch.device, clock: _Clock, estimates: Estimates, report: Report) -> None:
        self._store, self._device, self._clock = store, device, clock
        self._estimates, self._report = estimates, report

    def is_ready(self, unit: Unit) -> bool:
        """Return whether all networks that a unit needs are trained."""
        return all("run" in self._store.names(needed) for needed in unit.needs)

    def obstacle(self, unit: Unit) -> Refusal | None:
        """Return why a unit cannot be carried out in this store, or not within any limit like this one."""
        # It may have come from elsewhere since the work was planned.
        if unit.name in self._store.names(unit.spec) or is_hopeless(unit, self._estimates.failed):
            return None
        for needed in unit.needs:
            names = self._store.names(needed)
            if "run" in names and "weights" not in names:
                remedy = "import them, or remove its folder to train it anew"
                return Refusal(f"{unit.label}: the weights of {needed.slug} are not here; {remedy}", impossible=True)
        if (
            isinstance(unit.measure, AttackAccuracy)
            and unit.measure.attack.method == AUTOATTACK
            and find_spec("pyautoattack") is None
        ):
            return Refusal(f"{unit.label}: {MISSING}", impossible=True)
        seconds, budget = _piece(self._store, unit, self._estimates), self._clock.budget
        if self.is_ready(unit) and seconds is not None and budget is not None and not _fits(seconds, budget):
            why = f"needs about {in_words(seconds)} at a time; give it more than {in_words(budget)}"
            return Refusal(f"{unit.label}: {why}", impossible=False)
        return None

    def is_elsewhere(self, unit: Unit) -> bool:
        """Return whether another process is at work on the network of a unit, or trains one that it needs."""
        # A network that is trained can be read while it is measured.
        untrained = (needed for needed in unit.needs if "run" not in self._store.names(needed))
        return any(self._store.is_held(spec) for spec in {unit.spec, *untrained})

    def wait_for_one_of(self, units: Sequence[Unit]) -> None:
        """Wait until no other process is in the way of at least one of some units."""
        while all(map(self.is_elsewhere, units)):
            time.sleep(_POLL)

    def do(self, unit: Unit, trainings: Sequence[RunSpec]) -> bool:
        """Carry out a unit if there is time, and return whether nothing was known of its costs before.

        ``trainings`` are those that are still to come: a training may take the other seeds of its own along.
        """
        piece = _piece(self._store, unit, self._estimates)
        if is_hopeless(unit, self._estimates.failed) or not self._clock.fits(piece):
            return False
        with suppress(OutOfTime):
            if unit.measure is None:
                return self._train(unit.spec, mates_of(unit.spec, trainings))
            return self._measure(unit.spec, unit.measure)
        return False

    def _train(self, spec: RunSpec, mates: Sequence[RunSpec]) -> bool:
        new, last = self._estimates.epoch(spec) is None, self._clock.now

        def told(what: str, share: float, detail: str) -> None:
            nonlocal last
            self._report(what, share, detail)
            seconds, last = self._clock.now - last, self._clock.now
            if 0 < share < 1:  # an epoch has ended, and is kept if this ends the training here
                self._store.save_spent(spec, None, Spent())
                if not self._clock.fits(seconds):
                    raise OutOfTime

        try:
            train_run(self._store, spec, mates=mates, device=self._device, report=told, wait=False)
        except OutOfTime:
            if self._clock.left <= 0:
                self._store.save_spent(spec, None, Spent(lost=round(self._clock.now - last, 3)))
            for other, history, _ in self._store.under_way():
                if other in (spec, *mates):
                    self._estimates.learn_history(other, history)
            raise
        for ended in filter(None, map(self._store.result, (spec, *mates))):
            self._estimates.learn_run(ended)
        return new

    def _measure(self, spec: RunSpec, measure: Measure) -> bool:
        new, share_done, last = self._estimates.measure(spec, measure) is None, 0.0, self._clock.now
        started = last - self._store.spent(spec, measure).kept

        def told(what: str, share: float, detail: str) -> None:
            nonlocal share_done
            self._report(what, share, detail)
            share_done = share

        def saved() -> None:
            nonlocal last
            step, last = self._clock.now - last, self._clock.now
            left = (last - started) * (1 - share_done) / share_done if share_done > 0 else math.inf
            if not self._clock.fits(min(left, max(step, RESUMED[measure.kind]))):
                raise OutOfTime

        found = measure_run(self._store, spec, measure, device=self._device, report=told, on_save=saved, wait=False)
        self._estimates.learn_measurement(spec, found)
        return new


class _Clock:
    """What is left of a time limit; without one there is no end."""

    def __init__(self, budget: float | None) -> None:
        self.budget = budget
        self._end = math.inf if budget is None else self.now + budget

    @property
    def now(self) -> float:
        return time.monotonic()

    @property
    def left(self) -> float:
        return self._end - self.now

    def fits(self, seconds: float | None) -> bool:
        """Return whether what takes so many seconds ends in time; where nothing is known, whether there is any left."""
        return self.left > 0 if seconds is None else _fits(seconds, self.left)

    @contextmanager
    def alarm(self) -> Iterator[None]:
        """Raise OutOfTime in the middle of whatever is done when the time is up; in the main thread only."""
        if self.budget is None or threading.current_thread() is not threading.main_thread():
            yield
            return

        def ring(_: int, frame: FrameType | None) -> None:
            if _is_importing(frame):  # a module that is half imported stays broken for as long as Python runs
                signal.setitimer(signal.ITIMER_REAL, 0.1, 5.0)
                return
            raise OutOfTime

        earlier = signal.signal(signal.SIGALRM, ring)
        try:
            # Again after some seconds: where it rings in a destructor, Python drops the exception.
            signal.setitimer(signal.ITIMER_REAL, max(self.left, 1e-3), 5.0)
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, earlier)


def _is_importing(frame: FrameType | None) -> bool:
    while frame and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


def _fits(seconds: float, left: float) -> bool:
    return seconds * _STRETCH + _SLACK <= left


def _seconds(store: Store, unit: Unit, estimates: Estimates) -> float | None:
    """Return the seconds that are left of a unit, or None where nothing is known."""
    if unit.measure is None:
        return estimates.training(unit.spec)
    seconds, spent = estimates.measure(unit.spec, unit.measure), store.spent(unit.spec, unit.measure)
    if seconds is None or unit.measure.kind not in RESUMED:
        return None if seconds is None or seconds < spent.lost else seconds
    return max(seconds - spent.kept, 0.1 * seconds)


def _piece(store: Store, unit: Unit, estimates: Estimates) -> float | None:
    """Return the seconds after which something of a unit is kept, or None where nothing is known."""
    if unit.measure is None:
        seconds = estimates.epoch(unit.spec)
    elif unit.measure.kind in RESUMED:
        left, step = _seconds(store, unit, estimates), RESUMED[unit.measure.kind] + _STEP
        seconds = step if left is None else min(left, step)
    else:
        seconds = estimates.measure(unit.spec, unit.measure)
    return max(seconds or 0.0, store.spent(unit.spec, unit.measure).lost) or None
