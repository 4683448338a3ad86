"""Which trained networks and measures each table and figure of the paper needs, under a profile and for some seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from hessnb import models
from hessnb.attacks import ATTACKS, BEYOND
from hessnb.errors import InputError, unknown, whole_number
from hessnb.experiments.profile import AdversarialTraining, LargeBatch, Profile
from hessnb.experiments.spec import (
    AUTOATTACK,
    SECOND_ORDER,
    SPLITS,
    AttackAccuracy,
    AttackSpec,
    Density,
    InputCurvature,
    Interpolation,
    LossLine,
    LossPlane,
    Measure,
    PowerIteration,
    RunSpec,
    Sharpness,
    Spectrum,
)


@dataclass(frozen=True)
class Task:
    """One trained network and what is to be computed on it."""

    spec: RunSpec
    measures: tuple[Measure, ...]


# From a profile and a seed to the tasks that these need.
Tasks = Callable[[Profile, int], list[Task]]


@dataclass(frozen=True)
class Artefact:
    """A table or figure, the paper's or ours: its name, what it shows, and the tasks that it needs for one seed."""

    name: str
    title: str
    tasks_of_seed: Tasks

    def tasks(self, profile: Profile, seeds: int | None = None) -> list[Task]:
        """Return the tasks for seeds 0 to ``seeds`` - 1 (default: the profile's number); see `plan`."""
        return plan([self], profile, seeds)


def plan(artefacts: Sequence[Artefact], profile: Profile, seeds: int | None = None) -> list[Task]:
    """Return the tasks of several artefacts for seeds 0 to ``seeds`` - 1 (default: the profile's number).

    Raises InputError for what is no whole number, less than one seed or more than a thousand. See `of_seeds`.
    """
    n = whole_number("seeds", profile.seeds if seeds is None else seeds)
    if n > 1000:
        raise InputError(f"seeds = {n}: it must be at most 1,000")
    return of_seeds(artefacts, profile, range(n))


def of_seeds(artefacts: Sequence[Artefact], profile: Profile, seeds: Iterable[int]) -> list[Task]:
    """Return the tasks of several artefacts for these seeds, in their order; a network that they share once."""
    merged: dict[str, Task] = {}
    for seed in seeds:
        for task in (task for artefact in artefacts for task in artefact.tasks_of_seed(profile, seed)):
            earlier = merged.get(task.spec.key)
            measures = dict.fromkeys((*(earlier.measures if earlier else ()), *task.measures))
            merged[task.spec.key] = Task(task.spec, tuple(measures))
    return list(merged.values())


def _leading(profile: Profile) -> Spectrum:
    """Return the two leading eigenvalues of the training loss: one for the tables, both for the planes."""
    return Spectrum(split="train", k=2, tol=profile.spectrum.tol)


def _full(profile: Profile) -> Spectrum:
    """Return all eigenvalues of the training loss that the paper draws."""
    return Spectrum(split="train", k=profile.spectrum.k, tol=profile.spectrum.tol)


def _large_batch(name: str) -> Tasks:
    """Return the tasks of a network's rows in Tables 1, 2 and 7, and FGSM-10, of which section 3.2 says the same."""

    def tasks(profile: Profile, seed: int) -> list[Task]:
        network, spectrum = profile.large_batch[name], profile.spectrum
        precisions: tuple[Literal["plain"] | None, ...] = (None, "plain")  # exact, and as most code has it
        attacks = [
            AttackSpec(method="FGSM", eps=eps, clip=True, precision=precision)
            for precision in precisions
            for eps in network.eps
        ]
        measures: tuple[Measure, ...] = (
            _leading(profile),
            Spectrum(split="test", k=1, tol=spectrum.tol),
            *(InputCurvature(split=split) for split in SPLITS),
            *(AttackAccuracy(split=split, attack=attack) for attack in attacks for split in SPLITS),
            AttackAccuracy(split="test", attack=AttackSpec(method="FGSM-10", eps=network.middle_eps, clip=True)),
        )
        return [Task(network.spec(batch_size, seed), measures) for batch_size in network.batch_sizes]

    return tasks


