"""What is there, what is missing, and about how long the rest will take on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hessnb.experiments import campaign
from hessnb.experiments.estimate import Estimates
from hessnb.experiments.grid import ARTEFACTS, plan
from hessnb.experiments.profile import Profile
from hessnb.experiments.store import Store

# The name of the line that counts what several artefacts share once.
TOGETHER = "together"


@dataclass(frozen=True)
class Line:
    """One artefact under one profile: how much of it is there, and what is left in words."""

    artefact: str
    profile: str
    seeds: int
    runs: int
    runs_done: int
    measures: int
    measures_done: int
    left: str

    @property
    def state(self) -> str:
        """there, partly there, missing, or failed: nothing is left, and what is not there needs a failed training."""
        if (self.runs_done, self.measures_done) == (self.runs, self.measures):
            return "there"
        if self.left == "nothing":
            return "failed"
        return "partly there" if self.runs_done else "missing"


def lines(store: Store, profile: Profile, estimates: Estimates, seeds: int | None = None) -> Iterator[Line]:
    """Return one line for each artefact of the grid under a profile, and one for all of them together."""
    for names in (*((name,) for name in ARTEFACTS), tuple(ARTEFACTS)):
        tasks = plan([ARTEFACTS[name] for name in names], profile, seeds)
        rest = campaign.rest(store, tasks, estimates)
        yield Line(
            artefact=names[0] if len(names) == 1 else TOGETHER,
            profile=profile.name,
            seeds=len({task.spec.recipe.seed for task in tasks}),
            runs=rest.trainings,
            runs_done=rest.trainings - rest.trainings_left - rest.trainings_lost,
            measures=rest.measures,
            measures_done=rest.measures - rest.measures_left - rest.measures_lost,
            left=rest.left,
        )
