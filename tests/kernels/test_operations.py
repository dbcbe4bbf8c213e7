"""Second derivatives of PyTorch's operations: right singly, right in batches, or refused by name.

By default those that once were wrong and some common ones; the whole of PyTorch's operator database with

    MAGIC_WHOLE_SWEEP=1 pytest tests/kernels/test_operations.py
"""

import functools
import os
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from magic.engine import adjoint
from magic.kernels import replace
from magic.kernels.replace import REFUSED, REWRITTEN, SAME_BITS, differentiable
from tests.support import operations

WRONG_ONCE = [
    "cdist", "nn.functional.linear_cross_entropy", "nn.functional.linear_cross_entropy.chunked",
    "nn.functional.linear_cross_entropy.chunked_none", "native_layer_norm", "as_strided_scatter",
    "nn.functional.max_unpool1d", "nn.functional.max_unpool2d", "nn.functional.max_unpool3d",
    "nn.functional.batch_norm",
]  # fmt: skip
COMMON = [
    "matmul", "einsum", "softmax", "log_softmax", "logsumexp", "sigmoid", "tanh", "cumsum",
    "index_select", "gather", "where", "clamp", "norm", "std", "nn.functional.pairwise_distance",
    "nn.functional.cross_entropy", "nn.functional.silu", "nn.functional.softplus", "nn.functional.gelu",
    "nn.functional.layer_norm", "nn.functional.group_norm", "nn.functional.conv2d",
    "nn.functional.conv_transpose2d", "nn.functional.max_pool2d", "nn.functional.avg_pool2d",
    "nn.functional.embedding", "linalg.solve", "nn.functional.scaled_dot_product_attention",
    "nn.functional.pdist",
]  # fmt: skip
# Operations that have no derivative for some samples, or none at all; the message says so.
MAY_REFUSE = {
    "as_strided_scatter", "nn.functional.ctc_loss",
    "nn.functional.max_unpool1d", "nn.functional.max_unpool2d", "nn.functional.max_unpool3d",
}  # fmt: skip
WHOLE = bool(os.environ.get("MAGIC_WHOLE_SWEEP"))
SINGLE, BATCHED = 1e-5, 1e-9  # a finite difference is good to some seven digits, a batch to rounding


@functools.cache
def database():
    return operations.database()


def chosen():
    known = {operations.name_of(op): op for op in database()}
    names = [name for name in WRONG_ONCE + COMMON if name in known]
    assert len(names) >= 30, "the operator database has other names now"
    return [known[name] for name in names] if not WHOLE else list(known.values())


def problems(ops, most):
    """What is wrong, and how much was looked at."""
    wrong, seen, one_by_one, refused = [], 0, set(), set()
    for op in ops:
        name = operations.name_of(op)
        for i, sample in enumerate(operations.samples(op, most)):
            try:
                found = operations.examine(op, sample)
            except Exception as error:
                wrong.append(f"{name}, sample {i}: {type(error).__name__}: {str(error)[:120]}")
                continue
            seen += found.batched is not None
            one_by_one |= {name} if found.one_by_one else set()
            refused |= {name} if found.refused else set()
            if found.refused and name not in MAY_REFUSE:
                wrong.append(f"{name}, sample {i}: {found.refused}")
            if (found.differences or 0.0) > SINGLE:
                wrong.append(f"{name}, sample {i}: off finite differences by {found.differences:.2g}")
            if (found.batched or 0.0) > BATCHED:
                wrong.append(f"{name}, sample {i}: a batched pull is off single ones by {found.batched:.2g}")
    return wrong, seen, one_by_one, refused


def test_second_derivatives_of_the_database():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrong, seen, one_by_one, refused = problems(chosen(), 4)
    print(f"{seen} samples; one by one: {sorted(one_by_one)}; refused: {sorted(refused)}")
    assert seen > (1500 if WHOLE else 80)
    assert refused >= {"as_strided_scatter"}
    assert wrong == []


def examined(name):
    op = next(op for op in database() if operations.name_of(op) == name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return problems([op], 4)[0]


def test_a_wrong_derivative_is_found(monkeypatch):
    """A part that is detached, a batched rule that is wrong, a refusal that nobody expects."""
    assert examined("cdist") == examined("tanh") == []
    right = REWRITTEN[torch.cdist]
    with monkeypatch.context() as patched:
        patched.setitem(
            REWRITTEN, torch.cdist, lambda a, b, *args, **kwargs: right(a, b.detach() * 1.0) + b.sum()
        )
        assert any("off finite differences" in p or "Error" in p for p in examined("cdist"))

    class Twisted(torch.autograd.Function):
        """tanh, with a first derivative whose own derivative is left out."""

        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.tanh()

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            return g * (1 - x.detach().tanh() ** 2)

    monkeypatch.setitem(REWRITTEN, torch.tanh, Twisted.apply)
    assert any("off finite differences" in p for p in examined("tanh"))
    monkeypatch.setitem(REFUSED, torch.sigmoid, replace.REFUSED[torch.as_strided_scatter])
    assert any("has a wrong derivative" in p for p in examined("sigmoid"))


def test_the_batched_derivative_is_looked_at(monkeypatch):
    """torch.cdist itself: right singly, wrong in batches."""
    monkeypatch.delitem(REWRITTEN, torch.cdist)
    found = examined("cdist")
    if not found:
        pytest.skip("this PyTorch batches cdist rightly")
    assert all("a batched pull is off" in p for p in found)


def test_methods_are_replaced_as_functions_are():
    table = {**SAME_BITS, **REWRITTEN, **REFUSED}
    for f in table:
        method = getattr(Tensor, f.__name__, None)
        assert method is None or method in table, f.__name__


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, float("inf")])
def test_cdist(p):
    """Value and first derivative are PyTorch's; equal rows and equal numbers included."""
    torch.manual_seed(0)
    a = torch.randn(3, 5, 4, dtype=torch.float64)
    a[0, 0, 0] = a[0, 1, 0]
    b = torch.cat([a[:1, :2], torch.randn(1, 2, 4, dtype=torch.float64)], 1)
    a, b = a.requires_grad_(), b.requires_grad_()
    with differentiable() as replace:
        ours = torch.cdist(a, b, p=p)
    assert replace.rewritten
    theirs = torch.cdist(a, b, p=p, compute_mode="donot_use_mm_for_euclid_dist")
    torch.testing.assert_close(ours, theirs)
    g = torch.randn_like(ours)
    mine, yours = (torch.autograd.grad(d, (a, b), g, create_graph=True) for d in (ours, theirs))
    for x, y in zip(mine, yours, strict=True):
        torch.testing.assert_close(x, y)
        again = torch.autograd.grad(x.square().sum(), (a, b), retain_graph=True, allow_unused=True)
        assert all(z is None or z.isfinite().all() for z in again)


def test_a_refusal_names_the_way_out():
    pooled, indices = F.max_pool2d(torch.rand(1, 1, 5, 5), 3, 1, return_indices=True)
    with (
        pytest.raises(adjoint.NotDifferentiable, match="stride = kernel_size"),
        adjoint.refusing("step 3"),
        differentiable(),
    ):
        nn.MaxUnpool2d(3, 1)(pooled, indices)
    pooled, indices = F.max_pool2d(torch.rand(1, 1, 4, 4), 2, return_indices=True)
    with differentiable():
        nn.MaxUnpool2d(2)(pooled, indices)
