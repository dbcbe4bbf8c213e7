"""What real training recipes contain: clipping, accumulation, weights per token.

That each is exact and has the bits of the plain loop is tested with all other cases (tests/support/cases.py).
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import magic
from magic.training import clipping
from magic.training.determinism import seed_step
from tests.engine.test_exact import error_against_finite_differences
from tests.support import cases

N, L, WORDS = 12, 5, 7


def language_run(dtype=torch.float64, normalize="batch", **options):
    """Twelve sentences of six words through an embedding and a recurrent layer; a loss for each next word."""
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.lstm = nn.Embedding(WORDS, 6), nn.LSTM(6, 8, batch_first=True)
            self.head, self.drop = nn.Linear(8, WORDS), nn.Dropout(0.1)

        def forward(self, words):
            return self.head(self.drop(self.lstm(self.embed(words))[0]))

    words = torch.randint(WORDS, (N, L + 1))
    model = Model().to(dtype)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    order = magic.batches(N, 4, 3, seed=1)
    return magic.Run(model, optimizer, (words,), per_token, order, normalize=normalize, **options), model


def per_token(model, words):
    logits = model(words[:, :-1]).transpose(1, 2)
    return F.cross_entropy(logits, words[:, 1:], reduction="none")


def measure_on(words):
    return lambda model: per_token(model, words[:2]).sum(1)


@pytest.mark.parametrize("options", [{}, {"clip": 1.0}, {"accumulate": 2}, {"normalize": "weights"}])
def test_weights_per_token_are_exact(options):
    run, _ = language_run(**options)
    assert run.shape == (N, L) and "L=5" in repr(run)
    dice = torch.Generator().manual_seed(4)
    at = 0.5 + torch.rand(N, L, generator=dice, dtype=torch.float64)
    scores = magic.attribute(run, measure_on(*run.data), at=at, progress=False)
    assert scores.values.shape == (2, N, L)

    # the same numbers with one axis for all tokens of all examples
    flat = SimpleNamespace(values=scores.values.flatten(1), at=at.flatten())

    class FlatRun:
        train = staticmethod(lambda weights, progress: run.train(weights.view(N, L), progress=progress))

        def __getattr__(self, name):
            return getattr(run, name)

    error = error_against_finite_differences(FlatRun(), scores.measure, flat, examples=(17, 59))
    assert error <= 1e-8
    verified = magic.verify(scores, progress=False)
    assert verified.ok


def test_the_bits_of_the_plain_loop_with_a_loss_per_token():
    run, model = language_run(torch.float32)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for t, indices in enumerate(run.batches):
        seed_step(0, t)
        optimizer.zero_grad()
        (per_token(model, run.data[0][indices]).sum() / len(indices)).backward()
        optimizer.step()
    trained = run.model(run.train(progress=False)).state_dict()
    assert all(torch.equal(x, trained[name]) for name, x in model.state_dict().items())


def test_scores_of_examples_are_the_sums_over_their_tokens():
    run, _ = language_run()
    scores = magic.attribute(run, measure_on(*run.data), progress=False)
    whole = scores.per_example()
    assert whole.values.shape == (2, N) and whole.per_example() is whole
    model = language_run()[1]
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)

    def per_sentence(model, words):
        return per_token(model, words).sum(1)

    other = magic.Run(model, optimizer, run.data, per_sentence, run.batches)
    truth = magic.attribute(other, measure_on(*run.data), progress=False)
    assert other.shape == (N,) and truth.values.abs().max() > 1e-3
    assert (whole.values - truth.values).abs().max() <= 1e-12 * truth.values.abs().max()
    assert scores.top(0, 2).equals(whole.top(0, 2))
    assert torch.allclose(scores.removal_effect([3, 5]), whole.removal_effect([3, 5]), rtol=1e-12)
    weights = magic.subsets.without(N, [[3, 5], [1]])
    assert torch.allclose(scores.predict(weights), whole.predict(weights), rtol=1e-12)
    assert torch.allclose(scores.predict(run.weights(weights[0])), whole.predict(weights[0]), rtol=1e-12)
    assert magic.verify(whole, progress=False).ok
    assert "tokens of each L" in dict(scores.rows())


def test_spans_are_removed_and_what_that_does_is_predicted(tmp_path):
    run, _ = language_run()
    measure = measure_on(*run.data)
    scores = magic.attribute(run, measure, progress=False)
    weights = magic.subsets.spans(run.shape, [[(0, 1, 3)], [(0, 1, 3), (7, 0, L)], [(2, 4, 5)], []])
    assert weights.shape == (4, N, L) and weights.sum((1, 2)).tolist() == [58, 53, 59, 60]
    bank = magic.Bank(tmp_path / "bank.sqlite", run, measure)
    true = magic.outputs(run, measure, weights, bank=bank, progress=False)
    assert len(bank) == 4 and torch.equal(bank.rows()[0].float(), weights)
    assert torch.equal(true[1], magic.outputs(run, measure, weights[1], bank=bank, progress=False))
    predicted, come = (x[[0, 2]] - x[3] for x in (scores.predict(weights), true))
    assert torch.equal(true[3], scores.outputs) and come.abs().min() > 1e-6
    assert torch.nn.functional.cosine_similarity(predicted.flatten(), come.flatten(), dim=0) > 0.95
    removed = magic.outputs(run, measure, magic.subsets.without(N, [[7]]), bank=bank, progress=False)
    without = run.weights().index_fill(0, torch.tensor([7]), 0.0)
    final = run.train(without, progress=False)
    assert torch.equal(removed[0], run.measured(measure, final.params, final.buffers).detach())
    path = tmp_path / "scores.npz"
    scores.save(path)
    assert torch.equal(magic.Attribution.load(path, run, measure).values, scores.values)


def test_bad_spans():
    for bad, error in (((12, 0, 1), IndexError), ((0, 0, 6), IndexError), ((0, 2, 2), ValueError)):
        with pytest.raises(error):
            magic.subsets.spans((N, L), [[bad]])


def test_what_is_refused_of_tokens():
    run, model = language_run()
    with pytest.raises(ValueError, match=r"one per token is \(12, 5\)"):
        run.train(torch.ones(N, L + 1))
    with pytest.raises(ValueError, match="a token cannot be left out of its batch"):
        magic.outputs(
            run, measure_on(*run.data), magic.subsets.spans(run.shape, [[(0, 1, 2)]])[0], how="rows"
        )
    with pytest.raises(ValueError, match="scores of tokens"):
        magic.curvature(magic.attribute(run, measure_on(*run.data), progress=False))
    with pytest.raises(ValueError, match="tokens of one example have different weights"):
        at = torch.rand(N, L) + 0.5
        magic.attribute(run, measure_on(*run.data), at=at, progress=False).per_example()

    def shorter_later(model, words):
        return per_token(model, words if words[0, 0] == run.data[0][run.batches[0][0], 0] else words[:, :-1])

    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match=r"step [1-9]: loss returned \(4, 4\).*pad the examples"):
        magic.Run(model, optimizer, run.data, shorter_later, run.batches).train(progress=False)
    other, *_ = cases.build("sgd")
    with pytest.raises(ValueError, match=r"one per example is \(40,\)"):
        other.train(torch.ones(40, 3))


def test_clipping_is_on_in_some_steps():
    run, *_ = cases.build("clip-partly")
    state, on = run.initial, []
    for t in range(run.steps):
        leaves = {name: p.detach().requires_grad_() for name, p in state.params.items()}
        found = run.gradient(leaves, state.buffers, torch.ones(10, dtype=torch.float64), t)
        on.append(run.clip.on(found.by_name))
        state = run.step(state, run.weights())
    assert 3 < sum(on) < 13
    scores = magic.attribute(run, cases.measure_on(*run.data), progress=False)
    assert scores.health.clipped == sum(on)
    assert f"in {sum(on)} of 16 steps" in str(scores.health)


@pytest.mark.parametrize("clip", [("norm", 0.5), ("norm", 50.0), ("value", 0.1)])
def test_the_adjoint_of_clipping_is_autograds(clip):
    dice = torch.Generator().manual_seed(0)
    grads = {
        "a": torch.randn(3, 4, generator=dice),
        "b": torch.randn((), generator=dice),
        "c": torch.zeros(2),
    }
    grads = {name: g.double().requires_grad_() for name, g in grads.items()}
    how = clipping.read(clip)
    if clip[0] == "value":
        clipped = {name: g.clamp(-clip[1], clip[1]) for name, g in grads.items()}
    else:
        norm = torch.cat([g.flatten() for g in grads.values()]).norm()
        clipped = {name: g * (clip[1] / (norm + 1e-6)).clamp(max=1.0) for name, g in grads.items()}
    cotangents = {name: torch.randn(5, *g.shape, generator=dice).double() for name, g in grads.items()}
    truth = [
        torch.autograd.grad(
            list(clipped.values()),
            list(grads.values()),
            [c[k] for c in cotangents.values()],
            retain_graph=True,
        )
        for k in range(5)
    ]
    plain = {name: g.detach() for name, g in grads.items()}
    assert all(torch.equal(x, clipped[name]) for name, x in how.clip(plain, plain).items())
    how.adjoint(plain)(cotangents)
    for row, name in enumerate(grads):
        assert torch.allclose(
            cotangents[name], torch.stack([one[row] for one in truth]), rtol=1e-12, atol=1e-15
        )


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"clip": 0.0}, ValueError, "a positive, finite number"),
        ({"clip": -1.0}, ValueError, "a positive, finite number"),
        ({"clip": float("inf")}, ValueError, "a positive, finite number"),
        ({"clip": ("value", 0)}, ValueError, "a positive, finite number"),
        ({"clip": "1.0"}, TypeError, "the largest norm of all gradients"),
        ({"clip": ("l1", 1.0)}, TypeError, "the largest norm of all gradients"),
        ({"accumulate": 3}, ValueError, r"accumulate=3 does not divide batches\[0\], which has 10 examples"),
        ({"accumulate": 0}, ValueError, "in how many parts"),
        ({"accumulate": 2.0}, ValueError, "in how many parts"),
    ],
)
def test_what_is_refused_of_recipes(options, error, says):
    with pytest.raises(error, match=says):
        cases.build("sgd", **options)


def test_a_parameter_outside_the_optimizer_cannot_be_clipped_with():
    model = cases.mlp()
    optimizer = torch.optim.SGD(list(model.parameters())[:2], 0.1)
    data = cases.data(torch.float32)
    with pytest.raises(ValueError, match=r"'2.weight' has one without being held by the optimizer"):
        magic.Run(model, optimizer, data, cases.loss, cases.order(), clip=1.0)
    magic.Run(model, optimizer, data, cases.loss, cases.order(), clip=("value", 1.0))


def test_rows_cannot_be_left_out_of_parts():
    run, *_ = cases.build("sgd", accumulate=2)
    with pytest.raises(ValueError, match="accumulate=2 divides each batch into parts of one length"):
        magic.retrain(run, [0], how="rows", progress=False)


def test_accumulated_gradients_give_the_scores_of_the_whole_batch():
    whole, *_ = cases.build("groupnorm-conv")
    measure = cases.measure_on(*whole.data)
    truth = magic.attribute(whole, measure, progress=False).values
    parts, *_ = cases.build("groupnorm-conv", accumulate=5)
    found = magic.attribute(parts, measure, progress=False, plan=magic.plan(parts, states=3))
    assert truth.norm() > 1e-3, "degenerate: no influence at all"
    assert (found.values - truth).norm() <= 1e-10 * truth.norm()
    again = magic.attribute(parts, measure, progress=False, plan=magic.plan(parts, states=16))
    assert torch.equal(again.values, found.values)


def test_a_trace_in_parts_takes_the_memory_of_one():
    """Wide activations, few parameters: the trace of ten parts holds about a tenth."""

    def wide():
        return nn.Sequential(nn.Linear(8, 2000), nn.GELU(), nn.Linear(2000, 3))

    sizes = {}
    for accumulate in (1, 10):
        torch.manual_seed(0)
        model = wide()
        generator = torch.Generator().manual_seed(1)
        data = torch.randn(400, 8, generator=generator), torch.randint(3, (400,), generator=generator)
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        order = magic.batches(400, 400, 2)
        run = magic.Run(model, optimizer, data, cases.loss, order, accumulate=accumulate)
        sizes[accumulate] = magic.plan(run, targets=1).trial.trace_bytes
    assert 0 < sizes[10] < 0.2 * sizes[1]
    assert magic.Run(model, optimizer, data, cases.loss, order, clip=1.0).identity() != run.identity()
