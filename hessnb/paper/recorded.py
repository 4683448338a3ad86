"""What the record holds of an artefact: the paper's own specifications, or smaller ones where those are missing.

Each outcome says under which profile it was recorded and whether its specification is the paper's, so that no number of
a smaller scale can pass for one of the paper's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from hessnb.experiments.grid import artefact
from hessnb.experiments.profile import load_profile
from hessnb.experiments.record import record_root, recorded
from hessnb.experiments.results import Outcome

# Where numbers are looked for, in this order; the first is the paper's own scale.
PROFILES = ("paper", "laptop")

AnyOutcome = TypeVar("AnyOutcome", bound=Outcome)


@dataclass(frozen=True)
class Recorded(Outcome):
    """An outcome from the record, and the ``profile`` under which it was recorded; None where it is not there.

    ``papers_own`` says whether its specification is the paper's, under whichever profile it was recorded.
    """

    profile: str | None = None
    papers_own: bool = True

    @property
    def scale(self) -> str | None:
        """The profile, in words that say where its scale is smaller than the paper's."""
        return self.profile if self.papers_own or not self.profile else f"{self.profile}, smaller"

    @property
    def folder(self) -> str:
        """Its folder in the repository."""
        return f"book/record/{self.profile}/{self.task.spec.slug}"


def from_record(name: str, *, network: str | None = None, folder: Path | None = None) -> list[Recorded]:
    """Return what the record holds of an artefact, and an empty outcome for each run of seed 0 that it lacks.

    A run of the paper's specification counts under whichever profile it was recorded; of one recorded twice the one
    with more measures is taken. A network comes from the smaller profile instead if more runs of it are measured there.
    ``network`` keeps one network of Table 6, ``folder`` is another record. Raises InputError for an unknown name.
    """
    root = folder or record_root()
    found = [(profile, o) for profile in PROFILES for o in (recorded(name, profile, root) if root else [])]
    seeds = sorted({o.task.spec.recipe.seed for _, o in found} | {0})
    chosen: list[Recorded] = []
    planned = {p: [t for s in seeds for t in artefact(name).tasks_of_seed(load_profile(p), s)] for p in PROFILES}
    for wanted in dict.fromkeys(task.spec.model.name for task in planned["paper"]):
        if network in (None, wanted):
            scales = ([t for t in planned[profile] if t.spec.model.name == wanted] for profile in PROFILES)
            own, smaller = (_best([Recorded(task, None, {}) for task in tasks], found) for tasks in scales)
            use_own = _measured(own) >= _measured(smaller)
            chosen += own if use_own else [replace(o, papers_own=False) for o in smaller]
    return [o for o in chosen if o.result or o.task.spec.recipe.seed == 0]


def _measured(outcomes: Sequence[Outcome]) -> tuple[int, int]:
    """Return how many runs have measures, and how many there are."""
    return sum(bool(o.measurements) for o in outcomes), sum(o.result is not None for o in outcomes)


def _best(planned: Sequence[Recorded], found: Sequence[tuple[str, Outcome]]) -> list[Recorded]:
    """Return for each planned run the recorded one of its specification with most measures, or itself."""
    best: list[Recorded] = []
    for empty in planned:
        there = [(p, o) for p, o in found if o.task.spec == empty.task.spec]
        if there:
            profile, o = max(there, key=lambda pair: len(pair[1].measurements))
            best.append(Recorded(o.task, o.result, o.measurements, profile))
        else:
            best.append(empty)
    return best


def fullest(outcomes: Sequence[AnyOutcome]) -> list[AnyOutcome]:
    """Return the outcomes with the most measures: what a row or a curve compares is to be of the same networks."""
    most = max((len(o.measurements) for o in outcomes), default=0)
    return [o for o in outcomes if len(o.measurements) == most]


def papers_own(outcomes: Sequence[Outcome]) -> bool:
    """Whether these outcomes, of one row of a table, are of the paper's own specifications, from the record."""
    return all(isinstance(o, Recorded) and o.papers_own for o in outcomes)


def profiles(outcomes: Sequence[Outcome]) -> str:
    """Return under which profiles these outcomes were recorded; a dash for none."""
    return "; ".join(dict.fromkeys(o.scale for o in outcomes if isinstance(o, Recorded) and o.scale)) or "–"


def recorded_as(record: Sequence[Outcome]) -> str:
    """Return the title of a column of what the record holds, with the profile that it was measured under."""
    return "record" if profiles(record) == "–" else f"record ({profiles(record)})"
