"""What the record holds and what it lacks: one row a recorded run, one row and one list an artefact."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from hessnb.experiments.grid import ARTEFACTS, Artefact, Task
from hessnb.experiments.profile import load_profile
from hessnb.experiments.record import Record, recorded
from hessnb.experiments.results import Outcome, look_up
from hessnb.experiments.spec import RunSpec
from hessnb.paper.origins import distinctions
from hessnb.paper.recorded import PROFILES
from hessnb.paper.tables import NOT_MEASURED, markdown_line

# Of each network of an artefact one outcome a seed; and the same by artefact.
Seeds = list[list[Outcome]]
Networks = dict[str, Seeds]


def generated(record: Path, address: str) -> dict[str, str]:
    """Return the generated files by name; ``address`` is where the folder ``record`` is shown on the repository."""
    networks = {profile: networks_of(record, profile) for profile in PROFILES}
    return {
        "state.md": state_table(networks),
        "runs.md": runs_table(record, address),
        **{f"missing_{profile}.md": missing_lists(of_profile) for profile, of_profile in networks.items()},
    }


def networks_of(record: Path, profile: str) -> Networks:
    """Return by artefact what the record holds of its networks under a profile, and what it lacks.

    Of a smaller profile only what differs from the paper's own specifications.
    """
    return {name: _networks(artefact, record, profile) for name, artefact in ARTEFACTS.items()}


def state_table(networks: Mapping[str, Networks]) -> str:
    """Return how much of each artefact the record holds, at the paper's scale and at smaller ones of their own."""
    lines = [markdown_line(("Artefact", "What it shows", "Paper's scale", "Laptop")), "| :--- | :--- | :--- | :--- |"]
    for name, artefact in ARTEFACTS.items():
        cells = [_state(networks[profile][name]) for profile in PROFILES]
        lines.append(markdown_line((name, artefact.title, *cells)))
    return "\n".join(lines) + "\n"


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


def missing_lists(networks: Networks) -> str:
    """Return for each artefact which of its networks and measures the record holds, and which not."""
    return "\n".join(_missing(ARTEFACTS[name], found) for name, found in networks.items() if found)


def _runs(profile: str, record: Path) -> list[Outcome]:
    """Return all runs of a profile's record that the grid knows, each once, with everything measured on it."""
    return sorted(recorded("all", profile, record), key=lambda o: (o.task.spec.label, o.task.spec.key))


def _run_row(outcome: Outcome, address: str) -> str:
    assert outcome.result is not None  # `recorded` returns no others
    spec, told = outcome.task.spec, outcome.result.provenance
    recipe = spec.recipe
    until = f"to loss {recipe.loss_target:g}" if recipe.loss_target else f"{recipe.max_epochs} epochs"
    under = f"under {spec.attack.label}" if spec.attack else "without an attack"
    attack = f", trained on {under}" if spec.parent else ""
    taken = [m.provenance["seconds"] for m in outcome.measurements.values()]
    cells = (
        f"[{spec.label}]({address}/{spec.slug}/run.json)",
        f"{''.join(f'{told}, ' for told in _scale(spec))}batch {recipe.batch_size}, learning rate {recipe.lr:g}, "
        f"momentum {recipe.momentum:g}, {until}{attack}",
        str(recipe.seed),
        f"`{(told['commit'] or 'unknown')[:12]}`",
        f"{told['device']}, {told['threads']} thread{'s'[: told['threads'] > 1]}, torch {told['torch']}",
        told["date"][:10],
        f"{told['seconds']:,.0f} s",
        f"{len(taken)} in {sum(taken):,.0f} s",
    )
    return markdown_line(cells)


def _scale(spec: RunSpec) -> list[str]:
    """Return in what a network and its data differ from those of the paper's Table 6."""
    width, n = spec.model.width, spec.data.n_train
    told = (spec.model.variant, f"width {width:g}" if width else None, f"{n:,} training images" if n else None)
    return [part for part in told if part]


