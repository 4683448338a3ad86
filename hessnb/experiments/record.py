"""The record: what the store holds at a published scale, as small text files in ``book/record/``, without weights.

    book/record/<profile>/<label>-<key>/run.json            spec, history, provenance
    book/record/<profile>/<label>-<key>/<measure>-<key>.json

    book/record/benchmarks.json                             what the speed page shows

The formatting is deterministic: the same results give the same bytes. Curves (the histories of trainings, and lists of
more than 50 numbers) take a line each and have their floats rounded to 7 significant digits; every other number is as
it was measured. Nothing here is written by hand; the chapters read it beside the live run, and a cell that the record
does not hold says that it has not been measured. `check` says whether a record is what this says.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from hessnb.errors import InputError
from hessnb.experiments.files import clear_errors, write_whole
from hessnb.experiments.grid import ARTEFACTS, of_seeds
from hessnb.experiments.profile import load_profile, profile_names
from hessnb.experiments.results import (
    Measurement,
    Outcome,
    Results,
    RunResult,
    ended,
    measurement_from_json,
    measurement_to_json,
    run_result_from_json,
    run_result_to_json,
    without_origin,
)
from hessnb.experiments.spec import Measure, RunSpec

BENCHMARKS = "benchmarks.json"

# All of the record, in bytes.
LARGEST = 10 * 1024 * 1024

# Numbers in a list, or in a list of lists, from which on it is a curve; and the significant digits of one.
_CURVE, _DIGITS = 51, 7


def project_root(start: Path | None = None) -> Path | None:
    """Return the nearest folder at or above ``start`` (default: here) that holds the book, or None."""
    here = (start or Path.cwd()).resolve()
    return next((folder for folder in (here, *here.parents) if (folder / "_toc.yml").exists()), None)


def record_root() -> Path | None:
    """Return the record's folder: of the book around the working directory, else of the package's own checkout."""
    root = project_root() or project_root(Path(__file__))
    return root / "book" / "record" if root else None


class Record:
    """The record of one profile in a folder; it is asked for results as a store is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def results(self) -> Iterator[RunResult]:
        """Go through all recorded trainings."""
        for path in sorted(self.folder.glob("*/run.json")):
            yield run_result_from_json(_read(path), str(path))

    def result(self, spec: RunSpec) -> RunResult | None:
        """Return the recorded training of ``spec``, or None."""
        path = self.folder / spec.slug / "run.json"
        return run_result_from_json(_read(path), str(path)) if path.exists() else None

    def measurement(self, spec: RunSpec, measure: Measure) -> Measurement | None:
        """Return what is recorded of ``measure`` on the network of ``spec``, or None."""
        path = self.folder / spec.slug / f"{measure.slug}.json"
        return measurement_from_json(_read(path), str(path)) if path.exists() else None


@dataclass(frozen=True)
class Published:
    """The files of the record that changed, and a line for each result that may not enter it."""

    changed: list[Path]
    refused: list[str]


def publish(source: Results, folder: Path, profile: str, names: Sequence[str] = ()) -> Published:
    """Write all that ``source`` holds of the named artefacts ("all" or none: all), be it some batch sizes of one seed.

    What does not say where it came from, or came from code that was not committed, stays out; with a run its measures.
    So does a run whose training differs from the recorded one, while measures that were taken on that would stay.
    Raises InputError for a profile that is not one of the package's: a reader could not look up what it is.
    """
    if profile not in profile_names():
        raise InputError(f"the record holds results of {', '.join(profile_names())}; {profile!r} is none of these")
    changed, refused = [], []
    for outcome in ended(source, names, load_profile(profile)):
        assert outcome.result is not None  # `ended` returns no others
        spec = outcome.task.spec
        if faults := _untold(outcome.result.provenance, spec.recipe.seed):
            refused.append(f"{spec.slug}: {faults[0]}")
            continue
        files = {"run.json": run_result_to_json(outcome.result)}
        for measure, found in outcome.measurements.items():
            if faults := [*_untold(found.provenance, spec.recipe.seed), *_unfit(found.values)]:
                refused.append(f"{spec.slug}/{measure.slug}: {faults[0]}")
            else:
                files[f"{measure.slug}.json"] = measurement_to_json(found)
        target = folder / profile / spec.slug
        if left := _of_another_training(target, files):
            refused.append(
                f"{spec.slug}: {left[0]} of the record was measured on another training of it; publish all of its "
                f"measures together, or remove {target}"
            )
            continue
        with clear_errors(target):
            target.mkdir(parents=True, exist_ok=True)
        for name, body in files.items():
            path, content = target / name, serialised(body)
            if not path.exists() or path.read_bytes() != content:
                write_whole(path, content)
                changed.append(path)
    return Published(changed, refused)


