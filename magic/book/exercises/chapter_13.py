"""Checkers of chapter 13, language models: spans of tokens, losses of padded sequences, clipped gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .judging import Cases, Wrong, exercise

Spans = list[tuple[int, int, int]]


def _dice(seed: int) -> Callable[..., Tensor]:
    """A function that draws normal numbers of a shape, in float64, always the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def _no_single(case: str, got: Any, want: Tensor, singles: dict[str, Tensor]) -> None:
    """Raise Wrong, with the reason, where one number came, and it is one of these, for several."""
    if isinstance(got, (Tensor, float)) and torch.as_tensor(got).numel() == 1 < want.numel():
        number = torch.as_tensor(got, dtype=want.dtype).detach().flatten()[0]
        for reason, single in singles.items():
            if abs(number - single) <= 1e-6 * abs(single):
                raise Wrong(f"wrong for {case}: {reason}.")


@exercise("13.1", "the predicted change of every output when spans of tokens are no longer targets")
def span_effect(answer) -> None:
    cases, length = Cases({}), 9
    many = [(0, 1, 4), (4, 3, 6), (2, 7, 10)]
    for case, spans in (
        ("one span", [(2, 3, 6)]),
        ("a span up to the last token", [(1, 6, 10)]),
        ("a span that begins with the first token", [(3, 0, 4)]),
        ("spans of three examples", many),
        ("spans that overlap", [(0, 1, 5), (0, 3, 7), (4, 2, 4)]),
    ):
        scores = _dice(len(spans))(3, 5, length)
        want = -_of_tokens(scores, spans)
        got = cases.call(case, answer, scores, spans)
        added = {"the outputs are added up; each has a change of its own": want.sum()}
        _no_single(case, got, want, added)
        later, earlier = (_of_tokens(scores, spans, shift) for shift in (0, 2))
        apart = torch.stack([_of_tokens(scores, [span]) for span in spans]).sum(0)
        from_end = -scores[:, [i for i, start, _ in spans if start == 0], -1].sum(1)
        suspects = {
            "this is what more of these tokens would do: a removal takes their weight from 1 to 0": -want,
            "a token that is in two spans is counted twice; its weight can only go from 1 to 0": -apart,
            "off by one: token l + 1 has the score l, so that token l has the score l − 1": -later,
            "off by one: token l + 1 has the score l, and the shift is made twice": -earlier,
            "off by one: token `stop` stays, as in a slice": -_of_tokens(scores, spans, more=1),
            "off by one: token `start` leaves, too": -_of_tokens(scores, spans, less=1),
            "the first token has no score: −1 is the index of the last score": want + from_end,
            "the first token has no score: a slice that begins at −1 begins at the end, and is empty":
                -_of_tokens(scores, [span for span in spans if span[1] > 0]),
            "the whole examples are removed, and only their spans should be": -scores[
                :, sorted({i for i, _, _ in spans})
            ].sum((1, 2)),
            "the effects add up; this is their mean": want / len(_places(spans, length)),
        }  # fmt: skip
        cases.same(case, got, want, suspects)


def _places(spans: Spans, length: int, shift: int = 1, more: int = 0, less: int = 0) -> set[tuple[int, int]]:
    """(example, score) of the tokens in these spans, each once; token l has the score l − shift."""
    tokens = {(i, token - shift) for i, start, stop in spans for token in range(start + less, stop + more)}
    return {(i, place) for i, place in tokens if 0 <= place < length}


def _of_tokens(scores: Tensor, spans: Spans, shift: int = 1, more: int = 0, less: int = 0) -> Tensor:
    """(K,): the sum of the scores of the tokens in these spans.

    shift        token l has the score l − shift; 1 is right
    more, less   how many tokens too late the spans end and begin; 0 is right
    """
    chosen = torch.zeros(scores.shape[1:], dtype=scores.dtype)
    for place in _places(spans, scores.shape[2], shift, more, less):
        chosen[place] = 1.0
    return (scores * chosen).sum((1, 2))


