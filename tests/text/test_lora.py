"""LoRA through peft: a state holds the adapters, and what is frozen lies in memory once."""

import copy
import importlib.util
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import magic
from magic import text
from magic.engine.places import written
from magic.kernels.precision import InDouble
from magic.training.determinism import seed_step
from tests.kernels.test_stop_gradients import relative_error

tf = pytest.importorskip("transformers")
WORDS, N, LENGTH = 40, 8, 6
ORDER = [[0, 4, 2], [7, 1, 3], [2, 5, 6]]
LOSS = text.loss()


def tokens():
    return torch.randint(3, WORDS, (N, LENGTH + 1), generator=torch.Generator().manual_seed(1))


def base(dtype=torch.float64):
    torch.manual_seed(0)
    settings = tf.LlamaConfig(
        vocab_size=WORDS, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    return tf.AutoModelForCausalLM.from_config(settings).to(dtype)


def lora(model, dropout=0.0):
    torch.manual_seed(0)
    peft = pytest.importorskip("peft")  # here, as its import takes four seconds
    settings = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], lora_dropout=dropout, task_type="CAUSAL_LM"
    )
    kept = next(model.parameters()).dtype
    model = peft.get_peft_model(model, settings).train()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn(p.shape).to(p.dtype))
                p.data = p.data.double() if kept == torch.float64 else p.data.float()
    return model


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def adamw(model):
    return torch.optim.AdamW(trained(model), 1e-2, eps=1e-4)


def run_of(model):
    return magic.Run(model, adamw(model), tokens(), LOSS, ORDER)


def first_two(model):
    return LOSS(model, tokens()[:2])


def places(model):
    """Where the frozen parameters lie. data_ptr() would be a way to write, and so make a copy."""
    return {
        name.removeprefix("base_model."): torch._C._data_address(p)
        for name, p in model.named_parameters()
        if not p.requires_grad
    }


def nbytes(tensors):
    return sum(x.numel() * x.element_size() for x in tensors)


def test_bits_and_exact_scores_with_dropout():
    model = lora(base(), dropout=0.2)
    run = run_of(model)
    final, plain = run.train(progress=False), copy.deepcopy(model)
    optimizer = adamw(plain)
    for t, indices in enumerate(ORDER):
        seed_step(0, t)
        optimizer.zero_grad()
        LOSS(plain, tokens()[indices]).mean().backward()
        optimizer.step()
    moved = {name: p for name, p in plain.named_parameters() if p.requires_grad}
    assert final.params.keys() == moved.keys() and all(
        torch.equal(p, moved[k]) for k, p in final.params.items()
    )
    with warnings.catch_warnings(), InDouble():
        warnings.simplefilter("error")
        run = run_of(model)
        scores = magic.attribute(run, first_two, progress=False)
        assert scores.health.ok and relative_error(run, first_two, scores, (4,), 1e-4) < 1e-8


def test_a_state_holds_the_adapters_and_no_more():
    model = lora(base())
    run = run_of(model)
    final = run.train(progress=False)
    assert final.params.keys() and all("lora_" in name for name in final.params)
    adapters, count = nbytes(trained(model)), len(trained(model))
    on_disk = nbytes(written(final).values())
    assert on_disk == 3 * adapters + 8 * count  # two moments beside them, and AdamW counts its steps
    assert final.nbytes == on_disk + nbytes(final.buffers.values())
    assert all(b is run.initial.buffers[name] for name, b in final.buffers.items())  # none is copied


@pytest.mark.skipif(importlib.util.find_spec("safetensors") is None, reason="needs safetensors")
def test_files_on_disk_hold_the_adapters_and_no_more(tmp_path):
    model = lora(base())
    magic.train(run_of(model), disk=tmp_path, progress=False)
    files = [path for path in tmp_path.rglob("*.safetensors")]
    assert files
    header = 6000
    assert (
        max(path.stat().st_size for path in files)
        < 3 * nbytes(trained(model)) + header
        < nbytes(model.parameters())
    )


def test_the_frozen_weights_are_shared_until_someone_writes():
    run = run_of(lora(base()))
    final = run.train(progress=False)
    mine, before = places(run.network.module), magic.fingerprint(run.network.module)
    one, other = run.model(final), run.model(run.initial)
    assert len(mine) > 5 and places(one) == places(other) == mine
    seen = {}

    def measure(model):
        out = first_two(model)
        seen.update(places(model))
        return out

    scores = magic.attribute(run, measure, progress=False)
    assert scores.health.ok and magic.retrain(run, without=[4], progress=False).step == run.steps
    assert {name: seen[name] for name in mine} == mine  # while it is measured, too
    assert places(run.network.module) == mine  # and after forward and backward passes
    # peft adds the adapters into the frozen weights, in place
    outputs = first_two(one)
    merged = one.merge_and_unload()
    torch.testing.assert_close(first_two(merged), outputs)
    assert magic.fingerprint(run.network.module) == before and places(run.network.module) == mine
    assert places(other) == mine
    again = magic.attribute(run, measure, progress=False)
    assert torch.equal(again.values, scores.values)


