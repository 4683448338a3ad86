"""The numbers that claims are tested on, as tables of one row a trained network: the paper's, and those of the record.

Both have the same columns, those of the paper's tables and some that it only draws:

    network  batch_size  training  seed  profile  n_test
    accuracy_S  lambda1_x_S  gradient_x_S       S is train or test; accuracies in per cent
    adversarial_E_S  exact_E_S  FGSM-10_E_S     under FGSM of size E with the gradient of float32 (as the paper's), with
                                                the exact one, and under another attack; clipped
    clean  FGSM ... L2HESS  mean                Tables 3 and 4: on sets made from the original network
    lambda1_D ... lambda20_D  lowest_D error_D  a spectrum by magnitude, its lowest eigenvalue and how exact that is; D
                                                is train, test, or a draw of the training set: B1_0, B1_1, B320_0
    curvature_L                                 second derivative of the loss L (train, test or batch) along a line
    start_S  end_S                              second difference at both ends of a line from the original to a robust
                                                network

A cell that is not there is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from hessnb.attacks import ATTACKS
from hessnb.experiments.results import Measurement
from hessnb.experiments.spec import (
    SPLITS,
    AttackAccuracy,
    InputCurvature,
    Interpolation,
    LossLine,
    Measure,
    RunSpec,
    Spectrum,
)
from hessnb.paper.adversarial import network_name
from hessnb.paper.landscapes import second_derivative, second_difference
from hessnb.paper.published import ADVERSARIAL, LARGE_BATCH, published
from hessnb.paper.recorded import Recorded

# Samples of the published test sets, where a specification does not take fewer.
_N_TEST = 10_000

_NETWORK = {"table3": "M1", "table4": "C3"}

Row = dict[str, Any]


def printed(name: str) -> pd.DataFrame:
    """Return the paper's numbers of an artefact; empty for one of which it prints none."""
    if name in LARGE_BATCH:
        frame = published(name).reset_index()
        frame["lambda1_gap"] = frame["lambda1_test"] / frame["lambda1_train"]
    elif name in ADVERSARIAL:
        frame = published(name).reset_index(names="training").assign(network=_NETWORK[name])
    else:
        return pd.DataFrame()
    return frame.assign(seed=0, profile="the paper", n_test=_N_TEST)


def measured(outcomes: Sequence[Recorded]) -> pd.DataFrame:
    """Return the numbers of recorded outcomes; a run that is planned and not there is a row of NaN."""
    return pd.DataFrame([_row(outcome) for outcome in outcomes])


def _row(outcome: Recorded) -> Row:
    spec = outcome.task.spec
    row: Row = {
        "network": spec.model.name,
        "batch_size": spec.recipe.batch_size,
        "training": network_name(spec),
        "seed": spec.recipe.seed,
        "profile": outcome.scale,
        "n_test": spec.data.n_test or _N_TEST,
    }
    ended = outcome.result.history[-1] if outcome.result and outcome.result.status == "done" else None
    row |= {f"accuracy_{s}": 100 * getattr(ended, f"{s}_accuracy") if ended else math.nan for s in SPLITS}
    row["clean"] = row["accuracy_test"]
    # The longer of two spectra over the same data comes last and stays, if it has been measured.
    for measure in sorted(outcome.task.measures, key=lambda m: (m in outcome.measurements, getattr(m, "k", 0))):
        row |= _columns(spec, measure, outcome.measurements.get(measure))
    row["mean"] = np.mean([row.get(method, math.nan) for method in ATTACKS])
    row["lambda1_gap"] = row.get("lambda1_test", math.nan) / row.get("lambda1_train", math.nan)
    return row


def _columns(spec: RunSpec, measure: Measure, found: Measurement | None) -> Row:
    values = found.values if found else {}
    if isinstance(measure, AttackAccuracy):
        name = _attack_column(spec, measure)
        return {name: 100 * values.get("accuracy", math.nan)} if name else {}
    if isinstance(measure, InputCurvature):
        of = measure.split
        return {
            f"lambda1_x_{of}": values.get("lambda1", math.nan),
            f"gradient_x_{of}": values.get("gradient_norm", math.nan),
        }
    if isinstance(measure, Spectrum):
        return _spectrum(measure, values) if measure.parameters is None else {}
    if isinstance(measure, LossLine | Interpolation):
        return _lines(measure, values)
    return {}


def _attack_column(spec: RunSpec, measure: AttackAccuracy) -> str | None:
    attack = measure.attack
    if spec.recipe.loss_target is None:  # a network of Tables 3 and 4: on sets made from the original network
        return attack.method if measure.source == spec.parent else None
    plain = {("FGSM", "plain"): "adversarial", ("FGSM", None): "exact"}
    return f"{plain.get((attack.method, attack.precision), attack.method)}_{attack.eps:g}_{measure.split}"


def _spectrum(measure: Spectrum, values: dict[str, Any]) -> Row:
    data = f"B{measure.samples}_{measure.draw}" if measure.samples else measure.split
    if not values:
        missing = {f"lambda{i}_{data}": math.nan for i in range(1, measure.k + 1)}
        return missing | {f"lowest_{data}": math.nan, f"error_{data}": math.nan}
    pairs = sorted(zip(values["eigenvalues"], values["residuals"], strict=True), key=lambda pair: -abs(pair[0]))
    lowest, residual = min(pairs)
    row = {f"lambda{i}_{data}": abs(value) for i, (value, _) in enumerate(pairs, start=1)}
    return row | {f"lowest_{data}": lowest, f"error_{data}": abs(lowest) * residual}


def _lines(measure: LossLine | Interpolation, values: dict[str, Any]) -> Row:
    """Return curvatures along a line: in its middle, or at both ends of the way to a robust network."""
    middle = isinstance(measure, LossLine)
    sets = (*SPLITS, "batch") if middle else SPLITS
    if not values:
        return {f"{name}_{of}": math.nan for name in (("curvature",) if middle else ("start", "end")) for of in sets}
    places, drawn = values["positions"], values["losses"].items()
    if middle:
        return {f"curvature_{of}": second_derivative(places, losses, 0.0) for of, losses in drawn}
    ends = {"start": 0.0, "end": 1.0}
    return {f"{name}_{of}": second_difference(places, losses, at) for name, at in ends.items() for of, losses in drawn}
