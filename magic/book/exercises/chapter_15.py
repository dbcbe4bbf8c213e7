"""Checkers of chapter 15, at the scale of the papers: many machines, a batch on many ranks, memory."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .judging import Cases, Wrong, exercise, number


def _numbers(values: dict[str, float]) -> dict[str, Tensor]:
    return {reason: number(value) for reason, value in values.items()}


@exercise("15.1", "what the sweeps for many targets cost on many machines")
def sweeps_cost(answer) -> None:
    cases, fixed, each = Cases({}), 3.0, 1.7
    for case, K, machines, group in (
        ("one machine and one full sweep", 4, 1, 4),
        ("one machine and a last sweep that is not full", 10, 1, 4),
        ("several machines that have no equal shares", 10, 4, 2),
        ("several machines and larger groups", 500, 8, 39),
        ("more machines than targets", 3, 8, 2),
    ):
        own = ceil(K / machines)
        want = ceil(own / group) * fixed + own * each
        got = cases.call(case, answer, K, machines, group, fixed, each)
        cases.same(case, got, number(want), _wrong_costs(K, machines, group, fixed, each))


def _wrong_costs(K: int, machines: int, group: int, fixed: float, each: float) -> dict[str, Tensor]:
    """Wrong answers to 15.1, by what is wrong with them."""
    own, uneven = ceil(K / machines), K / machines
    sweeps, equal = ceil(own / group), K // machines
    shares = [K // machines + (i < K % machines) for i in range(machines)]
    total = sum(ceil(share / group) * fixed + share * each for share in shares)
    return _numbers({
        "`fixed` is paid in every sweep, and not only once": fixed + own * each,
        "`fixed` is paid once for a whole sweep, and not for each of its targets": own * (fixed + each),
        "what each target costs is left out": sweeps * fixed,
        "each target costs `each`, and not each sweep": sweeps * (fixed + each),
        "`fixed` is left out": own * each,
        "a last sweep that is not full is a sweep, too: round up": own // group * fixed + own * each,
        "a sweep that is not full costs `fixed` all the same: the number of sweeps is whole":
            own / group * fixed + own * each,
        "the last sweep is not full, and it costs `each` for the targets that it has":
            sweeps * (fixed + group * each),
        "the busiest machine has more targets than this: round up":
            ceil(equal / group) * fixed + equal * each,
        "this is the work of all machines; asked for is the time until the last of them is done": total,
        "this is the work of all machines; they work at the same time":
            machines * (sweeps * fixed + own * each),
        "the machines are forgotten: each has only its share": ceil(K / group) * fixed + K * each,
        "this divides the time of one machine by their number; but each machine has sweeps of its own":
            (ceil(K / group) * fixed + K * each) / machines,
        "the targets are shared first, and then put into sweeps; a machine does no part of a sweep":
            ceil(K / group) / machines * fixed + own * each,
        "a target is not divided: the busiest machine has a whole number of them":
            ceil(uneven / group) * fixed + uneven * each,
    })  # fmt: skip


RATE = 0.3


class _Step:
    """A step of SGD whose batch is shared between ranks: their examples, their weights and its adjoint."""

    def __init__(self, sizes: tuple[int, ...], weighted: bool, seed: int) -> None:
        chance = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=chance, dtype=torch.float64)

        self.params, self.cotangent = draw(8), draw(8)
        self.weights = [1 + 0.4 * draw(size) * weighted for size in sizes]
        self.locals = [_local(draw(size, 3), draw(size), sum(sizes)) for size in sizes]
        self.before, *self.scores = torch.func.vjp(self.after, self.params, *self.weights)[1](self.cotangent)

    def after(self, params: Tensor, *weights: Tensor) -> Tensor:
        """The whole step in one process, through which PyTorch pulls the cotangent back."""
        parts = zip(self.locals, weights, strict=True)
        return params - RATE * sum(torch.func.grad(local)(params, w) for local, w in parts)

    def pulled(self, rank: int, cotangent: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """This rank's gradient, and the cotangent pulled through it, to params and to weights."""
        gradient = torch.func.grad(self.locals[rank])
        to_params, to_weights = torch.func.vjp(gradient, self.params, weights)[1](cotangent)
        return gradient(self.params, weights), to_params, to_weights


def _local(x: Tensor, y: Tensor, size: int) -> Callable[[Tensor, Tensor], Tensor]:
    def local(params: Tensor, weights: Tensor) -> Tensor:
        predicted = torch.tanh(x @ params[:6].view(3, 2)) @ params[6:]
        return (weights * (predicted - y) ** 2).sum() / size

    return local