def _of_another_training(target: Path, files: Mapping[str, dict[str, Any]]) -> list[str]:
    """Return the measures in a run's folder that ``files`` leave there and that were taken on another training."""
    there = target / "run.json"
    if not there.exists():
        return []
    old, new = (without_origin(body) for body in (_read(there), json.loads(serialised(files["run.json"]))))
    return [] if old == new else sorted(path.name for path in target.glob("*.json") if path.name not in files)


def recorded(name: str, profile: str = "paper", folder: Path | None = None) -> list[Outcome]:
    """Return what the record holds of an artefact under a profile: an outcome for each run that is there."""
    folder = folder or record_root()
    loaded = load_profile(profile)
    return ended(Record(folder / loaded.name), [name], loaded) if folder else []


# -- formatting ----------------------------------------------------------------------------------------------------


def serialised(body: dict[str, Any]) -> bytes:
    """Return the bytes of a record's file; see the head of this module."""
    return (_text(body, "") + "\n").encode()


def _text(value: Any, indent: str, *, curve: bool = False) -> str:
    """Return JSON with an indent of 1 and sorted keys, as `json.dumps` has it, but curves on lines of their own."""
    if (isinstance(value, list) and _n_numbers(value) >= _CURVE) or (curve and not isinstance(value, list)):
        return json.dumps(_rounded(value), sort_keys=True, separators=(",", ":"))
    inner = indent + " "
    if isinstance(value, dict) and value:
        items = [
            f"{inner}{json.dumps(name)}: {_text(value[name], inner, curve=name == 'history')}" for name in sorted(value)
        ]
        return "{\n" + ",\n".join(items) + f"\n{indent}}}"
    if isinstance(value, list) and value:
        return "[\n" + ",\n".join(inner + _text(item, inner, curve=curve) for item in value) + f"\n{indent}]"
    return json.dumps(value)


def _n_numbers(value: Any) -> int:
    """Return how many numbers a list, or a list of lists, of nothing but numbers holds; else 0."""
    if isinstance(value, list):
        counts = [_n_numbers(item) for item in value]
        return sum(counts) if all(counts) else 0
    return int(isinstance(value, int | float) and not isinstance(value, bool))


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value


# -- the check -----------------------------------------------------------------------------------------------------


