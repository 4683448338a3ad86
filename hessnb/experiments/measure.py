"""Measure trained networks: what each kind of `Measure` computes, as plain numbers and lists."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessnb import data, training
from hessnb.curvature import (
    EigenResult,
    HessianOperator,
    KrylovState,
    Progress,
    input_curvature,
    lanczos,
    power_iteration,
)
from hessnb.experiments.networks import attack_function, load_split, trained_model
from hessnb.experiments.spec import (
    AttackAccuracy,
    AttackSpec,
    InputCurvature,
    Measure,
    PowerIteration,
    RunSpec,
    Spectrum,
    SplitName,
)
from hessnb.experiments.store import Store

# Samples per minibatch of a Hessian-vector product: on a CPU the fastest of 100 to 2,500 for M1; a GPU wants more.
HESSIAN_BATCH = {"cpu": 250, "cuda": 2000}

# Samples that are attacked between two reports.
ATTACK_BATCH = 1000

# Called with what is being done ("M1-mnist-b64-s0: training"), the share that is done, and a detail ("loss 0.012").
Report = Callable[[str, float, str], None]


def silent(what: str, share: float, detail: str) -> None:
    """Report nothing."""


def measured(
    store: Store, spec: RunSpec, measure: Measure, device: torch.device, report: Report, label: str
) -> dict[str, object]:
    """Return what a measure gives on a trained network, as plain numbers and lists."""
    if isinstance(measure, InputCurvature):
        return _input_curvature(trained_model(store, spec, device), load_split(spec, measure.split, device))
    if isinstance(measure, AttackAccuracy):
        return _attack_accuracy(store, spec, measure, device, report, label)
    return _eigenpairs(store, spec, measure, device, report, label)


def _eigenpairs(
    store: Store, spec: RunSpec, measure: Spectrum | PowerIteration, device: torch.device, report: Report, label: str
) -> dict[str, object]:
    model, split = trained_model(store, spec, device), load_split(spec, measure.split, device)
    block = [measure.parameters] if isinstance(measure, Spectrum) and measure.parameters else None
    operator = HessianOperator(model, F.cross_entropy, split.batches(HESSIAN_BATCH[device.type]), parameters=block)
    if isinstance(measure, Spectrum):
        found = _lanczos(operator, store, spec, measure, report, label)
    else:
        found = power_iteration(operator, measure.k, measure.tol)
    return {
        "eigenvalues": found.eigenvalues.tolist(),
        "residuals": found.residuals.tolist(),
        "n_matvecs": found.n_matvecs,
        "converged": found.converged,
        "n_samples": operator.n_samples,
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
    clean = load_split(spec, measure.split, device)
    attacked = adversarial_examples(store, measure.source or spec, measure.attack, measure.split, device, report, label)
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
) -> Tensor:
    """Return the images (N, C, H, W) of a split, attacked on the trained network of ``spec``."""
    n_batches = -(-len(load_split(spec, split, device)) // ATTACK_BATCH)
    parts = []
    for i in range(n_batches):
        parts.append(_attacked(store, spec, attack, split, device, i))
        report(label, (i + 1) / (n_batches + 1), "")
    return torch.cat(parts)


# Six networks in turn are shown the same five sets of 10 batches: they are kept.
@lru_cache(maxsize=50)
def _attacked(
    store: Store, spec: RunSpec, attack: AttackSpec, split: SplitName, device: torch.device, batch: int
) -> Tensor:
    images, labels = load_split(spec, split, device).batches(ATTACK_BATCH)[batch]
    return attack_function(attack)(trained_model(store, spec, device), images, labels)


def _lanczos(
    operator: HessianOperator, store: Store, spec: RunSpec, measure: Spectrum, report: Report, label: str
) -> EigenResult:
    """Solve for a spectrum, going on from what the store kept of an interrupted solve."""

    def progress(told: Progress) -> None:
        share = 0.0 if told.remaining is None else told.n_matvecs / (told.n_matvecs + told.remaining)
        report(label, share, str(told))

    def save(state: KrylovState) -> None:
        store.save_partial(spec, measure, {field.name: getattr(state, field.name) for field in fields(KrylovState)})

    kept = store.partial(spec, measure)
    state = KrylovState(**kept) if kept else None
    return lanczos(operator, measure.k, measure.tol, progress=progress, state=state, save=save)
