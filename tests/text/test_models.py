"""Causal language models of transformers as they are: padded by a collator, tied or not, with dropout, with
either attention and with activation checkpoints. Random starts; the bits of the plain loop; exact scores.

tests/engine/test_transformers.py has more of them, with other losses and the full unroll.
"""

import copy
import warnings

import pytest
import torch

import magic
from magic import text
from magic.engine import witness
from magic.kernels.precision import InDouble
from magic.training.determinism import seed_step
from tests.kernels.test_stop_gradients import relative_error
from tests.support import cases

tf = pytest.importorskip("transformers")
WORDS, N = 40, 9
ORDER = [[0, 4, 2], [7, 1, 3], [2, 5, 8]]
SMALL = {
    "vocab_size": WORDS, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 16, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
GROUPED, DROPOUT = {"num_key_value_heads": 1}, {"attention_dropout": 0.1}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}


def make(kind, attention, dtype=torch.float64, **settings):
    torch.manual_seed(0)
    config = getattr(tf, f"{kind}Config")(**SMALL, **settings)
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(dtype).train()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape).to(dtype))
    return model


MODELS = {
    "llama": lambda **k: make("Llama", "sdpa", **GROUPED, **TIED, **k),
    "qwen2": lambda **k: make("Qwen2", "eager", **GROUPED, **UNTIED, **DROPOUT, **k),
    "neox": lambda **k: make("GPTNeoX", "sdpa", **UNTIED, **DROPOUT, **k),
}


def sentences():
    """What a tokenizer returns for each text, of several lengths."""
    dice = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 7, (N,), generator=dice).tolist()
    ids = [torch.randint(3, WORDS, (n,), generator=dice).tolist() for n in lengths]
    return [tf.BatchEncoding({"input_ids": x, "attention_mask": [1] * len(x)}) for x in ids]


def collator():
    return tf.DataCollatorWithPadding(text.byte_tokenizer())


def sgd(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1, momentum=0.9)


def run_of(model, **options):
    options = {"collate": collator()} | options
    return magic.Run(model, sgd(model), sentences(), text.loss(), ORDER, **options)


def first_two(model):
    return text.loss()(model, collator()(sentences()[:2]))


def plain(model):
    """The loop of a user, with a DataLoader."""
    model = copy.deepcopy(model)
    optimizer = sgd(model)
    loader = torch.utils.data.DataLoader(sentences(), batch_sampler=ORDER, collate_fn=collator())
    for t, batch in enumerate(loader):
        seed_step(0, t)
        optimizer.zero_grad()
        logits = model(**batch).logits[:, :-1]
        targets = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)[:, 1:]
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), reduction="none"
        ).view(targets.shape)
        (losses / (targets != -100).sum(1, keepdim=True)).sum(1).mean().backward()
        optimizer.step()
    return dict(model.named_parameters())


def scored(model):
    """The run and its scores, without a warning, with the bits of the plain loop."""
    run = run_of(model)
    final, truth = run.train(progress=False), plain(model)
    assert final.params.keys() and all(torch.equal(x, truth[name]) for name, x in final.params.items())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = magic.attribute(run, first_two, progress=False)
    assert scores.health.ok and max(scores.health.witnessed.values()) < 1e-4
    return run, scores


@pytest.mark.parametrize("name", MODELS)
def test_padded_by_a_collator(name):
    model = MODELS[name]()
    _, scores = scored(model)
    with InDouble():  # without casts to float32, through which differences are those of a staircase
        run = run_of(model)
        exact = magic.attribute(run, first_two, progress=False)
        assert relative_error(run, first_two, exact, (4,), 1e-3) < 1e-8
    assert (scores.values - exact.values).norm() < 1e-4 * exact.values.norm()


def test_in_float32_there_is_no_false_alarm():
    _, single = scored(MODELS["llama"](dtype=torch.float32))
    _, exact = scored(MODELS["llama"]())
    assert (single.values - exact.values).norm() < 1e-4 * exact.values.norm() > 1e-5


@pytest.mark.parametrize("large", [witness.LARGE, 0])
def test_in_float32_a_wrong_derivative_is_still_found(large, monkeypatch):
    """In a large model, too, of which the witness looks at two examples of a batch."""
    monkeypatch.setattr(witness, "LARGE", large)
    model = MODELS["llama"](dtype=torch.float32)
    right = type(model.model.norm)

    class Wrong(right):
        def forward(self, x):
            return super().forward(x) * (1 + 5 * x.square().mean().item())

    model.model.norm.__class__ = Wrong
    run = run_of(model)
    assert witness.examples_of(run) == (8 if large else 2)
    with pytest.raises(magic.NotDifferentiable, match="finite difference gives"):
        magic.attribute(run, first_two, progress=False)


def test_of_what_is_normalised_over_the_batch_the_witness_looks_at_more(monkeypatch):
    monkeypatch.setattr(witness, "LARGE", 0)
    run, *_ = cases.build("batchnorm-sgd")
    assert witness.examples_of(run) == 8


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_activation_checkpoints():
    model = MODELS["llama"]()
    _, truth = scored(model)
    model.gradient_checkpointing_enable()
    _, scores = scored(model)
    assert torch.equal(scores.values, truth.values)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant=True has no derivative"):
        run_of(model)


def test_masks_drawn_by_a_collator_replay():
    """Masked language modelling: DataCollatorForLanguageModeling draws anew at each step."""

    class Tokenizer(tf.ByT5Tokenizer):
        mask_token, mask_token_id = "<unk>", 2

    collate = tf.DataCollatorForLanguageModeling(Tokenizer(extra_ids=0), mlm_probability=0.5)

    def masked_words(model, batch):
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        losses = torch.nn.functional.cross_entropy(logits.mT, batch["labels"], reduction="none")
        return losses.sum(1)

    model = tf.BertForMaskedLM(tf.BertConfig(**(SMALL | {"vocab_size": 259}))).double()
    run = magic.Run(model, sgd(model), sentences(), masked_words, ORDER, collate=collate)
    assert run.train(progress=False).fingerprint() == run.train(progress=False).fingerprint()
    scores = magic.attribute(run, lambda m: masked_words(m, collator_labels()), progress=False)
    assert scores.health.ok and scores.values.abs().max() > 0


def collator_labels():
    batch = collator()(sentences()[:2])
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def test_a_tokenizer_is_the_same_after_it_was_used():
    tokenizer = text.byte_tokenizer()
    collate = tf.DataCollatorWithPadding(tokenizer)
    run = run_of(MODELS["llama"](), collate=collate)
    before = run.identity()
    tokenizer(["a", "bb"], padding=True)
    collate(sentences()[:2])
    assert run.identity() == before == run_of(MODELS["llama"]()).identity()
    tokenizer.padding_side = "left"
    assert run.identity() != before


def test_a_fast_tokenizer_is_the_same_after_it_was_used():
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<pad>": 0, "<unk>": 1} | {f"w{i}": i for i in range(2, WORDS)}

    def made(words):
        inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
        inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        return tf.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>")

    tokenizer = made(words)
    run = run_of(MODELS["llama"](), collate=tf.DataCollatorWithPadding(tokenizer))
    before = run.identity()
    tokenizer(["w2", "w3 w4"], padding=True, truncation=True, max_length=4)
    assert run.identity() == before
    other = made(words | {"w2": 3, "w3": 2})
    assert run_of(MODELS["llama"](), collate=tf.DataCollatorWithPadding(other)).identity() != before
