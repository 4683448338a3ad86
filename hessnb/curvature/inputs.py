"""The Hessian of the loss with respect to the input of each sample (the paper's section 2 and Theorem 2.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessnb.curvature.operator import full_precision
from hessnb.errors import InputError
from hessnb.models import eval_mode


def input_hessian(model: nn.Module, x: Tensor, y: Tensor, *, train_mode: bool = False) -> Tensor:
    """Return the dense Hessian of each sample's cross-entropy with respect to its own input, (N, d, d).

    ``x`` has shape (N, ...) with d entries a sample, ``y`` (N,) holds labels. Exact, by differentiating twice: d
    backward passes over the batch, in the dtype of ``x`` and the model. With ``train_mode`` batch normalisation uses
    the statistics of the batch, as in the counter-example of chapter 02; the samples then depend on each other, and
    what is returned are the diagonal blocks of the Hessian of the summed loss. The model's running statistics are
    left as they were.

    Raises InputError when the numbers of inputs and labels differ or are zero.
    """
    if len(x) != len(y) or len(x) == 0:
        raise InputError(f"{len(x)} inputs and {len(y)} labels: give as many labels as inputs, at least one")
    x = x.detach().clone().requires_grad_(True)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    with eval_mode(model), full_precision(), torch.enable_grad():
        if train_mode:
            model.train()
        logits = torch.func.functional_call(model, buffers, (x,))
        loss = F.cross_entropy(logits, y, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        columns = gradient.reshape(len(x), -1)
        d = columns.shape[1]
        hessian = torch.empty(len(x), d, d, dtype=x.dtype, device=x.device)
        if not gradient.requires_grad:  # the gradient does not depend on the input at all
            return hessian.zero_()
        for row in range(d):  # the same pixel of each sample: row by row of all N Hessians at once
            (products,) = torch.autograd.grad(columns[:, row].sum(), x, retain_graph=True, materialize_grads=True)
            hessian[:, row] = products.reshape(len(x), d)
    return hessian
