"""SOURCE: the closed form of its paper, and the derivative itself where its assumptions hold."""

import pytest
import torch
from torch import nn

import magic
from magic import baselines
from magic.evidence import source
from tests.evidence.test_baselines import first, gradients, needs, regression
from tests.support import cases

pytestmark = needs("kronfluence")


def flat(blocks):
    """Layer blocks, (rows, out, in + 1), in the order of the parameters: weight, then bias."""
    parts = [x for b in blocks.values() for x in (b[:, :, :-1].flatten(1), b[:, :, -1])]
    return torch.cat(parts, dim=1)


def test_the_formula_of_the_paper_with_dense_matrices():
    run = regression()
    states, layers = cases.states_of(run, 7), ["0", "2"]
    assert [state.step for state in states] == [7, 14] and run.steps == 15
    final = run.train(progress=False)
    states = [states[0], final]
    expected = torch.zeros(3, 30, dtype=torch.float64)
    pulled = gradients(run, final, first(run))
    for state, time in ((final, 0.05 * 4), (states[0], 0.05 * 11)):
        factors = source._factors(run, state, layers, "no classes", 64)
        count = pulled.shape[1]
        dense = torch.zeros(count, count, dtype=torch.float64)
        at = 0
        for left, right, values in factors.values():
            basis = torch.kron(left, right)  # of vec(W with its bias as the last column), row by row
            block = basis @ torch.diag(values.flatten()) @ basis.T
            out, wide = len(left), len(right)
            grid = torch.arange(out * wide).view(out, wide)
            order = torch.cat([grid[:, :-1].flatten(), grid[:, -1]])
            dense[at : at + out * wide, at : at + out * wide] = block[order][:, order]
            at += out * wide
        kept = torch.linalg.matrix_exp(-time * dense)
        share = torch.linalg.lstsq(
            dense, torch.eye(count, dtype=torch.float64) - kept, driver="gelsd"
        ).solution
        null = torch.eye(count, dtype=torch.float64) - torch.linalg.pinv(dense, hermitian=True) @ dense
        share = share + time * null
        expected -= pulled @ share @ gradients(run, state, run.data).T / 30
        pulled = pulled @ kept
    scores = baselines.source(run, first(run), states, batch_size=7)
    torch.testing.assert_close(scores.values, expected, rtol=1e-6, atol=1e-10)


def test_a_short_time_is_one_step_of_gradient_descent():
    """Where nothing has time to bend, what is left is TracIn over the same states."""
    run = regression()
    states = cases.states_of(run, 5)
    scores = baselines.source(run, first(run), states, pace=1e-6).values / 1e-6
    ours = gradients(run, states[-1], first(run))
    expected = torch.zeros_like(scores)
    for state, steps in zip(states, (7, 5, 3), strict=True):
        expected -= 0.05 * steps * ours @ gradients(run, state, run.data).T / 30
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("steps", [300, 12])
def test_the_derivative_of_training_where_the_curvature_is_constant(steps):
    """Logistic regression on whole batches: at its optimum the whole of the influence, before it a part."""
    torch.manual_seed(0)
    n, decay = 500, 0.02
    x = torch.randn(n, 6, dtype=torch.float64) * torch.linspace(0.4, 1.6, 6, dtype=torch.float64)
    y = (torch.rand(n) < (0.3 * x[:, 0] - 0.3 * x[:, 5]).sigmoid()).long()
    model = nn.Sequential(nn.Linear(6, 2)).double()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.8, weight_decay=decay)
    run = magic.Run(model, optimizer, (x, y), cases.loss, magic.batches(n, n, steps))
    states, test = cases.states_of(run, steps // 3), first(run, 8)
    scores = baselines.source(run, test, states).values
    true = magic.attribute(run, cases.measure_on(x, y, 8), progress=False).values
    assert torch.corrcoef(torch.stack([scores.flatten(), true.flatten()]))[0, 1] > 0.98
    ratio = ((scores * true).sum() / (true * true).sum()).item()
    assert 0.8 < ratio < 1.25
    if steps == 12:  # influence functions take the training to its end, and are further off
        whole = baselines.ekfac(run, test, states[-1], damping=decay).values
        assert (scores - true).norm() < 0.6 * (whole - true).norm()


def test_what_does_not_fit_is_told():
    run = regression()
    states = cases.states_of(run, 5)
    with pytest.raises(ValueError, match="pace=0: a positive factor"):
        baselines.source(run, first(run), states, pace=0)
    with pytest.raises(ValueError, match=r"steps \[10, 5\]: give each once"):
        baselines.source(run, first(run), [states[1], states[0]])


@pytest.mark.parametrize("name", ["tied-embedding", "batchnorm-conv", "frozen-and-unused"])
def test_other_layers_and_tied_weights(name):
    run, *_ = cases.build(name)
    final = run.train(progress=False)
    scores = baselines.source(run, first(run), [run.step(run.initial, run.weights()), final])
    assert scores.values.isfinite().all() and scores.values.abs().max() > 0


def test_a_language_model_of_transformers():
    """Its Conv1D layers keep their weights the other way round, and its head shares the embedding's."""
    pytest.importorskip("transformers")
    from tests.experiments import language_sweep

    tokens = torch.randint(0, 12, (500, 25), generator=torch.Generator().manual_seed(0))
    run = language_sweep.language_run(12, tokens, 160, 1e-6, 0.0)
    run.batches, run.hypers = run.batches[:2], run.hypers[:2]
    final = run.train(progress=False)
    small = baselines.source(run, (tokens[:2],), [final], pace=1e-6).values / 1e-6
    layers = source.layers_of(run, final, (tokens[:2],))
    assert "lm_head" in layers and "transformer.h.0.attn.c_attn" in layers
    names = {source._name(run, layer) for layer in layers}
    names |= {name.replace("weight", "bias") for name in names}
    ours, theirs = (
        gradients(run, final, x, [k for k in final.params if k in names]) for x in ((tokens[:2],), (tokens,))
    )
    rate = sum(groups[0]["lr"] for groups in run.hypers)
    assert small.abs().max() > 5e-5
    torch.testing.assert_close(small, -rate * ours @ theirs.T / 500, rtol=1e-3, atol=1e-8)
