"""What a chapter shows of an artefact: computed live where the store lacks it, and beside it what the record holds."""

from __future__ import annotations

from pathlib import Path

from hessnb.experiments.grid import artefact
from hessnb.experiments.profile import load_profile
from hessnb.experiments.results import Outcome
from hessnb.experiments.run import all_trained, compute
from hessnb.experiments.store import Store
from hessnb.paper.recorded import from_record, fullest


def live_and_recorded(
    name: str,
    *,
    network: str | None = None,
    failures: bool = False,
    profile: str = "quick",
    seeds: int | None = None,
    device: str = "cpu",
    store: str | Path | None = None,
) -> tuple[list[Outcome], list[Outcome]]:
    """Return what an artefact shows, computing what the store lacks, and what the record holds of it.

    ``network`` keeps one network of Table 6. See `hessnb.paper.recorded.from_record` for the record; of its seeds those
    are taken that have the most measures. With ``failures`` all are, and trainings that failed are among the outcomes:
    in a sweep that is a result.

    Raises InputError for an unknown name, and without ``failures`` RunFailed when a training failed.
    """
    tasks = artefact(name).tasks(load_profile(profile), seeds)
    chosen = [task for task in tasks if network in (None, task.spec.model.name)]
    live = compute(Store(store), chosen, device=device)
    record: list[Outcome] = [outcome for outcome in from_record(name, network=network) if outcome.result]
    return (live, record) if failures else (all_trained(live), fullest(record))
