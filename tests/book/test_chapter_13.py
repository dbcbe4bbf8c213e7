"""The checkers of chapter 13: right answers pass, and wrong ones are told what is wrong."""

import pytest
import torch

from tests.support.answers import fails, passes


def span_effect(scores, spans):
    weights = torch.ones(scores.shape[1:], dtype=scores.dtype)
    for example, start, stop in spans:
        weights[example, max(start - 1, 0) : max(stop - 1, 0)] = 0
    return ((weights - 1) * scores).sum((1, 2))


def by_set(scores, spans):
    places = {(i, token - 1) for i, start, stop in spans for token in range(max(start, 1), stop)}
    return -sum(scores[:, i, place] for i, place in places)


def moved(first, last, wrap=False):
    """A wrong answer to 13.1: first and last are added to the ends of each span, in numbers of scores."""

    def answer(scores, spans):
        weights = torch.ones(scores.shape[1:], dtype=scores.dtype)
        for example, start, stop in spans:
            begin = start + first if wrap else max(start + first, 0)
            weights[example, begin : max(stop + last, 0)] = 0
        return ((weights - 1) * scores).sum((1, 2))

    return answer


def token_by_token(scores, spans):
    places = {(i, token - 1) for i, start, stop in spans for token in range(start, stop)}
    return -sum(scores[:, i, place] for i, place in places)


def each_span(scores, spans):
    return sum(span_effect(scores, [span]) for span in spans)


def whole(scores, spans):
    return -scores[:, sorted({i for i, _, _ in spans})].sum((1, 2))