class _Waits(BaseException):
    """Raised where a rank needs a sum that is not known yet. No Exception, since answers may catch those."""


class _Sums:
    """`all_reduce` for ranks that one process plays, one after the other.

    No rank can wait for the others here. So each is run again and again. It is handed the sums that are
    known and stopped at the next one, to which it gives its part; when all have given theirs, that is known.
    """

    def __init__(self) -> None:
        self.known: list[Tensor] = []
        self.given: list[Tensor] = []  # by the rank that runs, one for each call

    def all_reduce(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise Wrong(f"`all_reduce` sums tensors, and it was given {type(x).__name__}.")
        self.given.append(x.detach().clone())
        if len(self.given) > len(self.known):
            raise _Waits
        return self.known[len(self.given) - 1].clone()

    def next(self, parts: list[Tensor]) -> None:
        """The next sum, of what the ranks gave to it."""
        shapes = [str(tuple(part.shape)) for part in parts]
        if len(set(shapes)) > 1:
            raise Wrong(
                f"the ranks gave `all_reduce` tensors of the shapes {', '.join(shapes)}, and only tensors of "
                "one shape can be summed. (Scores need no sum: a rank's are those of its own examples.)"
            )
        self.known.append(torch.stack(parts).sum(0))


def _on_all_ranks(cases: Cases, case: str, answer: Any, step: _Step) -> tuple[list[Any], int]:
    """What the answer returns on each rank, and how many sums it took."""

    def until_it_waits(*arguments: Any) -> Any:
        try:
            return answer(*arguments)
        except _Waits:
            return None

    sums, run = _Sums(), until_it_waits if callable(answer) else answer
    while True:
        found, parts = [], []
        for local, weights in zip(step.locals, step.weights, strict=True):
            sums.given = []
            arguments = local, step.params, weights, step.cotangent, RATE, sums.all_reduce
            found.append(cases.call(case, run, *arguments))
            parts += sums.given[len(sums.known) :][:1]
        if not parts:
            return found, len(sums.known)
        if len(parts) < len(found):
            more = "some ranks call `all_reduce` more often than others, and would wait for them for ever"
            cases.true(case, False, more)
        sums.next(parts)


@exercise("15.2", "the adjoint of a step whose batch is shared between ranks")
def pull(answer) -> None:
    cases = Cases({"the rate": RATE})
    for case, sizes, weighted in (
        ("one rank", (3,), False),
        ("two ranks with three examples each", (3, 3), False),
        ("three ranks with different numbers of examples", (1, 2, 4), False),
        ("weights that are not all 1", (1, 2, 4), True),
    ):
        step = _Step(sizes, weighted, seed=len(sizes))
        found, calls = _on_all_ranks(cases, case, answer, step)
        before = list(cases.right)
        for rank, got in enumerate(found):
            if not isinstance(got, (tuple, list)) or len(got) != 2:
                cases.true(
                    case, False, "asked for are two tensors, the cotangent before the step and the scores"
                )
            wrong = _wrong_cotangents(step, rank, calls)
            cases.same(f"the cotangent on rank {rank} ({case})", got[0], step.before, wrong)
            wrong = _wrong_scores(step, rank)
            cases.same(f"the scores on rank {rank} ({case})", got[1], step.scores[rank], wrong)
        cases.right = [*before, case]


def _wrong_cotangents(step: _Step, rank: int, calls: int) -> dict[str, Tensor]:
    """Wrong cotangents of 15.2, by what is wrong with them."""
    c, world = step.cotangent, len(step.weights)
    parts = [step.pulled(r, c, w) for r, w in enumerate(step.weights)]
    plain = [step.pulled(r, c, torch.ones_like(w))[1] for r, w in enumerate(step.weights)]
    gradient, product = (torch.stack([part[i] for part in parts]).sum(0) for i in (0, 1))
    own_gradient, own = parts[rank][:2]
    alone = "only this rank's examples are in it, so that each rank would go on with another cotangent: "
    unused = "what `all_reduce` returns is the sum, and its argument stays as it is"
    return {
        "the sign of the step is the other way round": c + RATE * product,
        "the rate is missing": c - product,
        "the gradient stands where its derivative should be: pull the cotangent through the gradient":
            c - RATE * gradient,
        "this rank's gradient stands where its derivative should be": c - RATE * own_gradient,
        "the cotangent itself is missing: params' contains params": -RATE * product,
        "this is the Hessian product alone, without the step": product,
        alone + (unused if calls else "sum the Hessian products"): c - RATE * own,
        "the cotangent itself is summed, too; every rank has all of it already": world * c - RATE * product,
        "the ranks' parts are averaged; their sum is asked for, since each is divided by B already":
            c - RATE * product / world,
        "the Hessian products are summed over the ranks twice": c - RATE * world * product,
        "it came back unchanged; if you differentiate through `all_reduce`, nothing comes back": c,
        "the weights are taken as 1": c - RATE * torch.stack(plain).sum(0),
    }  # fmt: skip


def _wrong_scores(step: _Step, rank: int) -> dict[str, Tensor]:
    """Wrong scores of 15.2, by what is wrong with them."""
    want, w, world = step.scores[rank], step.weights[rank], len(step.weights)
    wrong = {
        "the sign of the step is missing: a weight moves the gradient, and params' has −rate times it": -want,
        "the factor −rate of the step is missing": -want / RATE,
        "the rate is missing": want / RATE,
        "they are multiplied by the weights; asked for is the derivative by a weight": want * w,
        "they are pulled from the cotangent before the step; take the one after it, which was given":
            -RATE * step.pulled(rank, step.before, w)[2],
        "they are divided by the number of ranks": want / world,
    }  # fmt: skip
    if len({len(weights) for weights in step.weights}) == 1:
        summed = torch.stack(step.scores).sum(0)
        wrong["the scores of the ranks are summed, and they are those of different examples"] = summed
    return wrong


class _Memory(NamedTuple):
    """The arguments of 15.3; slots are those of the optimizer, for each number that is trained."""

    memory: int
    parameters: int
    trained: int
    slots: int
    trace: int
    bytes: int = 4

    def fits(self, **changed: int) -> float:
        """How many cotangents fit, not rounded; with what a wrong answer takes for a part of it."""
        whole = self.trained * (1 + self.slots)
        parts = {"frozen": self.parameters - self.trained, "state": whole, "each": whole}
        parts |= {"trace": self.trace, "bytes": self.bytes} | changed
        held = parts["bytes"] * (parts["frozen"] + parts["state"]) + parts["trace"]
        return (self.memory - held) / (parts["bytes"] * parts["each"])


@exercise("15.3", "how many targets' cotangents fit into the memory")
def targets_at_once(answer) -> None:
    cases, M = Cases({}), 10**6
    for case, given in (
        ("SGD without momentum", _Memory(1000 * M, 9 * M, 9 * M, 0, 316 * M)),
        ("a memory that does not come out even", _Memory(1000 * M, 9 * M, 9 * M, 0, 290 * M)),
        ("AdamW", _Memory(2000 * M, 9 * M, 9 * M, 2, 331 * M)),
        ("LoRA with AdamW", _Memory(4000 * M, 40 * M, 3 * M, 2, 200 * M)),
        ("numbers of 2 bytes", _Memory(1000 * M, 40 * M, 5 * M, 1, 211 * M, 2)),
        ("a model that does not fit at all", _Memory(300 * M, 90 * M, 3 * M, 2, 200 * M)),
    ):
        arguments = given if given.bytes != 4 else given[:5]
        got = cases.call(case, answer, *arguments)
        want = max(0, int(given.fits() // 1))
        cases.same(case, got, number(want), _wrong_numbers(given))


def _wrong_numbers(given: _Memory) -> dict[str, Tensor]:
    """Wrong answers to 15.3, by what is wrong with them, whole or not."""
    parameters, trained, slots = given.parameters, given.trained, given.slots
    full = parameters * (1 + slots)
    wrong = {
        "the model's state is not subtracted": given.fits(state=0),
        "the trace is not subtracted": given.fits(trace=0),
        "the frozen parameters are not subtracted, and they lie in memory, too": given.fits(frozen=0),
        "the memory is in bytes, and numbers have to be multiplied by theirs": given.fits(bytes=1),
        "a number is taken to have 4 bytes, and `bytes` says otherwise": given.fits(bytes=4),
        "the optimizer's slots have cotangents, too": given.fits(each=trained),
        "the optimizer's slots are left out": given.fits(each=trained, state=trained),
        "frozen parameters have neither slots nor cotangents": given.fits(frozen=0, state=full, each=full),
        "frozen parameters have no cotangents": given.fits(each=full),
        "frozen parameters have no cotangents ": given.fits(each=parameters + trained * slots),
        "the trained parameters are counted twice, in the model and in the state":
            given.fits(frozen=parameters),
    }  # fmt: skip
    fits = given.fits()
    first = {
        "part of a cotangent is of no use: round down to a whole number": fits,
        "no fewer than none can be pulled back: the least is 0": fits // 1,
        "the state has the optimizer's slots, too": given.fits(state=trained) // 1,
        "there is no room for the last one: round down": ceil(fits),
    }
    return _numbers(first | {reason: max(0, value // 1) for reason, value in wrong.items()})
