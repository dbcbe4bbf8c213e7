"""One loss for each sequence, or for each of its tokens: how ill a model predicts the next token.

The model sees the tokens up to a place and predicts the next one; the loss is the negative log-probability,
in nats, that it gave to the token that came. What is padding, or labelled −100 as transformers does it, is
no target. transformers' own loss is one mean over all the targets of a batch, in which no example has a loss
of its own, and it is taken in float32 whatever the model's precision; so it is not used here.

With a small model from its configuration:

    tokens = text.pack(text.byte_tokenizer()(page).input_ids, 64)          # (n, 65)
    run = magic.Run(model, optimizer, tokens, text.loss(), batches)
    scores = magic.attribute(run, lambda model: text.loss()(model, tokens[:2]))

With sequences of several lengths, a padding collator makes a batch out of a list of items:

    data = [tokenizer(page) for page in pages]
    collate = transformers.DataCollatorWithPadding(tokenizer)
    run = magic.Run(model, optimizer, data, text.loss(), batches, collate=collate)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.higher_order import batched

MASKED = -100  # the label of a token that is not to be predicted
LOW_PRECISION = (torch.bfloat16, torch.float16)


def loss(kind: str = "mean", *, per_token: bool = False) -> Callable[..., Tensor]:
    """A loss for a Run or a measure: loss(model, batch) -> (B,), in nats.

    kind       "mean" over the targets of a sequence, or their "sum"
    per_token  (B, L) for sequences of L + 1 tokens: entry l is the part of the sequence's loss that is due to
               token l + 1, 0 where that is no target. The sum over l is the loss without `per_token`

    The batch is one of these:

    tokens     (B, L + 1) integers; or tokens, labels, two such tensors. The model is called with the first L
    a mapping  with input_ids (B, L + 1), and attention_mask or labels if there are any. The model is called
               with all of it but the labels. Without labels, what attention_mask has as 0 is no target

    The model is a causal language model of transformers, one with adapters of peft, or any module that
    returns logits (B, L, V). Where lengths differ from batch to batch, so does L; weights for each token need
    one length for all (padding="max_length").

    Raises ValueError for tokens outside the model's vocabulary, sequences beyond its context
    (max_position_embeddings) and sequences without a target, and TypeError for a model in low precision.
    """
    if kind not in ("mean", "sum"):
        raise ValueError(f'kind={kind!r}: choose "mean" (over the tokens of a sequence) or "sum"')
    return partial(sequence_loss, kind=kind, per_token=per_token)


def sequence_loss(model, batch, labels: Tensor | None = None, *, kind: str, per_token: bool) -> Tensor:
    """What `loss` returns, called with its options."""
    inputs, targets = _told(batch, labels)
    if not batched():
        _check_tokens(model, inputs["input_ids"])
        _check_targets(targets)
    logits = _logits(model, inputs, positional=isinstance(batch, Tensor))[:, : targets.shape[1]]
    if not batched():
        _check_range("label", targets[targets != MASKED], logits.shape[-1])
    flat = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=MASKED, reduction="none")
    losses = flat.view(targets.shape)
    if kind == "mean":
        losses = losses / (targets != MASKED).sum(1, keepdim=True)
    return losses if per_token else losses.sum(1)


def _told(batch, labels: Tensor | None) -> tuple[dict, Tensor]:
    """What the model is called with, and the targets (B, L): the labels of all tokens but the first."""
    if isinstance(batch, Tensor):
        _check_shape("tokens", batch)
        told: Tensor | None = batch if labels is None else labels
        inputs = {"input_ids": batch[:, :-1]}
    elif isinstance(batch, Mapping) and "input_ids" in batch:
        inputs = {name: x for name, x in batch.items() if name != "labels"}
        tokens, mask = inputs["input_ids"], inputs.get("attention_mask")
        _check_shape("input_ids", tokens)
        told = batch.get("labels")
        if told is None:
            told = tokens if mask is None or mask.dim() != 2 else tokens.masked_fill(mask == 0, MASKED)
        batch = tokens
    else:
        keys = f" with {sorted(batch)}" if isinstance(batch, Mapping) else ""
        raise TypeError(
            f"the batch is a {type(batch).__name__}{keys}; text.loss takes tokens (B, L + 1), or a dict with "
            "input_ids and, if there are any, attention_mask and labels"
        )
    assert told is not None
    if told.shape != batch.shape:
        raise ValueError(f"the labels have shape {tuple(told.shape)}, the tokens {tuple(batch.shape)}")
    return inputs, told[:, 1:]


def _logits(model, inputs: dict, positional: bool) -> Tensor:
    """The model's logits (B, L, V)."""
    config = getattr(model, "config", None)
    options = {"use_cache": False} if hasattr(config, "use_cache") and "use_cache" not in inputs else {}
    out = model(inputs["input_ids"], **options) if positional else model(**inputs, **options)
    logits = out if isinstance(out, Tensor) else getattr(out, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        raise TypeError(
            f"the model returned a {type(out).__name__} without logits (B, L, V); text.loss takes a causal "
            "language model, such as AutoModelForCausalLM makes"
        )
    if logits.dtype in LOW_PRECISION:
        raise TypeError(
            f"the logits are {logits.dtype}: the derivative of a training in this precision is invalid; use "
            "model.float(), or text.pretrained, which loads in float32"
        )
    return logits


def _check_shape(name: str, tokens: Tensor) -> None:
    if tokens.dim() != 2 or tokens.shape[1] < 2:
        raise ValueError(f"{name} have shape {tuple(tokens.shape)}; they must be (B, L + 1), with L ≥ 1")
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise TypeError(f"{name} are {tokens.dtype}; tokens are integers")


def _check_tokens(model, tokens: Tensor) -> None:
    """Raise ValueError for tokens that the model has no embedding for, or more than it has places for."""
    places = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(places, int) and tokens.shape[1] > places:
        raise ValueError(
            f"the sequences have {tokens.shape[1]} tokens, and the model's context holds {places} "
            "(max_position_embeddings); cut them, with text.pack or the tokenizer's truncation and max_length"
        )
    find = getattr(model, "get_input_embeddings", None)
    embedding = find() if callable(find) else None
    size = getattr(embedding, "num_embeddings", None)
    if isinstance(size, int):
        _check_range("token", tokens, size)


def _check_range(what: str, numbers: Tensor, size: int) -> None:
    if numbers.numel() and not 0 <= numbers.min().item() <= numbers.max().item() < size:
        wrong = numbers[(numbers < 0) | (numbers >= size)][0].item()
        raise ValueError(
            f"{what} {wrong} is outside the model's vocabulary, 0 … {size - 1}: the tokenizer does not fit "
            f"the model (a label may also be {MASKED}, which is no target)"
        )


def _check_targets(targets: Tensor) -> None:
    """Raise ValueError for a sequence in which there is nothing to predict."""
    empty = (targets == MASKED).all(1)
    if empty.any():
        raise ValueError(
            f"sequence {empty.nonzero()[0].item()} of the batch has no target: every token after its first "
            f"is padding or has the label {MASKED}, so its loss is the mean of nothing; leave it out of the "
            "data"
        )
