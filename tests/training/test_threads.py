"""Two threads give what one after the other gives; and nothing that is given a model changes the run."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import magic
from magic import determinism
from tests.support import cases

TIMES = 4


def together(*jobs):
    """The results of the jobs, each in a thread of its own, begun at one moment."""
    start = threading.Barrier(len(jobs))

    def begun(job):
        start.wait(20)
        return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result(120) for future in [pool.submit(begun, job) for job in jobs]]


def trainings(run, first):
    """Fingerprints of a few trainings with different weights."""
    weights = [torch.full((run.n,), 1 + 0.01 * (first + i), dtype=run.dtype) for i in range(TIMES)]
    return lambda: [run.train(w, progress=False).fingerprint() for w in weights]


@pytest.mark.parametrize("name", ["dropout", "attention", "batchnorm-conv"])
@pytest.mark.parametrize("runs", [1, 2])
def test_trainings_in_two_threads(name, runs):
    run, *_ = cases.build(name)
    other = run if runs == 1 else cases.build(name, seed=11)[0]
    jobs = [trainings(run, 0), trainings(other, 10)]
    alone = [job() for job in jobs]
    assert alone[0] != alone[1]
    fresh = cases.build(name)[0]  # without a record to be compared with
    again = fresh if runs == 1 else cases.build(name, seed=11)[0]
    assert together(trainings(fresh, 0), trainings(again, 10)) == alone


def test_attributing_while_another_thread_trains():
    run, *_ = cases.build("dropout")
    measure = cases.measure_on(*run.data)
    jobs = [
        lambda run: magic.attribute(run, measure, progress=False).values,
        lambda run: magic.attribute(run, measure, at=0.9, progress=False).values,
        lambda run: [run.train(0.8 + 0.01 * i, progress=False).fingerprint() for i in range(TIMES)],
    ]
    first, second, third = [job(run) for job in jobs]
    fresh = cases.build("dropout")[0]
    found = together(*(lambda job=job: job(fresh) for job in jobs))
    assert torch.equal(found[0], first) and torch.equal(found[1], second) and found[2] == third


def test_models_and_identities_while_another_thread_trains():
    """While a step is done, the run's module holds the step's tensors."""
    run, *_ = cases.build("batchnorm-conv")
    state = run.train(0.5, progress=False)
    model, identity = magic.fingerprint(run.model(state)), run.identity()

    def looked_at():
        return {magic.fingerprint(run.model(state)) for _ in range(20)}, [run.identity() for _ in range(5)]

    models, identities = together(looked_at, trainings(run, 0))[0]
    assert models == {model} and all(found == identity for found in identities)


def test_a_plain_loop_in_another_thread_keeps_its_bits():
    """The plain loop seeds torch's random numbers, and nothing can hold it off; the other run draws none."""
    run, model, optimizer, scheduler = cases.build("adamw-onecycle")
    expected = run.train(progress=False).fingerprint()
    plain, final = together(
        lambda: cases.plain_loop(run, model, optimizer, scheduler),
        lambda: cases.build("batchnorm-conv")[0].train(progress=False),
    )
    values = {name: p.detach() for name, p in plain.named_parameters()}
    assert magic.fingerprint(values) == magic.fingerprint(run.train(progress=False).params)
    assert run.train(progress=False).fingerprint() == expected and final.step == cases.STEPS


def test_settings_come_back_after_two_threads():
    runs = [cases.build("dropout")[0], cases.build("dropout", seed=3)[0]]
    before = torch.are_deterministic_algorithms_enabled(), torch.get_rng_state()
    together(*(trainings(run, 0) for run in runs))
    assert torch.are_deterministic_algorithms_enabled() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_who_fixes_and_does_not_restore_keeps_nobody_waiting():
    settings = magic.determinism.fix()
    try:
        run, *_ = cases.build("sgd")
        assert together(lambda: run.train(progress=False))[0].step == cases.STEPS
    finally:
        settings.restore()


def test_a_failure_keeps_nobody_waiting():
    run, *_ = cases.build("sgd")

    def fails(model):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        magic.attribute(run, fails, progress=False)
    assert together(
        lambda: determinism.TURN.acquire(timeout=5) and (determinism.TURN.release(), True)[1]
    ) == [True]


