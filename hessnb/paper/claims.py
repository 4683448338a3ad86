"""The claims of the paper, as `claims.toml` lists them, each tested on the paper's own numbers and on the record."""

from __future__ import annotations

import inspect
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from pydantic import Field, field_validator, model_validator

from hessnb.errors import InputError, unknown
from hessnb.experiments.grid import ARTEFACTS
from hessnb.experiments.spec import Frozen
from hessnb.paper.evidence import STATISTICS
from hessnb.paper.numbers import measured, printed
from hessnb.paper.recorded import from_record
from hessnb.paper.theory import checked_samples
from hessnb.paper.verdicts import Part, Region, Verdict, verdict

Question = Literal["Q1", "Q2", "Q3"]

# What is computed for the claims themselves, and stands in no record.
THEORY = "section2"


class Bounds(Frozen):
    """The region in which a claim says that its statistic lies; see `hessnb.paper.verdicts.Region`."""

    low: float | None = None
    high: float | None = None
    fails_without: float | None = None

    def region(self) -> Region:
        """Return it with what is not given taken as no bound."""
        return Region(**self.model_dump(exclude_none=True))


class Claim(Frozen):
    """One checkable claim: in our words, where the paper makes it, and how it is tested.

    ``frames`` are the artefacts whose numbers ``statistic`` takes, with ``parameters``; ``reading`` says how a sentence
    that can be read in several ways was taken.
    """

    id: str = Field(pattern=r"^[a-z0-9-]+$")
    title: str
    question: Question
    sentence: str
    place: str
    chapter: str
    frames: tuple[str, ...] = Field(min_length=1, strict=False)
    statistic: str
    parameters: dict[str, Any]
    holds: Bounds
    reading: str | None = None

    @field_validator("statistic")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in STATISTICS:
            raise unknown("statistic", name, list(STATISTICS))
        return name

    @model_validator(mode="after")
    def _fitting(self) -> Claim:
        try:
            inspect.signature(STATISTICS[self.statistic]).bind({}, **self.parameters)
        except TypeError as error:
            raise InputError(f"{self.id}: parameters of {self.statistic}: {error}") from error
        return self


@dataclass(frozen=True)
class Tested:
    """A claim on one set of numbers: each part with its verdict, and the verdict on the whole."""

    parts: tuple[tuple[Part, Verdict], ...]
    verdict: Verdict

    @property
    def profiles(self) -> list[str]:
        """Where the numbers of its judged parts come from."""
        return list(dict.fromkeys(part.profile for part, _ in self.parts if part.interval))


@dataclass(frozen=True)
class Assessment:
    """A claim, tested on the numbers that the paper printed and on those measured here."""

    claim: Claim
    papers: Tested
    ours: Tested


@lru_cache
def claims() -> tuple[Claim, ...]:
    """Return the claims in the order of the list; raise InputError for one that is ill-formed."""
    text = (resources.files("hessnb.paper") / "claims.toml").read_text()
    listed = tomllib.loads(text)["claim"]
    return tuple(Claim.parse(content, f"claims.toml, {content.get('id', 'a claim without id')}") for content in listed)


def assess(record: Path | None = None) -> list[Assessment]:
    """Test every claim; ``record`` is the record's folder, by default that of the book around the working directory."""

    @lru_cache
    def recorded(name: str) -> pd.DataFrame:
        if name == THEORY:
            return checked_samples()
        return measured(from_record(name, folder=record)) if name in ARTEFACTS else pd.DataFrame()

    return [Assessment(claim, examine(claim, printed), examine(claim, recorded)) for claim in claims()]


def examine(claim: Claim, numbers: Callable[[str], pd.DataFrame]) -> Tested:
    """Test a claim on the numbers that ``numbers`` gives of each of its artefacts."""
    region = claim.holds.region()
    parts = list(STATISTICS[claim.statistic]({name: numbers(name) for name in claim.frames}, **claim.parameters))
    judged = [(part, region.judge(part.interval)) for part in parts]
    return Tested(tuple(judged), verdict([found for _, found in judged]))
