"""The record: what the store holds at a published scale, as small text files in ``book/record/``, without weights.

    book/record/<profile>/<label>-<key>/run.json            spec, history, provenance
    book/record/<profile>/<label>-<key>/<measure>-<key>.json

The formatting is deterministic: the same results give the same bytes. Nothing here is written by hand; the chapters
read it beside the live run, and a cell that the record does not hold says that it has not been measured.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hessnb.errors import InputError
from hessnb.experiments.grid import ARTEFACTS, artefact
from hessnb.experiments.profile import Profile, load_profile
from hessnb.experiments.run import Outcome, look_up
from hessnb.experiments.spec import Measure, RunSpec
from hessnb.experiments.store import (
    Measurement,
    Results,
    RunResult,
    measurement_from_json,
    measurement_to_json,
    run_result_from_json,
    run_result_to_json,
    write_whole,
)


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

    def result(self, spec: RunSpec) -> RunResult | None:
        """Return the recorded training of ``spec``, or None."""
        path = self.folder / spec.slug / "run.json"
        return run_result_from_json(_read(path), str(path)) if path.exists() else None

    def measurement(self, spec: RunSpec, measure: Measure) -> Measurement | None:
        """Return what is recorded of ``measure`` on the network of ``spec``, or None."""
        path = self.folder / spec.slug / f"{measure.slug}.json"
        return measurement_from_json(_read(path), str(path)) if path.exists() else None


def publish(source: Results, folder: Path, profile: Profile, names: Sequence[str] = ()) -> list[Path]:
    """Write all seeds of the named artefacts (default: all) that ``source`` holds; return the files that changed."""
    changed = []
    for outcome in (o for name in names or ARTEFACTS for o in _all_seeds(source, name, profile)):
        files = {"run.json": run_result_to_json(outcome.result)} if outcome.result else {}
        files |= {f"{m.slug}.json": measurement_to_json(found) for m, found in outcome.measurements.items()}
        target = folder / profile.name / outcome.task.spec.slug
        target.mkdir(parents=True, exist_ok=True)
        for name, body in files.items():
            path, content = target / name, (json.dumps(body, indent=1, sort_keys=True) + "\n").encode()
            if not path.exists() or path.read_bytes() != content:
                write_whole(path, content)
                changed.append(path)
    return changed


def recorded(name: str, profile: str = "paper", folder: Path | None = None) -> list[Outcome]:
    """Return what the record holds of an artefact under a profile: an outcome for each run that is there."""
    folder = folder or record_root()
    loaded = load_profile(profile)
    return _all_seeds(Record(folder / loaded.name), name, loaded) if folder else []


def _all_seeds(source: Results, name: str, profile: Profile) -> list[Outcome]:
    """Return the outcomes whose run ``source`` holds, for seeds 0, 1, ... as long as it holds any of a seed."""
    found: list[Outcome] = []
    for seed in itertools.count():
        there = [o for o in look_up(source, artefact(name).tasks_of_seed(profile, seed)) if o.result is not None]
        if not there:
            return found
        found += there
    return found


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
