"""Where the recorded numbers of a table come from: each run's specification, seed, commit, machine, date and file."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from hessnb.experiments.record import project_root
from hessnb.experiments.results import Outcome
from hessnb.experiments.spec import RunSpec
from hessnb.paper.recorded import Recorded

HEADER = ("Run", "Seed", "Profile", "Commit", "Machine", "Date")


@dataclass(frozen=True)
class Origin:
    """One recorded run: the texts of `HEADER`'s columns, and the address of its folder in the repository, if known.

    Where it is not, the run is named by its folder in the record.
    """

    cells: tuple[str, ...]
    address: str | None


def origins(outcomes: Sequence[Outcome]) -> tuple[Origin, ...]:
    """Return where the recorded ones among ``outcomes`` come from; a live run has no place in the record."""
    found = [o for o in outcomes if isinstance(o, Recorded) and o.result is not None]
    apart = distinctions([o.task.spec for o in found])
    return tuple(_origin(o, told) for o, told in zip(found, apart, strict=True))


def distinctions(specs: Sequence[RunSpec]) -> list[str]:
    """Return what the labels of runs leave out: ", " and the variant, or the learning rate where that differs."""
    kinds = [(spec.label.removesuffix(f"-s{spec.recipe.seed}"), spec.model.variant) for spec in specs]
    rates = Counter(kind for kind, _ in {(kind, spec.recipe.lr) for kind, spec in zip(kinds, specs, strict=True)})
    told = [
        (kind[1], f"learning rate {spec.recipe.lr:g}" if rates[kind] > 1 else None)
        for kind, spec in zip(kinds, specs, strict=True)
    ]
    return ["".join(f", {part}" for part in parts if part) for parts in told]


def _origin(outcome: Recorded, apart: str) -> Origin:
    assert outcome.result is not None
    spec, told = outcome.task.spec, outcome.result.provenance
    measured = [found.provenance for found in outcome.measurements.values()]
    commits = dict.fromkeys(p["commit"][:12] if p["commit"] else "unknown" for p in (told, *measured))
    dates = sorted({p["date"][:10] for p in (told, *measured)})
    machines = dict.fromkeys(f"{p['device']}, torch {p['torch']}" for p in (told, *measured))
    base = files_address(project_root() or project_root(Path(__file__)))
    cells = (
        (spec.label if base else spec.slug) + apart,
        str(spec.recipe.seed),
        outcome.scale or "–",
        ", ".join(commits),
        "; ".join(machines),
        " to ".join(dict.fromkeys((dates[0], dates[-1]))).replace("-", "\u2011"),  # hyphens that do not break
    )
    return Origin(cells, f"{base}/{outcome.folder}" if base else None)


@lru_cache
def files_address(root: Path | None) -> str | None:
    """Return the address below which the repository shows its folders, by ``_config.yml``; None where it names none."""
    path = root / "_config.yml" if root else None
    if path is None or not path.exists():
        return None
    section = re.search(r"^repository:\n((?:[ \t].*\n)+)", path.read_text(), re.MULTILINE)
    told = dict(re.findall(r"^\s+(url|branch):\s*(\S+)", section[1], re.MULTILINE)) if section else {}
    return f"{told['url'].rstrip('/')}/tree/{told['branch']}" if told.keys() >= {"url", "branch"} else None
