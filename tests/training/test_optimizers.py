"""The adjoints of the optimizers, written by hand, are those that autograd finds for the rules."""

import itertools

import pytest
import torch

from magic.training import optim
from magic.training.adam import adam_adjoint

SGD = [
    {"lr": 0.1, "momentum": momentum, "dampening": dampening, "nesterov": nesterov,
     "weight_decay": decay, "maximize": maximize}
    for momentum, dampening, nesterov, decay, maximize in itertools.product(
        (0, 0.9), (0, 0.3), (False, True), (0, 0.05), (False, True)
    )
    if not (nesterov and (momentum == 0 or dampening))
]  # fmt: skip
ADAM = [
    {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": decay,
     "decoupled_weight_decay": decoupled, "amsgrad": amsgrad, "maximize": maximize}
    for decay, decoupled, amsgrad, maximize in itertools.product((0, 0.05), *[(False, True)] * 3)
]  # fmt: skip
RMSPROP = [
    {"lr": 0.01, "alpha": 0.9, "eps": 1e-6, "momentum": momentum, "centered": centered,
     "weight_decay": decay, "maximize": maximize}
    for momentum, decay, centered, maximize in itertools.product((0, 0.9), (0, 0.05), *[(False, True)] * 2)
]  # fmt: skip


@pytest.mark.parametrize("updates", [0, 1, 3])
@pytest.mark.parametrize(
    "rule, hyper",
    [(optim.sgd, h) for h in SGD] + [(optim.adam, h) for h in ADAM] + [(optim.rmsprop, h) for h in RMSPROP],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_against_autograd_of_the_rule(rule, hyper, updates):
    dice = torch.Generator().manual_seed(updates)

    def randn(*shape):
        return torch.randn(*shape, generator=dice, dtype=torch.float64)

    param, slots = randn(3, 4), {}
    for _ in range(updates):
        param, slots = rule(param, randn(3, 4), slots, hyper)
    given = {"param": param, "grad": randn(3, 4)} | {k: x for k, x in slots.items() if x.is_floating_point()}
    leaves = {k: x.detach().requires_grad_() for k, x in given.items()}
    after, made = rule(
        leaves["param"], leaves["grad"], {**slots, **{k: leaves[k] for k in slots if k in leaves}}, hyper
    )
    outputs = {"param": after} | {k: x for k, x in made.items() if x.is_floating_point()}
    cotangent = {k: randn(2, 3, 4) for k in outputs}
    expected = [
        torch.autograd.grad(
            list(outputs.values()), list(leaves.values()), [c[k] for c in cotangent.values()],
            retain_graph=True, allow_unused=True, materialize_grads=True,
        )
        for k in range(2)
    ]  # fmt: skip
    found = {k: c.clone() for k, c in cotangent.items()}
    known = made if updates % 2 else None
    known = known and {k: x.detach() for k, x in known.items()}
    found["grad"] = optim.ADJOINTS[rule](param, given["grad"], slots, hyper, known)(found)
    assert found.keys() >= leaves.keys()
    for i, name in enumerate(leaves):
        torch.testing.assert_close(found[name], torch.stack([e[i] for e in expected]), rtol=1e-12, atol=1e-14)
    assert found["grad"].abs().min() > 0


@pytest.mark.parametrize("updates", [0, 2])
def test_where_no_gradient_has_been(updates):
    """v = 0 in one row: no NaN, and the slope of the numerator, −α(1 − β₁)/ε."""
    hyper = next(h for h in ADAM if h["weight_decay"] == 0 and not h["amsgrad"] and not h["maximize"])
    param, slots, (beta1, _) = torch.ones(2, 3, dtype=torch.float64), {}, hyper["betas"]
    grad = torch.tensor([[0.0] * 3, [1.0] * 3], dtype=torch.float64)
    for _ in range(updates):
        param, slots = optim.adam(param, grad, slots, hyper)
    cotangent = {k: torch.zeros(1, 2, 3, dtype=torch.float64) for k in ("exp_avg", "exp_avg_sq")}
    cotangent["param"] = torch.ones(1, 2, 3, dtype=torch.float64)
    to_grad = adam_adjoint(param, grad, slots, hyper)(cotangent)
    alpha = hyper["lr"] / (1 - beta1 ** (updates + 1))
    assert to_grad[0, 0].tolist() == pytest.approx([-alpha * (1 - beta1) / hyper["eps"]] * 3)
    assert all(c.isfinite().all() for c in cotangent.values())
    h = 1e-12  # a real step to both sides of 0, small against ε
    slopes = [
        optim.adam(param, grad + d, slots, hyper)[0][0] - optim.adam(param, grad - d, slots, hyper)[0][0]
        for d in [torch.tensor([[h] * 3, [0.0] * 3], dtype=torch.float64)]
    ]
    assert (slopes[0] / (2 * h)).tolist() == pytest.approx(to_grad[0, 0].tolist(), rel=1e-3)


def test_each_rule_has_its_adjoint():
    assert set(optim.RULES.values()) == set(optim.ADJOINTS)
