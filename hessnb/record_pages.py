"""The tables on what the record holds and what it lacks: one row a recorded run, one table an artefact."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path

from hessnb.experiments.grid import ARTEFACTS, Artefact, Task
from hessnb.experiments.profile import load_profile
from hessnb.experiments.record import Record, recorded
from hessnb.experiments.run import Outcome, look_up
from hessnb.paper.tables import NOT_MEASURED

PROFILES = ("paper", "laptop")


def generated(record: Path, address: str) -> dict[str, str]:
    """Return the generated files by name; ``address`` is where the folder ``record`` is shown on the repository."""
    return {
        "runs.md": runs_table(record, address),
        **{f"missing_{name}.md": missing_tables(record, name) for name in PROFILES},
    }


def runs_table(record: Path, address: str) -> str:
    """Return every recorded run with its specification, seed, commit, machine, date and seconds, by profile."""
    parts = []
    for folder in sorted(path for path in record.iterdir() if path.is_dir()) if record.exists() else []:
        rows = [_run_row(o, f"{address}/{folder.name}") for o in _runs(folder.name, record)]
        if rows:
            head = "| Run | Settings | Seed | Commit | Machine | Trained on | Training | Measures |\n"
            rule = "| :--- | :--- | ---: | :--- | :--- | :--- | ---: | ---: |\n"
            parts.append(f"**Profile {folder.name}**\n\n" + head + rule + "\n".join(rows) + "\n")
    return "\n".join(parts) or f"{NOT_MEASURED.capitalize()}.\n"


def missing_tables(record: Path, profile: str) -> str:
    """Return for each artefact which of its networks and measures the record holds under a profile, and which not."""
    return "\n".join(_missing(artefact, Record(record / profile), profile) for artefact in ARTEFACTS.values())


def _runs(profile: str, record: Path) -> list[Outcome]:
    """Return all runs of a profile's record that the grid knows, each once, with everything measured on it."""
    merged: dict[str, Outcome] = {}
    for name in ARTEFACTS:
        for outcome in recorded(name, profile, record):
            spec = outcome.task.spec
            earlier = merged.get(spec.key)
            found = {**(earlier.measurements if earlier else {}), **outcome.measurements}
            merged[spec.key] = Outcome(Task(spec, tuple(found)), outcome.result, found)
    return sorted(merged.values(), key=lambda o: (o.task.spec.label, o.task.spec.key))


def _run_row(outcome: Outcome, address: str) -> str:
    assert outcome.result is not None  # `recorded` returns no others
    spec, told = outcome.task.spec, outcome.result.provenance
    recipe = spec.recipe
    until = f"to loss {recipe.loss_target:g}" if recipe.loss_target else f"{recipe.max_epochs} epochs"
    attack = f", trained on under {spec.attack.label}" if spec.attack else ""
    taken = [m.provenance["seconds"] for m in outcome.measurements.values()]
    return _line(
        f"[{spec.label}]({address}/{spec.slug}/run.json)",
        f"batch {recipe.batch_size}, learning rate {recipe.lr:g}, momentum {recipe.momentum:g}, {until}{attack}",
        str(recipe.seed),
        f"`{(told['commit'] or 'unknown')[:12]}`",
        f"{told['device']}, {told['threads']} thread{'s'[: told['threads'] > 1]}, torch {told['torch']}",
        told["date"][:10],
        f"{told['seconds']:,.0f} s",
        f"{len(taken)} in {sum(taken):,.0f} s",
    )


def _missing(artefact: Artefact, record: Record, profile: str) -> str:
    loaded = load_profile(profile)
    there = recorded(artefact.name, profile, record.folder.parent)
    seeds = sorted({o.task.spec.recipe.seed for o in there}) or [0]
    by_seed = [look_up(record, artefact.tasks_of_seed(loaded, seed)) for seed in seeds]
    networks = [list(same) for same in zip(*by_seed, strict=True)]
    planned = sum(len(o.task.measures) for column in by_seed for o in column)
    done = sum(len(o.measurements) for column in by_seed for o in column)
    head = f"{artefact.title}. Measured: {done} of {planned} cells" + (f", seeds {_listed(seeds)}." if done else ".")
    if done == planned:
        return f"`{artefact.name}`\n: {head} Nothing is missing.\n"
    if not any(o.result for column in by_seed for o in column):
        return f"`{artefact.name}`\n: {head} None of its {len(networks)} networks is in the record.\n"
    rows = list(_missing_rows(networks))
    table = "\n".join(
        [
            _line("Network", "Seeds trained", "Measured", "Not measured yet"),
            "| :--- | ---: | ---: | :--- |",
            *rows,
        ]
    )
    indented = table.replace("\n", "\n  ")
    return f"`{artefact.name}`\n: {head}\n\n  {indented}\n"


def _missing_rows(networks: list[list[Outcome]]) -> Iterator[str]:
    """Return a row for each network that is not complete, the same network of all seeds in one."""
    for same in networks:
        lacking = [m.label for o in same for m in o.task.measures if m not in o.measurements]
        if lacking:
            first = same[0].task
            total = len(first.measures)
            share = statistics.mean(len(o.measurements) for o in same)
            what = "everything" if len(lacking) == total * len(same) else _listed(sorted(set(lacking)))
            yield _line(_name(first), str(sum(o.result is not None for o in same)), f"{share:.3g} of {total}", what)


def _name(task: Task) -> str:
    return task.spec.label.removesuffix(f"-s{task.spec.recipe.seed}")


def _listed(things: list[str] | list[int]) -> str:
    return ", ".join(map(str, things))


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"
