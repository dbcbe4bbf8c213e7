"""Stop-gradients, exactly: `detach`, `.data` and `no_grad` inside a loss or a measure.

A loss may hold a quantity x(θ) fixed while its gradient is taken: the weight of a focal loss, a target
network, the rounding of a straight-through estimator. The step is then g(θ) = ∂L/∂θ with x held fixed,
and x still moves with θ from step to step. So the derivative of the *step* must flow through x, which
autograd, having cut x off for good, leaves out:

    dg/dθ = ∂g/∂θ + ∂g/∂x · dx/dθ

`_Stop` is the identity, put in the place of `detach` and of its like. While the gradient g is taken it hands
nothing back, as `detach` does. While g is pulled back, it hands its cotangent on, and so adds the second
term. In a measure nothing is cut at all: retraining moves what is measured along every path, whether
autograd is shown that path or not.
"""

from __future__ import annotations

import contextlib
import functools

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_iter, tree_map_only

from .escapes import Escapes
from .higher_order import batched

DETACH = {torch.Tensor.detach, torch.detach}
# What a mode is shown where .data or .requires_grad is read. It is a new object each time: compare it by ==.
# PyTorch's stubs describe these attributes of a tensor, not those of its class.
DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]
REQUIRES = torch.Tensor.requires_grad.__get__  # type: ignore[attr-defined]
IN_PLACE = {torch.Tensor.detach_, torch.detach_}
# What turns tensors into things of Python or NumPy: what comes out has no graph, whatever becomes of it.
OUT = {
    torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__,
    torch.Tensor.__float__, torch.Tensor.__int__, torch.Tensor.__complex__,
}  # fmt: skip
# What makes views; who writes into a view of a buffer writes into the buffer. The name of a property, such as
# x.T, is __get__.
VIEWS = {
    "__getitem__", "__get__", "view", "view_as", "reshape", "flatten", "unflatten", "narrow", "select", "t",
    "transpose", "movedim", "swapaxes", "permute", "squeeze", "unsqueeze", "expand", "expand_as", "diagonal",
    "chunk", "split", "tensor_split", "unbind", "unfold", "as_strided", "ravel",
}  # fmt: skip


class _Stop(torch.autograd.Function):
    """The identity; its derivative is nothing while the gradient is taken, and the identity afterwards."""

    @staticmethod
    def forward(ctx, x, stops):
        ctx.stops = stops
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return (g if ctx.stops.pulling else None), None


def _copying(storages: set[int]) -> saved_tensors_hooks:
    """Inside, where a graph saves a tensor that lies in one of these storages, it saves a copy.

    Invariant: what is packed has no graph of its own, which is why it is detached. Suppose an operation saves
    its own output, as exp does. Packed with its graph, the output would hold the operation's node, which
    holds what was packed, and this circle, which goes through autograd, would never be freed. Nothing is
    lost by it: a node knows where its inputs and outputs stand in the graph, and gives what it unpacks
    its place there again.
    """

    def pack(x: Tensor) -> Tensor:
        alone = x.detach()
        return alone.clone() if x.untyped_storage()._cdata in storages else alone

    return saved_tensors_hooks(pack, lambda x: x)