def _networks(artefact: Artefact, record: Path, profile: str) -> Seeds:
    """Return for each network of an artefact what the record holds of it, one outcome a seed that is there at all.

    Without what the paper's profile asks for as well, unless that is the profile.
    """
    loaded, source = load_profile(profile), Record(record / profile)
    seeds = sorted({o.task.spec.recipe.seed for o in recorded(artefact.name, profile, record)}) or [0]
    by_seed = []
    for seed in seeds:
        tasks = artefact.tasks_of_seed(loaded, seed)
        if profile != PROFILES[0]:
            own = {task.spec: task.measures for task in artefact.tasks_of_seed(load_profile(PROFILES[0]), seed)}
            rest = [Task(t.spec, tuple(m for m in t.measures if m not in own.get(t.spec, ()))) for t in tasks]
            tasks = [task for task in rest if task.measures]
        by_seed.append(look_up(source, tasks))
    return [list(same) for same in zip(*by_seed, strict=True)]


def _counted(networks: Seeds) -> tuple[int, int]:
    """Return how many measures are there, and how many there would be: none of a training that failed."""
    outcomes = [o for same in networks for o in same if not _failed(o)]
    return sum(len(o.measurements) for o in outcomes), sum(len(o.task.measures) for o in outcomes)


def _seeds(networks: Seeds) -> str:
    seeds = sorted({o.task.spec.recipe.seed for same in networks for o in same if o.measurements})
    return ("seed " if len(seeds) == 1 else "seeds ") + _listed(seeds)


def _state(networks: Seeds) -> str:
    if not networks:
        return "as the paper's"
    done, planned = _counted(networks)
    return f"{done} of {planned} cells, {_seeds(networks)}" if done else NOT_MEASURED


def _missing(artefact: Artefact, networks: Seeds) -> str:
    done, planned = _counted(networks)
    head = f"`{artefact.name}`\n: {artefact.title}. "
    if not any(o.result for same in networks for o in same):
        counted = f"{len(networks)} network{'s'[: len(networks) != 1]}"
        return f"{head}None of its {planned} cells on {counted} is in the record.\n"
    head += f"Measured: {done} of {planned} cells" + (f", {_seeds(networks)}. " if done else ". ")
    if done == planned:
        return f"{head}Nothing is missing.\n"
    items = "".join(f"  - {item}\n" for item in _missing_items(networks))
    return f"{head}Not measured yet:\n\n{items}"


def _missing_items(networks: Seeds) -> Iterator[str]:
    """Return a line for each network that is not complete, the same network of all seeds in one."""
    for name, same in zip(_names([same[0].task.spec for same in networks]), networks, strict=True):
        trained = [o for o in same if o.result and not _failed(o)]
        untrained = sorted(o.task.spec.recipe.seed for o in same if not o.result)
        lacking = [m.label for o in trained for m in o.task.measures if m not in o.measurements]
        if len(untrained) == len(same):
            yield f"**{name}**: not trained"
        elif lacking or untrained:
            seeds = f" (not trained with seed {_listed(untrained)})" if untrained else ""
            everything = len(lacking) == len(trained) * len(same[0].task.measures)
            yield f"**{name}**{seeds}: {'everything' if everything else _some(lacking, len(trained)) or 'nothing else'}"


def _failed(outcome: Outcome) -> bool:
    return outcome.result is not None and outcome.result.status == "failed"


def _some(lacking: list[str], seeds: int) -> str:
    """Return labels of what is missing, each once: of all seeds, and then of some of them."""
    missing = Counter(lacking)
    parts = []
    for n in sorted(set(missing.values()), reverse=True):
        labels = _listed(sorted(label for label in missing if missing[label] == n))
        parts.append(labels if n == seeds else f"of {n} of {seeds} seeds {labels}")
    return "; ".join(parts)


def _names(specs: Sequence[RunSpec]) -> list[str]:
    """Return a name for each network that tells it from the others: its label, variant and learning rate, no seed."""
    labels = [spec.label.removesuffix(f"-s{spec.recipe.seed}") for spec in specs]
    return [label + apart for label, apart in zip(labels, distinctions(specs), strict=True)]


def _listed(things: list[str] | list[int]) -> str:
    return ", ".join(map(str, things))
