"""Baselines: each estimate is what its paper says, by another way to the same numbers, and is of some use."""

import functools
import gc
import importlib.util
import logging
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import magic
from magic import baselines
from magic.evidence import ekfac
from magic.evidence.classes import Classes, classes_of
from magic.evidence.estimates import quietly
from tests.support import cases


def needs(package):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


METHODS = {
    "similarity": lambda run, test, state: baselines.gradient_similarity(run, test, state),
    "cosine": lambda run, test, state: baselines.gradient_similarity(run, test, state, cosine=True),
    "tracin": lambda run, test, state: baselines.tracin(run, test, [state]),
    "trak": lambda run, test, state: baselines.trak(run, test, [state]),
    "ekfac": lambda run, test, state: baselines.ekfac(run, test, state),
    "source": lambda run, test, state: baselines.source(run, test, [state]),
    "dvemb": lambda run, test, state: baselines.dvemb(run, test, pace=0.3, progress=False),
    "embeddings": lambda run, test, state: baselines.embeddings(run, test, state),
}
LIBRARY = {"trak": "trak", "ekfac": "kronfluence", "source": "kronfluence"}
ALL = [pytest.param(name, marks=[needs(LIBRARY[name])] if name in LIBRARY else []) for name in METHODS]


def first(run, count=3):
    return tuple(x[:count] for x in run.data)


def gradients(run, state, examples, names=None):
    """The flat gradient of each example's loss in eval mode, as a user would take it."""
    model = run.model(state)
    named = dict(model.named_parameters())
    inputs = [named[name] for name in names or state.params]
    rows = []
    for example in zip(*examples, strict=True):
        loss = run.loss(model, *(x.unsqueeze(0) for x in example)).sum()
        found = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([g.flatten() for g in found]))
    return torch.stack(rows)


@pytest.fixture(scope="module")
def scored(digits):
    """The scores of a method on the digits, computed once."""
    run, test, states, _ = digits
    return functools.cache(lambda name: METHODS[name](run, test, states[-1]))


def agreement(scores, exact):
    """The mean over targets of the rank correlation with the exact scores."""
    ranks = [x.values.argsort(1).argsort(1).double() for x in (scores, exact)]
    return F.cosine_similarity(*(r - r.mean() for r in ranks)).mean()


@pytest.mark.parametrize("name", ALL)
def test_an_attribution_like_any_other(digits, scored, name):
    run, _, states, exact = digits
    scores = scored(name)
    assert isinstance(scores, magic.Attribution) and scores.values.shape == (20, 300)
    assert scores.values.dtype == run.dtype and scores.values.isfinite().all()
    assert torch.equal(scores.outputs, exact.outputs) and torch.equal(scores.at, exact.at)
    assert scores.run is run and torch.equal(scores.measure(run.model(states[-1])), exact.outputs)
    assert agreement(scores, exact) > 0.05
    assert magic.lds(scores, drop=0.1, subsets=10, progress=False).mean > 0.1


@pytest.mark.parametrize("name", ALL)
def test_an_example_helps_itself(digits, name):
    run, _, states, _ = digits
    own = run.loss(run.model(states[-1]), *run.data).detach().argsort(descending=True)[:10]
    values = METHODS[name](run, tuple(x[own] for x in run.data), states[-1]).values
    itself = values.gather(1, own.unsqueeze(1))
    assert (itself < 0).all()
    assert ((values < itself).sum(dim=1) <= 3).all()


@pytest.mark.parametrize("name", ALL)
def test_the_same_again_and_nothing_left_behind(digits, scored, name, capfd, recwarn):
    run, test, states, _ = digits
    expected = scored(name).values
    capfd.readouterr(), recwarn.clear(), torch.rand(3)
    handlers, generator = logging.root.handlers[:], torch.get_rng_state()
    assert torch.equal(METHODS[name](run, test, states[-1]).values, expected)
    assert capfd.readouterr() == ("", "") and not recwarn.list
    assert logging.root.handlers == handlers and torch.equal(torch.get_rng_state(), generator)