class Stops(TorchFunctionMode):
    """Inside `with Stops(...)`, what autograd would cut off stays in the graph.

    cuts      True for a loss: `detach` and its like stop the gradient until `pulling` is set. False for a
              measure, where they do nothing
    buffers   the tensors in the place of the model's buffers, which may be written under `no_grad`
    pulling   whether the gradient has been taken and is being pulled back
    stopped   whether anything was cut off
    taking    how many gradients the loss or the measure is taking itself just now
    escapes   ways in which a number that depends on the parameters may have left the graph
    """

    def __init__(self, cuts: bool, buffers=()):
        super().__init__()
        self.cuts, self.pulling, self.stopped, self.taking = cuts, False, False, 0
        self.escapes = Escapes(open=cuts)
        self._written = {b.untyped_storage()._cdata for b in buffers}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if batched() and (func in DETACH or func == DATA or not torch.is_grad_enabled()):
            self.escapes.note(
                func
            )  # inside torch.func's transforms, where `_Stop` has no rule (see `batched`)
            return func(*args, **kwargs)
        if func in DETACH:
            return self._stop(args[0] if args else kwargs["input"])
        if func == DATA:
            return args[0] if self._is_buffer(args[0]) else self._stop(args[0], share=True)
        if func in IN_PLACE and args[0].requires_grad:
            raise RuntimeError("detach_() is not differentiable in place; use x = x.detach()")
        if func in OUT and args[0].requires_grad:
            self.escapes.note(func)
            return func(args[0].detach(), *args[1:], **kwargs)
        if func is torch.Tensor.backward:
            raise RuntimeError(
                "backward() inside a loss or a measure is not differentiable; use torch.autograd.grad"
            )
        if func is torch.autograd.grad:
            return self._grad(func, args, kwargs)
        if func is torch.Tensor.__deepcopy__:
            x, memo = args
            memo[id(x)] = self._stop(x).clone() if x.requires_grad else func(*args)
            return memo[id(x)]
        if func is torch.Tensor.register_hook:
            return func(args[0], self._hook(*args[1:], **kwargs))
        if func is torch.nn.functional.gumbel_softmax:
            return self._gumbel(func, *args, **kwargs)
        run = functools.partial(self._shown if torch.is_grad_enabled() else self._under_no_grad, func)
        if self._written and self._reads_a_buffer((args, kwargs)):
            with _copying(self._written):
                return run(*args, **kwargs)
        return run(*args, **kwargs)

    def _shown(self, func, *args, **kwargs):
        return self.escapes.after(func, args, kwargs, func(*args, **kwargs))

    def _reads_a_buffer(self, arguments) -> bool:
        """Whether a graph may save a buffer here that a plain loop's graph would not save.

        Such a buffer may be written later, and autograd refuses to go through a graph whose saved tensors
        have been written. So a copy is saved.
        """
        tensors = (x for x in tree_iter(arguments) if isinstance(x, Tensor))
        shown = not torch.is_grad_enabled()
        return any((shown or x.requires_grad) and self._is_buffer(x) for x in tensors)

    def _is_buffer(self, x: Tensor) -> bool:
        return x.untyped_storage()._cdata in self._written

    def _stop(self, x: Tensor, share: bool = False) -> Tensor:
        """x, with nothing flowing back through it while the gradient is taken."""
        if (
            not x.requires_grad
        ):  # with `share`, as of .data, what is written into the result is written into x
            return x.view_as(x) if share else x.detach()
        with torch.enable_grad():
            if not self.cuts:
                return x.view_as(x)
            self.stopped = True
            return self.escapes.stopped(_Stop.apply(x, self))

    def _under_no_grad(self, func, *args, **kwargs):
        """An operation that the user has put under no_grad, with a graph that begins at stopped inputs."""
        tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        if func == REQUIRES or not any(x.requires_grad or self._is_buffer(x) for x in tensors):
            # a view may be written into later, and then it needs to know of what it is a view
            with torch.enable_grad() if _name(func) in VIEWS else contextlib.nullcontext():
                return func(*args, **kwargs)
        out = kwargs.pop("out", None) if "out" in kwargs else None
        if self.cuts and writes(func) and args[0].requires_grad and not self._is_buffer(args[0]):
            raise RuntimeError(
                f"{resolve_name(func)} writes under no_grad() into a tensor that carries a gradient, which "
                "is not differentiable; write x + (new - x).detach() in its place"
            )

        written = args[0] if args and writes(func) else None

        def stop(x: Tensor) -> Tensor:
            whole = x is written or self._is_buffer(x) or not x.is_floating_point()
            return x if whole else self._stop(x)

        with torch.enable_grad():
            args, kwargs = tree_map_only(Tensor, stop, (args, kwargs))
            result = func(*args, **kwargs)
            self.escapes.after(func, args, kwargs, result)
            return result if out is None else out.copy_(result)

    def _hook(self, hook):
        """A hook that the loss or the measure has registered on a tensor.

        It belongs to the gradient that a plain loop takes. So it is called while that is taken, but not
        where it is pulled back. A measure is only pulled back, so its hooks are called for nothing but
        the gradients that the measure takes itself.
        """

        def called(g: Tensor):
            if self.pulling or not (self.cuts or self.taking):
                return None
            with self:
                return hook(g)

        return called

    def _grad(self, func, args, kwargs):
        """torch.autograd.grad, which keeps a graph whether the user has asked for it or not.

        Where the user has not, a plain loop holds the gradients fixed, so they are stopped.
        """
        asked = kwargs.get("create_graph", args[4] if len(args) > 4 else False)
        args, kwargs = args[:4], dict(zip(("create_graph",), args[4:5], strict=False)) | kwargs
        self.taking += 1
        try:
            with torch.enable_grad():
                found = func(*args, **kwargs | {"create_graph": True})
        finally:
            self.taking -= 1
        return found if asked else tuple(g if g is None else self._stop(g) for g in found)

    def _gumbel(self, func, logits, tau=1, hard=False, eps=1e-10, dim=-1):
        """F.gumbel_softmax, whose hard form is straight-through: y_hard − stop(y) + y."""
        soft = func(logits, tau=tau, hard=False, eps=eps, dim=dim)
        if not hard:
            return soft
        index = soft.max(dim, keepdim=True)[1]
        one_hot = torch.zeros_like(logits).scatter_(dim, index, 1.0)
        return one_hot - self._stop(soft) + soft


def _name(func) -> str:
    return getattr(func, "__name__", "")


def writes(func) -> bool:
    """Whether an operation writes into its first argument."""
    name = _name(func)
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
