"""Operations whose second derivative PyTorch lacks, or computes slowly, with one written here.

States are always computed by the operations that training uses. The adjoint only linearises around
them, so there an operation may be replaced. Two kinds of replacement:

- `SAME_BITS`: value and first derivative are PyTorch's own kernels, so that a step traced with them
  gives training's bits; only the derivative of the derivative is ours, in closed form.
- `REWRITTEN`: another expression of the same function, equal up to rounding.

Each closed form below is derived in its docstring and checked by `gradgradcheck` (tests).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from . import checkpointing
from .normalisation import batch_norm, group_norm, layer_norm
from .orders import batched, further, shared
from .rewritten import REFUSED, REWRITTEN

aten = torch.ops.aten


# -- GELU --------------------------------------------------------------------------------------------


class _Gelu(Function):
    """y = xΦ(x), with Φ the normal distribution function."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return aten.gelu(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            return aten.gelu_backward(g, x) if batched(g) else _GeluBackward.apply(g, x, ctx)
        return g * _slope(ctx)


def _slope(ctx) -> Tensor:
    """y'(x), where ctx is that of `_Gelu`."""
    (x,) = ctx.saved_tensors
    return shared(ctx, lambda: aten.gelu_backward(torch.ones_like(x), x))


class _GeluBackward(Function):
    """g y'(x), with y' = Φ + xφ and y'' = (2 − x²)φ, φ the normal density."""

    @staticmethod
    def forward(ctx, g, x, of):
        ctx.of = of
        ctx.save_for_backward(g, x)
        return aten.gelu_backward(g, x)

    @staticmethod
    def backward(ctx, c):
        if torch.is_grad_enabled():
            return *further(aten.gelu_backward, ctx.saved_tensors, c), None
        return c * _slope(ctx.of), c * shared(ctx, lambda: _bend(*ctx.saved_tensors)), None


def _bend(g: Tensor, x: Tensor) -> Tensor:
    """g y''(x)."""
    square = x * x
    density = square.mul(-0.5).exp_().mul_(1 / math.sqrt(2 * math.pi))
    return (2 - square).mul_(density).mul_(g)


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """F.gelu; the form approximated by tanh keeps PyTorch's own derivatives."""
    return _Gelu.apply(x) if approximate == "none" else F.gelu(x, approximate=approximate)


# -- convolution -------------------------------------------------------------------------------------


class _Conv(Function):
    """y = W ∗ x + b, bilinear in W and x. `how` is (stride, padding, dilation, groups)."""

    @staticmethod
    def forward(ctx, x, weight, bias, how):
        ctx.how = stride, padding, dilation, groups = how
        ctx.save_for_backward(x, weight)
        return aten.convolution(x, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups)

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        if torch.is_grad_enabled() and not batched(g):
            return *_ConvBackward.apply(g, x, weight, ctx.how, ctx.needs_input_grad[:3]), None
        return *_conv_backward(g, x, weight, ctx.how, ctx.needs_input_grad[:3]), None


class _ConvBackward(Function):
    """∂x = Wᵀ g, ∂W = g ⋆ x, ∂b = Σ g are bilinear again, so their cotangents c, c_W, c_b go

    to g: W ∗ c + c_W ∗ x + c_b        to x: c_Wᵀ g        to W: g ⋆ c

    each by the kernel that fits it. PyTorch's own formula takes a forward convolution for the last, and
    computes the second for the data, too, which nobody asks for.
    """

    @staticmethod
    def forward(ctx, g, x, weight, how, asked):
        ctx.how, ctx.asked = how, asked
        ctx.save_for_backward(g, x, weight)
        ctx.set_materialize_grads(False)
        return _conv_backward(g, x, weight, how, asked)

    @staticmethod
    def backward(ctx, c, c_weight, c_bias):
        g, x, weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *further(
                lambda g, x, weight: _conv_backward(g, x, weight, ctx.how, ctx.asked),
                (g, x, weight), c, c_weight, c_bias,
            ), None, None  # fmt: skip
        to_g = to_x = to_weight = None
        if c is not None:
            to_g = _conv(c, weight, ctx.how)
            to_weight = _conv_backward(g, c, weight, ctx.how, (False, True, False))[1]
        if c_weight is not None:
            more = _conv(x, c_weight, ctx.how)
            to_g = more if to_g is None else to_g + more
            if ctx.needs_input_grad[1]:
                to_x = _conv_backward(g, x, c_weight, ctx.how, (True, False, False))[0]
        if c_bias is not None:
            more = c_bias.view(-1, *[1] * (g.dim() - 2))
            to_g = more.expand_as(g) if to_g is None else to_g + more
        return to_g, to_x, to_weight, None, None


