"""Which trained networks and measures each table and figure of the paper needs, under a profile and for some seeds."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from pydantic import Field, PositiveFloat, PositiveInt

from hessnb import models
from hessnb.errors import InputError, unknown
from hessnb.experiments.spec import DataSpec, Frozen, Measure, ModelSpec, PowerIteration, RunSpec, Spectrum
from hessnb.training import Recipe


class LargeBatch(Frozen):
    """One network of section 3.1, trained at several batch sizes with the same learning rate to the same loss."""

    data: DataSpec
    model: ModelSpec
    batch_sizes: tuple[PositiveInt, ...] = Field(min_length=1, strict=False)
    lr: PositiveFloat
    momentum: float = Field(ge=0, lt=1)
    loss_target: PositiveFloat
    max_epochs: PositiveInt

    def spec(self, batch_size: int, seed: int) -> RunSpec:
        """Return the run of one batch size and seed."""
        recipe = Recipe(
            batch_size=batch_size,
            lr=self.lr,
            momentum=self.momentum,
            max_epochs=self.max_epochs,
            seed=seed,
            loss_target=self.loss_target,
        )
        return RunSpec(data=self.data, model=self.model, recipe=recipe)


class SpectrumSettings(Frozen):
    """How many eigenvalues of the training loss, and how exact (relative residual)."""

    k: PositiveInt
    tol: PositiveFloat


class Profile(Frozen):
    """The scale at which the grid is computed; one TOML file each, in ``hessnb/experiments/profiles``."""

    name: str
    about: str
    seeds: PositiveInt
    large_batch: dict[str, LargeBatch]
    spectrum: SpectrumSettings


@dataclass(frozen=True)
class Task:
    """One trained network and what is to be computed on it."""

    spec: RunSpec
    measures: tuple[Measure, ...]


@dataclass(frozen=True)
class Artefact:
    """A table or figure, the paper's or ours: its name, what it shows, and the tasks that it needs for one seed."""

    name: str
    title: str
    tasks_of_seed: Callable[[Profile, int], list[Task]]

    def tasks(self, profile: Profile, seeds: int | None = None) -> list[Task]:
        """Return the tasks for seeds 0 to ``seeds`` - 1 (default: the profile's number); see `plan`."""
        return plan([self], profile, seeds)


def plan(artefacts: Sequence[Artefact], profile: Profile, seeds: int | None = None) -> list[Task]:
    """Return the tasks of several artefacts, all of one seed before the next, a network that they share once."""
    n = profile.seeds if seeds is None else seeds
    if n < 1:
        raise InputError(f"seeds = {n}: at least one is needed")
    merged: dict[str, Task] = {}
    for seed in range(n):
        for task in (task for artefact in artefacts for task in artefact.tasks_of_seed(profile, seed)):
            earlier = merged.get(task.spec.key)
            measures = dict.fromkeys((*(earlier.measures if earlier else ()), *task.measures))
            merged[task.spec.key] = Task(task.spec, tuple(measures))
    return list(merged.values())


def _table7(profile: Profile, seed: int) -> list[Task]:
    m1, spectrum = profile.large_batch["M1"], profile.spectrum
    measures = (
        Spectrum(split="train", k=spectrum.k, tol=spectrum.tol),
        Spectrum(split="test", k=1, tol=spectrum.tol),
    )
    return [Task(m1.spec(batch_size, seed), measures) for batch_size in m1.batch_sizes]


def _fig1(profile: Profile, seed: int) -> list[Task]:
    m1, spectrum = profile.large_batch["M1"], profile.spectrum
    measures = (Spectrum(split="train", k=spectrum.k, tol=spectrum.tol),)
    return [Task(m1.spec(batch_size, seed), measures) for batch_size in m1.batch_sizes]


# How many eigenvalues of each layer, and how many by power iteration, are enough to see the point.
_FEW = 5


def _layers(profile: Profile, seed: int) -> list[Task]:
    """Return the spectra of each layer's block for the smallest and the largest batch."""
    m1, spectrum = profile.large_batch["M1"], profile.spectrum
    k = min(_FEW, spectrum.k)
    measures = tuple(
        Spectrum(split="train", k=k, tol=spectrum.tol, parameters=layer)
        for layer in models.layers("M1", variant=m1.model.variant)
    )
    sizes = sorted({min(m1.batch_sizes), max(m1.batch_sizes)})
    return [Task(m1.spec(batch_size, seed), measures) for batch_size in sizes]


def _stopping(profile: Profile, seed: int) -> list[Task]:
    """Return the first eigenvalues of one network, by Lanczos iteration and by the paper's power iteration."""
    m1, spectrum = profile.large_batch["M1"], profile.spectrum
    measures = (
        Spectrum(split="train", k=spectrum.k, tol=spectrum.tol),
        PowerIteration(split="train", k=min(_FEW, spectrum.k), tol=spectrum.tol),
    )
    return [Task(m1.spec(m1.batch_sizes[0], seed), measures)]


ARTEFACTS = {
    artefact.name: artefact
    for artefact in (
        Artefact("table7", "M1 on MNIST: accuracy and dominant Hessian eigenvalue against batch size", _table7),
        Artefact("fig1", "Top 20 Hessian eigenvalues against batch size (M1, right)", _fig1),
        Artefact("layers", "Hessian eigenvalues layer by layer, smallest and largest batch (M1)", _layers),
        Artefact("stopping", "The paper's power iteration beside certified eigenvalues (M1)", _stopping),
    )
}


def artefact(name: str) -> Artefact:
    """Return an artefact by name; raise InputError for one that is not there."""
    if name not in ARTEFACTS:
        raise unknown("artefact", name, list(ARTEFACTS))
    return ARTEFACTS[name]


def profile_names() -> list[str]:
    """Return the names of the profiles that come with the package, smallest scale first."""
    return ["smoke", "quick", "laptop", "paper"]


def load_profile(name: str | Path) -> Profile:
    """Read a profile: the name of one that comes with the package, or the path of a ``.toml`` file of one's own.

    Raises InputError for an unknown name, a file that cannot be read, or an unknown or ill-typed key.
    """
    text_name = str(name)
    if text_name.endswith(".toml"):
        path = Path(text_name)
        try:
            text = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"profile {path} cannot be read: {error}") from error
        text_name = path.stem
    elif text_name in profile_names():
        text = (resources.files("hessnb.experiments") / "profiles" / f"{text_name}.toml").read_text()
    else:
        raise unknown("profile", text_name, [*profile_names(), "a path that ends in .toml"])
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"profile {name} is not valid TOML: {error}") from error
    profile = Profile.parse({"name": text_name, **content}, f"profile {name}")
    missing = {"M1"} - profile.large_batch.keys()
    if missing:
        raise InputError(f"profile {name}: large_batch has no {', '.join(sorted(missing))}")
    return profile
