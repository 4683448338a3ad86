"""Eigenvalues of the training Hessian beside each other, as tables: two ways to solve for them, and layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

from hessnb import models
from hessnb.experiments.results import Outcome
from hessnb.experiments.spec import PowerIteration, Spectrum
from hessnb.paper.tables import SUBSCRIPTS, Table


def stopping(outcome: Outcome, *, name: str, caption: str) -> Table:
    """Return the eigenvalues of a network by power and by Lanczos iteration, with residuals and products."""
    power = next(m for measure, m in outcome.measurements.items() if isinstance(measure, PowerIteration)).values
    spectra = {
        measure.k: m.values
        for measure, m in outcome.measurements.items()
        if isinstance(measure, Spectrum)
        and (measure.split, measure.parameters, measure.samples) == ("train", None, None)
    }
    certified = spectra[max(spectra)]
    rows = []
    for i, value in enumerate(power["eigenvalues"]):
        exact = certified["eigenvalues"][i]
        rows.append(
            (
                f"λ{i + 1}".translate(SUBSCRIPTS),
                f"{value:.5g}",
                f"{power['residuals'][i]:.0e}",
                f"{exact:.5g}",
                f"{certified['residuals'][i]:.0e}",
                f"{abs(value - exact) / abs(exact):.0e}",
            )
        )
    pairs = f"{len(power['eigenvalues'])} pairs", f"{len(certified['eigenvalues'])} pairs"
    rows.append(("Products", str(power["n_matvecs"]), pairs[0], str(certified["n_matvecs"]), pairs[1], ""))
    header = ("", "Power iteration", "Residual", "Lanczos", "Residual", "Error of the first")
    return Table(name, caption, header, tuple(rows))


def layer_shares(blocks: Sequence[Outcome], whole: Sequence[Outcome], *, name: str, caption: str) -> Table:
    """Return the dominant eigenvalue of each layer's block in parts of the whole Hessian's, one row a network."""
    largest = {o.task.spec: o.eigenvalues("train")[0] for o in whole if o.eigenvalues("train")}
    names: dict[str, str] = {}
    rows = []
    for block in blocks:
        spec = block.task.spec
        names = models.layers(spec.model.name, variant=spec.model.variant)
        shares = [f"{block.eigenvalues('train', layer)[0] / largest[spec]:.0%}" for layer in names]
        rows.append((str(spec.recipe.batch_size), f"{largest[spec]:.3g}", *shares))
    return Table(name, caption, ("Batch", "λ₁, whole", *names.values()), tuple(rows))