def _conv(x: Tensor, weight: Tensor, how) -> Tensor:
    stride, padding, dilation, groups = how
    return aten.convolution(x, weight, None, stride, padding, dilation, False, [0] * len(stride), groups)


def _conv_backward(g: Tensor, x: Tensor, weight: Tensor, how, asked) -> tuple[Tensor | None, ...]:
    stride, padding, dilation, groups = how
    bias, zeros = [weight.shape[0]], [0] * len(stride)
    return aten.convolution_backward(
        g, x, weight, bias, stride, padding, dilation, False, zeros, groups, list(asked)
    )


def _convolution(dimensions: int, plain: Callable) -> Callable:
    def conv(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        if isinstance(padding, str) or x.dim() != dimensions + 2:
            return plain(x, weight, bias, stride, padding, dilation, groups)
        sizes = ([n] * dimensions if isinstance(n, int) else list(n) for n in (stride, padding, dilation))
        return _Conv.apply(x, weight, bias, (*sizes, groups))

    conv.__name__ = plain.__name__
    return conv


# -- average pooling ---------------------------------------------------------------------------------


class _AvgPool(Function):
    """Means over windows of k × k that tile the image: a linear map, as is its transpose.

    PyTorch's kernels go pixel by pixel; sums of strided slices are four to six times as fast on a CPU.
    They are used in the pull, where the last bit is free.
    """

    @staticmethod
    def forward(ctx, x, k):
        ctx.k, ctx.shape = k, x.shape
        return aten.avg_pool2d(x, k)

    @staticmethod
    def backward(ctx, g):
        if torch.is_grad_enabled():
            return (_pool_backward if batched(g) else _AvgPoolBackward.apply)(g, ctx.k, ctx.shape), None
        k, g = ctx.k, g / ctx.k**2
        high, wide = g.shape[-2] * k, g.shape[-1] * k
        covers = (high, wide) == ctx.shape[-2:]
        out = g.new_empty(ctx.shape) if covers else g.new_zeros(ctx.shape)
        for i in range(k * k):
            out[..., i // k : high : k, i % k : wide : k] = g
        return out, None


class _AvgPoolBackward(Function):
    @staticmethod
    def forward(ctx, g, k, shape):
        ctx.k, ctx.high, ctx.wide = k, g.shape[-2] * k, g.shape[-1] * k
        return _pool_backward(g, k, shape)

    @staticmethod
    def backward(ctx, c):
        k = ctx.k
        rows = sum(c[..., i : ctx.high : k, :] for i in range(k))
        return sum(rows[..., j : ctx.wide : k] for j in range(k)) / k**2, None, None


def _pool_backward(g: Tensor, k: int, shape) -> Tensor:
    like = g.new_empty(1).expand(shape)
    return aten.avg_pool2d_backward(g, like, [k, k], [k, k], [0, 0], False, True, None)


def avg_pool2d(
    x, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None
):
    """F.avg_pool2d; other than square windows that tile the image keep PyTorch's own derivatives."""
    k = kernel_size if isinstance(kernel_size, int) else None
    tiles = k is not None and stride in (None, k) and padding == 0 and not ceil_mode
    if x.dim() == 4 and tiles and divisor_override is None:
        return _AvgPool.apply(x, k)
    return F.avg_pool2d(
        x, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override=divisor_override
    )


# -- what takes the place of what ---------------------------------------------------------------------


def _torch_batch_norm(x, weight, bias, mean, var, training, momentum, eps, cudnn_enabled):
    return batch_norm(x, mean, var, weight, bias, training, momentum, eps)


SAME_BITS: dict[Callable, Callable] = {
    F.gelu: gelu,
    **{f: _convolution(i, f) for i, f in enumerate((F.conv1d, F.conv2d, F.conv3d), start=1)},
    F.layer_norm: layer_norm,
    F.group_norm: group_norm,
    F.batch_norm: batch_norm,
    torch.batch_norm: _torch_batch_norm,
    F.avg_pool2d: avg_pool2d,
}
# Inside the transforms of torch.func, PyTorch's own operations stand, but its third derivative of
# LayerNorm is wrong and BatchNorm has none.
BATCH_NORMS = {F.batch_norm, torch.batch_norm}
NORMALISATIONS = {F.layer_norm, F.group_norm, *BATCH_NORMS}
# PyTorch takes another formula for their gradient where that is to be differentiated again.
OTHER_BITS = {
    F.silu, torch._C._nn.silu, torch._C._nn.silu_, F.mish, torch._C._nn.mish, torch._C._nn.mish_,
    torch.cumprod, torch.Tensor.cumprod, torch.Tensor.cumprod_,
    torch.ormqr, torch.Tensor.ormqr, torch.linalg.householder_product, torch.orgqr, torch.Tensor.orgqr,
    torch.linalg.solve, torch.linalg.solve_ex, torch.linalg.tensorsolve,
    torch.group_norm, torch.native_group_norm,
}  # fmt: skip
# Attention's kernel is chosen below Python; for these, the plain one is.
ATTENTION = {F.scaled_dot_product_attention, F.multi_head_attention_forward}


def _in_eval(func, args, kwargs) -> bool:
    """Whether this call of a batch normalisation uses the running statistics: it is written out then."""
    return not (args[5] if len(args) > 5 else kwargs.get("training", False))


class _Replace(TorchFunctionMode):
    """Calls an equivalent of an operation in its place; `rewritten` says whether bits may differ."""

    rewritten = False

    def __enter__(self):
        self._checkpoints = checkpointing.refusing(keeping=True)
        self._checkpoints.__enter__()
        return super().__enter__()

    def __exit__(self, *exc):
        super().__exit__(*exc)
        self._checkpoints.__exit__(*exc)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in SAME_BITS and (not batched() or func in NORMALISATIONS):
            self.rewritten |= batched() or (func in BATCH_NORMS and _in_eval(func, args, kwargs))
            return SAME_BITS[func](*args, **kwargs)
        if func is torch.autograd.grad:  # a loss that takes gradients: theirs are formed in another order
            self.rewritten = True
        if func in REWRITTEN:
            self.rewritten = True
            return REWRITTEN[func](*args, **kwargs)
        self.rewritten |= func in OTHER_BITS
        if func in REFUSED:
            return REFUSED[func](*args, **kwargs)
        if func in ATTENTION:
            self.rewritten = True
            with sdpa_kernel(SDPBackend.MATH):
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def differentiable() -> _Replace:
    """Inside `with differentiable() as replace:`, operations can be differentiated twice.

    Attention takes its plain form instead of a fused kernel, and recurrent layers leave cuDNN.
    `replace.rewritten` says whether an operation with other bits stood in.
    """
    return _Replace()


def measuring(measured: Callable) -> Callable:
    """Make measured(run, measure, params, buffers) go along the path whose derivative is taken.

    Under no_grad, attention layers in eval mode take a fused path, which fills with zeros what it masks:
    another function at the padded positions, without a derivative. It is switched off, so that outputs
    and derivative agree. And a measure may take gradients itself: they are on inside, and parameters
    require them where it asks for theirs. Where gradients are off outside, what is returned has none.
    """

    @functools.wraps(measured)
    def call(run, measure, params, buffers):
        wanted, fused = torch.is_grad_enabled(), torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with torch.enable_grad():
                try:
                    out = measured(run, measure, params, buffers)
                except RuntimeError as error:  # without need, no graph is recorded: it takes memory
                    if wanted or "does not require grad" not in str(error):
                        raise
                    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
                    out = measured(run, measure, leaves, buffers)
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)
        return out if wanted else out.detach()

    return call