def test_a_measure_that_writes_into_frozen_weights_writes_into_a_copy():
    run = run_of(lora(base()))
    before = magic.fingerprint(run.network.module)

    def measure(model):
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(0.5)
        return first_two(model)

    def halved(model):
        inputs = {"inputs_embeds": 0.5 * model.get_input_embeddings()(tokens()[:2, :-1])}
        head = 0.5 * model.get_output_embeddings().weight  # it is tied
        hidden = model(**inputs, output_hidden_states=True).hidden_states[-1]
        losses = F.cross_entropy((hidden @ head.T).mT, tokens()[:2, 1:], reduction="none")
        return losses.mean(1)

    scores = magic.attribute(run, measure, progress=False)
    truth = magic.attribute(run, halved, progress=False)
    torch.testing.assert_close(scores.values, truth.values)
    assert magic.fingerprint(run.network.module) == before


class Up(nn.Module):
    """What is stored in bfloat16, cast up where it is used."""

    def forward(self, stored):
        return stored.float()


def stored_low(model):
    """The same model with its frozen parameters in bfloat16."""
    for module in list(model.modules()):
        for name, p in list(module.named_parameters(recurse=False)):
            if not p.requires_grad:
                p.data = p.data.bfloat16()
                parametrize.register_parametrization(module, name, Up(), unsafe=True)
    return model


def test_frozen_weights_may_be_stored_in_bfloat16():
    """The run is the one whose frozen weights are in float32, and have the values that bfloat16 can hold."""
    rounded = base(torch.float32)
    with torch.no_grad():
        for p in rounded.parameters():
            p.copy_(p.bfloat16())
    model = stored_low(lora(copy.deepcopy(rounded)))
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert frozen and {p.dtype for p in frozen} == {torch.bfloat16}
    runs = [run_of(m) for m in (model, lora(rounded))]
    low, single = (run.train(progress=False).params.values() for run in runs)
    assert all(torch.equal(p, q) for p, q in zip(low, single, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        low, single = (magic.attribute(run, first_two, progress=False) for run in runs)
    assert torch.equal(low.values, single.values) and low.health.ok and low.values.abs().max() > 1e-4
    assert nbytes(runs[0].network.frozen.values()) * 2 == nbytes(runs[1].network.frozen.values())


def test_arithmetic_in_bfloat16_is_refused():
    model = lora(base(torch.bfloat16))
    with pytest.raises(TypeError, match=r"logits are torch.bfloat16"):
        run_of(model)

    def cast_up(model, ids):
        return F.cross_entropy(model(ids).logits.float().mT, ids, reduction="none").mean(1)

    with pytest.raises(TypeError, match=r"step 0: \w+ returns torch.bfloat16, from autocast or a cast"):
        magic.Run(model, adamw(model), tokens(), cast_up, ORDER)
    with pytest.raises(
        TypeError, match=r"parameter 'model.embed_tokens.weight' is torch.bfloat16.*freeze it"
    ):
        run_of(base(torch.bfloat16))


class Mixed(nn.Module):
    """A table in bfloat16, and a layer in float32 that reads it."""

    def __init__(self, cast):
        super().__init__()
        self.table = nn.Embedding(WORDS, 8).bfloat16().requires_grad_(False)
        self.head, self.cast = nn.Linear(8, WORDS), cast

    def forward(self, ids):
        return self.head(self.table(ids).float()) if self.cast == "up" else self.down(ids)

    def down(self, ids):
        return (self.head(self.table(ids).float()).bfloat16() * 2).float()


def test_what_is_trained_may_not_be_cast_down():
    torch.manual_seed(0)
    run = magic.Run(*with_optimizer(Mixed("up")), tokens(), LOSS, ORDER)
    scores = magic.attribute(run, first_two, progress=False)
    assert scores.health.ok and scores.values.abs().max() > 0
    with pytest.raises(TypeError, match=r"bfloat16 returns torch\.bfloat16"):
        magic.Run(*with_optimizer(Mixed("down")), tokens(), LOSS, ORDER)


def with_optimizer(model):
    return model, torch.optim.SGD(trained(model), 0.1)


def test_a_run_with_shared_weights_can_be_pickled():
    import pickle

    run = run_of(lora(base()))
    kept = run.model(run.initial)
    again = pickle.loads(pickle.dumps(run))
    assert again.fingerprint() == run.fingerprint()
    assert F.mse_loss(first_two(kept), first_two(again.model(again.initial))).item() == 0