def check(folder: Path) -> list[str]:
    """Return one line for each fault of a record: what it holds without origin, without place or by hand.

    Each number belongs to a run and a measure of its profile's grid, whose keys match its name, beside its run; says
    its commit (of committed code), date, processor, torch, seed and seconds; and has the bytes that `publish` writes.
    There is no other file, and no more than 10 MB in all. Raises InputError for a folder that does not exist.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder: a record is one, with a folder for each profile")
    files = sorted(path for path in folder.rglob("*") if not path.is_dir())
    faults = []

    @cache
    def spec_in(path: Path) -> RunSpec:
        return run_result_from_json(_read(path), str(path)).spec

    for path in files:
        try:
            faults += [f"{path}: {fault}" for fault in _faults(path, path.relative_to(folder).parts, spec_in)]
        except InputError as error:
            faults.append(str(error))
    size = sum(path.stat().st_size for path in files)
    if size > LARGEST:
        faults.append(f"{folder} holds {size:,} bytes: more than {LARGEST:,}")
    return faults


def _faults(path: Path, parts: tuple[str, ...], spec_in: Callable[[Path], RunSpec]) -> Iterator[str]:
    if parts == (BENCHMARKS,):
        yield from _faults_of_benchmarks(path)
        return
    if len(parts) != 3 or parts[0] not in profile_names() or path.suffix != ".json":
        yield "neither a run nor a measure of a profile: it does not belong here"
        return
    profile, run, name = parts
    body = _read(path)
    beside = path.parent / "run.json"
    if not beside.exists():
        yield "a measure without its run: run.json is not beside it"
        return
    spec = spec_in(beside)
    if name == "run.json":
        result = run_result_from_json(body, str(path))
        known, again = spec.slug, run_result_to_json(result)
        if run != known:
            yield f"it is the run {known}: the folder's name says {run}"
        if spec not in _planned(profile, spec.recipe.seed):
            yield f"no artefact needs this run under the profile {profile}"
    else:
        measurement = measurement_from_json(body, str(path))
        known, again = f"{measurement.measure.slug}.json", measurement_to_json(measurement)
        if name != known:
            yield f"it is the measure {known}: the file's name says {name}"
        if measurement.measure not in _planned(profile, spec.recipe.seed).get(spec, ()):
            yield f"no artefact needs this measure of this run under the profile {profile}"
        yield from _unfit(measurement.values)
    yield from _untold(body.get("provenance"), spec.recipe.seed)
    if serialised(again) != path.read_bytes():
        yield "its formatting is not the record's; publish it again with: hessnb record"


def _faults_of_benchmarks(path: Path) -> Iterator[str]:
    body = _read(path)
    rows = body.get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "name" in row for row in rows):
        yield "it does not hold rows with names"
        return
    names = [row["name"] for row in rows]
    if names != sorted(set(names)):
        yield "its rows are not sorted by name, each once"
    for row in rows:
        if not _finite({name: value for name, value in row.items() if name != "provenance"}):
            yield f"{row['name']}: not finite"
        for fault in _untold(row.get("provenance"), None):
            yield f"{row['name']}: {fault}"
    if (json.dumps(body, indent=1, sort_keys=True) + "\n").encode() != path.read_bytes():
        yield "its formatting is not that of: make bench"


@cache
def _planned(profile: str, seed: int) -> Mapping[RunSpec, frozenset[Measure]]:
    """Return the runs of one seed in a profile's grid, and the measures of each."""
    tasks = of_seeds(list(ARTEFACTS.values()), load_profile(profile), [seed])
    return {task.spec: frozenset(task.measures) for task in tasks}


def _untold(provenance: Any, seed: int | None) -> list[str]:
    """Return what is wrong with the provenance of a result (of a seed, where one is given)."""
    if not isinstance(provenance, dict):
        return ["no provenance"]
    commit, faults = str(provenance.get("commit")), []
    if not re.fullmatch("[0-9a-f]{40}", commit):
        faults.append(f"commit {commit!r} is not that of committed code")
    try:
        dated = datetime.fromisoformat(str(provenance.get("date"))).tzinfo is not None
    except ValueError:
        dated = False
    if not dated:
        faults.append(f"no date: {provenance.get('date')!r}")
    faults += [f"no {name}" for name in ("device", "torch") if not provenance.get(name)]
    given = provenance.get("seed")
    if not isinstance(given, int) or (seed is not None and given != seed):
        faults.append(f"seed {given!r}" + ("" if seed is None else f" in a run of seed {seed}"))
    seconds = provenance.get("seconds")
    if not isinstance(seconds, int | float) or not 0 <= seconds < math.inf:
        faults.append(f"seconds {seconds!r}")
    return faults


def _unfit(values: dict[str, Any]) -> list[str]:
    """Return what is wrong with the values of a measure."""
    return [] if values and _finite(values) else ["its values are empty or not finite"]


def _finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_finite(item) for item in value.values())
    if isinstance(value, list):
        return all(_finite(item) for item in value)
    return not isinstance(value, float) or math.isfinite(value)


def _read(path: Path) -> dict[str, Any]:
    try:
        body = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read ({error}); restore it, or publish it again with: hessnb record"
        ) from error
    if not isinstance(body, dict):
        raise InputError(f"{path} does not hold a record; restore it, or publish it again with: hessnb record")
    return body
