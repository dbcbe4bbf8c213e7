"""Models of transformers, tiny and from their configurations: accepted, with the plain loop's bits.

Scores against one autograd graph over the whole run, and against five-point differences of real trainings.
Most of these models normalise and rotate in float32 whatever their own precision is. A difference through
that is one of a staircase, so it is taken without the casts (`magic.kernels.precision`).
"""

import copy
import warnings
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import magic
from magic.kernels.precision import InDouble
from magic.training.determinism import seed_step
from tests.kernels.test_stop_gradients import relative_error
from tests.support.unroll import unroll

tf = pytest.importorskip("transformers")
N, LENGTH, WORDS = 16, 6, 50
ORDER = torch.stack([torch.randperm(N, generator=torch.Generator().manual_seed(t))[:4] for t in range(4)])
EXAMPLES = (int(ORDER[0][0]),)  # whose scores are compared with differences
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TWO_LAYERS = SMALL | {"num_hidden_layers": 2}
TEXT = {"vocab_size": WORDS, "intermediate_size": 32, "max_position_embeddings": 16}
GROUPED = {"head_dim": 8, "num_key_value_heads": 1, "pad_token_id": 0}


def text(dtype=None):
    """Token ids and the mask of what is padding."""
    ids = torch.randint(3, WORDS, (N, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[::3, 4:] = 0
    return ids, mask


def images(dtype):
    return torch.randn(N, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype), torch.arange(N) % 3


def next_words(model, ids, mask):
    logits = model(ids, attention_mask=mask).logits
    return (F.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none") * mask[:, 1:]).mean(1)


def masked_words(model, ids, mask):
    hidden = torch.where(ids % 4 == 0, 3, ids)
    logits = model(hidden, attention_mask=mask).logits
    return (F.cross_entropy(logits.mT, ids, reduction="none") * mask).mean(1)


def translated(model, ids, mask):
    logits = model(input_ids=ids, attention_mask=mask, decoder_input_ids=ids.flip(1)).logits
    return F.cross_entropy(logits[:, :-1].mT, ids.flip(1)[:, 1:], reduction="none").mean(1)


def pictures(model, x, y):
    return F.cross_entropy(model(x).logits, y, reduction="none")


def causal(config, attention="sdpa"):
    return tf.AutoModelForCausalLM.from_config(config, attn_implementation=attention)


MODELS = {
    "llama": (lambda: causal(tf.LlamaConfig(**SMALL, **TEXT, pad_token_id=0)), next_words, text),
    "llama-tied-dropout": (
        lambda: causal(
            tf.LlamaConfig(**SMALL, **TEXT, **GROUPED, tie_word_embeddings=True, attention_dropout=0.1),
            "eager",
        ),
        next_words,
        text,
    ),
    "qwen3": (lambda: causal(tf.Qwen3Config(**SMALL, **TEXT, **GROUPED)), next_words, text),
    "gemma2": (
        lambda: causal(
            tf.Gemma2Config(
                **TWO_LAYERS, **TEXT, **GROUPED, sliding_window=4, query_pre_attn_scalar=8
            ),
            "eager",
        ),
        next_words,
        text,
    ),
    "gpt2": (
        lambda: causal(tf.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=WORDS, n_positions=16)),
        next_words,
        text,
    ),
    "bert": (
        lambda: tf.BertForMaskedLM(tf.BertConfig(**SMALL, **TEXT, hidden_dropout_prob=0.1)),
        masked_words,
        text,
    ),
    "t5": (
        lambda: tf.T5ForConditionalGeneration(
            tf.T5Config(
                d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=WORDS, dropout_rate=0.0,
                feed_forward_proj="gated-gelu",
            )
        ),
        translated,
        text,
    ),
    "vit": (
        lambda: tf.ViTForImageClassification(
            tf.ViTConfig(**SMALL, intermediate_size=32, image_size=8, patch_size=4, num_labels=3)
        ),
        pictures,
        images,
    ),
}  # fmt: skip
IN_SINGLE = {"llama", "llama-tied-dropout", "qwen3", "gemma2", "t5"}  # they cast to float32 inside


def make(name, dtype=torch.float64):
    """The model, a little larger at the start than it is by default, its loss and its data."""
    torch.manual_seed(0)
    model, loss, data = MODELS[name]
    model = model().to(dtype).train()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape).to(dtype))
    return model, loss, data(dtype)