def test_objects_are_frozen_for_a_call_only():
    """Those that the user has frozen stay so, and no others with them."""
    with quietly():
        assert gc.get_freeze_count() > 0
    assert gc.get_freeze_count() == 0
    gc.freeze()
    try:
        count, later = gc.get_freeze_count(), [[] for _ in range(1000)]
        with quietly():
            assert gc.get_freeze_count() <= count
        assert 0 < gc.get_freeze_count() <= count and len(later) == 1000
    finally:
        gc.unfreeze()


@pytest.mark.parametrize("name", ["sgd", "batchnorm-adamw", "dropout", "tied-embedding", "frozen-and-unused"])
def test_gradient_similarity_is_the_double_loop(name):
    run, *_ = cases.build(name)
    state = run.train(progress=False)
    ours, theirs = gradients(run, state, first(run)), gradients(run, state, run.data)
    products = torch.stack([torch.stack([g @ h for h in theirs]) for g in ours])
    assert products.abs().min() > 0
    scores = baselines.gradient_similarity(run, first(run), state, batch_size=2)
    torch.testing.assert_close(scores.values, -products / run.n, rtol=1e-9, atol=1e-12)
    cosine = products / (ours.norm(dim=1).unsqueeze(1) * theirs.norm(dim=1))
    scores = baselines.gradient_similarity(run, first(run), state, cosine=True, batch_size=7)
    torch.testing.assert_close(scores.values, -cosine, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["sgd", "two-groups-onecycle"])
def test_tracin_is_the_loop(name):
    run, *_ = cases.build(name)
    states = [run.initial, *cases.states_of(run, 5)]
    assert [state.step for state in states] == [0, 5, 10, 15]
    expected = torch.zeros(3, run.n, dtype=torch.float64)
    for state, t in zip(states, [0, 4, 9, 14], strict=True):
        for name, group in run.group_of.items():
            ours, theirs = (gradients(run, state, x, [name]) for x in (first(run), run.data))
            expected -= run.hypers[t][group]["lr"] * ours @ theirs.T
    expected *= run.steps / (4 * run.n)
    scores = baselines.tracin(run, first(run), states, batch_size=16)
    torch.testing.assert_close(scores.values, expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(scores.outputs, magic.engine.replay.measured_outputs(run, states[-1], scores.measure))


def test_tracin_becomes_exact_as_the_rate_goes_to_zero():
    torch.manual_seed(0)
    model = cases.mlp().double()
    run = magic.Run(model, cases.sgd(1e-6)(model), cases.data(), cases.loss, cases.order())
    exact = magic.attribute(run, cases.measure_on(*run.data), progress=False)
    scores = baselines.tracin(run, first(run), cases.states_of(run, 4))
    assert exact.values.abs().max() > 1e-9
    torch.testing.assert_close(scores.values, exact.values, rtol=1e-3, atol=1e-12)


def test_one_by_one_where_vmap_cannot():
    run, *_ = cases.build("lstm")
    state = run.train(progress=False)
    with pytest.warns(UserWarning, match="one by one"):
        scores = baselines.gradient_similarity(run, first(run), state)
    expected = -gradients(run, state, first(run)) @ gradients(run, state, run.data).T / run.n
    torch.testing.assert_close(scores.values, expected, rtol=1e-9, atol=1e-12)


@needs("trak")
@pytest.mark.parametrize("dim", [12, 120])
def test_trak_is_the_formula_of_the_paper(digits, dim):
    from trak.projectors import BasicProjector, ProjectionType

    run, test, states, _ = digits
    states = states[-2:]
    expected = torch.zeros(20, 300)
    for number, state in enumerate(states):
        model = run.model(state)
        count = sum(p.numel() for p in model.parameters())
        projector = BasicProjector(count, dim, 7, ProjectionType.normal, "cpu", model_id=number)
        features = []
        for x, y in (run.data, test):
            p = model(x).softmax(1).gather(1, y.unsqueeze(1)).squeeze(1)
            margins, params = (p / (1 - p)).log(), list(model.parameters())
            rows = [torch.autograd.grad(margin, params, retain_graph=True) for margin in margins]
            rows = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
            features.append(projector.project(rows, number).double())
        train, of_test = features
        expected += (of_test @ torch.linalg.inv(train.T @ train) @ train.T).float() / len(states)
    wrong = torch.stack([1 - run.loss(run.model(state), *run.data).neg().exp() for state in states]).mean(0)
    expected *= wrong * (run.loss(run.model(states[-1]), *test).neg().exp() - 1).unsqueeze(1)
    scores = baselines.trak(run, test, states, dim=dim, seed=7, batch_size=64)
    assert scores.values.abs().max() > 1e-4
    assert (scores.values - expected).abs().max() < 1e-3 * scores.values.abs().max()


@needs("trak")
def test_trak_on_digits(digits):
    run, test, states, exact = digits
    scores = baselines.trak(run, test, states)
    assert agreement(scores, exact) > 0.1
    assert not torch.equal(scores.values, baselines.trak(run, test, states, seed=1).values)
    again = baselines.trak(run, test, states, batch_size=77).values
    assert (scores.values - again).abs().max() < 1e-3 * again.abs().max()


@needs("trak")
def test_trak_takes_the_trained_parameters():
    run, *_ = cases.build("frozen-and-unused")
    scores = baselines.trak(run, first(run), run.train(progress=False))
    assert scores.values.dtype == torch.float64 and scores.values.abs().max() > 0


def regression():
    torch.manual_seed(0)
    x = torch.randn(30, 4, dtype=torch.float64)
    y = (x @ torch.randn(4, 2, dtype=torch.float64)).sin()
    model = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 2)).double()

    def loss(model, x, y):
        return (model(x) - y).square().sum(1)

    return magic.Run(model, cases.sgd(0.05)(model), (x, y), loss, magic.batches(30, 10, 5))


