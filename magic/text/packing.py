"""Texts as bytes, and tokens as rows of one length."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..show import needs


def byte_tokenizer():
    """A tokenizer without files: transformers' ByT5Tokenizer (Xue et al. 2022), of 259 tokens.

    0 is padding, 1 the end of a text, 2 unknown, and 3 + b the byte b of the text in UTF-8. Raises
    ImportError without transformers.
    """
    transformers = needs("transformers", "text", "text.byte_tokenizer needs")
    return transformers.ByT5Tokenizer(extra_ids=0)


def pack(tokens, length: int, *, separator: int | None = None) -> Tensor:
    """(n, length + 1): the tokens cut into rows, in each of which `length` tokens are predicted.

    tokens     the tokens of one text, a tensor, an array or a list of integers; or a list of such texts,
               which are put one behind the other
    separator  a token that is put between two texts, such as the tokenizer's eos_token_id

    The last token of a row is the first of the next, so that each but the very first is predicted once. What
    does not fill a row at the end is left out. Raises ValueError where there is not enough for one row, and
    TypeError for what are no integers.
    """
    if not isinstance(length, int) or length < 1:
        raise ValueError(f"length={length!r}: a row predicts at least one token")
    texts = _texts(tokens)
    if separator is not None:
        between = torch.tensor([separator])
        texts = [part for text in texts for part in (between, text)][1:]
    whole = torch.cat(texts)
    if len(whole) <= length:
        raise ValueError(
            f"there are {len(whole)} tokens, and a row of length={length} takes {length + 1}; give more text "
            "or a smaller length"
        )
    return whole.unfold(0, length + 1, length).clone()


def _texts(tokens) -> list[Tensor]:
    """The texts as tensors of integers."""
    if isinstance(tokens, str):
        raise TypeError("pack takes tokens, not text; tokenise it first, with text.byte_tokenizer or another")
    single = hasattr(tokens, "dtype") or not isinstance(tokens, Iterable)
    texts = [tokens] if single else list(tokens)
    if not single and all(isinstance(x, int | float) or getattr(x, "ndim", None) == 0 for x in texts):
        texts = [texts]
    try:
        made = [torch.as_tensor(text, device="cpu") for text in texts]
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"pack takes a list of integers, or a list of such lists: {error}") from error
    made = [text.to(torch.int64) if text.numel() == 0 else text for text in made]
    for i, text in enumerate(made):
        if text.dim() != 1 or text.is_floating_point() or text.is_complex() or text.dtype == torch.bool:
            raise TypeError(
                f"text {i} has shape {tuple(text.shape)} and type {text.dtype}; a text is a row of integers"
            )
        if len(text) and text.min() < 0:
            raise ValueError(f"text {i} has the token {text.min().item()}; tokens are not negative")
    return [text.to(torch.int64) for text in made] or [torch.empty(0, dtype=torch.int64)]
