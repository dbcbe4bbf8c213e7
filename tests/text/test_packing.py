"""Texts as bytes and rows."""

import numpy as np
import pytest
import torch

from magic import text


@pytest.mark.parametrize("make", [list, torch.tensor, np.array])
def test_each_token_but_the_first_is_predicted_once(make):
    rows = text.pack(make(range(100, 111)), 3)
    assert rows.tolist() == [[100, 101, 102, 103], [103, 104, 105, 106], [106, 107, 108, 109]]
    assert rows.dtype == torch.int64 and rows.is_contiguous()
    rows[0, 3] = 7  # rows are of their own
    assert rows[1, 0] == 103


def test_texts_are_put_one_behind_the_other():
    texts = [[5, 6], torch.tensor([7]), [], [8, 9]]
    assert text.pack(texts, 2).tolist() == [[5, 6, 7], [7, 8, 9]]
    assert text.pack(texts, 7, separator=1).tolist() == [[5, 6, 1, 7, 1, 1, 8, 9]]
    assert text.pack([torch.tensor(3), torch.tensor(4)], 1).tolist() == [[3, 4]]


@pytest.mark.parametrize(
    ("tokens", "length", "error", "says"),
    [
        ("text", 3, TypeError, "takes tokens, not text"),
        ([1, 2, 3], 3, ValueError, "there are 3 tokens, and a row of length=3 takes 4"),
        ([], 3, ValueError, "there are 0 tokens"),
        ([1, 2], 0, ValueError, "length=0"),
        ([1, 2], 1.5, ValueError, "length=1.5"),
        ([1.0, 2.0, 3.0], 1, TypeError, r"text 0 has shape \(3,\) and type torch.float32"),
        ([[1, 2], [3, -4]], 1, ValueError, "text 1 has the token -4"),
        ([[[1, 2]], [[3, 4]]], 1, TypeError, r"text 0 has shape \(1, 2\)"),
        ([["a"], ["b"]], 1, TypeError, "a list of integers, or a list of such lists"),
    ],
)
def test_bad_input(tokens, length, error, says):
    with pytest.raises(error, match=says):
        text.pack(tokens, length)


def test_bytes_to_tokens_and_back():
    pytest.importorskip("transformers")
    tokenizer = text.byte_tokenizer()
    said = "Zoë, 1 € ✓\n"
    ids = tokenizer(said).input_ids
    assert ids == [3 + b for b in said.encode()] + [tokenizer.eos_token_id]
    assert tokenizer.decode(ids[:-1]) == said and len(tokenizer) == 259 and max(ids) < 259
    rows = text.pack([tokenizer(x).input_ids for x in ("ab", "c")], 4)
    assert rows.tolist() == [[100, 101, 1, 102, 1]]