@needs("kronfluence")
def test_ekfac_strategies_that_can_be_computed_by_hand():
    """No classes, so the Fisher matrix is the empirical one, which draws nothing."""
    run = regression()
    state = run.train(progress=False)
    ours, theirs = gradients(run, state, first(run)), gradients(run, state, run.data)
    scores = baselines.ekfac(run, first(run), state, strategy="identity", batch_size=7)
    torch.testing.assert_close(scores.values, -ours @ theirs.T / 30, rtol=1e-9, atol=1e-12)
    fisher = theirs.square().mean(0)
    scores = baselines.ekfac(run, first(run), state, strategy="diagonal", damping=0.01, batch_size=7)
    torch.testing.assert_close(scores.values, -ours / (fisher + 0.01) @ theirs.T / 30, rtol=1e-9, atol=1e-12)


@needs("kronfluence")
def test_ekfac_is_the_exact_influence_where_that_is_known():
    """Logistic regression, trained to convergence: convex, and the true Fisher matrix is the Hessian."""
    torch.manual_seed(0)
    n, decay = 500, 0.02
    x = torch.randn(n, 6, dtype=torch.float64) * torch.linspace(0.4, 1.6, 6, dtype=torch.float64)
    y = (torch.rand(n) < (x[:, 0] - x[:, 5]).sigmoid()).long()
    model = nn.Sequential(nn.Linear(6, 2)).double()
    optimizer = torch.optim.SGD(model.parameters(), 0.5, momentum=0.8, weight_decay=decay)
    run = magic.Run(model, optimizer, (x, y), cases.loss, magic.batches(n, n, 300))
    state, test = run.train(progress=False), first(run, 8)

    def objective(weight, bias):
        squares = weight.square().sum() + bias.square().sum()
        return F.cross_entropy(x @ weight.T + bias, y) + decay / 2 * squares

    params = tuple(state.params.values())
    slope = torch.autograd.functional.jacobian(objective, params)
    assert max(g.abs().max() for g in slope) < 1e-9, "not converged"
    blocks = torch.autograd.functional.hessian(objective, params)
    sizes = [p.numel() for p in params]
    rows = [[b.reshape(r, -1) for b in row] for row, r in zip(blocks, sizes, strict=True)]
    curvature = torch.cat([torch.cat(row, dim=1) for row in rows])
    ours, theirs = gradients(run, state, test), gradients(run, state, run.data)
    exact = -ours @ torch.linalg.solve(curvature, theirs.T) / n
    with pytest.warns(UserWarning, match="powers of ten"):  # training forgets its beginning, as it should
        true = magic.attribute(run, cases.measure_on(x, y, 8), progress=False).values
    torch.testing.assert_close(true, exact, rtol=1e-6, atol=1e-12)
    for strategy, least in (("ekfac", 0.99), ("kfac", 0.97)):
        scores = baselines.ekfac(run, test, state, damping=decay, strategy=strategy).values
        assert torch.corrcoef(torch.stack([scores.flatten(), exact.flatten()]))[0, 1] > least
        assert 0.9 < (scores * exact).sum() / (exact * exact).sum() < 1.1


