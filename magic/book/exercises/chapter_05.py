"""The exercises of chapter 05: what Adam, weight decay, BatchNorm and a warming layer remember."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .judging import Cases, Wrong, exercise, number


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _several(cases: Cases, case: str, got: Any, wants: dict[str, tuple[Tensor, dict]]) -> None:
    """Each of the tensors that the answer returns, by name; a case that is right counts as one."""
    if not isinstance(got, (tuple, list)) or len(got) != len(wants):
        came = f"{len(got)} values" if isinstance(got, (tuple, list)) else type(got).__name__
        raise Wrong(f"asked for are {len(wants)} tensors, {', '.join(wants)}; for {case} came {came}.")
    before = list(cases.right)
    for mine, (name, (want, suspects)) in zip(got, wants.items(), strict=True):
        cases.same(f"{name} ({case})", mine, want, suspects)
    cases.right = [*before, case]


# -- 05.1 ------------------------------------------------------------------------------------------


def _measured_stretch(done: int, betas: tuple[float, float]) -> Tensor:
    """torch.optim.Adam itself, resumed with the right count and with 0."""
    moves = []
    for forget in (False, True):
        param = nn.Parameter(_random(1, seed=0))
        optimizer = torch.optim.Adam([param], lr=0.01, betas=betas, eps=0.0)
        for t in range(done + 1):
            param.grad = _random(1, seed=t + 1)
            before = param.detach().clone()
            if forget and t == done and done:
                optimizer.state[param]["step"].zero_()
            optimizer.step()
        moves.append(param.detach() - before)
    return (moves[1] / moves[0]).squeeze()


@exercise("05.1", "the factor by which a forgotten count changes Adam's next update")
def stretch(answer: Callable) -> None:
    cases = Cases({})
    for case, done, b1, b2 in (
        ("nothing done yet, where there is nothing to forget", 0, 0.9, 0.999),
        ("1 update done", 1, 0.9, 0.999),
        ("30 updates done", 30, 0.9, 0.999),
        ("other betas", 7, 0.5, 0.8),
        ("400 updates done", 400, 0.9, 0.999),
    ):
        want = _measured_stretch(done, (b1, b2))
        m, v = (1 - b1 ** (done + 1)) / (1 - b1), (1 - b2 ** (done + 1)) / (1 - b2)
        m_too_few, v_too_few = (1 - b1**done) / (1 - b1), (1 - b2**done) / (1 - b2)
        suspects = {
            "this is the true update divided by the resumed one; asked for is the other way round": 1 / want,
            "the square root over v's correction is missing": number(m / v),
            "v's correction, the factor c, is left out": number(m),
            "m's correction, in α, is left out": number(v**-0.5),
            "the corrections of m and v multiply here, though one stands over the other": number(m * v**0.5),
        }
        if done:
            suspects["after `done` updates the next one has the number done + 1, not done"] = number(
                m_too_few / v_too_few**0.5
            )
        got = cases.call(case, answer, done, b1, b2)
        cases.same(case, got, want, suspects)


# -- 05.2 ------------------------------------------------------------------------------------------


def _measured_slope(done: int, hyper: dict) -> Tensor:
    """A finite difference through the package's update, from m = v = 0 and a count of `done`."""
    from magic.training.adam import adam

    zero = torch.zeros((), dtype=torch.float64)
    slots = {"step": torch.tensor(done), "exp_avg": zero, "exp_avg_sq": zero}
    h = 1e-9 * hyper["eps"]
    up, down = (adam(zero, zero + g, slots, hyper)[0] for g in (h, -h))
    return (up - down) / (2 * h)


@exercise("05.2", "the slope of Adam's update at a gradient of 0")
def slope_at_zero(answer: Callable) -> None:
    cases = Cases({})
    for case, done, root in (
        ("the first update without eps_root", 0, 0.0),
        ("a later update without eps_root", 12, 0.0),
        ("the first update with eps_root", 0, 1e-4),
        ("a later update with eps_root", 12, 1e-4),
    ):
        lr, b1, b2, eps = 0.02, 0.9, 0.99, 1e-3
        hyper = {
            "lr": lr, "betas": (b1, b2), "eps": eps, "eps_root": root, "weight_decay": 0,
            "maximize": False, "amsgrad": False,
        }  # fmt: skip
        c = (1 - b2 ** (done + 1)) ** 0.5
        share, r = (1 - b1) / (1 - b1 ** (done + 1)), root**0.5 + eps
        suspects = {
            "ρ = eps_root stands under the root, and here it does not": number(-lr * share / (root + eps)),
            "eps_root is left out": number(-lr * share / eps),
            "m' = (1 − β₁)g, and here the factor 1 − β₁ is missing": number(-lr * share / r / (1 - b1)),
            "α's division by 1 − β₁ᵗ is left out": number(-lr * (1 - b1) / r),
            "this is the slope of the first update; α = η/(1 − β₁ᵗ) depends on t": number(-lr / r),
            "ρ is added to v'/c², so c does not divide it": number(-lr * share / (root**0.5 / c + eps)),
        }
        if done:
            suspects["after `done` updates the next one has the number done + 1, not done"] = number(
                -lr * (1 - b1) / (1 - b1**done) / r
            )
        got = cases.call(case, answer, done, lr, b1, b2, eps, root)
        cases.same(case, got, _measured_slope(done, hyper), suspects)