def losses(logits, tokens, mask, shift=True, sign=-1.0, mask_shift=True):
    """The loss of each target, and which are targets; wrong where an argument is changed."""
    logs = logits.log_softmax(-1)
    if not shift:
        return sign * logs.gather(2, tokens[..., None])[..., 0], mask
    each = sign * logs[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
    return each, mask[:, 1:] if mask_shift else mask[:, :-1]


def mean(each, real):
    return (each * real).sum(1) / real.sum(1)


def sequence_losses(logits, tokens, mask):
    return mean(*losses(logits, tokens, mask))


def one_by_one(logits, tokens, mask):
    """The right answer once more, without padding: each sequence alone."""
    found = []
    for row, ids, count in zip(logits, tokens, mask.sum(1).tolist(), strict=True):
        found.append(torch.nn.functional.cross_entropy(row[: count - 1], ids[1:count]))
    return torch.stack(found)


def wrong_losses(**changed):
    return lambda *arguments: mean(*losses(*arguments, **changed))


def over_all(logits, tokens, mask):
    each, real = losses(logits, tokens, mask)
    return (each * real).sum() / real.sum()


def backwards(logits, tokens, mask):
    each = -logits[:, 1:].log_softmax(-1).gather(2, tokens[:, :-1, None])[..., 0]
    return mean(each, mask[:, 1:])


def raw(logits, tokens, mask):
    return mean(-logits[:, :-1].gather(2, tokens[:, 1:, None])[..., 0], mask[:, 1:])


def but(change):
    """An answer to 13.2 that `change` makes of the losses and of which are targets."""
    return lambda *arguments: change(*losses(*arguments))


def pull_clipped(cotangent, gradient, limit, power=2, sign=-1.0, always=False, factor=True):
    norm = gradient.norm()
    if norm <= limit and not always:
        return cotangent
    along = (gradient @ cotangent) / norm**power * gradient
    return (limit / norm if factor else 1) * (cotangent + sign * along)


def by_autograd(cotangent, gradient, limit):
    gradient = gradient.clone().requires_grad_()
    clipped = gradient * min(1, limit / gradient.norm())
    return torch.autograd.grad(clipped, gradient, cotangent)[0]


def held(cotangent, gradient, limit):
    return cotangent * min(1, limit / gradient.norm())


def wrong_clipped(**changed):
    return lambda *arguments: pull_clipped(*arguments, **changed)


def clipped_only(formula):
    """A wrong answer to 13.3 that is right where nothing is clipped; formula of c, g, r and ‖g‖."""

    def answer(c, g, limit):
        norm = g.norm()
        return c if norm <= limit else formula(c, g, limit / norm, norm)

    return answer


@pytest.mark.parametrize(
    "number, answer",
    [
        ("13.1", span_effect),
        ("13.1", by_set),
        ("13.2", sequence_losses),
        ("13.2", one_by_one),
        ("13.3", pull_clipped),
        ("13.3", by_autograd),
    ],
)
def test_right_answers(number, answer):
    passes(number, answer)


SPANS = [
    (moved(0, 0), ["wrong for one span", "token l has the score l − 1"]),
    (moved(-2, -2), ["wrong for one span", "the shift is made twice"]),
    (moved(-1, 0), ["token `stop` stays"]),
    (moved(0, -1), ["token `start` leaves, too"]),
    (moved(0, -1, wrap=True), ["token `start` leaves, too"]),
    (moved(-1, -1, wrap=True), ["right for one span and a span up to", "begins at the end, and is empty"]),
    (token_by_token, ["that begins with the first token", "−1 is the index of the last score"]),
    (lambda scores, spans: -span_effect(scores, spans), ["wrong for one span", "from 1 to 0"]),
    (each_span, ["and spans of three examples; wrong for spans that overlap", "counted twice"]),
    (lambda scores, spans: span_effect(scores, spans).sum(), ["the outputs are added up"]),
    (lambda scores, spans: span_effect(scores, spans)[0], ["for one span the shape is ()"]),
    (whole, ["the whole examples are removed"]),
    (lambda scores, spans: span_effect(scores, spans) / 3, ["this is their mean"]),
    (lambda scores, spans: span_effect(scores, spans[:1]), ["wrong for spans of three examples"]),
]
LOSSES = [
    (wrong_losses(shift=False), ["wrong for three sequences", "not shifted"]),
    (but(lambda each, real: mean(-each, real)), ["wrong for three sequences", "the mean of log p"]),
    (backwards, ["wrong for three sequences", "shifted the wrong way"]),
    (raw, ["p is their softmax"]),
    (but(lambda each, real: mean(each.neg().exp(), real)), ["without the logarithm"]),
    (but(lambda each, real: (each * real).sum(1)), ["this is the sum"]),
    (but(lambda each, real: (each * real).sum(1) / (real.sum(1) + 1)), ["divided by the number of tokens"]),
    (but(lambda each, real: each.mean(1)), ["right for three sequences", "padding is counted"]),
    (but(lambda each, real: (each * real).mean(1)), ["left out of the sum, but counted in the mean"]),
    (wrong_losses(mask_shift=False), ["sequences with padding", "the mask is not shifted"]),
    (over_all, ["wrong for three sequences", "one mean over all targets of the batch"]),
    (but(lambda each, real: each.mean()), ["one mean over all targets of the batch"]),
    (lambda *arguments: sequence_losses(*arguments)[:1], ["the shape is (1,)"]),
    (lambda *arguments: over_all(*arguments).expand(len(arguments[2])), ["every sequence has the mean"]),
    (but(lambda each, real: (each * real).sum(1) / real.sum()), ["three sequences of one length"]),
]
CLIPPED = [
    (held, ["not clipped; wrong for a clipped gradient", "the norm is held fixed"]),
    (lambda c, g, limit: c, ["right for a gradient that is not clipped", "comes back as it was"]),
    (
        lambda c, g, limit: c * limit / g.norm(),
        ["wrong for a gradient that is not clipped", "is more than 1"],
    ),
    (wrong_clipped(always=True), ["nothing is clipped here", "the formula for clipped gradients"]),
    (wrong_clipped(always=True, factor=False), ["nothing is clipped here", "the part along g is missing"]),
    (
        lambda c, g, limit: held(c, g, limit) * (g.norm() > limit),
        ["nothing is clipped here", "all entries are zero"],
    ),
    (wrong_clipped(factor=False), ["the factor limit/‖g‖ is missing"]),
    (wrong_clipped(sign=1.0), ["is added, and should be subtracted"]),
    (wrong_clipped(power=0), ["a wrong power of the norm"]),
    (wrong_clipped(power=1), ["a wrong power of the norm"]),
    (wrong_clipped(power=3), ["a wrong power of the norm"]),
    (clipped_only(lambda c, g, r, norm: -pull_clipped(c, g, r * norm)), ["the sign is the other way round"]),
    (
        clipped_only(lambda c, g, r, norm: r * c - (g @ c) / norm**2 * g),
        ["the factor stands before the first term only"],
    ),
    (clipped_only(lambda c, g, r, norm: r * (g @ c) / norm**2 * g), ["the part along g alone"]),
    (clipped_only(lambda c, g, r, norm: r * (g - (g @ c) / (c @ c) * c)), ["have changed places"]),
    (lambda c, g, limit: c * min(1, limit / c.norm()), ["the cotangent itself was clipped"]),
]


@pytest.mark.parametrize(
    "number, answer, words",
    [
        *(("13.1", *wrong) for wrong in SPANS),
        *(("13.2", *wrong) for wrong in LOSSES),
        *(("13.3", *wrong) for wrong in CLIPPED),
    ],
)
def test_wrong_answers_are_explained(number, answer, words):
    fails(number, answer, words)