@needs("kronfluence")
@pytest.mark.parametrize("name", ["batchnorm-conv", "frozen-and-unused"])
def test_ekfac_takes_the_layers_it_can(name):
    run, *_ = cases.build(name)
    scores = baselines.ekfac(run, first(run), run.train(progress=False))
    assert scores.values.isfinite().all() and scores.values.abs().max() > 0


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.layer(self.layer(x).tanh()).tanh())


@pytest.mark.parametrize(
    ("model", "word"),
    [
        (Twice(), "'layer' is called more than once"),
        (nn.Linear(8, 3), "contains none"),
        (None, "contains none"),
    ],
)
def test_ekfac_refuses_layers(model, word):
    if model is None:
        model = nn.Sequential(nn.Unflatten(1, (1, 8)), nn.Conv1d(1, 3, 8), nn.Flatten())
    model = model.double()
    run = magic.Run(model, cases.sgd()(model), cases.data(), cases.loss, cases.order())
    with pytest.raises(ValueError, match=word):
        baselines.ekfac(run, first(run), run.initial)


def test_trak_refuses_what_is_no_classification():
    run = regression()
    with pytest.raises(ValueError, match=r"TRAK needs .*data\[1\] is torch.float64"):
        baselines.trak(run, first(run), run.initial)
    torch.manual_seed(0)
    model = cases.mlp().double()

    def smoothed(model, x, y):
        return F.cross_entropy(model(x), y, reduction="none", label_smoothing=0.1)

    run = magic.Run(model, cases.sgd()(model), cases.data(), smoothed, cases.order())
    with pytest.raises(ValueError, match="the loss is not the cross-entropy"):
        baselines.trak(run, first(run), run.initial)
    run, *_ = cases.build("sgd")
    for dim in (0, 41):
        with pytest.raises(ValueError, match=f"dim={dim}: .* between 1 and n=40"):
            baselines.trak(run, first(run), run.initial, dim=dim)


@pytest.mark.parametrize(("name", "package"), [("trak", "traker"), ("ekfac", "kronfluence")])
def test_a_missing_library_is_named(monkeypatch, name, package):
    for module in [m for m in sys.modules if m.partition(".")[0] in ("trak", "kronfluence")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, LIBRARY[name], None)
    run, *_ = cases.build("sgd")
    with pytest.raises(ImportError, match=rf"needs {package}: pip install 'magic-attribution\[baselines\]'"):
        METHODS[name](run, first(run), run.initial)


@pytest.mark.parametrize("method", [baselines.tracin, baselines.trak])
def test_no_states(method):
    run, *_ = cases.build("sgd")
    with pytest.raises(ValueError, match="states is empty"):
        method(run, first(run), [])