# -- 05.3 ------------------------------------------------------------------------------------------

_NAMES = ("ḡ", "Δ_θ", "Δ_m", "Δ_v")


T = 5  # the number of the update in 05.3


def _coupled(inputs, hyper):
    """(θ', m', v') of (θ, g, m, v); hyper is (lr, β₁, β₂, ε, λ)."""
    (theta, g, m, v), (lr, b1, b2, eps, decay) = inputs, hyper
    g = g + decay * theta
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
    r = v.sqrt() / (1 - b2**T) ** 0.5 + eps
    return theta - lr / (1 - b1**T) * m / r, m, v


def _mistaken(inputs, to, hyper, *, inside: bool, outside: bool) -> Tensor:
    """ḡ with λθ missing in m' and v' (unless `inside`) or in the factor of v̄ (unless `outside`)."""
    (theta, g, m, v), (lr, b1, b2, eps, decay) = inputs, hyper
    whole = g + decay * theta
    used, factor = (whole if inside else g), (whole if outside else g)
    m, v = b1 * m + (1 - b1) * used, b2 * v + (1 - b2) * used**2
    alpha, c = lr / (1 - b1**T), (1 - b2**T) ** 0.5
    r = v.sqrt() / c + eps
    m_bar = to[1] - alpha / r * to[0]
    v_bar = to[2] + alpha * m / (2 * c * r**2 * v.sqrt()) * to[0]
    return (1 - b1) * m_bar + 2 * (1 - b2) * factor * v_bar


@exercise("05.3", "the pull through Adam with coupled weight decay")
def pull_coupled(answer: Callable) -> None:
    theta, g, m, v, *to = (_random(6, seed=k) for k in range(7))
    inputs = theta, g, m, v**2
    cases = Cases({})
    for case, decay, kept in (
        ("no weight decay", 0.0, (1, 1, 1)),
        ("weight decay, Δ'_m alone", 0.3, (0, 1, 0)),
        ("weight decay, Δ'_θ alone", 0.3, (1, 0, 0)),
        ("weight decay and all three", 0.3, (1, 1, 1)),
    ):
        hyper = (0.05, 0.9, 0.99, 1e-3, decay)
        here = [k * d for k, d in zip(kept, to, strict=True)]
        leaves = [x.clone().requires_grad_() for x in inputs]
        after = _coupled(leaves, hyper)
        to_theta, to_g, *rest = torch.autograd.grad(after, leaves, here)
        suspects: dict[str, dict[str, Tensor]] = {name: {} for name in _NAMES}
        suspects["Δ_θ"] = {
            "λθ is a part of g̃, and so θ has a second path, through the gradient": here[0],
            "this is decoupled decay, (1 − ηλ)Δ'_θ; here λθ goes into the gradient": (
                (1 - hyper[0] * decay) * here[0]
            ),
            "the path through g̃ counts λ times, not once": here[0] + to_g,
            "ḡ is counted for θ with the decoupled factor as well": (1 - hyper[0] * decay) * here[0]
            + decay * to_g,
        }
        suspects["ḡ"] = {
            "v̄ is multiplied by 2(1 − β₂)g̃, with g̃ = g + λθ, and not by g": (
                _mistaken(inputs, here, hyper, inside=True, outside=False)
            ),
            "m' and v' are made of g̃ = g + λθ, not of g": (
                _mistaken(inputs, here, hyper, inside=False, outside=True)
            ),
            "λθ is left out: m', v' and the factor of v̄ are made of g̃ = g + λθ": (
                _mistaken(inputs, here, hyper, inside=False, outside=False)
            ),
            "g̃ = g + λθ moves one for one with g: λ does not multiply ḡ": decay * to_g,
        }
        got = cases.call(case, answer, *inputs, T, *here, *hyper)
        pairs = zip(_NAMES, (to_g, to_theta, *rest), strict=True)
        _several(cases, case, got, {name: (want, suspects[name]) for name, want in pairs})


