"""The checkers of chapter 15: right answers pass, and wrong ones are told what is wrong."""

from math import ceil, floor

import pytest
import torch

from tests.support.answers import fails, passes


def cost(targets, machines, group, fixed, each):
    own = ceil(targets / machines)
    return ceil(own / group) * fixed + own * each


def sweep_by_sweep(targets, machines, group, fixed, each):
    """The right answer once more, by dealing the targets out and counting."""
    piles = [len(range(i, targets, machines)) for i in range(machines)]
    return max(sum(fixed + each * min(group, pile - k) for k in range(0, pile, group)) for pile in piles)


def whole_work(targets, machines, group, fixed, each):
    shares = [len(range(i, targets, machines)) for i in range(machines)]
    return sum(ceil(share / group) * fixed + share * each for share in shares)


def parts(local, params, weights, cotangent):
    """A rank's gradient, its Hessian product, and the slopes of its examples along the cotangent."""
    params, weights = params.requires_grad_(), weights.requires_grad_()
    (gradient,) = torch.autograd.grad(local(params, weights), params, create_graph=True)
    product, slopes = torch.autograd.grad(gradient @ cotangent, (params, weights))
    return gradient.detach(), product, slopes


def pull(local, params, weights, cotangent, rate, all_reduce):
    _, product, slopes = parts(local, params, weights, cotangent)
    return cotangent - rate * all_reduce(product), -rate * slopes


def by_vjp(local, params, weights, cotangent, rate, all_reduce):
    """The right answer once more, and its sum has the rate in it."""
    back = torch.func.vjp(torch.func.grad(local), params, weights)[1]
    through, scores = back(-rate * cotangent)
    return cotangent + all_reduce(through), scores


def by_number(local, params, weights, cotangent, rate, all_reduce):
    """The right answer once more, with a sum for each parameter and one that nobody needs."""
    _, product, slopes = parts(local, params, weights, cotangent)
    total = torch.stack([all_reduce(one) for one in product])
    all_reduce(torch.ones(2, 3))
    return [cotangent - rate * total, -rate * slopes]


def other(change):
    """An answer to 15.2 whose two results are a function of its parts, by name."""

    def answer(local, params, weights, cotangent, rate, all_reduce):
        gradient, product, slopes = parts(local, params, weights, cotangent)
        world = all_reduce(torch.ones(1))
        given = (cotangent, rate, all_reduce, gradient, product, slopes, world)
        names = ("c", "rate", "sum", "g", "h", "slopes", "world")
        return change(dict(zip(names, given, strict=True)))

    return answer


def cotangent(change):
    """The same, where the scores are right."""
    return other(lambda p: (change(p), -p["rate"] * p["slopes"]))


def scores(change):
    """The same, where the cotangent is right."""
    return other(lambda p: (p["c"] - p["rate"] * p["sum"](p["h"]), change(p)))


def one_rank(local, params, weights, cotangent, rate, all_reduce):
    _, product, slopes = parts(local, params, weights, cotangent)
    return cotangent - rate * product, -rate * slopes


def in_place(local, params, weights, cotangent, rate, all_reduce):
    _, product, slopes = parts(local, params, weights, cotangent)
    all_reduce(product)
    return cotangent - rate * product, -rate * slopes


def by_example(local, params, weights, cotangent, rate, all_reduce):
    """A sum for each example, of which ranks have different numbers."""
    product = 0
    for one in torch.eye(len(weights)).to(weights):
        product = product + all_reduce(parts(local, params, weights.detach() * one, cotangent)[1])
    return cotangent - rate * product, -rate * parts(local, params, weights, cotangent)[2]


def through_the_sum(local, params, weights, cotangent, rate, all_reduce):
    params = params.requires_grad_()
    (gradient,) = torch.autograd.grad(local(params, weights), params, create_graph=True)
    (product,) = torch.autograd.grad(all_reduce(gradient) @ cotangent, params)
    return cotangent - rate * product, weights


def inside_of_the_sum(local, params, weights, cotangent, rate, all_reduce):
    def step(params, weights):
        return params - rate * all_reduce(torch.func.grad(local)(params, weights))

    return torch.func.vjp(step, params, weights)[1](cotangent)


def from_before(local, params, weights, cotangent, rate, all_reduce):
    before, _ = pull(local, params, weights, cotangent, rate, all_reduce)
    return before, -rate * parts(local, params, weights, before)[2]