def test_bad_input():
    run, *_ = cases.build("sgd")
    x, y = first(run)
    for test in [(x,), (x, y[:2]), (x[:, :4], y), (x[:0], y[:0]), (x, y[0]), (y, x)]:
        with pytest.raises(ValueError, match="test must be tensors like the run's data"):
            baselines.gradient_similarity(run, test, run.initial)
    with pytest.raises(ValueError, match="batch_size=0"):
        baselines.gradient_similarity(run, (x, y), run.initial, batch_size=0)
    with pytest.raises(TypeError, match="a list is no State"):
        baselines.gradient_similarity(run, (x, y), [run.initial])
    other, *_ = cases.build("lstm")
    with pytest.raises(ValueError, match="of another run"):
        baselines.tracin(run, (x, y), [run.initial, other.initial])
    with pytest.raises(ValueError, match="strategy='kronecker': choose one of ekfac"):
        baselines.ekfac(run, (x, y), run.initial, strategy="kronecker")
    maximizes, *_ = cases.build("sgd-maximize")
    with pytest.raises(ValueError, match="maximizes its loss"):
        baselines.gradient_similarity(maximizes, (x, y), maximizes.initial)
    dataset = torch.utils.data.TensorDataset(*run.data)
    model = cases.mlp().double()
    run = magic.Run(model, cases.sgd()(model), dataset, cases.loss, cases.order())
    with pytest.raises(TypeError, match="is a TensorDataset; baselines take tensors"):
        baselines.gradient_similarity(run, (x, y), run.initial)


def language(per_token=True, kind="mean", labelled=False):
    """A small GPT-2 and its run over 24 sequences of 7 tokens, and a test with a target in each sequence."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=6, n_embd=8, n_layer=1, n_head=2, initializer_range=0.3,
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).double()
    tokens = torch.randint(11, (24, 7), generator=torch.Generator().manual_seed(1))
    labels = tokens.clone()
    labels[:, 3] = -100
    data, loss = (tokens, labels) if labelled else (tokens,), magic.text.loss(kind, per_token=per_token)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    run = magic.Run(model, optimizer, data, loss, magic.batches(24, 8, 4))
    asked = labels[:4].clone()
    asked[:, :5] = -100
    return run, (tokens[:4], asked) if labelled else (tokens[:4],)


def by_hand(run, state, batch, of, names):
    """(B, ...): gradients of each example's number of(log p of its targets, mask), one by one."""
    rows = []
    for example in zip(*batch, strict=True):
        model = run.model(state)
        named, labels = dict(model.named_parameters()), example[-1][1:]
        logits = model(example[0][None, :-1]).logits[0][labels != -100]
        p = logits.softmax(-1).gather(1, labels[labels != -100][:, None])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(of(p), [named[k] for k in names])]))
    return torch.stack(rows)