@exercise("13.2", "the mean loss of each sequence over its own targets")
def sequence_losses(answer) -> None:
    cases, draw = Cases({}), _dice(2)
    for case, lengths in (
        ("three sequences of one length", [5, 5, 5]),
        ("sequences with padding", [7, 4, 2, 6]),
    ):
        shape = len(lengths), max(lengths)
        logits = 2 * draw(*shape, 11)
        mask = (torch.arange(shape[1]) < torch.tensor(lengths)[:, None]).long()
        tokens = (draw(*shape).abs() * 100).long() % 10 + 1
        tokens = tokens * mask  # 0 is the token for padding
        want = _by_magic(logits, tokens, mask)
        got = cases.call(case, answer, logits, tokens, mask)
        each = -logits.log_softmax(-1)[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
        real = mask[:, 1:]
        _no_single(case, got, want, {
            "this is one mean over all targets of the batch, as transformers takes it; each sequence has "
            "its own": (each * real).sum() / real.sum(),
            "this is one mean over the batch; each sequence has its own": want.mean(),
            "this is one mean over the batch, and padding is in it": each.mean(),
        })  # fmt: skip
        cases.same(case, got, want, _wrong_losses(logits, tokens, mask, each))


def _by_magic(logits: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """(B,): what magic.text.loss makes of a model that has these logits."""
    from magic import text

    batch = {"input_ids": tokens, "attention_mask": mask}
    return text.loss()(lambda input_ids, attention_mask: logits, batch)


def _wrong_losses(logits: Tensor, tokens: Tensor, mask: Tensor, each: Tensor) -> dict[str, Tensor]:
    """Wrong answers to 13.2, by what is wrong with them; `each` are the losses (B, L − 1), with padding."""
    real, logs = mask[:, 1:].double(), logits.log_softmax(-1)
    count, right = real.sum(1), (each * real).sum(1)
    here = -logs.gather(2, tokens[..., None])[..., 0]
    back = -logs[:, 1:].gather(2, tokens[:, :-1, None])[..., 0]
    raw = -logits[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
    shifted = "not shifted: place l of the logits tells of token l + 1, and here it is asked for token l"
    backwards = "shifted the wrong way: place l of the logits tells of token l + 1, not of token l − 1"
    early = mask[:, :-1]
    return {
        "this is the mean of log p, which is negative; the loss is −log p": -right / count,
        shifted: (here * mask).sum(1) / mask.sum(1),
        f"{shifted} ": (here[:, 1:] * real).sum(1) / count,
        f"{shifted}  ": here.mean(1),
        backwards: (back * real).sum(1) / count,
        f"{backwards} ": (back * early).sum(1) / early.sum(1),
        f"{backwards}  ": back.mean(1),
        "padding is counted: its tokens are no targets": each.mean(1),
        "padding is left out of the sum, but counted in the mean: divide by the targets of the sequence":
            (each * real).mean(1),
        "divided by the number of tokens; the first is no target, so there is one target less":
            right / mask.sum(1),
        "the mask is not shifted: a target counts where *it* is a token, and this asks for the one before":
            (each * early).sum(1) / early.sum(1),
        "this is the sum over the targets, and asked for is their mean": right,
        "the logits are not normalised: p is their softmax": (raw * real).sum(1) / count,
        "this is the mean of p, without the logarithm": (each.neg().exp() * real).sum(1) / count,
        "every sequence has the mean over the batch; each has its own": (right.sum() / count.sum()).expand(
            len(mask)
        ),
    }  # fmt: skip


@exercise("13.3", "the way back through a gradient that was clipped by its norm")
def pull_clipped(answer) -> None:
    draw, limit = _dice(3), 1.5
    cases = Cases({"the limit": limit})
    some, cotangent = draw(6), 3 * draw(6)
    long, short = some * (2.4 / some.norm()), some * (0.6 / some.norm())
    for case, c, g in (
        ("a gradient that is not clipped", cotangent, short),
        ("a clipped gradient", cotangent, long),
        ("a gradient of many parameters, clipped", draw(40), draw(40)),
    ):
        want = torch.func.vjp(lambda g: g * (limit / g.norm()).clamp(max=1.0), g)[1](c)[0]
        got = cases.call(case, answer, c, g, limit)
        cases.same(case, got, want, _wrong_clipped(c, g, limit))


def _wrong_clipped(c: Tensor, g: Tensor, limit: float) -> dict[str, Tensor]:
    """Wrong answers to 13.3, by what is wrong with them."""
    norm = g.norm()
    r, along = limit / norm, c @ g
    itself = {"the cotangent itself was clipped; what was clipped is the gradient": c * (limit / c.norm())}
    if norm <= limit:
        whole = "nothing is clipped here: g arrives as it is, and so does its cotangent"
        return {
            f"{whole}; limit/‖g‖ is more than 1": r * c,
            f"{whole}; the formula for clipped gradients was used": r * (c - along / norm**2 * g),
            f"{whole}; the part along g is missing": c - along / norm**2 * g,
            f"{whole}; all entries are zero": 0 * c,
            **itself,
        }
    power = "the part along g has a wrong power of the norm: it is (g·c)/‖g‖² · g, before the factor"
    return {
        "the factor alone: the norm is held fixed, and it moves with g": r * c,
        "this gradient was clipped, and the cotangent comes back as it was": c,
        "the factor limit/‖g‖ is missing": c - along / norm**2 * g,
        "the part along g is added, and should be subtracted": r * (c + along / norm**2 * g),
        "this is the part along g alone; it is what does not come back": r * along / norm**2 * g,
        power: r * (c - along * g),
        f"{power} ": r * (c - along / norm * g),
        f"{power}  ": r * (c - along / norm**3 * g),
        "the factor stands before the first term only": r * c - along / norm**2 * g,
        "the factor stands before the first term only, and the second lacks a power of the norm": r * c
        - along / norm * g,
        "c and g have changed places: g is projected away from c": r * (g - along / (c @ c) * c),
        **itself,
    }