def _table1(profile: Profile, seed: int) -> list[Task]:
    return [*_large_batch("C1")(profile, seed), *_large_batch("C2")(profile, seed)]


def _table7(profile: Profile, seed: int) -> list[Task]:
    """Return Table 7's tasks; a full spectrum, which Figure 1 needs anyway, holds the dominant eigenvalue as well."""
    return [Task(task.spec, (*task.measures, _full(profile))) for task in _large_batch("M1")(profile, seed)]


def _adversarial(name: str) -> Tasks:
    """Return the tasks of Tables 3 and 4: each network under each attack on the original network, and on itself."""

    def tasks(profile: Profile, seed: int) -> list[Task]:
        settings = profile.adversarial[name]
        original = settings.original(seed)
        attacks = [settings.attack(method) for method in ATTACKS]
        transferred = [AttackAccuracy(split="test", attack=attack, source=original) for attack in attacks]
        white_box = [AttackAccuracy(split="test", attack=attack) for attack in attacks]
        robust = [settings.robust(method, seed) for method in ATTACKS]
        return [
            Task(original, tuple(white_box)),
            *(Task(network, (*transferred, *white_box)) for network in robust),
        ]

    return tasks


def _on_original(name: str, attacks: Callable[[AdversarialTraining], Sequence[AttackSpec]]) -> Tasks:
    """Return the tasks of accuracies on the test set under ``attacks`` on an original network of section 3.3."""

    def tasks(profile: Profile, seed: int) -> list[Task]:
        settings = profile.adversarial[name]
        measures = tuple(AttackAccuracy(split="test", attack=attack) for attack in attacks(settings))
        return [Task(settings.original(seed), measures)]

    return tasks


def _both(attacks: Callable[[AdversarialTraining], Sequence[AttackSpec]]) -> Tasks:
    """Return these tasks for M1 and for C3."""
    return lambda profile, seed: [task for name in ("M1", "C3") for task in _on_original(name, attacks)(profile, seed)]


def _five(settings: AdversarialTraining) -> list[AttackSpec]:
    return [settings.attack(method) for method in ATTACKS]


def _changed(attack: AttackSpec, **changes: object) -> AttackSpec:
    return attack.model_copy(update=changes)


def _apart(settings: AdversarialTraining) -> list[AttackSpec]:
    """Return the five attacks: as Tables 3 and 4 have them, clipped, in the network's precision, of radius eps."""
    five = _five(settings)
    l2 = [attack for attack in five if attack.method in ("L2GRAD", "L2HESS")]
    return [
        *five,
        *(_changed(attack, clip=True) for attack in five),
        *(_changed(attack, precision=precision) for precision in ("own", "plain") for attack in five),
        *(_changed(attack, scale="unit") for attack in l2),
    ]


# Conjugate gradient steps of the sweep; one is the gradient itself.
_CG_STEPS = (1, 2, 3, 5, 10)


def _cg(settings: AdversarialTraining) -> list[AttackSpec]:
    """Return the second-order attacks after some steps and exactly."""
    attacks = [settings.attack(method) for method in SECOND_ORDER]
    iterated = [_changed(attack, cg_steps=steps) for attack in attacks for steps in _CG_STEPS]
    return [*iterated, *(_changed(attack, cg_steps=None, solver="exact") for attack in attacks)]


# Multiples of the paper's eps at which the curves are drawn.
_MULTIPLES = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0)


def _curves(settings: AdversarialTraining) -> list[AttackSpec]:
    """Return the five attacks at several sizes, clipped."""
    return [
        _changed(attack, eps=round(multiple * settings.eps, 6), clip=True)
        for attack in _five(settings)
        for multiple in _MULTIPLES
    ]


def _section34(settings: AdversarialTraining) -> list[AttackSpec]:
    """Return gradient, second-order and preconditioned attacks of equal size, not clipped."""
    exact = [_changed(settings.attack(method), cg_steps=None, solver="exact") for method in SECOND_ORDER]
    beyond = [AttackSpec(method=method, eps=settings.eps, clip=False) for method in BEYOND]
    return [settings.attack("FGSM"), settings.attack("L2GRAD"), *exact, *beyond]