# -- 05.4 ------------------------------------------------------------------------------------------


@exercise("05.4", "the pull through BatchNorm's running statistics")
def pull_statistics(answer: Callable) -> None:
    h, to_mean, to_var = _random(5, 3, seed=0), _random(3, seed=1), _random(3, seed=2)
    kappa, count = 0.1, len(h)
    cases = Cases({"κ": kappa, "1 − κ": 1 - kappa, "the batch size": float(count)})
    for case, by_mean, by_var in (
        ("the mean alone", to_mean, 0 * to_var),
        ("the variance alone", 0 * to_mean, to_var),
        ("both", to_mean, to_var),
    ):
        leaves = [x.clone().requires_grad_() for x in (h, torch.zeros(3).to(h), torch.ones(3).to(h))]
        inputs, mean, var = leaves
        after = (
            (1 - kappa) * mean + kappa * inputs.mean(0),
            (1 - kappa) * var + kappa * inputs.var(0, unbiased=True),
        )
        wants = torch.autograd.grad(after, leaves, (by_mean, by_var))
        from_mean = kappa / count * by_mean.expand_as(h)
        from_var = kappa * 2 * (h - h.mean(0)) * by_var
        suspects = {
            "the running variance divides by B − 1, and here by B": from_mean + from_var / count,
            "the deviations are from the batch's mean, and h is used without it": (
                from_mean + kappa * 2 * h * by_var / (count - 1)
            ),
            "κ and 1 − κ are exchanged": wants[0] * (1 - kappa) / kappa,
            "the batch's mean divides by B, the number of rows of h": from_mean * count
            + from_var / (count - 1),
        }
        got = cases.call(case, answer, h, by_mean, by_var, kappa)
        old = {"the old statistics enter with the factor 1 − κ": by_mean}
        old_var = {"the old statistics enter with the factor 1 − κ": by_var}
        wanted = {
            "Δ of h": (wants[0], suspects),
            "Δ of the old mean": (wants[1], old),
            "Δ of the old variance": (wants[2], old_var),
        }
        _several(cases, case, got, wanted)


# -- 05.5 ------------------------------------------------------------------------------------------


@exercise("05.5", "a layer whose memory is part of the state")
def warm_up(answer: Any) -> None:
    cases = Cases({})
    if not (isinstance(answer, type) and issubclass(answer, nn.Module)):
        raise Wrong("asked for is the class of a layer, a subclass of nn.Module, not an instance.")
    layer = cases.call("making one", answer).train()
    x = _random(4, 2, seed=0)
    for k in range(1, 26):
        got = cases.call(f"training step {k}", layer, x)
        late = {"the count is raised after it is used, so each step is one behind": x * min(1, (k - 1) / 20)}
        cases.same(f"training step {k}", got, x * min(1.0, k / 20), late)
    cases.right = ["25 training steps"]
    _in_the_state(cases, answer)
    counted = answer().train()
    for _ in range(5):
        counted(x)
    counted.eval()
    for k in (1, 2):
        got = cases.call(f"eval mode, call {k}", counted, x)
        cases.same(
            f"eval mode, call {k} after 5 training steps",
            got,
            x * 5 / 20,
            {
                "a call in eval mode counts as well": x * (5 + k) / 20,
                "in eval mode the layer forgets how far it has grown": x,
            },
        )


def _in_the_state(cases: Cases, layer: type[nn.Module]) -> None:
    """Restored in the middle, a training ends in the same bits."""
    import magic

    x, y = _random(12, 2, seed=1), _random(12, 2, seed=2)
    model = nn.Sequential(nn.Linear(2, 2), layer()).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = magic.batches(12, size=4, epochs=4, seed=0)
    try:
        run = magic.Run(model, optimizer, (x, y), lambda m, x, y: (m(x) - y).square().sum(1), batches)
        states = [run.initial]
        while states[-1].step < run.steps:
            states.append(run.step(states[-1], run.weights()))
        again = states[5]
        while again.step < run.steps:
            again = run.step(again, run.weights())
    except Exception as refusal:
        raise Wrong(f"right for 25 training steps; but magic.Run refuses the layer: {refusal}") from refusal
    moved = any(not torch.equal(b, states[-1].buffers[name]) for name, b in states[0].buffers.items())
    cases.true("the state's buffers", moved, "no buffer changes in training, so the count is elsewhere")
    same = again.fingerprint() == states[-1].fingerprint()
    cases.true("a training restored at step 5", same, "it does not end as the uninterrupted one does")
