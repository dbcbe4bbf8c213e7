"""Every gradient has three witnesses in float64: finite differences, a full unroll, replay."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import magic
from magic.engine.measuring import measured_outputs
from magic.training import muon
from tests.support import cases
from tests.support.unroll import unroll


@pytest.fixture(autouse=True)
def muon_is_not_rounded(monkeypatch):
    """Rounded to bfloat16, a training is a staircase, and no finite difference can tell its slope."""
    monkeypatch.setattr(muon, "PRECISION", torch.float64)


def at_random(n):
    """A point that is not special: weights between 0.5 and 1.5."""
    return 0.5 + torch.rand(n, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def finite_difference(run, measure, at, direction, h):
    """Five-point central difference of the measured outputs along a direction: error O(h⁴) + rounding / h."""

    def f(change):
        return measured_outputs(run, run.train(at + change * direction, progress=False), measure)

    return (8 * (f(h) - f(-h)) - (f(2 * h) - f(-2 * h))) / (12 * h)


def error_against_finite_differences(
    run, measure, scores, examples=(), steps=(3e-5, 1e-4, 1e-3, 1e-5, 1e-6), enough=1e-8
):
    """Largest relative error, along a random direction of all weights and along those of some examples.

    Of a few step sizes the one with the least error counts: large ones are truncated, small ones rounded, and
    where the optimum lies depends on the run. Those after one that is exact enough are not tried."""
    worst, norm = 0.0, scores.values.norm(dim=0).mean()
    dice = torch.Generator().manual_seed(5)
    everything = torch.randn(len(scores.at), generator=dice, dtype=torch.float64).to(scores.at.device)
    for direction in (everything, *torch.eye(len(everything)).to(everything)[list(examples)]):
        slope = scores.values @ direction
        assert slope.norm() > 1e-3 * norm, "degenerate: no influence along this direction"
        least = float("inf")
        for h in steps:
            found = finite_difference(run, measure, scores.at, direction, h)
            least = min(least, ((found - slope).norm() / slope.norm()).item())
            if least <= enough:
                break
        worst = max(worst, least)
    return worst


@pytest.mark.parametrize("name", cases.CASES)
def test_against_finite_differences(name, device):
    run, *_ = cases.build(name, device=device)
    measure = cases.measure_on(*run.data)
    scores = magic.attribute(run, measure, progress=False)
    assert scores.values.isfinite().all()
    error = error_against_finite_differences(run, measure, scores)
    print(f"{name:<24} {error:.1e}")
    assert error <= 1e-8


# The two ways to normalise differ in the weighted loss alone, so the second is tried with each kind of model
# and of step, and not with each optimizer.
BY_WEIGHTS = (
    "sgd", "adamw-onecycle", "batchnorm-conv", "batchnorm-now-and-then", "dropout", "attention",
    "tied-embedding", "clip-partly", "clip-value", "accumulate", "accumulate-batchnorm",
    "accumulate-now-and-then",
)  # fmt: skip


@pytest.mark.usefixtures("unwitnessed")
@pytest.mark.parametrize(
    "name, normalize",
    [(name, "batch") for name in cases.CASES] + [(name, "weights") for name in BY_WEIGHTS],
)
def test_against_a_full_unroll(name, normalize):
    run, model, optimizer, scheduler = cases.build(name, normalize=normalize)
    measure, at = cases.measure_on(*run.data), at_random(run.n)
    scores = magic.attribute(run, measure, at=at, plan=magic.plan(run, states=3), progress=False)
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no second derivative
        truth = unroll(
            model, optimizer, scheduler, run.data, cases.loss, cases.order(), measure, at, run.seed,
            normalize, clip=run.clip and (run.clip.kind, run.clip.limit), accumulate=run.accumulate,
        )  # fmt: skip
    assert truth.norm() > 1e-6, "degenerate: no influence at all"
    error = ((scores.values - truth).norm() / truth.norm()).item()
    print(f"{name:<24} {error:.1e}")
    assert error <= 1e-10


@pytest.mark.usefixtures("unwitnessed")
@pytest.mark.parametrize("name", ["batchnorm-adamw", "dropout", "sgd-onecycle", "untouched-embedding"])
def test_the_schedule_does_not_change_the_answer(name):
    run, *_ = cases.build(name)
    measure = cases.measure_on(*run.data)
    everything = magic.attribute(run, measure, progress=False, plan=magic.plan(run, states=run.steps))
    assert everything.values.abs().max(dim=1).values.min() > 1e-4, "degenerate: no influence"
    for states in (1, 2, 5):
        scores = magic.attribute(run, measure, progress=False, plan=magic.plan(run, states=states))
        assert scores.plan.extra > 0
        assert torch.equal(scores.values, everything.values)


@pytest.mark.usefixtures("unwitnessed")
@pytest.mark.parametrize("name", ["groupnorm-conv", "batchnorm-conv", "attention", "lstm", "dropout"])
def test_targets_together_are_targets_alone(name):
    run, *_ = cases.build(name)
    together = magic.attribute(run, cases.measure_on(*run.data), progress=False).values
    for k in range(3):
        alone = magic.attribute(
            run, lambda model, k=k: cases.measure_on(*run.data)(model)[k : k + 1], progress=False
        ).values
        assert ((alone[0] - together[k]).norm() / together[k].norm()) < 1e-12


def test_an_untouched_embedding_row_under_adam():
    """√v has no finite slope at v = 0, where no batch has been: the derivative there is 0, not NaN."""
    run, *_ = cases.build("untouched-embedding")
    final = run.train(progress=False)
    untouched = final.slots["embed.weight"]["exp_avg_sq"].sum(1) == 0
    assert 5 < untouched.sum() < 25
    scores = magic.attribute(run, cases.measure_on(*run.data), progress=False)
    assert scores.values.isfinite().all() and scores.values.abs().max() > 0


def test_running_statistics_carry_derivative():
    """What an eval-mode measure reads of BatchNorm depends on the data weights; dropping that is wrong."""
    run, *_ = cases.build("batchnorm-sgd")
    measure = cases.measure_on(*run.data)

    def in_train_mode(model):
        model.train()
        return measure(model)

    scores = magic.attribute(run, measure, progress=False).values
    other = magic.attribute(run, in_train_mode, progress=False).values
    assert ((scores - other).norm() / scores.norm()) > 0.02
    fresh = magic.attribute(run, in_train_mode, progress=False)
    assert error_against_finite_differences(run, in_train_mode, fresh) <= 1e-8


def test_an_example_that_is_in_a_batch_twice():
    torch.manual_seed(0)
    model = cases.mlp().double()
    twice = torch.tensor([[0, 0, 1, 2], [3, 2, 2, 2], [0, 1, 2, 3]])
    run = magic.Run(model, cases.sgd(momentum=0.9)(model), cases.data(), cases.loss, twice)
    measure = cases.measure_on(*run.data)
    scores = magic.attribute(run, measure, progress=False)
    assert error_against_finite_differences(run, measure, scores, (0, 1, 2)) <= 1e-8
    assert (scores.values[:, 4:] == 0).all()


def test_float32_is_float64_rounded():
    exact = magic.attribute(cases.build("adamw")[0], cases.measure_on(*cases.data()), progress=False)
    short = cases.data(torch.float32)
    rounded = magic.attribute(
        cases.build("adamw", torch.float32)[0], cases.measure_on(*short), progress=False
    )
    assert rounded.values.dtype == torch.float32
    assert ((rounded.values - exact.values).norm() / exact.values.norm()) < 1e-3


def test_the_witness_catches_pytorchs_own_mistakes(monkeypatch):
    """The fused weight normalisation differentiates twice without error, and wrongly."""
    v = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    g = torch.rand(3, 1, dtype=torch.float64, requires_grad=True)
    if torch.autograd.gradgradcheck(
        lambda v, g: torch._weight_norm(v, g, 0).sin(), (v, g), raise_exception=False
    ):
        pytest.skip("this PyTorch differentiates it right")
    monkeypatch.delitem(magic.kernels.replace.REWRITTEN, torch._weight_norm)
    run, *_ = cases.build("weightnorm")
    with pytest.raises(magic.NotDifferentiable, match="a finite difference gives"):
        magic.attribute(run, cases.measure_on(*run.data), progress=False)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_eps_root(amsgrad):
    """Under the root; by finite differences and a full unroll, and smoother than without."""

    def built(eps_root):
        torch.manual_seed(0)
        model = cases.mlp().double()
        group = {"params": list(model.parameters()), "eps_root": eps_root}
        optimizer = torch.optim.AdamW([group], lr=1e-2, amsgrad=amsgrad)
        return magic.Run(model, optimizer, cases.data(), cases.loss, cases.order()), model, optimizer

    run, model, optimizer = built(1e-4)
    measure = cases.measure_on(*run.data)
    scores = magic.attribute(run, measure, progress=False)
    assert error_against_finite_differences(run, measure, scores) <= 1e-8
    truth = unroll(
        model, optimizer, None, run.data, cases.loss, cases.order(), measure, run.weights(), run.seed
    )
    assert ((scores.values - truth).norm() / truth.norm()) <= 1e-10
    plain = built(0.0)[0]
    assert plain.train(progress=False).fingerprint() != run.train(progress=False).fingerprint()
    way = magic.smoothness.directions(run.n, 0.2, 1)[0]
    assert magic.smoothness.metasmoothness(run, way) > magic.smoothness.metasmoothness(plain, way)


def test_eps_root_is_adams():
    model = cases.mlp().double()
    for optimizer in (
        torch.optim.SGD([{"params": model.parameters(), "eps_root": 1e-4}], lr=0.1),
        torch.optim.Adam([{"params": model.parameters(), "eps_root": -1.0}]),
    ):
        with pytest.raises(ValueError, match="eps_root="):
            magic.Run(model, optimizer, cases.data(), cases.loss, cases.order())
