"""What has no derivative is refused, with the operation that PyTorch names and what to write in its place."""

from __future__ import annotations

import contextlib


class NotDifferentiable(RuntimeError):
    """A part of the run or of the measure has no derivative PyTorch can give; the message names it."""


# What PyTorch says where a loss cuts the history of the parameters that it is given.
CUTS = ("optimize a non-leaf Tensor", "a leaf Variable that requires grad", "support the deepcopy protocol")


@contextlib.contextmanager
def refusing(where: str):
    """Turn autograd's refusals into NotDifferentiable, with the operation that PyTorch names.

    A Function marked once_differentiable is not among them: autograd cuts its graph without a word,
    and `magic.engine.witness` finds it.
    """
    try:
        yield
    except NotDifferentiable:
        raise
    except (RuntimeError, ValueError) as error:
        what = str(error)
        if "_Stop is a view" in what:
            raise NotDifferentiable(
                f"{where}: something is written in place through .data or detach(), behind autograd's back; "
                "write x + (new - x).detach() in its place, or do it in the optimizer"
            ) from error
        if any(sign in what for sign in CUTS):
            raise NotDifferentiable(
                f"{where}: it writes into parameters, as an optimizer or load_state_dict does, and so cuts "
                "their history. Make new tensors, with torch.autograd.grad(..., create_graph=True), and call "
                "torch.func.functional_call(model, tensors, inputs)"
            ) from error
        if isinstance(error, ValueError) or not ("derivative" in what or "differentia" in what):
            raise
        raise NotDifferentiable(
            f"{where}: {what.rstrip('.')}. The derivative of a training step is a second derivative of "
            "the model; use an operation that has one"
        ) from error
