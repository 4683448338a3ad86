"""What identifies a result: the spec of a trained network (`RunSpec`) and of a thing computed on it (`Measure`).

Both are frozen and validated, and have a key: the first 16 hex digits of the SHA-256 of their canonical JSON, in which
fields that are None do not appear, so that a field added later (with None for "as before") changes no key.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from typing import Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from hessnb import data, models
from hessnb.attacks import ATTACKS, BEYOND
from hessnb.errors import InputError, unknown
from hessnb.training import Recipe

SplitName = Literal["train", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "test")

# The attacks that solve a system with the input Hessian.
SECOND_ORDER = ("FHSM", "L2HESS")

# Four attacks in turn, the worst case of each sample kept: see `hessnb.attacks.autoattack`.
AUTOATTACK = "AUTOATTACK"


def faults(error: ValidationError) -> str:
    """Return in one line what is wrong with each field."""
    return "; ".join(
        f"{'.'.join(map(str, e['loc'])) or 'the whole'}: {e['msg'].removeprefix('Value error, ')}"
        for e in error.errors()
    )


class Frozen(BaseModel):
    """An immutable, strictly typed record without unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @classmethod
    def parse(cls, content: Any, where: str) -> Self:
        """Validate ``content``, or raise one InputError line that names ``where`` it came from and each wrong field."""
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise InputError(f"{where}: {faults(error)}") from error

    def canonical(self) -> str:
        """Return the canonical JSON: sorted keys, no spaces, nothing that is None."""
        content = self.model_dump(mode="json", exclude_none=True)
        return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)

    @property
    def key(self) -> str:
        """The first 16 hex digits of the SHA-256 of the canonical JSON."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()[:16]


class DataSpec(Frozen):
    """A data set by name, or its first samples (see `hessnb.data.load`)."""

    name: str
    n_train: PositiveInt | None = None
    n_test: PositiveInt | None = None

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in data.NAMES:
            raise unknown("data set", name, list(data.NAMES))
        return name


class ModelSpec(Frozen):
    """A network of Table 6 by name (see `hessnb.models.build`)."""

    name: str
    width: PositiveFloat | None = None
    variant: str | None = None

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.name not in models.MODELS:
            raise unknown("model", self.name, list(models.MODELS))
        if self.variant not in (None, *models.VARIANTS.get(self.name, ())):
            raise unknown(f"variant of {self.name}", self.variant, list(models.VARIANTS.get(self.name, ())))
        return self


class AttackSpec(Frozen):
    """An attack by its name in `ATTACKS` or `BEYOND`, or AUTOATTACK, its size in pixel values, and settings.

    A setting of None is the attack's default.
    """

    method: str
    eps: PositiveFloat
    clip: bool
    cg_steps: PositiveInt | None = None
    solver: Literal["cg", "exact"] | None = None
    scale: Literal["sqrt_dim", "unit"] | None = None
    precision: Literal["float64", "own", "plain"] | None = None
    restarts: PositiveInt | None = None

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.method not in {*ATTACKS, *BEYOND, AUTOATTACK}:
            raise unknown("attack", self.method, [*ATTACKS, *BEYOND, AUTOATTACK])
        if self.restarts and self.method != "PGD":
            raise InputError(f"{self.method} starts once: leave out restarts")
        if self.method == AUTOATTACK and (not self.clip or self.scale or self.precision):
            raise InputError(
                "AUTOATTACK is clipped and has its own precision and radius: give clip = true, nothing else"
            )
        if (self.cg_steps or self.solver) and self.method not in SECOND_ORDER:
            raise InputError(f"{self.method} solves no system: leave out cg_steps and solver")
        return self

    @property
    def label(self) -> str:
        """A short readable name."""
        settings = (self.cg_steps and f"cg{self.cg_steps}", self.solver, self.scale, self.precision, self.restarts)
        told = "".join(f"-{setting}" for setting in settings if setting)
        return f"{self.method}{told}-eps{self.eps:g}{'' if self.clip else '-unclipped'}"


class _Named(Frozen, ABC):
    """What runs and measures have: names."""

    @property
    @abstractmethod
    def label(self) -> str:
        """A short readable name."""

    @property
    def slug(self) -> str:
        """The label and the key: a unique name for files and folders."""
        return f"{self.label}-{self.key}"


class RunSpec(_Named):
    """One trained network: which data, which model, which recipe (with its seed).

    With ``parent`` it is the network of that run, trained on: under ``attack`` (Algorithm 1), or without, as a control.
    """

    data: DataSpec
    model: ModelSpec
    recipe: Recipe
    attack: AttackSpec | None = None
    parent: RunSpec | None = None

    @field_validator("recipe", mode="before")
    @classmethod
    def _from_mapping(cls, value: Any) -> Any:
        if isinstance(value, dict):
            try:
                return Recipe(**value)
            except TypeError as error:
                raise ValueError(str(error)) from error
        return value

    @model_validator(mode="after")
    def _fitting(self) -> Self:
        needed = models.INPUT_SHAPES[self.model.name][0]
        given = 1 if self.data.name in ("mnist", "mnist5k") else 3
        if needed != given:
            raise InputError(f"{self.model.name} takes {needed} colour channels, {self.data.name} has {given}")
        if self.attack is not None and self.parent is None:
            raise InputError("an attack without a parent: give the run from which training goes on")
        if self.parent is not None and self.parent.model != self.model:
            raise InputError(f"the parent is {self.parent.label}: it must be the same network, {self.model.name}")
        return self

    @property
    def label(self) -> str:
        """A short readable name, not unique: network, data, batch size, seed."""
        under = f"-{self.attack.method}" if self.attack else "-control" if self.parent else ""
        return f"{self.model.name}-{self.data.name}{under}-b{self.recipe.batch_size}-s{self.recipe.seed}"


class _Measured(_Named, ABC):
    """What a measure over one split has: which one."""

    split: SplitName


class Spectrum(_Measured):
    """The ``k`` Hessian eigenvalues of largest magnitude over a split, to relative residual ``tol`` (section 3.1).

    With ``parameters``, the name of a parameter or module, those of the diagonal block of its parameters. With
    ``samples``, the paper's B_H, those of the Hessian of as many samples of the split, drawn at random (section 3.3);
    ``draw`` tells several such draws apart.
    """

    kind: Literal["spectrum"] = "spectrum"
    k: PositiveInt
    tol: PositiveFloat
    parameters: str | None = None
    samples: PositiveInt | None = None
    draw: NonNegativeInt | None = None

    @model_validator(mode="after")
    def _drawn(self) -> Self:
        if (self.samples is None) != (self.draw is None):
            raise InputError("samples and draw belong together: give both or neither")
        return self

    @property
    def label(self) -> str:
        """A short readable name."""
        drawn = f"-{self.samples}of-draw{self.draw}" if self.samples else ""
        return f"spectrum-{self.split}-k{self.k}" + (f"-{self.parameters}" if self.parameters else "") + drawn


class PowerIteration(_Measured):
    """The same by the paper's own method, power iteration with deflation, stopped by its own rule (section 3.1)."""

    kind: Literal["power_iteration"] = "power_iteration"
    k: PositiveInt
    tol: PositiveFloat

    @property
    def label(self) -> str:
        """A short readable name."""
        return f"power-{self.split}-k{self.k}"