def _fig1(profile: Profile, seed: int) -> list[Task]:
    networks = [profile.large_batch[name] for name in ("C1", "M1")]
    return [Task(network.spec(b, seed), (_full(profile),)) for network in networks for b in network.batch_sizes]


# How many times closer to the network the line is drawn once more, so that its second derivative there can be seen.
_CLOSER = 100


def _lines(name: str) -> Tasks:
    """Return the dominant eigenvalue and the losses along its eigenvector, far and near, for each batch size."""

    def tasks(profile: Profile, seed: int) -> list[Task]:
        network, drawn = profile.large_batch[name], profile.landscape
        line = LossLine(along=_leading(profile), reach=drawn.reach, points=drawn.line_points, batch=drawn.batch)
        close = line.model_copy(update={"reach": drawn.reach / _CLOSER, "points": 5})
        return [Task(network.spec(batch_size, seed), (line.along, line, close)) for batch_size in network.batch_sizes]

    return tasks


def _planes(name: str) -> Tasks:
    """Return the losses on the plane of the two leading eigenvectors, for the smallest and the largest batch."""

    def tasks(profile: Profile, seed: int) -> list[Task]:
        network, drawn = profile.large_batch[name], profile.landscape
        plane = LossPlane(along=_leading(profile), reach=drawn.reach, points=drawn.plane_points)
        return [Task(network.spec(batch_size, seed), (plane.along, plane)) for batch_size in _extremes(network)]

    return tasks


def _extremes(network: LargeBatch) -> list[int]:
    """Return the smallest and the largest batch size."""
    return sorted({min(network.batch_sizes), max(network.batch_sizes)})


def _interpolated(name: str) -> Tasks:
    """Return the losses from the original network to each robust one."""

    def tasks(profile: Profile, seed: int) -> list[Task]:
        line = Interpolation(points=profile.landscape.line_points)
        return [Task(network, (line,)) for network in _six(profile, name, seed)[1:]]

    return tasks


def _subsampled(profile: Profile, name: str, samples: int | None, draw: int | None) -> Spectrum:
    """Return the spectrum of a network's sub-sampled Hessian of the training loss; None: of the full one."""
    k = profile.adversarial[name].eigenvalues or profile.spectrum.k
    return Spectrum(split="train", k=k, tol=profile.spectrum.tol, samples=samples, draw=draw)


def _sampled_spectra(profile: Profile, name: str) -> tuple[Measure, ...]:
    """Return the spectra of single samples twice, of a batch, and of all samples."""
    draws = ((1, 0), (1, 1), (profile.landscape.batch, 0), (None, None))
    return tuple(_subsampled(profile, name, samples, draw) for samples, draw in draws)


def _batch_line(profile: Profile, name: str) -> tuple[Measure, ...]:
    """Return the losses along the dominant eigenvector of a batch, and the spectrum that it is taken from."""
    drawn = profile.landscape
    first = _subsampled(profile, name, drawn.batch, 0)
    return first, LossLine(along=first, reach=drawn.reach, points=drawn.line_points, batch=drawn.batch)


def _of_six(name: str, measures: Callable[[Profile, str], tuple[Measure, ...]]) -> Tasks:
    """Return measures of the original network and the robust ones."""

    def tasks(profile: Profile, seed: int) -> list[Task]:
        wanted = measures(profile, name)
        return [Task(network, wanted) for network in _six(profile, name, seed)]

    return tasks


def _controls(profile: Profile, seed: int) -> list[Task]:
    """Return the spectra and lines of the robust networks for those that were trained as long without an attack."""

    def measures(name: str) -> tuple[Measure, ...]:
        return tuple(dict.fromkeys([*_sampled_spectra(profile, name), *_batch_line(profile, name)]))

    return [Task(profile.adversarial[name].control(seed), measures(name)) for name in ("M1", "C3")]


def _six(profile: Profile, name: str, seed: int) -> list[RunSpec]:
    """Return the original network of section 3.3 and the robust ones, all five or those that the profile names."""
    settings = profile.adversarial[name]
    return [settings.original(seed), *(settings.robust(method, seed) for method in settings.curvature_of or ATTACKS)]