@needs("kronfluence")
@pytest.mark.parametrize(("labelled", "kind"), [(False, "sum"), (True, "mean")])
def test_ekfac_of_a_language_model(labelled, kind):
    """Its Conv1D layers are covered, with those of class nn.Linear; embeddings and norms are not."""
    run, test = language(kind=kind, labelled=labelled)
    state = run.train(progress=False)
    names = [k for k in state.params if "attn.c_" in k or "mlp.c_" in k]
    assert len(names) == 8
    ours, theirs = (
        by_hand(run, state, x, lambda p: -p.log().mean() if kind == "mean" else -p.log().sum(), names)
        for x in (test, run.data)
    )
    head = dict(run.model(state).named_modules())["lm_head"]
    assert head.weight.shape == (11, 8)

    def head_gradients(batch):
        """Of the head's own use of its weight, which is that of the embedding, too."""
        rows = []
        for example in zip(*batch, strict=True):
            model, labels = run.model(state), example[-1][1:]
            hidden = model.transformer(example[0][None, :-1]).last_hidden_state[0].detach()
            weight = model.lm_head.weight.detach().clone().requires_grad_()
            each = F.cross_entropy(hidden @ weight.T, labels, ignore_index=-100, reduction=kind)
            rows.append(torch.autograd.grad(each, weight)[0].flatten())
        return torch.stack(rows)

    expected = -(ours @ theirs.T + head_gradients(test) @ head_gradients(run.data).T) / run.n
    scores = baselines.ekfac(run, test, state, strategy="identity", batch_size=5)
    torch.testing.assert_close(scores.values, expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(
        scores.values, baselines.ekfac(run, test, state, strategy="identity", batch_size=5).values
    )
    curved = baselines.ekfac(run, test, state)
    assert curved.values.isfinite().all() and agreement(curved, scores) < 0.999


@needs("kronfluence")
@pytest.mark.parametrize("kind", ["mean", "sum"])
def test_the_fisher_matrix_of_tokens_is_the_true_one(kind):
    """The mean of g gᵀ over draws is Σ c_l F_l: of the head, whose logits are linear in its weight."""
    run, _ = language(kind=kind)
    classes = classes_of(run, run.data, run.initial)
    assert classes == Classes(tokens=True, mean=kind == "mean")
    task, model, one = ekfac._task(run, ["lm_head"], classes), run.model(run.initial), run.data[0][:1]
    hidden = model.transformer(one[:, :-1]).last_hidden_state[0].detach()
    head, draws = model.lm_head.weight.detach(), 20_000
    weights = head.expand(draws, 11, 8).clone().requires_grad_()  # a head for each draw

    def heads(tokens):
        return torch.einsum("lh,bvh->blv", hidden, weights)

    p = (hidden @ head.T).softmax(-1)
    fisher = sum(
        torch.kron(q.diag() - q[:, None] * q, h[:, None] * h) for q, h in zip(p, hidden, strict=True)
    )
    fisher = fisher / len(p) if kind == "mean" else fisher
    torch.manual_seed(0)
    loss = task.compute_train_loss((one.expand(draws, 7),), heads, sample=True)
    g = torch.autograd.grad(loss, weights)[0].flatten(1)
    assert (g.T @ g / draws - fisher).norm() < 0.05 * fisher.norm()


@needs("trak")
@pytest.mark.parametrize("labelled", [False, True])
def test_trak_of_a_language_model(labelled):
    """The formula of the paper, the margin of a sequence the mean of its tokens'."""
    from trak.projectors import BasicProjector, ProjectionType

    run, test = language(labelled=labelled)
    state, names = run.train(progress=False), list(run.initial.params)
    count = sum(x.numel() for x in state.params.values())
    projector = BasicProjector(count, 5, 3, ProjectionType.normal, "cpu", model_id=0)
    rows = [by_hand(run, state, x, lambda p: (p / (1 - p)).log().mean(), names) for x in (run.data, test)]
    train, of_test = (projector.project(row.float(), 0).double() for row in rows)

    def wrong(batch):
        logits, labels = run.model(state)(batch[0][:, :-1]).logits, batch[-1][:, 1:]
        p = logits.softmax(-1).gather(2, labels.clamp_min(0)[..., None])[..., 0]
        return ((1 - p) * (labels != -100)).sum(1) / (labels != -100).sum(1)

    expected = of_test @ torch.linalg.inv(train.T @ train) @ train.T * wrong(run.data) * -wrong(test)[:, None]
    scores = baselines.trak(run, test, [state], dim=5, seed=3, batch_size=7)
    assert (scores.values - expected).abs().max() < 1e-3 * expected.abs().max()


def test_what_is_no_language_model_is_refused():
    run, test = language()

    def focal(model, tokens):
        return magic.text.loss("sum")(model, tokens).square()

    model = run.model(run.initial)
    other = magic.Run(model, torch.optim.AdamW(model.parameters()), run.data, focal, run.batches)
    with pytest.raises(
        ValueError, match="or tokens, and cross-entropy: the loss is not the cross-entropy of next"
    ):
        baselines.trak(other, test, run.initial)
