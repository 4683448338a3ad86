"""Exact second derivatives: products with the Hessian over whole data sets, its eigenvalues, and input Hessians.

Everything here leaves the model as it was (parameters, buffers, ``.grad``, each module's mode, the global random
state), is taken in eval mode, and works on flat vectors in the order of ``torch.nn.utils.parameters_to_vector``.
"""

from hessnb.curvature.density import DensityState, Estimate, SpectralDensity, spectral_density, trace
from hessnb.curvature.eigen import EigenResult, Progress, lanczos, power_iteration
from hessnb.curvature.inputs import (
    InputCurvature,
    input_curvature,
    input_gradient_norms,
    input_hessian,
    input_hessian_eigenvalues,
    input_hessian_solve,
    is_piecewise_linear,
)
from hessnb.curvature.krylov import KrylovState
from hessnb.curvature.operator import CurvatureOperator, GGNOperator, HessianOperator

__all__ = [
    "CurvatureOperator",
    "DensityState",
    "EigenResult",
    "Estimate",
    "GGNOperator",
    "HessianOperator",
    "InputCurvature",
    "KrylovState",
    "Progress",
    "SpectralDensity",
    "input_curvature",
    "input_gradient_norms",
    "input_hessian",
    "input_hessian_eigenvalues",
    "input_hessian_solve",
    "is_piecewise_linear",
    "lanczos",
    "power_iteration",
    "spectral_density",
    "trace",
]