def with_ones(local, params, weights, cotangent, rate, all_reduce):
    return pull(local, params, torch.ones_like(weights), cotangent, rate, all_reduce)


def times_weights(local, params, weights, cotangent, rate, all_reduce):
    before, found = pull(local, params, weights, cotangent, rate, all_reduce)
    return before, weights.detach() * found


def fits(memory, parameters, trained, slots, trace, bytes=4):
    each = bytes * trained * (1 + slots)
    return max(0, (memory - bytes * (parameters - trained) - each - trace) // each)


def memory(rounding=floor, **changed):
    """An answer to 15.3 that takes something else for some of its parts, as functions of its arguments."""

    def answer(memory, parameters, trained, slots, trace, bytes=4):
        given = {"P": parameters, "p": trained, "s": slots, "bytes": bytes, "trace": trace}
        full = trained * (1 + slots)
        used = {"frozen": parameters - trained, "state": full, "each": full, "trace": trace, "bytes": bytes}
        used |= {name: f(given) for name, f in changed.items()}
        held = used["bytes"] * (used["frozen"] + used["state"]) + used["trace"]
        return max(0, rounding((memory - held) / (used["bytes"] * used["each"])))

    return answer


@pytest.mark.parametrize(
    "number, answer",
    [
        ("15.1", cost),
        ("15.1", sweep_by_sweep),
        ("15.2", pull),
        ("15.2", by_vjp),
        ("15.2", by_number),
        ("15.3", fits),
        ("15.3", memory()),
    ],
)
def test_right_answers(number, answer):
    passes(number, answer)


COSTS = [
    (lambda K, m, g, f, e: f + ceil(K / m) * e, ["right for one machine and one", "not only once"]),
    (lambda K, m, g, f, e: cost(K, m, 1, f, e), ["wrong for one machine and one", "for a whole sweep"]),
    (lambda K, m, g, f, e: cost(K, m, g, f, 0), ["what each target costs is left out"]),
    (lambda K, m, g, f, e: cost(K, m, g, f + e, 0), ["and not each sweep"]),
    (lambda K, m, g, f, e: cost(K, m, g, 0, e), ["`fixed` is left out"]),
    (lambda K, m, g, f, e: K // m // g * f + ceil(K / m) * e, ["not full is a sweep, too: round up"]),
    (lambda K, m, g, f, e: K / m / g * f + ceil(K / m) * e, ["the number of sweeps is whole"]),
    (lambda K, m, g, f, e: ceil(K / m / g) * (f + g * e), ["for the targets that it has"]),
    (lambda K, m, g, f, e: cost(K // m, 1, g, f, e), ["equal shares", "more targets than this: round up"]),
    (whole_work, ["right for one machine", "the work of all machines; asked for is the time"]),
    (lambda K, m, g, f, e: m * cost(K, m, g, f, e), ["they work at the same time"]),
    (lambda K, m, g, f, e: cost(K, 1, g, f, e), ["the machines are forgotten"]),
    (lambda K, m, g, f, e: cost(K, 1, g, f, e) / m, ["each machine has sweeps of its own"]),
    (lambda K, m, g, f, e: ceil(K / g) / m * f + ceil(K / m) * e, ["the targets are shared first"]),
    (lambda K, m, g, f, e: ceil(K / m / g) * f + K / m * e, ["a target is not divided"]),
]
PULLS = [
    (
        one_rank,
        ["right for one rank; ", "wrong for the cotangent on rank 0 (two", "sum the Hessian products"],
    ),
    (in_place, ["right for one rank; ", "what `all_reduce` returns is the sum"]),
    (cotangent(lambda p: p["sum"](p["c"] - p["rate"] * p["h"])), ["the cotangent itself is summed, too"]),
    (
        cotangent(lambda p: p["c"] - p["rate"] * p["sum"](p["h"]) / p["world"]),
        ["right for one rank; ", "divided by B already"],
    ),
    (cotangent(lambda p: p["c"] - p["rate"] * p["sum"](p["sum"](p["h"]))), ["over the ranks twice"]),
    (cotangent(lambda p: p["c"] + p["rate"] * p["sum"](p["h"])), ["wrong for the cotangent", "other way"]),
    (cotangent(lambda p: p["c"] - p["sum"](p["h"])), ["the rate is missing"]),
    (cotangent(lambda p: p["c"] - p["rate"] * p["sum"](p["g"])), ["the gradient stands where"]),
    (cotangent(lambda p: p["c"] - p["rate"] * p["g"]), ["the gradient stands where"]),
    (cotangent(lambda p: -p["rate"] * p["sum"](p["h"])), ["params' contains params"]),
    (cotangent(lambda p: p["sum"](p["h"])), ["the Hessian product alone"]),
    (with_ones, ["right for one rank, two ranks", "weights that are not all 1", "taken as 1"]),
    (
        scores(lambda p: p["rate"] * p["slopes"]),
        ["wrong for the scores on rank 0 (one", "has −rate times it"],
    ),
    (scores(lambda p: p["slopes"]), ["the factor −rate of the step"]),
    (scores(lambda p: -p["slopes"]), ["the rate is missing"]),
    (scores(lambda p: -p["rate"] * p["slopes"] / p["world"]), ["divided by the number of ranks"]),
    (
        scores(lambda p: -p["rate"] * (p["sum"](p["slopes"]) if len(p["slopes"]) == 3 else p["slopes"])),
        ["wrong for the scores on rank 0 (two", "those of different examples"],
    ),
    (scores(lambda p: -p["rate"] * p["slopes"].sum()), ["the shape is (), and it should be (3,)"]),
    (
        scores(lambda p: -p["rate"] * p["slopes"] + 0 * p["sum"](p["slopes"])),
        ["the shapes (1,), (2,), (4,)", "Scores need no sum"],
    ),
    (from_before, ["wrong for the scores on rank 0 (one rank)", "from the cotangent before the step"]),
    (times_weights, ["weights that are not all 1", "the derivative by a weight"]),
    (lambda *a: pull(*a)[0], ["asked for are two tensors"]),
    (lambda *a: a[-1](3.0), ["sums tensors, and it was given float"]),
    (by_example, ["right for one rank and two ranks", "call `all_reduce` more often than others"]),
    (through_the_sum, ["raised RuntimeError for one rank"]),
    (lambda *a: (pull(*a)[0], a[-1](pull(*a)[1][:, None])), ["the shape is (3, 1)"]),
    (lambda loss, p, w, c, rate, total: (c, total(w)), ["wrong for the cotangent on rank 0 (one rank)"]),
    (inside_of_the_sum, ["it came back unchanged"]),
    (3, ["asked for is a function"]),
]
MEMORIES = [
    (memory(state=lambda a: 0), ["wrong for SGD without", "the model's state is not subtracted"]),
    (memory(trace=lambda a: 0), ["the trace is not subtracted"]),
    (memory(bytes=lambda a: 1), ["the memory is in bytes"]),
    (memory(frozen=lambda a: a["P"]), ["the trained parameters are counted twice"]),
    (memory(ceil), ["right for SGD without momentum; wrong", "no room for the last one"]),
    (memory(round), ["no room for the last one"]),
    (memory(float), ["part of a cotangent is of no use"]),
    (memory(each=lambda a: a["p"]), ["wrong for AdamW", "slots have cotangents, too"]),
    (memory(state=lambda a: a["p"]), ["wrong for AdamW", "the state has the optimizer's slots"]),
    (memory(each=lambda a: a["p"], state=lambda a: a["p"]), ["slots are left out"]),
    (memory(frozen=lambda a: 0), ["wrong for LoRA", "the frozen parameters are not subtracted"]),
    (memory(each=lambda a: a["P"] * (1 + a["s"])), ["frozen parameters have no cotangents"]),
    (memory(each=lambda a: a["P"] + a["p"] * a["s"]), ["frozen parameters have no cotangents"]),
    (lambda m, P, p, s, t, b=4: fits(m, P, P, s, t, b), ["wrong for LoRA", "have neither slots"]),
    (lambda m, P, p, s, t, b=4: fits(m, P, p, s, t), ["numbers of 2 bytes", "`bytes` says otherwise"]),
    (
        lambda m, P, p, s, t, b=4: floor((m - t - b * (P + p * s)) / (b * p * (1 + s))),
        ["wrong for a model that does not fit", "the least is 0"],
    ),
]


@pytest.mark.parametrize(
    "number, answer, words",
    [
        *(("15.1", *wrong) for wrong in COSTS),
        *(("15.2", *wrong) for wrong in PULLS),
        *(("15.3", *wrong) for wrong in MEMORIES),
    ],
)
def test_wrong_answers_are_explained(number, answer, words):
    fails(number, answer, words)