def _densities(profile: Profile, seed: int) -> list[Task]:
    """Return the spectral densities of the training loss for each batch size."""
    m1, settings = profile.large_batch["M1"], profile.density
    density = Density(split="train", probes=settings.probes, steps=settings.steps)
    return [Task(m1.spec(batch_size, seed), (density,)) for batch_size in m1.batch_sizes]


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
    return [Task(m1.spec(batch_size, seed), measures) for batch_size in _extremes(m1)]


def _stopping(profile: Profile, seed: int) -> list[Task]:
    """Return the first eigenvalues of one network, by Lanczos iteration and by the paper's power iteration."""
    m1, spectrum = profile.large_batch["M1"], profile.spectrum
    measures = (
        _full(profile),
        PowerIteration(split="train", k=min(_FEW, spectrum.k), tol=spectrum.tol),
    )
    return [Task(m1.spec(m1.batch_sizes[0], seed), measures)]


def _edge(profile: Profile, seed: int) -> list[Task]:
    """Return the largest eigenvalue along gradient descent at each learning rate."""
    edge = profile.edge
    return [Task(edge.spec(lr, seed), (Sharpness(points=edge.points, tol=edge.tol),)) for lr in edge.lr]


def _sharpening(profile: Profile, seed: int) -> list[Task]:
    """Return the largest eigenvalue along the trainings of the smallest and the largest batch."""
    m1, edge = profile.large_batch["M1"], profile.edge
    followed = Sharpness(points=edge.points, tol=edge.tol, samples=edge.samples)
    return [Task(m1.spec(batch_size, seed), (followed,)) for batch_size in _extremes(m1)]


def _strong(profile: Profile, seed: int) -> list[Task]:
    """Return the accuracies of original and robust networks under one step, many with restarts, and AutoAttack."""
    settings, strong = profile.adversarial["M1"], profile.strong
    restarts = {"FGSM": None, "PGD": strong.restarts, AUTOATTACK: None}
    measures = tuple(
        AttackAccuracy(
            split="test", attack=AttackSpec(method=method, eps=eps, clip=True, restarts=restarts[method]), n=strong.n
        )
        for eps in strong.eps
        for method in restarts
    )
    robust = [settings.robust(method, seed) for method in strong.trainings]
    return [Task(network, measures) for network in (settings.original(seed), *robust)]


def _compared(profile: Profile) -> tuple[Measure, ...]:
    """Return what seeds and sweeps compare: the leading eigenvalues, and the accuracy under FGSM of the middle size."""
    m1 = profile.large_batch["M1"]
    attack = AttackSpec(method="FGSM", eps=m1.middle_eps, clip=True)
    return _leading(profile), AttackAccuracy(split="test", attack=attack)


def _seeds(profile: Profile, seed: int) -> list[Task]:
    """Return the smallest and the largest batch, to be compared over several seeds."""
    m1 = profile.large_batch["M1"]
    return [Task(m1.spec(batch_size, seed), _compared(profile)) for batch_size in _extremes(m1)]


def _swept(profile: Profile, seed: int, batch_size: int, variant: str | None = None, rate: float = 1.0) -> Task:
    """Return M1 of section 3.1 in another variant or with a multiple of the learning rate."""
    spec = profile.large_batch["M1"].spec(batch_size, seed)
    model = spec.model.model_copy(update={"variant": variant})
    recipe = replace(spec.recipe, lr=round(rate * spec.recipe.lr, 6))
    return Task(RunSpec(data=spec.data, model=model, recipe=recipe), _compared(profile))


def _rates(profile: Profile, seed: int) -> list[Task]:
    return [_swept(profile, seed, profile.sweep.batch_sizes[0], rate=rate) for rate in profile.sweep.rates]


def _readings(variant: str) -> Tasks:
    """Return M1 as it is taken here and in a variant."""
    return lambda profile, seed: [
        _swept(profile, seed, batch_size, taken)
        for batch_size in profile.sweep.batch_sizes
        for taken in (None, variant)
    ]