class InputCurvature(_Measured):
    """The means over a split of the norms of input Hessian and input gradient (section 3.2)."""

    kind: Literal["input_curvature"] = "input_curvature"

    @property
    def label(self) -> str:
        """A short readable name."""
        return f"inputs-{self.split}"


class AttackAccuracy(_Measured):
    """The accuracy over a split under an attack on the network itself, or on ``source``, another run (section 3.3).

    With ``n``, over the first n samples of the split.
    """

    kind: Literal["attack_accuracy"] = "attack_accuracy"
    attack: AttackSpec
    source: RunSpec | None = None
    n: PositiveInt | None = None

    @property
    def label(self) -> str:
        """A short readable name."""
        first = f"-first{self.n}" if self.n else ""
        return f"{self.attack.label}-{self.split}{first}" + ("-transferred" if self.source else "")


class LossLine(_Named):
    """The loss at ``points`` places from -``reach`` to ``reach`` along the first eigenvector of a spectrum (Fig. 2).

    Over the training set, the test set, and a batch of the training set of ``batch`` samples, drawn as those of a
    `Spectrum` of that size and draw 0 are.
    """

    kind: Literal["loss_line"] = "loss_line"
    along: Spectrum
    reach: PositiveFloat
    points: PositiveInt
    batch: PositiveInt

    @property
    def label(self) -> str:
        """A short readable name."""
        return f"line-{self.along.label}-{self.points}"