def sgd(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05, momentum=0.9)


def adamw(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-3, eps=1e-4)


def first_two(loss, data):
    return lambda model: loss(model, *(x[:2] for x in data))


def plain(model, optimizer, loss, data):
    """The loop that a user would write."""
    model = copy.deepcopy(model)
    optimizer = optimizer(model)
    for t, indices in enumerate(ORDER):
        seed_step(0, t)
        optimizer.zero_grad()
        loss(model, *(x[indices] for x in data)).mean().backward()
        optimizer.step()
    return dict(model.named_parameters())


def scored(model, optimizer, loss, data, measure):
    """The run and its scores, which may not warn. It has the plain loop's bits, and was checked sharply."""
    run = magic.Run(model, optimizer(model), data, loss, ORDER)
    final, truth = run.train(progress=False), plain(model, optimizer, loss, data)
    assert final.params.keys() and all(torch.equal(x, truth[name]) for name, x in final.params.items())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = magic.attribute(run, measure, progress=False)
    assert scores.health.ok
    steps = [found for t, found in scores.health.witnessed.items() if t < run.steps]
    assert len(steps) >= 3 and max(steps) < 1e-4
    return run, scores


def exact_and_scored(model, optimizer, loss, data, measure, h=1e-4):
    """The scores, and the error of those of the same training without casts against its finite differences,
    which must be no other scores but for rounding."""
    _, scores = scored(model, optimizer, loss, data, measure)
    with InDouble(), mock.patch("magic.engine.listeners.check_step", return_value=0.0):  # done above
        run = magic.Run(model, optimizer(model), data, loss, ORDER)
        exact = magic.attribute(run, measure, progress=False)
        error = relative_error(run, measure, exact, EXAMPLES, h)
    assert (scores.values - exact.values).norm() < 1e-4 * exact.values.norm()
    print(f"{type(model).__name__} {loss.__name__:<20} {error:.1e}")
    return error


@pytest.mark.parametrize("name", MODELS)
def test_bits_witness_and_a_full_unroll(name):
    model, loss, data = make(name)
    measure = first_two(loss, data)
    _, scores = scored(model, sgd, loss, data, measure)
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no second derivative
        weights = torch.ones(N, dtype=torch.float64)
        truth = unroll(model, sgd(model), None, data, loss, ORDER, measure, weights)
    assert truth.norm() > 1e-3, "degenerate: no influence at all"
    error = ((scores.values - truth).norm() / truth.norm()).item()
    print(f"{name:<20} {error:.1e}")
    assert error < (1e-6 if name in IN_SINGLE else 1e-12)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_finite_differences_of_training_with_adamw(name):
    model, loss, data = make(name)
    assert exact_and_scored(model, adamw, loss, data, first_two(loss, data), h=2e-5) < 1e-8


def test_in_float32():
    exact, single = (
        scored(model, sgd, loss, data, first_two(loss, data))[1].values.double()
        for model, loss, data in (make("llama", torch.float64), make("llama", torch.float32))
    )
    assert single.norm() > 1e-3 and (single - exact).norm() < 1e-4 * exact.norm()


# -- the same models, wrong ---------------------------------------------------------------------------


