"""What comes out of an experiment: ended trainings, measurements, what is there of a task, and all of it as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

from hessnb.errors import InputError
from hessnb.experiments.grid import Task, chosen, of_seeds
from hessnb.experiments.profile import Profile
from hessnb.experiments.spec import Measure, RunSpec, Spectrum, parse_measure
from hessnb.training import Epoch


@dataclass(frozen=True)
class RunResult:
    """A training that has ended: ``done``, or ``failed`` with a reason; its history and where it came from."""

    spec: RunSpec
    status: Literal["done", "failed"]
    reason: str
    history: list[Epoch]
    provenance: dict[str, Any]


@dataclass(frozen=True)
class Measurement:
    """What a measure gave: plain numbers and lists by name, and where they came from."""

    measure: Measure
    values: dict[str, Any]
    provenance: dict[str, Any]


class Results(Protocol):
    """Anything that can be asked for results: the store, or the published record."""

    def results(self) -> Iterator[RunResult]:
        """Go through all ended trainings."""
        ...

    def result(self, spec: RunSpec) -> RunResult | None:
        """Return the ended training of ``spec``, or None."""
        ...

    def measurement(self, spec: RunSpec, measure: Measure) -> Measurement | None:
        """Return what ``measure`` gave on the network of ``spec``, or None."""
        ...


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

        ``parameters`` names the block that they belong to, None the whole Hessian. Not those of a sub-sampled one.
        """
        found = [
            m.values["eigenvalues"]
            for measure, m in self.measurements.items()
            if isinstance(measure, Spectrum)
            and (measure.split, measure.parameters, measure.samples) == (split, parameters, None)
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


def ended(source: Results, names: Sequence[str], profile: Profile) -> list[Outcome]:
    """Return all that a store or the record holds of artefacts (see `chosen`): an outcome for each run that has ended.

    Of every seed, whatever others it lacks: the seeds of one artefact may have been computed in several stores.
    """
    seeds = sorted({result.spec.recipe.seed for result in source.results()})
    outcomes = look_up(source, of_seeds(chosen(names), profile, seeds))
    return [outcome for outcome in outcomes if outcome.result is not None]


def run_result_to_json(result: RunResult) -> dict[str, Any]:
    """Return a run result as plain JSON content."""
    return {
        "spec": json.loads(result.spec.canonical()),
        "status": result.status,
        "reason": result.reason,
        "history": [asdict(line) for line in result.history],
        "provenance": result.provenance,
    }


def run_result_from_json(body: dict[str, Any], where: str) -> RunResult:
    """Return the run result that `run_result_to_json` wrote; raise InputError naming ``where`` if it is not one."""
    try:
        return RunResult(
            spec=RunSpec.parse(body["spec"], where),
            status=body["status"],
            reason=body["reason"],
            history=[Epoch(**line) for line in body["history"]],
            provenance=body["provenance"],
        )
    except (KeyError, TypeError) as error:
        raise InputError(f"{where} does not hold a run ({error!r}); remove it") from error


def measurement_to_json(measurement: Measurement) -> dict[str, Any]:
    """Return a measurement as plain JSON content."""
    return {
        "measure": json.loads(measurement.measure.canonical()),
        "values": measurement.values,
        "provenance": measurement.provenance,
    }


def measurement_from_json(body: dict[str, Any], where: str) -> Measurement:
    """Return the measurement that `measurement_to_json` wrote; raise InputError naming ``where`` if it is not one."""
    try:
        return Measurement(parse_measure(body["measure"], where), body["values"], body["provenance"])
    except KeyError as error:
        raise InputError(f"{where} does not hold a measurement (no {error}); remove it") from error


def without_origin(body: dict[str, Any]) -> dict[str, Any]:
    """Return a run or a measurement, as JSON content, without where, when and in how many seconds it was computed."""
    body = {name: value for name, value in body.items() if name != "provenance"}
    if "history" in body:
        body["history"] = [{**epoch, "seconds": None} for epoch in body["history"]]
    return body
