"""One loss for each sequence, or for each token: against transformers' own, and against bad input."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import magic
from magic import text
from magic.book.models import Transformer

N, LENGTH, WORDS = 8, 6, 30


def tokens():
    return torch.randint(1, WORDS, (N, LENGTH + 1), generator=torch.Generator().manual_seed(0))


def padded():
    """Every other sequence ends with padding, which is token 0."""
    ids, mask = tokens(), torch.ones(N, LENGTH + 1, dtype=torch.int64)
    mask[::2, 4:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def model():
    torch.manual_seed(0)
    return Transformer(WORDS, width=8, layers=1, heads=2, length=LENGTH + 1).double()


class Plain(nn.Module):
    """A model that takes and returns what transformers' models do."""

    def __init__(self):
        super().__init__()
        self.inner = model()

    def forward(self, input_ids, attention_mask=None):
        return type("Output", (), {"logits": self.inner(input_ids)})


def by_hand(ids, mask, kind):
    """Token by token."""
    logits, found = model()(ids), torch.zeros(len(ids), dtype=torch.float64)
    for i in range(len(ids)):
        places = [t for t in range(1, ids.shape[1]) if mask[i, t]]
        found[i] = sum(-logits[i, t - 1].log_softmax(-1)[ids[i, t]] for t in places)
        found[i] /= len(places) if kind == "mean" else 1
    return found


@pytest.mark.parametrize("kind", ["mean", "sum"])
def test_a_loss_is_that_of_each_sequence_and_tokens_add_up_to_it(kind):
    batch, whole = padded(), torch.ones(N, LENGTH + 1)
    found = text.loss(kind)(Plain(), batch)
    torch.testing.assert_close(found, by_hand(batch["input_ids"], batch["attention_mask"], kind))
    each = text.loss(kind, per_token=True)(Plain(), batch)
    assert each.shape == (N, LENGTH) and torch.equal(each == 0, batch["attention_mask"][:, 1:] == 0)
    torch.testing.assert_close(each.sum(1), found)
    torch.testing.assert_close(text.loss(kind)(model(), tokens()), by_hand(tokens(), whole, kind))
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[1, 2] = -100
    batch["attention_mask"][1, 2] = 0  # for the truth only: the tokens before see the one after in any case
    truth = by_hand(batch["input_ids"], batch["attention_mask"], kind)
    torch.testing.assert_close(text.loss(kind)(model(), batch["input_ids"], labels), truth)
    named = {"input_ids": batch["input_ids"], "labels": labels}
    torch.testing.assert_close(text.loss(kind)(Plain(), named), truth)


def test_the_mean_over_targets_is_transformers_own_loss():
    tf = pytest.importorskip("transformers")
    settings = tf.LlamaConfig(
        vocab_size=WORDS, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    llama, batch = tf.AutoModelForCausalLM.from_config(settings), padded()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    truth = llama(**batch, labels=labels).loss
    found = text.loss("sum")(llama, batch).sum() / (labels[:, 1:] != -100).sum()
    torch.testing.assert_close(found, truth)
    assert torch.equal(text.loss()(llama, batch), text.loss()(llama, batch | {"labels": labels}))


def test_a_run_learns_from_what_is_no_padding_only():
    batches, optimizer = magic.batches(N, 4, 2), lambda model: torch.optim.SGD(model.parameters(), 0.5)
    trained = []
    for word in (0, 3):
        batch = padded()
        batch["input_ids"][batch["attention_mask"] == 0] = word
        items = [{name: x[i] for name, x in batch.items()} for i in range(N)]
        network = Plain()
        run = magic.Run(network, optimizer(network), items, text.loss(), batches)
        trained.append(run.train(progress=False))
    for name, p in trained[0].params.items():  # token 0 is nowhere else, and its embedding never moves
        rows = slice(1, None) if "tokens" in name else slice(None)
        torch.testing.assert_close(p[rows], trained[1].params[name][rows])
    scores = magic.attribute(
        run, lambda model: text.loss()(model, {"input_ids": tokens()[:2]}), progress=False
    )
    assert scores.health.ok and scores.values.abs().min() > 0


def test_the_loss_is_part_of_what_a_run_is():
    def parts(loss):
        network = model()
        run = magic.Run(network, torch.optim.SGD(network.parameters(), 0.1), tokens(), loss, [[0, 1]])
        return run.identity()

    one, other = parts(text.loss()), parts(text.loss("sum"))
    assert one == parts(text.loss("mean"))
    assert [name for name in one if one[name] != other[name]] == ["what the loss holds: arguments"]
    assert "the code of the loss" in one


def test_gradients_of_single_examples_by_vmap():
    """As baselines take them: under torch.func nothing can be looked at, and nothing is refused."""
    network, ids = model(), tokens()
    parameters = dict(network.named_parameters())

    def one(parameters, row):
        called = lambda x: torch.func.functional_call(network, parameters, (x,))  # noqa: E731
        return text.loss()(called, row.unsqueeze(0))[0]

    found = torch.func.vmap(torch.func.grad(one), (None, 0))(parameters, ids)["head.weight"]
    truth = torch.autograd.grad(text.loss()(network, ids)[2], network.head.weight)[0]
    torch.testing.assert_close(found[2], truth)


class WithContext(Plain):
    config = type("Config", (), {"max_position_embeddings": LENGTH})

    def get_input_embeddings(self):
        return self.inner.tokens


def all_masked():
    batch = padded()
    batch["attention_mask"][3, 1:] = 0
    return batch


def low(model):
    return lambda ids: model(ids).bfloat16()


@pytest.mark.parametrize(
    ("network", "batch", "error", "says"),
    [
        (Plain, all_masked, ValueError, "sequence 3 of the batch has no target"),
        (WithContext, padded, ValueError, "have 7 tokens, and the model's context holds 6"),
        (WithContext, lambda: tokens()[:, :4] + 25, ValueError, r"token 3\d is outside .*vocabulary, 0 … 29"),
        (Plain, lambda: {"input_ids": tokens(), "labels": tokens() - 5}, ValueError, r"label -\d is outside"),
        (model, lambda: tokens().double(), TypeError, "tokens are torch.float64; tokens are integers"),
        (model, lambda: tokens()[0], ValueError, r"tokens have shape \(7,\)"),
        (model, lambda: tokens()[:, :1], ValueError, r"tokens have shape \(8, 1\)"),
        (Plain, lambda: {"ids": tokens()}, TypeError, r"a dict with \['ids'\]"),
        (Plain, lambda: tokens().tolist(), TypeError, "the batch is a list"),
        (
            Plain,
            lambda: {"input_ids": tokens(), "labels": tokens()[:, 1:]},
            ValueError,
            r"\(8, 6\).*\(8, 7\)",
        ),
        (lambda: low(model()), tokens, TypeError, "logits are torch.bfloat16.*float32"),
        (lambda: lambda ids: ids.sum(), tokens, TypeError, "returned a Tensor without logits"),
    ],
)
def test_bad_input(network, batch, error, says):
    with pytest.raises(error, match=says):
        text.loss()(network(), batch())


def test_bad_options():
    with pytest.raises(ValueError, match="kind='median': choose \"mean\""):
        text.loss("median")


def test_an_untrained_model_knows_nothing():
    network = model()
    with torch.no_grad():
        network.head.weight.zero_()
    assert torch.allclose(text.loss()(network, tokens()), torch.tensor(math.log(WORDS), dtype=torch.float64))
    assert F.cross_entropy(torch.zeros(1, WORDS), torch.tensor([3])).item() == pytest.approx(math.log(WORDS))