class Norm(nn.Module):
    """The last normalisation of a Llama, with `scale_of(mean square)` in the place of its root."""

    def __init__(self, norm, scale_of):
        super().__init__()
        self.weight, self.eps, self.scale_of = norm.weight, norm.variance_epsilon, scale_of

    def forward(self, x):
        single = x.to(torch.float32)
        scale = self.scale_of(single.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (single * scale).to(x.dtype)


def through_numpy(square):
    return torch.from_numpy(square.detach().numpy() ** -0.5).to(square.dtype)


def by_item(square):
    return square.rsqrt() * (1 + 0.2 * square.mean().item())


class HalfSlope(torch.autograd.Function):
    """x ** -0.5, right and differentiated rightly; but its derivative is not."""

    @staticmethod
    def forward(ctx, square):
        ctx.save_for_backward(square)
        return square.rsqrt()

    @staticmethod
    def backward(ctx, g):
        (square,) = ctx.saved_tensors
        return -0.5 * g * (0.5 * (square + square.detach())) ** -1.5


@pytest.mark.parametrize("scale_of", [through_numpy, by_item, HalfSlope.apply])
def test_a_llama_with_a_wrong_derivative_is_refused(scale_of):
    model, loss, data = make("llama")
    model.model.norm = Norm(model.model.norm, scale_of)
    run = magic.Run(model, sgd(model), data, loss, ORDER)
    with pytest.raises(magic.NotDifferentiable, match="finite difference gives"):
        magic.attribute(run, first_two(loss, data), progress=False)


def test_the_same_llama_with_a_right_one_is_accepted():
    model, loss, data = make("llama")
    model.model.norm = Norm(model.model.norm, torch.rsqrt)
    scored(model, sgd, loss, data, first_two(loss, data))


# -- losses that hold a part of themselves fixed ------------------------------------------------------


class Pair(nn.Module):
    """A model that is trained, and one beside it that is not."""

    def __init__(self, model):
        super().__init__()
        self.model, self.reference = model, copy.deepcopy(model).requires_grad_(False).eval()

    def forward(self, *args, **options):
        return self.model(*args, **options)


def focal(model, ids, mask):
    logits = model(ids, attention_mask=mask).logits
    losses = F.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none")
    return ((1 - torch.exp(-losses)).detach() ** 2 * losses * mask[:, 1:]).mean(1)


def own_teacher(model, ids, mask):
    with torch.no_grad():
        told = model(ids.flip(1)).logits.softmax(-1)
    logits = model(ids, attention_mask=mask).logits
    return F.cross_entropy(logits.flatten(0, 1), told.flatten(0, 1), reduction="none").view(ids.shape).mean(1)


def preferred(model, ids, mask):
    """Direct preference optimisation (Rafailov et al. 2023); the reversed text is the worse one."""
    flipped = ids.flip(1)
    with torch.no_grad():
        before = next_words(model.reference, flipped, mask) - next_words(model.reference, ids, mask)
    now = next_words(model.model, flipped, mask) - next_words(model.model, ids, mask)
    return -F.logsigmoid(0.5 * LENGTH * (now - before))


@pytest.mark.parametrize(("name", "loss"), [("llama", focal), ("gpt2", own_teacher), ("llama", preferred)])
def test_losses_with_stop_gradients(name, loss):
    model, entropy, data = make(name)
    model = Pair(model) if loss is preferred else model
    assert exact_and_scored(model, sgd, loss, data, first_two(entropy, data)) < 1e-8


def test_a_lora_whose_base_is_the_reference():
    peft = pytest.importorskip("peft")

    def against_the_base(model, ids, mask):
        flipped = ids.flip(1)
        with torch.no_grad(), model.disable_adapter():
            before = next_words(model, flipped, mask) - next_words(model, ids, mask)
        now = next_words(model, flipped, mask) - next_words(model, ids, mask)
        return -F.logsigmoid(0.5 * LENGTH * (now - before))

    model, entropy, data = make("llama")
    settings = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, settings).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.5)
    model.train()
    assert 0 < sum(p.requires_grad for p in model.parameters()) < len(list(model.parameters()))
    assert exact_and_scored(model, sgd, against_the_base, data, first_two(entropy, data)) < 1e-8