def test_a_measure_may_train():
    """The turn is taken again by who has it."""
    run, *_ = cases.build("sgd")
    inner, *_ = cases.build("sgd-momentum")
    base = cases.measure_on(*run.data)
    scores = magic.attribute(
        run, lambda model: base(model) + inner.train(progress=False).step, progress=False
    )
    assert torch.equal(scores.values, magic.attribute(run, base, progress=False).values)


# -- what is frozen ------------------------------------------------------------------------------------


class Frozen(nn.Module):
    """A frozen layer and a constant buffer in front of one that is trained."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Linear(cases.FEATURES, 6), nn.Linear(6, cases.CLASSES)
        self.table.requires_grad_(False)
        self.register_buffer("shift", torch.zeros(6))

    def forward(self, x):
        return self.head(F.gelu(self.table(x) + self.shift))


def frozen_run(loss=cases.loss):
    torch.manual_seed(0)
    model = Frozen().double()
    return magic.Run(model, cases.sgd()(model), cases.data(), loss, cases.order())


ABLATIONS = {
    "no_grad": lambda x: x.zero_(),
    "data": lambda x: x.data.zero_(),
    "copied": lambda x: x.copy_(torch.ones_like(x)),
}


@pytest.mark.parametrize("how", ABLATIONS)
@pytest.mark.parametrize("what", ["table.weight", "shift", "head.bias"])
def test_a_measure_that_writes_into_a_model_does_not_change_the_run(what, how):
    def ablated(model):
        with torch.no_grad():
            ABLATIONS[how](dict([*model.named_parameters(), *model.named_buffers()])[what])
        return cases.loss(model, *(part[:3] for part in cases.data()))

    def on_a_copy(model):
        model = copy.deepcopy(model)
        with torch.no_grad():
            ABLATIONS[how](dict([*model.named_parameters(), *model.named_buffers()])[what])
        return cases.loss(model, *(part[:3] for part in cases.data()))

    run = frozen_run()
    identity, expected = run.identity(), run.train(progress=False).fingerprint()
    measured = magic.engine.replay.measured_outputs(run, run.initial, ablated)
    assert torch.equal(measured, magic.engine.replay.measured_outputs(frozen_run(), run.initial, on_a_copy))
    if what != "head.bias":  # what is trained may not be written in place where it is differentiated
        magic.attribute(run, ablated, progress=False)
    assert run.identity() == identity and run.train(progress=False).fingerprint() == expected


@pytest.mark.parametrize("data", [False, True])
def test_a_loss_that_writes_into_what_is_frozen_is_refused(data):
    """At a step in the middle, which is not tried when the run is made."""
    at = cases.data()[0][cases.order()[5]]

    def loss(model, x, y):
        if torch.equal(x, at):
            with torch.no_grad():
                weight = model.table.weight
                (weight.data if data else weight).mul_(1.01)
        return cases.loss(model, x, y)

    for use in (
        lambda run: run.train(progress=False),
        lambda run: magic.attribute(run, cases.measure_on(*run.data), progress=False),
    ):
        run = frozen_run(loss)
        with pytest.raises(ValueError, match=r"'table\.weight'"):
            use(run)
        with pytest.raises((ValueError, magic.ReplayMismatch)):  # and for good
            use(run)


def test_a_loss_that_clips_through_data_is_refused_by_attribute():
    """A plain loop goes on from what was clipped, and so does training; the derivative is not autograd's."""

    def clipped(model, x, y):
        model[0].weight.data.clamp_(-0.36, 0.36)
        return cases.loss(model, x, y)

    torch.manual_seed(0)
    model = cases.mlp().double()
    assert model[0].weight.abs().max() < 0.36
    run = magic.Run(model, cases.sgd(momentum=0.9)(model), cases.data(), clipped, cases.order())
    assert run.train(progress=False).params["0.weight"].abs().max() > 0.36, "degenerate: it never clips"
    with pytest.raises(magic.NotDifferentiable, match=r"in place through \.data"):
        magic.attribute(run, cases.measure_on(*run.data), progress=False)
