"""Profiles: the scales at which the grid is computed, as data; one TOML file each, in ``profiles`` beside this."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Self

from pydantic import (
    AfterValidator,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from hessnb.attacks import ATTACKS
from hessnb.errors import InputError, unknown
from hessnb.experiments.spec import SECOND_ORDER, AttackSpec, DataSpec, Frozen, ModelSpec, RunSpec, faults
from hessnb.training import Recipe


def _known_attack(name: str) -> str:
    if name not in ATTACKS:
        raise unknown("attack", name, list(ATTACKS))
    return name


AttackName = Annotated[str, AfterValidator(_known_attack)]


class LargeBatch(Frozen):
    """One network of section 3.1, trained at several batch sizes with the same learning rate to the same loss."""

    data: DataSpec
    model: ModelSpec
    batch_sizes: tuple[PositiveInt, ...] = Field(min_length=1, strict=False)
    lr: PositiveFloat
    momentum: float = Field(ge=0, lt=1)
    loss_target: PositiveFloat
    max_epochs: PositiveInt
    eps: tuple[PositiveFloat, ...] = Field(min_length=1, strict=False)

    @model_validator(mode="after")
    def _has_whole_batches(self) -> Self:
        for size in self.batch_sizes:
            _check_batch(size, self.data)
        _check_run(lambda: self.spec(self.batch_sizes[0], 0))
        return self

    @property
    def middle_eps(self) -> float:
        """The size of attack at which most is left to tell networks apart: neither the smallest nor the largest."""
        return sorted(self.eps)[len(self.eps) // 2]

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


class AdversarialTraining(Frozen):
    """One network of section 3.3: trained as usual, then for some epochs under each attack of Table 5.

    Curvature (Figs 4, 5, 10 to 13) is measured of the networks trained under ``curvature_of`` (None: all five attacks),
    ``eigenvalues`` of each (None: as many as in the other figures).
    """

    data: DataSpec
    model: ModelSpec
    batch_size: PositiveInt
    lr: PositiveFloat
    momentum: float = Field(ge=0, lt=1)
    decay_every: PositiveInt
    decay_factor: PositiveFloat = Field(le=1)
    epochs: PositiveInt
    adversarial_epochs: PositiveInt
    eps: PositiveFloat
    cg_steps: PositiveInt
    curvature_of: tuple[AttackName, ...] | None = Field(default=None, strict=False)
    eigenvalues: PositiveInt | None = None

    @model_validator(mode="after")
    def _has_a_whole_batch(self) -> Self:
        _check_batch(self.batch_size, self.data)
        _check_run(lambda: self.original(0))
        return self

    def original(self, seed: int) -> RunSpec:
        """Return the run of the original network, M_ORI."""
        return RunSpec(data=self.data, model=self.model, recipe=self._recipe(self.epochs, seed))

    def robust(self, method: str, seed: int) -> RunSpec:
        """Return the run that goes on from the original network under an attack."""
        return self.control(seed).model_copy(update={"attack": self.attack(method)})

    def control(self, seed: int) -> RunSpec:
        """Return the run that goes on from the original network as a robust one does, but without an attack."""
        recipe = self._recipe(self.adversarial_epochs, seed)
        return RunSpec(data=self.data, model=self.model, recipe=recipe, parent=self.original(seed))

    def attack(self, method: str) -> AttackSpec:
        """Return an attack of Table 5 as Tables 3 and 4 take it: not clipped."""
        steps = self.cg_steps if method in SECOND_ORDER else None
        return AttackSpec(method=method, eps=self.eps, clip=False, cg_steps=steps)

    def _recipe(self, epochs: int, seed: int) -> Recipe:
        return Recipe(
            batch_size=self.batch_size,
            lr=self.lr,
            momentum=self.momentum,
            max_epochs=epochs,
            seed=seed,
            decay_every=self.decay_every,
            decay_factor=self.decay_factor,
        )


def _check_batch(size: int, data: DataSpec) -> None:
    if data.n_train is not None and size > data.n_train:
        raise InputError(f"a batch of {size:,} samples: n_train is {data.n_train:,}")


def _check_run(spec: Callable[[], RunSpec]) -> None:
    """Raise InputError for a network, a recipe and data that do not fit together."""
    try:
        spec()
    except ValidationError as error:
        raise InputError(faults(error)) from error


class SpectrumSettings(Frozen):
    """How many eigenvalues of the training loss, and how exact (relative residual)."""

    k: PositiveInt
    tol: PositiveFloat


class LandscapeSettings(Frozen):
    """Where the loss is drawn: how far along unit eigenvectors, at how many places, and the size of its batch."""

    reach: PositiveFloat
    line_points: PositiveInt
    plane_points: PositiveInt
    batch: PositiveInt

    @field_validator("line_points")
    @classmethod
    def _holds_both_ends(cls, points: int) -> int:
        if points % 4 != 1:  # from -1/2 to 3/2: 0 and 1 are the networks themselves
            raise InputError(f"line_points = {points}: one more than a multiple of 4, so that 0 and 1 are on the line")
        return points


class DensitySettings(Frozen):
    """The random vectors of a spectral density, and the steps of Lanczos iteration from each."""

    probes: PositiveInt
    steps: PositiveInt


class EdgeSettings(Frozen):
    """Gradient descent of one network on all samples at once, at some learning rates, and where it is looked at.

    At as many ``points`` of the trainings of section 3.1, too, there over ``samples`` of the training set.
    """

    data: DataSpec
    model: ModelSpec
    lr: tuple[PositiveFloat, ...] = Field(min_length=1, strict=False)
    epochs: PositiveInt
    points: PositiveInt = Field(ge=2)
    tol: PositiveFloat
    samples: PositiveInt

    @model_validator(mode="after")
    def _is_a_run(self) -> Self:
        _check_run(lambda: self.spec(self.lr[0], 0))
        return self

    def spec(self, lr: float, seed: int) -> RunSpec:
        """Return the run of one learning rate and seed; each of its epochs is one step."""
        if self.data.n_train is None:
            raise InputError("data needs n_train, the size of its one batch")
        recipe = Recipe(batch_size=self.data.n_train, lr=lr, momentum=0.0, max_epochs=self.epochs, seed=seed)
        return RunSpec(data=self.data, model=self.model, recipe=recipe)


class StrongSettings(Frozen):
    """The strong attacks: on how many samples, at which sizes, beside the original network on which robust ones."""

    n: PositiveInt
    eps: tuple[PositiveFloat, ...] = Field(min_length=1, strict=False)
    restarts: PositiveInt
    trainings: tuple[AttackName, ...] = Field(strict=False)


class SweepSettings(Frozen):
    """The batch sizes at which readings of the paper are compared, and multiples of the learning rate at the first."""

    batch_sizes: tuple[PositiveInt, ...] = Field(min_length=1, strict=False)
    rates: tuple[PositiveFloat, ...] = Field(min_length=1, strict=False)


class Profile(Frozen):
    """The scale at which the grid is computed; one TOML file each, in ``hessnb/experiments/profiles``."""

    name: str
    about: str
    seeds: PositiveInt
    large_batch: dict[str, LargeBatch]
    adversarial: dict[str, AdversarialTraining]
    spectrum: SpectrumSettings
    landscape: LandscapeSettings
    density: DensitySettings
    edge: EdgeSettings
    strong: StrongSettings
    sweep: SweepSettings

    @field_validator("name")
    @classmethod
    def _is_part_of_the_names_of_files(cls, name: str) -> str:
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise InputError(
                f"{name!r} (the file's own name, where it gives none) may hold letters, digits, _ . - only, and must "
                "not begin with . or -"
            )
        return name

    @model_validator(mode="after")
    def _has_enough_samples(self) -> Self:
        robust = {f"adversarial {name}": network.data for name, network in self.adversarial.items()}
        large = {name: network.data for name, network in self.large_batch.items()}
        drawn = [*robust, *(name for name in large if name != "CR")]  # of CR nothing is drawn
        asked = [
            *(("landscape.batch", self.landscape.batch, "n_train", name) for name in drawn),
            ("edge.samples", self.edge.samples, "n_train", "M1"),
            ("sweep.batch_sizes", max(self.sweep.batch_sizes), "n_train", "M1"),
            ("strong.n", self.strong.n, "n_test", "adversarial M1"),
        ]
        sets = robust | large
        for key, samples, field, name in asked:
            there = getattr(sets[name], field) if name in sets else None
            if there is not None and samples > there:
                raise InputError(f"{key} = {samples:,}, but {field} of {name} is {there:,}")
        return self


def profile_names() -> list[str]:
    """Return the names of the profiles that come with the package, smallest scale first."""
    return ["smoke", "quick", "laptop", "paper"]


def load_profile(name: str | Path) -> Profile:
    """Read a profile: the name of one that comes with the package, or the path of a ``.toml`` file of one's own.

    Raises InputError for an unknown name, a file that cannot be read, or an unknown or ill-typed key.
    """
    if str(name) in profile_names():
        return _packaged(str(name))
    if not str(name).endswith(".toml"):
        raise unknown("profile", str(name), [*profile_names(), "a path that ends in .toml"])
    path = Path(name)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"profile {path} cannot be read: {error}") from error
    return _parsed(path.stem, text, path)


@cache
def _packaged(name: str) -> Profile:
    text = (resources.files("hessnb.experiments") / "profiles" / f"{name}.toml").read_text(encoding="utf-8")
    return _parsed(name, text, name)


def _parsed(own_name: str, text: str, name: str | Path) -> Profile:
    """Return the profile that a file holds, which is called by its own name where it gives none."""
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"profile {name} is not valid TOML: {error}") from error
    profile = Profile.parse({"name": own_name, **content}, f"profile {name}")
    for part, needed in (("large_batch", {"M1", "C1", "C2", "CR"}), ("adversarial", {"M1", "C3"})):
        if missing := needed - getattr(profile, part).keys():
            raise InputError(f"profile {name}: {part} has no {', '.join(sorted(missing))}")
    return profile