class LossPlane(_Named):
    """The loss on a square of ``points`` times ``points`` places, of the same reach both ways along the first and the
    second eigenvector of a spectrum (Fig. 3), over the training set and the test set.
    """

    kind: Literal["loss_plane"] = "loss_plane"
    along: Spectrum
    reach: PositiveFloat
    points: PositiveInt

    @model_validator(mode="after")
    def _two_directions(self) -> Self:
        if self.along.k < 2:
            raise ValueError("along: a plane needs the first two eigenvectors, k of at least 2")
        return self

    @property
    def label(self) -> str:
        """A short readable name."""
        return f"plane-{self.along.label}-{self.points}"


class Interpolation(_Named):
    """The loss at ``points`` places on the line from the parent run's network, at 0, to the run's own, at 1 (Fig. 4).

    It goes half as far beyond either end. Over the training set and the test set.
    """

    kind: Literal["interpolation"] = "interpolation"
    points: PositiveInt

    @property
    def label(self) -> str:
        """A short readable name."""
        return f"interpolation-{self.points}"


class Density(_Measured):
    """The Hessian's spectral density over a split: Gauss rules of ``steps`` points from ``probes`` random vectors."""

    kind: Literal["density"] = "density"
    probes: PositiveInt
    steps: PositiveInt

    @property
    def label(self) -> str:
        """A short readable name."""
        return f"density-{self.split}-{self.probes}x{self.steps}"


class Sharpness(_Named):
    """The largest Hessian eigenvalue of the training loss at ``points`` epochs of the training, its start and end among
    them, for which the network is trained again (Cohen et al., 2021).

    To relative residual ``tol``; with ``samples`` over so many of the training set, those of a `Spectrum`'s draw 0.
    """

    kind: Literal["sharpness"] = "sharpness"
    points: PositiveInt
    tol: PositiveFloat
    samples: PositiveInt | None = None

    @property
    def label(self) -> str:
        """A short readable name."""
        return f"sharpness-{self.points}" + (f"-{self.samples}of" if self.samples else "")


# Further kinds of measure join here; they are told apart by ``kind``.
Measure = (
    Spectrum
    | PowerIteration
    | InputCurvature
    | AttackAccuracy
    | LossLine
    | LossPlane
    | Interpolation
    | Density
    | Sharpness
)
_KINDS: dict[str, type[Measure]] = {measure.model_fields["kind"].default: measure for measure in get_args(Measure)}


def parse_measure(content: Any, where: str) -> Measure:
    """Return the measure that ``content`` describes; raise InputError naming ``where`` it came from if it is none."""
    kind = content.get("kind") if isinstance(content, dict) else None
    if kind not in _KINDS:
        raise InputError(f"{where}: {unknown('kind of measure', kind, list(_KINDS))}")
    return _KINDS[kind].parse(content, where)
