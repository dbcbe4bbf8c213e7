"""The script that measures a LoRA fine-tune, with a tiny random model."""

import pytest
import torch

import magic


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_the_script_with_a_tiny_model(capsys):
    pytest.importorskip("peft")
    from tests import smollm2

    found = smollm2.main(
        ["--tiny", "--double", "--steps", "4", "--batch", "3", "--length", "12", "--rank", "2"]
    )
    said = capsys.readouterr().out
    assert f"a state {found['final'].nbytes:,}" in said and "The whole derivative against" in said
    assert (found["run"].steps, found["run"].n, tuple(found["scores"].values.shape)) == (4, 12, (2, 12))
    assert found["scores"].health.ok and isinstance(found["verification"], magic.Verification)
    assert all("lora_" in name for name in found["final"].params)
    assert 0 < found["adapters"] < found["model"] and torch.all(found["scores"].values.abs().max(1)[0] > 0)


def test_too_little_text_is_said():
    pytest.importorskip("transformers")
    from magic import text
    from tests import smollm2

    with pytest.raises(ValueError, match="fewer than 100000 rows of 64 tokens"):
        smollm2.rows(text.byte_tokenizer(), 100000, 64)