ARTEFACTS = {
    artefact.name: artefact
    for artefact in (
        Artefact("table1", "C1, C2 on CIFAR-10: accuracy, curvature, robustness against batch size", _table1),
        Artefact("table2", "CR on CIFAR-100: accuracy, curvature, robustness against batch size", _large_batch("CR")),
        Artefact("table3", "M1 on MNIST: five adversarial trainings under five attacks", _adversarial("M1")),
        Artefact("table4", "C3 on CIFAR-10: five adversarial trainings under five attacks", _adversarial("C3")),
        Artefact("table5", "The five attacks: clipping, precision, radius (M1)", _on_original("M1", _apart)),
        Artefact("cg", "Second-order attacks from one conjugate gradient step to the inverse", _both(_cg)),
        Artefact("eps", "Accuracy under the five attacks against their size", _both(_curves)),
        Artefact("section34", "Gradient, second-order and preconditioned attacks of equal size", _both(_section34)),
        Artefact("table7", "M1 on MNIST: accuracy, curvature, robustness against batch size", _table7),
        Artefact("fig1", "Top 20 Hessian eigenvalues against batch size (C1, M1)", _fig1),
        Artefact("fig2", "Loss along the dominant eigenvector, by batch size (C1)", _lines("C1")),
        Artefact("fig3", "Loss on the plane of two eigenvectors (C1)", _planes("C1")),
        Artefact("fig4", "Loss between original and robust networks (C3)", _interpolated("C3")),
        Artefact("fig5", "Spectra of sub-sampled Hessians, original and robust (C3)", _of_six("C3", _sampled_spectra)),
        Artefact("fig6", "Loss along the dominant eigenvector, by batch size (M1)", _lines("M1")),
        Artefact("fig7", "Loss on the plane of two eigenvectors (M1)", _planes("M1")),
        Artefact("fig8", "Loss along the dominant eigenvector, by batch size (C2)", _lines("C2")),
        Artefact("fig9", "Loss on the plane of two eigenvectors (C2)", _planes("C2")),
        Artefact("fig10", "Loss between original and robust networks (M1)", _interpolated("M1")),
        Artefact("fig11", "Spectra of sub-sampled Hessians, original and robust (M1)", _of_six("M1", _sampled_spectra)),
        Artefact("fig12", "Loss along an eigenvector, original and robust (M1)", _of_six("M1", _batch_line)),
        Artefact("fig13", "Loss along an eigenvector, original and robust (C3)", _of_six("C3", _batch_line)),
        Artefact("control", "Spectra and losses of the originals trained on without an attack (M1, C3)", _controls),
        Artefact("density", "Spectral density of the Hessian against batch size (M1)", _densities),
        Artefact("layers", "Hessian eigenvalues layer by layer, smallest and largest batch (M1)", _layers),
        Artefact("edge", "Largest eigenvalue along gradient descent, by learning rate (M1)", _edge),
        Artefact("sharpening", "Largest eigenvalue along training, smallest and largest batch (M1)", _sharpening),
        Artefact("strong", "Original and robust networks under FGSM, PGD and AutoAttack (M1)", _strong),
        Artefact("seeds", "Smallest and largest batch, by seed (M1)", _seeds),
        Artefact("silent_lr", "Curvature and robustness against the learning rate (M1)", _rates),
        Artefact("silent_variant", "M1 with pooling, and with strides as in Table 6", _readings("strided")),
        Artefact("silent_input", "M1 on pixels as they are, and normalised", _readings("normalised")),
        Artefact("stopping", "The paper's power iteration beside certified eigenvalues (M1)", _stopping),
    )
}


def artefact(name: str) -> Artefact:
    """Return an artefact by name; raise InputError for one that is not there."""
    if name not in ARTEFACTS:
        raise unknown("artefact", name, list(ARTEFACTS))
    return ARTEFACTS[name]


def chosen(names: Sequence[str]) -> list[Artefact]:
    """Return artefacts by name, and all of them for no name and for "all"; raise InputError for an unknown one."""
    found = [artefact(name) for name in names if name != "all"]
    return list(ARTEFACTS.values()) if not names or "all" in names else found
