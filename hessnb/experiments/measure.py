"""Measure trained networks: what each kind of `Measure` computes, as plain numbers and lists."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import astuple, fields, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessnb import data, training
from hessnb.curvature import (
    DensityState,
    EigenResult,
    HessianOperator,
    KrylovState,
    Progress,
    input_curvature,
    lanczos,
    power_iteration,
    spectral_density,
)
from hessnb.errors import InputError
from hessnb.experiments.networks import attack_function, drawn, load_data, load_split, new_model, trained_model
from hessnb.experiments.spec import (
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
    SplitName,
)
from hessnb.experiments.store import Store, state_from_tensors, state_to_tensors
from hessnb.landscape import along, between, on_plane
from hessnb.sharpness import Followed, SharpnessAt, sharpness_along
from hessnb.training import Epoch

# Samples per minibatch of a Hessian-vector product: on a CPU the fastest of 100 to 2,500 for M1; a GPU wants more, the
# first whose graph takes at most a quarter of its memory.
_HESSIAN_BATCH = 250
_CUDA_HESSIAN_BATCHES = (2000, 1000, 500, 250, 125, 60, 30)

# Samples that are attacked between two reports.
ATTACK_BATCH = 1000

# Eigenvectors of a spectrum that are kept: landscapes go along one or two.
_KEPT_VECTORS = 2

# Called with what is being done ("M1-mnist-b64-s0: training"), the share that is done, and a detail ("loss 0.012").
Report = Callable[[str, float, str], None]


def silent(what: str, share: float, detail: str) -> None:
    """Report nothing."""


def measured(
    store: Store, spec: RunSpec, measure: Measure, device: torch.device, report: Report, label: str
) -> dict[str, object]:
    """Return what a measure gives on a trained network, as plain numbers and lists."""
    match measure:
        case InputCurvature():
            return _input_curvature(trained_model(store, spec, device), load_split(spec, measure.split, device))
        case AttackAccuracy():
            return _attack_accuracy(store, spec, measure, device, report, label)
        case LossLine() | LossPlane() | Interpolation():
            return _landscape(store, spec, measure, device, report, label)
        case Density():
            return _density(store, spec, measure, device, report, label)
        case Sharpness():
            return _sharpness(store, spec, measure, device, report, label)
        case Spectrum():
            return _values(*_spectrum(store, spec, measure, device, report, label))
        case PowerIteration():
            operator = _operator(store, spec, measure, device)
            return _values(power_iteration(operator, measure.k, measure.tol), operator)


def _operator(
    store: Store, spec: RunSpec, measure: Spectrum | PowerIteration | Density, device: torch.device
) -> HessianOperator:
    split = load_split(spec, measure.split, device)
    block = samples = None
    if isinstance(measure, Spectrum):
        block = [measure.parameters] if measure.parameters else None
        samples = None if measure.draw is None else drawn(len(split), measure.samples or 1, measure.draw)
    model = trained_model(store, spec, device)
    if samples is not None and len(samples) == 1:
        # One sample costs little, and of one that is classified with confidence float32 rounds most eigenvalues away.
        model, split = model.double(), data.Split(split.images.double(), split.labels)
    batches = split.batches(hessian_batch(model, split))
    return HessianOperator(model, F.cross_entropy, batches, parameters=block, samples=samples)


def hessian_batch(model: nn.Module, split: data.Split) -> int:
    """Return the samples per minibatch of a Hessian-vector product with a network, on the device where the split is.

    The same on each machine of a kind, whatever else takes memory there: results depend on it in their last digits.
    """
    device = split.labels.device
    if device.type == "cpu":
        return _HESSIAN_BATCH
    few = split.head(10)
    graph = HessianOperator(model, F.cross_entropy, few.batches(len(few)), graph_memory=0).graph_bytes
    return _fitting(graph / len(few), torch.cuda.get_device_properties(device).total_memory // 4)


def _fitting(bytes_per_sample: float, memory: int) -> int:
    """Return the largest minibatch of a GPU whose graph fits into some bytes, or the smallest of all."""
    fitting = (size for size in _CUDA_HESSIAN_BATCHES if size * bytes_per_sample <= memory)
    return next(fitting, _CUDA_HESSIAN_BATCHES[-1])


def _spectrum(
    store: Store, spec: RunSpec, measure: Spectrum, device: torch.device, report: Report, label: str
) -> tuple[EigenResult, HessianOperator]:
    """Solve for a spectrum, and keep the eigenvectors that landscapes go along."""
    operator = _operator(store, spec, measure, device)
    found = _lanczos(operator, store, spec, measure, report, label)
    if measure.parameters is None:
        store.save_vectors(spec, measure, _leading(found))
    return found, operator


def eigenvectors(
    store: Store, spec: RunSpec, measure: Spectrum, device: torch.device, report: Report = silent, label: str = ""
) -> Tensor:
    """Return the leading eigenvectors (j, n) of a spectrum on a device, solving for them if the store lacks them.

    As the store keeps them, rounded to float32: the points of an interrupted landscape are of these directions.
    """
    kept = store.vectors(spec, measure)
    if kept is None:
        kept = _leading(_spectrum(store, spec, measure, device, report, label)[0])
    return kept.to(device)


def _leading(found: EigenResult) -> Tensor:
    return found.eigenvectors[:_KEPT_VECTORS].float()


def _values(found: EigenResult, operator: HessianOperator) -> dict[str, object]:
    return {
        "eigenvalues": found.eigenvalues.tolist(),
        "residuals": found.residuals.tolist(),
        "n_matvecs": found.n_matvecs,
        "converged": found.converged,
        "n_samples": operator.n_samples,
    }


def _density(
    store: Store, spec: RunSpec, measure: Density, device: torch.device, report: Report, label: str
) -> dict[str, object]:
    """Estimate a density, going on from what the store kept of an interrupted estimate."""
    operator = _operator(store, spec, measure, device)

    def progress(done: int, total: int) -> None:
        report(label, done / total, f"product {done} of {total}")

    def save(state: DensityState) -> None:
        rules = {"nodes": state.nodes, "weights": state.weights, "counters": state.counters}
        store.save_partial(
            spec, measure, rules | {f"krylov.{name}": t for name, t in _krylov_tensors(state.krylov).items()}
        )

    state = None
    if kept := store.partial(spec, measure):
        krylov = {name.removeprefix("krylov."): kept.pop(name) for name in list(kept) if name.startswith("krylov.")}
        state = DensityState(**kept, krylov=KrylovState(**krylov))
    found = spectral_density(
        operator, n_probes=measure.probes, n_steps=measure.steps, progress=progress, state=state, save=save
    )
    return {
        "nodes": found.nodes.tolist(),
        "weights": found.weights.tolist(),
        "n": found.n,
        "n_matvecs": found.n_matvecs,
        "n_samples": operator.n_samples,
    }


def _sharpness(
    store: Store, spec: RunSpec, measure: Sharpness, device: torch.device, report: Report, label: str
) -> dict[str, object]:
    """Train a run again for as many epochs as it took, and solve for the largest eigenvalue on the way.

    What the store kept of an interrupted one goes on.
    """
    result, splits = store.result(spec), load_data(spec.data, str(device))
    if result is None:
        raise InputError(f"{spec.label} is not trained yet: train it, then follow its sharpness")
    parent = spec.parent and trained_model(store, spec.parent, device)
    epochs = torch.linspace(0, len(result.history), measure.points).round().int().tolist()

    def progress(epoch: int) -> None:
        report(label, epoch / (len(result.history) + 1), f"epoch {epoch}")

    def save(followed: Followed) -> None:
        store.save_partial(spec, measure, _followed_to_tensors(followed))

    kept = store.partial(spec, measure)
    model = parent or new_model(spec, len(splits.classes)).to(device)
    points = sharpness_along(
        model,
        splits,
        replace(spec.recipe, max_epochs=len(result.history), loss_target=None),
        set(epochs),
        tol=measure.tol,
        samples=None if measure.samples is None else drawn(len(splits.train), measure.samples, 0),
        batch_size=hessian_batch(model, splits.train),
        perturbation=attack_function(spec.attack) if spec.attack else None,
        progress=progress,
        followed=_followed_from_tensors(kept) if kept else None,
        save=save,
    )
    return {field.name: [getattr(point, field.name) for point in points] for field in fields(points[0])}


def _followed_to_tensors(followed: Followed) -> dict[str, Tensor]:
    history, points = (
        torch.tensor([astuple(line) for line in table], dtype=torch.float64)
        for table in (followed.state.history, followed.points)
    )
    return state_to_tensors(followed.state) | {"history": history, "points": points}


def _followed_from_tensors(tensors: dict[str, Tensor]) -> Followed:
    history = [Epoch(int(epoch), *numbers) for epoch, *numbers in tensors["history"].tolist()]
    points = [SharpnessAt(int(epoch), *numbers) for epoch, *numbers in tensors["points"].tolist()]
    return Followed(state_from_tensors(tensors, history), points)


def _landscape(
    store: Store,
    spec: RunSpec,
    measure: LossLine | LossPlane | Interpolation,
    device: torch.device,
    report: Report,
    label: str,
) -> dict[str, object]:
    splits: dict[str, data.Split] = {name: load_split(spec, name, device) for name in SPLITS}
    sets = {name: split.batches(training.EVALUATION_BATCH) for name, split in splits.items()}
    if isinstance(measure, LossLine):
        few = drawn(len(splits["train"]), measure.batch, 0).to(device)
        sets["batch"] = data.Split(splits["train"].images[few], splits["train"].labels[few]).batches(len(few))

    def progress(done: int, total: int) -> None:
        report(label, done / total, "")

    model, keep = trained_model(store, spec, device), store.points_file(spec, measure)
    if isinstance(measure, Interpolation):
        if spec.parent is None:
            raise InputError(f"{spec.label} has no parent run: there is nothing to interpolate from")
        places = torch.linspace(-0.5, 1.5, measure.points, dtype=torch.float64)
        parent = trained_model(store, spec.parent, device)
        found = between(parent, model, F.cross_entropy, sets, places, keep=keep, progress=progress)
    else:
        v = eigenvectors(store, spec, measure.along, device, report, label)
        places = torch.linspace(-measure.reach, measure.reach, measure.points, dtype=torch.float64)
        if isinstance(measure, LossLine):
            found = along(model, F.cross_entropy, sets, v[0], places, keep=keep, progress=progress)
        else:
            found = on_plane(model, F.cross_entropy, sets, (v[0], v[1]), places, places, keep=keep, progress=progress)
    return {
        "positions": places.tolist(),
        "losses": {name: losses.tolist() for name, losses in found.losses.items()},
        "accuracies": {name: accuracies.tolist() for name, accuracies in found.accuracies.items()},
    }


def _input_curvature(model: nn.Module, split: data.Split) -> dict[str, object]:
    found = input_curvature(model, split.images, split.labels)
    return {
        "lambda1": found.mean_lambda1,
        "gradient_norm": found.mean_gradient_norm,
        "lambda1_deviation": float(found.lambda1.std(correction=0)),
        "gradient_norm_deviation": float(found.gradient_norms.std(correction=0)),
        "n_samples": len(split),
    }


def _attack_accuracy(
    store: Store, spec: RunSpec, measure: AttackAccuracy, device: torch.device, report: Report, label: str
) -> dict[str, object]:
    clean = load_split(spec, measure.split, device).head(measure.n)
    attacked = adversarial_examples(
        store, measure.source or spec, measure.attack, measure.split, device, report, label, measure.n
    )
    loss, accuracy = training.evaluate(trained_model(store, spec, device), data.Split(attacked, clean.labels))
    moved = (attacked - clean.images).flatten(1)
    return {
        "accuracy": accuracy,
        "loss": loss,
        "l2_norm": float(torch.linalg.vector_norm(moved, dim=1).double().mean()),
        "linf_norm": float(torch.linalg.vector_norm(moved, ord=math.inf, dim=1).double().mean()),
        "unmoved": int((moved == 0).all(1).sum()),
        "n_samples": len(clean),
    }


def adversarial_examples(
    store: Store,
    spec: RunSpec,
    attack: AttackSpec,
    split: SplitName,
    device: torch.device,
    report: Report = silent,
    label: str = "",
    n: int | None = None,
) -> Tensor:
    """Return the images (N, C, H, W) of a split, or its first ``n``, attacked on the trained network of ``spec``."""
    n_batches = -(-len(load_split(spec, split, device).head(n)) // ATTACK_BATCH)
    parts = []
    for i in range(n_batches):
        parts.append(_attacked(store, spec, attack, split, device, i, n))
        report(label, (i + 1) / (n_batches + 1), "")
    return torch.cat(parts)


# Six networks in turn are shown the same five sets of 10 batches: they are kept.
@lru_cache(maxsize=50)
def _attacked(
    store: Store, spec: RunSpec, attack: AttackSpec, split: SplitName, device: torch.device, batch: int, n: int | None
) -> Tensor:
    images, labels = load_split(spec, split, device).head(n).batches(ATTACK_BATCH)[batch]
    return attack_function(attack)(trained_model(store, spec, device), images, labels)


def _krylov_tensors(state: KrylovState) -> dict[str, Tensor]:
    return {field.name: getattr(state, field.name) for field in fields(KrylovState)}


def _lanczos(
    operator: HessianOperator, store: Store, spec: RunSpec, measure: Spectrum, report: Report, label: str
) -> EigenResult:
    """Solve for a spectrum, going on from what the store kept of an interrupted solve."""

    def progress(told: Progress) -> None:
        share = 0.0 if told.remaining is None else told.n_matvecs / (told.n_matvecs + told.remaining)
        report(label, share, str(told))

    def save(state: KrylovState) -> None:
        store.save_partial(spec, measure, _krylov_tensors(state))

    kept = store.partial(spec, measure)
    state = KrylovState(**kept) if kept else None
    return lanczos(operator, measure.k, measure.tol, progress=progress, state=state, save=save)
