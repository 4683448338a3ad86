"""Exact second derivatives: Hessian-vector products over whole data sets, their eigenvalues, and input Hessians.

Everything here leaves the model as it was (parameters, buffers, ``.grad``, each module's mode, the global random
state), is taken in eval mode, and works on flat vectors in the order of ``torch.nn.utils.parameters_to_vector``.
"""

from hessnb.curvature.eigen import EigenResult, lanczos
from hessnb.curvature.inputs import input_hessian
from hessnb.curvature.operator import HessianOperator

__all__ = ["EigenResult", "HessianOperator", "input_hessian", "lanczos"]
