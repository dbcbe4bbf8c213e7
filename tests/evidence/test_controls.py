"""Controls: what they say they are, by other means."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import magic
from magic import baselines
from magic.book import models
from tests.evidence.test_baselines import first, gradients, needs, regression
from tests.support import cases


def test_chance_is_normal_and_fixed_by_its_seed():
    run = regression()
    state = run.train(progress=False)
    one, again, other = (baselines.random_scores(run, first(run), state, seed=s).values for s in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert one.shape == (3, 30) and one.mean().abs() < 0.3 and 0.8 < one.std() < 1.2


def test_loss_and_norm_of_the_gradient():
    run = regression()
    state = run.train(progress=False)
    losses = run.loss(run.model(state), *run.data).detach()
    scores = baselines.loss(run, first(run), state, batch_size=7)
    torch.testing.assert_close(scores.values, -losses.expand(3, -1), rtol=1e-12, atol=0)
    norms = gradients(run, state, run.data).norm(dim=1)
    scores = baselines.gradient_norm(run, first(run), state, batch_size=7)
    torch.testing.assert_close(scores.values, -norms.expand(3, -1), rtol=1e-9, atol=0)


def test_embeddings_are_what_the_last_layer_sees():
    run = regression()
    state = run.train(progress=False)
    model = run.model(state)
    inside = F.normalize(model[1](model[0](run.data[0])).detach())
    scores = baselines.embeddings(run, first(run), state, batch_size=7)
    torch.testing.assert_close(scores.values, -inside[:3] @ inside.T, rtol=1e-9, atol=1e-12)
    plain = F.normalize(run.data[0])
    scores = baselines.embeddings(run, first(run), state, layer="0")
    torch.testing.assert_close(scores.values, -plain[:3] @ plain.T, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="layer='head': the model has no module"):
        baselines.embeddings(run, first(run), state, layer="head")


def test_embeddings_of_a_text_are_means_over_its_tokens():
    run = texts()
    state = run.train(progress=False)
    scores = baselines.embeddings(run, (run.data[0][:3],), state, batch_size=2).values
    assert scores.shape == (3, 8) and torch.allclose(scores.diagonal(), torch.full((3,), -1.0), atol=1e-6)


def test_a_model_without_linear_layers_is_told():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(4, 2, dtype=torch.float64))

        def forward(self, x):
            return x @ self.w

    x, y = regression().data
    model = Bare()
    run = magic.Run(
        model, cases.sgd(0.01)(model), (x, y), lambda m, x, y: (m(x) - y).square().sum(1), [[0, 1]]
    )
    with pytest.raises(ValueError, match="calls no linear layer of the model: name one as layer="):
        baselines.embeddings(run, first(run), run.train(progress=False))


def texts():
    torch.manual_seed(0)
    tokens = torch.randint(0, 20, (8, 6), generator=torch.Generator().manual_seed(0))
    model = models.Transformer(20, width=8, heads=2, layers=1, length=6)

    def loss(model, tokens):
        logits = model(tokens[:, :-1])
        return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)

    return magic.Run(model, cases.sgd(0.05)(model), (tokens,), loss, magic.batches(8, 4, 2))


@needs("bm25s")
def test_bm25_is_its_formula():
    """Lucene's form: idf = log(1 + (N − d + ½)/(d + ½)), and of a word f times in a text of length l,
    idf · f/(f + k(1 − b + b l/l̄)) with k = 1.5 and b = 0.75."""
    run = texts()
    texts_of = [[x for x in row if x != 0] for row in run.data[0].tolist()]
    mean = sum(map(len, texts_of)) / 8
    expected = torch.zeros(3, 8)
    for k, query in enumerate(texts_of[:3]):
        for word in query:
            holding = sum(word in text for text in texts_of)
            idf = math.log(1 + (8 - holding + 0.5) / (holding + 0.5))
            for i, text in enumerate(texts_of):
                f = text.count(word)
                expected[k, i] -= idf * f / (f + 1.5 * (0.25 + 0.75 * len(text) / mean))
    scores = baselines.bm25(run, (run.data[0][:3],), run.train(progress=False))
    torch.testing.assert_close(scores.values, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(scores.values.argmin(1), torch.arange(3))


def test_bm25_takes_texts_alone():
    run = regression()
    with pytest.raises(TypeError, match="data must be token ids"):
        baselines.bm25(run, first(run), run.train(progress=False))
