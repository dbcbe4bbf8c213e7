"""Which operation takes the place of which while a step is differentiated, and the mode that sees to it.

States are always computed by the operations that training uses. The adjoint only linearises around them,
so there an operation whose second derivative PyTorch lacks, or computes slowly, may be replaced. There are
two kinds of replacement:

- `SAME_BITS`: value and first derivative are PyTorch's own kernels, so that a step traced with them
  gives training's bits; only the derivative of the derivative is ours, in closed form.
- `REWRITTEN` (rewritten.py): another expression of the same function, equal up to rounding.

Attention is of the first kind on a CPU and of the second elsewhere, as each call shows (attention.py).

Each closed form is derived in the docstring of its module and checked by `gradgradcheck` (tests).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_iter

from . import checkpointing
from .attention import PLAIN, attention, everywhere
from .batch_norm import batch_norm
from .convolution import convolution
from .gelu import gelu
from .higher_order import batched
from .layer_norm import group_norm, layer_norm
from .pooling import avg_pool2d
from .rewritten import REFUSED, REWRITTEN


def _torch_batch_norm(x, weight, bias, mean, var, training, momentum, eps, cudnn_enabled):
    return batch_norm(x, mean, var, weight, bias, training, momentum, eps)


SAME_BITS: dict[Callable, Callable] = {
    F.gelu: gelu,
    **{f: convolution(i, f) for i, f in enumerate((F.conv1d, F.conv2d, F.conv3d), start=1)},
    F.layer_norm: layer_norm,
    F.group_norm: group_norm,
    F.batch_norm: batch_norm,
    torch.batch_norm: _torch_batch_norm,
    F.avg_pool2d: avg_pool2d,
}
# Inside the transforms of torch.func, the operations above are left to PyTorch (see `batched`), except for
# these: PyTorch's third derivative of LayerNorm is wrong, and BatchNorm has none.
BATCH_NORMS = {F.batch_norm, torch.batch_norm}
NORMALISATIONS = {F.layer_norm, F.group_norm, *BATCH_NORMS}
# PyTorch computes the gradient of these by another formula where it is to be differentiated again, so that a
# trace of a step has other bits than the step.
OTHER_BITS = {
    F.silu, torch._C._nn.silu, torch._C._nn.silu_, F.mish, torch._C._nn.mish, torch._C._nn.mish_,
    torch.cumprod, torch.Tensor.cumprod, torch.Tensor.cumprod_,
    torch.ormqr, torch.Tensor.ormqr, torch.linalg.householder_product, torch.orgqr, torch.Tensor.orgqr,
    torch.linalg.solve, torch.linalg.solve_ex, torch.linalg.tensorsolve,
    torch.group_norm, torch.native_group_norm,
}  # fmt: skip
# And of these on a GPU, where they are one kernel.
OTHER_BITS_ON_A_GPU = {F.rms_norm, torch.rms_norm, torch.lstm_cell, torch.gru_cell}


def _in_eval(func, args, kwargs) -> bool:
    """Whether this call of a batch normalisation uses the running statistics, and so is written out."""
    return not (args[5] if len(args) > 5 else kwargs.get("training", False))


def _on_cpu(args, kwargs) -> bool:
    """Whether the tensors that an operation is given are on the CPU."""
    return all(x.device.type == "cpu" for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor))


class _Replace(checkpointing.Keeping):
    """Calls an equivalent of an operation in its place.

    rewritten  whether an operation was called whose bits, or whose gradient's bits, may not be training's
    """

    rewritten = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in SAME_BITS and (not batched() or func in NORMALISATIONS):
            self.rewritten |= batched() or (func in BATCH_NORMS and _in_eval(func, args, kwargs))
            return SAME_BITS[func](*args, **kwargs)
        if func is torch.autograd.grad:  # its sums are formed in another order where it is differentiated
            self.rewritten = True
        if func in REWRITTEN:
            self.rewritten = True
            return REWRITTEN[func](*args, **kwargs)
        self.rewritten |= func in OTHER_BITS or (func in OTHER_BITS_ON_A_GPU and not _on_cpu(args, kwargs))
        if func in REFUSED:
            return REFUSED[func](*args, **kwargs)
        if func is PLAIN:
            return self._attention(*args, **kwargs)
        if func is F.multi_head_attention_forward:  # it calls attention where this mode does not listen
            with everywhere(self._attention):
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _attention(self, *args, **kwargs):
        """Attention as training computes it, or, where that has no second derivative, its plain form."""
        out = None if batched() else attention(*args, **kwargs)
        if out is not None:
            return out
        self.rewritten = True
        with sdpa_kernel(SDPBackend.MATH):
            return PLAIN(*args, **kwargs)


def differentiable() -> _Replace:
    """Inside `with differentiable() as replace:`, operations can be differentiated twice.

    On a GPU attention takes its plain form instead of a fused kernel, and recurrent layers are computed
    without cuDNN. Afterwards `replace.rewritten` says whether an operation with other bits was among them.
    """
    return _Replace()


def measuring(measured: Callable) -> Callable:
    """Make measured(run, measure, params, buffers) compute the function whose derivative is taken.

    Under no_grad, attention layers in eval mode take a fused path that fills with zeros what it masks. At
    the padded positions that is another function, and it has no derivative. So the fused path is switched
    off, and the outputs are those of the function that is differentiated.

    A measure may take gradients itself. So graphs are kept inside, even where gradients are off outside, and
    the parameters require gradients where the measure asks for those. If gradients are off outside, what is
    returned carries no graph.
    """

    @functools.wraps(measured)
    def call(run, measure, params, buffers):
        wanted, fused = torch.is_grad_enabled(), torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with torch.enable_grad():
                try:
                    out = measured(run, measure, params, buffers)
                except RuntimeError as error:  # parameters require a gradient only here: graphs take memory
                    if wanted or "does not require grad" not in str(error):
                        raise
                    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
                    out = measured(run, measure, leaves, buffers)
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)
        return out if wanted else out.detach()

    return call
