"""A budget in bytes is kept: the plan fits, what is measured fits, and the answer does not change."""

import dataclasses
import itertools
import warnings
from functools import cache
from unittest import mock

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import magic
from magic import schedule
from magic.book import data, models
from magic.engine import footprint, search, trial
from magic.engine.planning import PLACES, Plan
from magic.engine.search import parse_bytes
from magic.engine.witness import check_step
from magic.engine.work import Choice, Sweep, Work
from magic.training.state import Cotangent
from tests.support import cases, slots


def digits_run(targets=8, steps=40):
    """An MLP with AdamW: 1 MB a state, more in a trace."""
    x, y, x_test, y_test = data.digits(train=800, test=100)
    torch.manual_seed(0)
    model = models.MLP((64, 256, 256, 10))
    order = magic.batches(len(x), 128, 8)[:steps]
    run = magic.Run(model, torch.optim.AdamW(model.parameters(), 1e-3), (x, y), cases.loss, order)
    return run, cases.measure_on(x_test, y_test, targets)


def images_run(targets=8, steps=20):
    """A small ConvNet with BatchNorm: 60 KB a state, megabytes in a trace."""
    dice = torch.Generator().manual_seed(0)
    x, y = torch.randn(300, 1, 14, 14, generator=dice), torch.randint(10, (300,), generator=dice)
    torch.manual_seed(0)
    model = models.ConvNet(width=16, norm="batch")
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    run = magic.Run(model, optimizer, (x, y), cases.loss, magic.batches(len(x), 50, 5)[:steps])
    return run, cases.measure_on(x, y, targets)


RUNS = {"digits": digits_run, "images": images_run}


def peak_of(work):
    """Bytes allocated at the peak of `work`, as PyTorch's own allocator reports them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            work()
    now = peak = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    assert peak > 0, "degenerate: nothing was seen"
    return peak


@pytest.mark.parametrize("memory", ["20MB", "150MB"])
@pytest.mark.parametrize("name", RUNS)
def test_what_is_measured_fits(name, memory):
    """From outside: everything that is allocated in a metagradient, its trial and its checks included."""
    run, measure = RUNS[name](steps=8)
    found = []
    peak = peak_of(lambda: found.append(magic.attribute(run, measure, memory=memory, progress=False)))
    (scores,) = found
    print(f"{name} {memory}: {peak / 1e6:.1f} MB measured; {scores.plan}")
    assert scores.plan.nbytes <= parse_bytes(memory)
    assert peak <= parse_bytes(memory)
    plenty = with_plenty(name)
    assert plenty.abs().max() > 0
    torch.testing.assert_close(scores.values, plenty, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", RUNS)
def test_what_is_asked_beside_the_scores_fits_too(name):
    """The start, every hyper-parameter, and the inputs of all examples."""
    memory = "30MB"
    run, measure = RUNS[name](steps=8)
    of, found = ("start", "hypers", "data"), []

    def work():
        found.append(magic.metagradient(run, measure, of, memory=memory, progress=False))

    peak = peak_of(work)
    print(f"{name} {memory}: {peak / 1e6:.1f} MB measured; {found[0].plan}")
    assert peak <= parse_bytes(memory)
    torch.testing.assert_close(found[0].weights, with_plenty(name), rtol=1e-3, atol=1e-6)


@cache
def with_plenty(name):
    """The scores of a run where memory is no concern."""
    run, measure = RUNS[name](steps=8)
    return magic.attribute(run, measure, memory="4GB", progress=False).values


@pytest.mark.parametrize("targets", [1, 3, 16, 200])
@pytest.mark.parametrize("name", RUNS)
def test_every_plan_is_legal_and_within_its_room(name, targets):
    run, _ = RUNS[name]()
    with pytest.raises(ValueError, match="the least that works is") as error:
        magic.plan(run, targets, memory=1000)
    least = int(str(error.value).split("least that works is ")[1].split(" bytes")[0].replace(",", ""))
    for room in (least, 2 * least, 5 * least, 100 * least):
        plan = magic.plan(run, targets, memory=room)
        assert plan.nbytes <= room
        cost = schedule.check(plan.actions(), run.steps, plan.states, plan.traces)
        assert cost == plan.cost
        assert plan.sweeps * plan.group >= targets > (plan.sweeps - 1) * plan.group
    assert plan.traces == run.steps and plan.extra == 0
    # the trial's bytes may differ by what other tensors were alive, not by much
    with pytest.raises(ValueError, match="the least that works"):
        magic.plan(run, targets, memory=int(0.9 * least))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("batch", [8, 128])
def test_what_the_witness_holds(dtype, optimizer, batch):
    """The rule for it, against what is measured; 14 gradients, which it once was, are too little here."""
    dice = torch.Generator().manual_seed(0)
    x, y = torch.randn(128, 64, generator=dice, dtype=dtype), torch.randint(10, (128,), generator=dice)
    torch.manual_seed(0)
    model = models.MLP((64, 512, 512, 10)).to(dtype)
    order = magic.batches(len(x), batch, 4)[:4]
    run = magic.Run(model, optimizer(model.parameters(), 1e-3), (x, y), cases.loss, order)
    told = trial.measure_step(run, 1).check_bytes
    state = run.step(run.initial, run.weights())
    _, _, held = footprint.measured(lambda: check_step(run, state, run.weights()), run.device)
    assert held <= told <= 1.5 * held


def test_more_memory_is_never_slower():
    run, _ = digits_run()
    plans = [magic.plan(run, 16, memory=f"{mb}MB") for mb in (18, 25, 40, 80, 200)]
    efforts = [plan.effort for plan in plans]
    assert efforts == sorted(efforts, reverse=True) and efforts[0] > efforts[-1]
    assert plans[0].sweeps > 1 and plans[-1].sweeps == 1


STEP = trial.StepCost(
    state_bytes=10_000, trace_bytes=50_000, target_bytes=20_000, pull_bytes=60_000, check_bytes=200_000,
    step_seconds=1e-3, trace_seconds=2e-3, pull_seconds=2e-3, disk_seconds=1e-3,
    same_bits=True, batched=True, convolves=True,
)  # fmt: skip


@pytest.mark.parametrize("disk", [0, 100, 10**9])
@pytest.mark.parametrize("targets", [1, 64])
def test_a_long_run_is_planned_at_once(targets, disk, monkeypatch):
    """100,000 steps and any budget: no schedule is walked through, and a bounded number are compared."""
    forbidden = mock.Mock(side_effect=AssertionError("a schedule was walked through"))
    for name in ("reverse", "walk", "check", "binomial", "store_all"):
        monkeypatch.setattr(schedule, name, forbidden)
    priced = mock.Mock(side_effect=search._time)
    monkeypatch.setattr(search, "_time", priced)
    work = Work(100_000, targets, STEP, row_bytes=400)
    least = work.nbytes(Choice(1, 1))
    for more in (0, 10, 100, 10_000, 10**6, 10**8, 10**9, 10**11):
        priced.reset_mock()
        choice = search.best(work, search.Budget(least + more, 0, disk), chunk=8)
        plan = Plan(
            work, choice.group, choice.chunk, choice.traces, search.places(100_000, choice), least + more
        )
        assert f"{plan.extra:,} extra steps" in str(plan) and plan.rows()
        assert plan.nbytes <= plan.room and 0 < priced.call_count <= 200
    assert plan.traces == 100_000 and plan.extra == 0


@pytest.mark.parametrize("steps", [7, 40, 333])
def test_what_a_plan_expects_is_what_its_schedule_takes(steps):
    """A choice is priced without a schedule; walking through the schedule finds the same time."""
    seen = set()
    for targets, disk, more in itertools.product((1, 20), (0, 5, 1000), (0, 3, 12, 60, 300, 5000)):
        work = Work(steps, targets, STEP, row_bytes=400)
        budget = search.Budget(work.nbytes(Choice(1, 1)) + more * STEP.state_bytes, 0, disk)
        choice = search.best(work, budget, chunk=8)
        plan = Plan(
            work, choice.group, choice.chunk, choice.traces, search.places(steps, choice), budget.nbytes
        )
        walked = schedule.check(plan.actions(), steps, plan.states, plan.traces)
        uses = slots.uses(plan.actions())
        accesses = sum(uses[slot] for slot, place in enumerate(plan.tier_of) if place == 2)
        sweep = Sweep(walked.advanced, walked.traced, accesses)
        assert work.sweep(choice) == sweep and plan.cost == walked
        assert plan.seconds == work.time(plan.sweeps, sweep, work.measured)
        seen |= {(plan.sweeps > 1, plan.traces > 0, accesses > 0, plan.extra > 0)}
    assert len(seen) > 3, "degenerate: the plans are all of a kind"


def test_arguments_that_contradict_are_refused_by_name(tmp_path):
    """More of it in test_defects: each pair of them."""
    run, *_ = cases.build("sgd")
    actions = schedule.store_all(run.steps)
    with pytest.raises(ValueError, match="memory= and states= contradict each other: give one of them"):
        magic.plan(run, memory="1GB", states=3)
    with pytest.raises(ValueError, match="states= and actions= contradict"):
        magic.plan(run, states=3, actions=actions)
    with pytest.raises(ValueError, match="disk= and actions= contradict"):
        magic.plan(run, disk=tmp_path, actions=actions)
    with pytest.raises(TypeError, match="measuring"):
        magic.plan(run, measuring=1000)


def test_the_grouping_of_targets_needs_no_clock():
    run, _ = digits_run()
    plans = [magic.plan(run, 16, memory="20MB") for _ in range(3)]
    assert len({(p.group, p.chunk) for p in plans}) == 1


def test_what_the_plan_says():
    run, measure = digits_run()
    plan = magic.plan(run, 8, memory="60MB")
    words = dict(plan.rows())
    assert words.keys() >= {"states kept", "targets", "extra steps", "memory", "time"}
    assert words["memory"].endswith("of 60.0 MB") and "8 in 1 sweep" in words["targets"]
    assert "<table>" in plan._repr_html_()
    assert "steps advanced" in plan.timeline() and len(plan.timeline().splitlines()) > 4
    assert "40 steps" in str(plan)
    with pytest.raises(
        ValueError, match=r"the plan is for 8 targets and 40 steps; measure returns 3.*magic\.plan"
    ):
        magic.attribute(run, lambda model: measure(model)[:3], plan=plan)


@pytest.mark.usefixtures("unwitnessed")
@pytest.mark.parametrize("name", ["adamw", "batchnorm-conv", "dropout"])
def test_every_schedule_gives_the_same_bits(name):
    run, *_ = cases.build(name)
    measure = cases.measure_on(*run.data)
    expected = magic.attribute(run, measure, progress=False)
    assert expected.plan.traces == run.steps
    T = run.steps
    given = [
        schedule.store_all(T),
        schedule.kary(T, 2),
        schedule.kary(T, 4),
        schedule.binomial(T, 3, traces=4),
    ]
    plans = [magic.plan(run, actions=actions) for actions in given]
    plans += [magic.plan(run, states=k) for k in (1, 3, T)]
    for plan in plans:
        found = magic.attribute(run, measure, progress=False, plan=plan)
        assert torch.equal(found.values, expected.values), str(plan)
        assert torch.equal(found.outputs, expected.outputs)


def test_a_schedule_that_is_not_legal():
    run, *_ = cases.build("sgd")
    actions = [a for a in schedule.binomial(run.steps, 3) if not isinstance(a, schedule.Load)]
    with pytest.raises(ValueError, match="is not legal"):
        magic.plan(run, actions=actions)
    with pytest.raises(ValueError, match=f"the schedule ends with {run.steps} steps not reversed"):
        magic.plan(run, actions=[])
    with pytest.raises(ValueError, match=r"is not legal|steps not reversed"):
        magic.plan(run, actions=schedule.store_all(run.steps - 1))


@pytest.mark.parametrize("targets", [0, -1, 2.5])
def test_a_number_of_targets_that_is_none(targets):
    run, *_ = cases.build("sgd")
    with pytest.raises(ValueError, match="targets="):
        magic.plan(run, targets=targets)


def test_measure_of_nothing():
    run, *_ = cases.build("sgd")
    with pytest.raises(ValueError, match="K >= 1"):
        magic.attribute(run, lambda model: torch.zeros(0), progress=False)


@pytest.mark.parametrize("seconds, wanted", [(1e-7, True), (100.0, False)])
def test_the_disk_is_used_where_it_pays(tmp_path, monkeypatch, seconds, wanted):
    """A fast folder saves steps; a slow one is left alone. The slots used most often stay in memory."""
    run, _ = digits_run()
    measure_step = magic.engine.planning.measure_step

    def with_a_disk_of_that_speed(*arguments):
        return dataclasses.replace(measure_step(*arguments), disk_seconds=seconds)

    monkeypatch.setattr(magic.engine.planning, "measure_step", with_a_disk_of_that_speed)
    plan, without = magic.plan(run, 1, memory="14MB", disk=tmp_path), magic.plan(run, 1, memory="14MB")
    assert list(tmp_path.iterdir()) == [], "the trial has cleaned up"
    here, there = plan.tier_of.count(0), plan.tier_of.count(2)
    assert here >= 2 and (there >= 2) == wanted
    if not wanted:
        assert plan.tier_of == without.tier_of
        return
    assert plan.extra < without.extra
    assert f"{there} in {PLACES[2]}" in dict(plan.rows())["states kept"]
    uses = slots.uses(plan.actions())
    by_place = {place: [uses[slot] for slot, t in enumerate(plan.tier_of) if t == place] for place in (0, 2)}
    assert min(by_place[0]) >= max(by_place[2])


@pytest.mark.usefixtures("unwitnessed")
def test_disk_and_host_give_the_same_bits(tmp_path):
    run, measure = digits_run(targets=3, steps=16)
    expected = magic.attribute(run, measure, memory="1GB", progress=False)
    plan = magic.plan(run, 3, memory="1GB")
    for i, tiers in enumerate([(0, 1, 1, 1), (1, 1, 0, 1), (0, 2, 1, 2), (2, 2, 2, 2)]):
        far = dataclasses.replace(plan, traces=0, tier_of=tiers)
        weights = run.weights()
        folder = magic.engine.resume.Trusted(tmp_path / str(i)) if 2 in tiers else None
        replay = magic.engine.replay.metagradient(run, measure, weights, far, progress=False, folder=folder)
        assert torch.equal(replay.values, expected.values)
        assert replay.peak_states == tuple(tiers.count(place) for place in range(3))
        assert all((b > 0) == (s > 0) for s, b in zip(replay.peak_states, replay.peak_bytes, strict=True))


@pytest.mark.parametrize("name", ["batchnorm-conv", "groupnorm-conv", "attention", "lstm", "sgd"])
def test_no_tensor_stays_alive(name):
    """A cycle through autograd's own memory would be invisible to Python, and hold every trace for good."""
    run, *_ = cases.build(name)
    weights, cpu = run.weights(), torch.device("cpu")
    run.train(progress=False)

    def a_step_there_and_back(keep):
        traced = magic.engine.adjoint.trace(run, run.initial, weights)
        ones = {k: x.new_ones(2, *x.shape) for k, x in traced.after.params.items()}
        slots = {
            name: {k: x.new_ones(2, *x.shape) for k, x in of.items() if x.is_floating_point()}
            for name, of in traced.after.slots.items()
        }
        magic.engine.adjoint.traced_vjp(run, traced, Cotangent(ones, {}, slots, 1))
        return traced if keep else None

    _, held, _ = footprint.measured(lambda: a_step_there_and_back(keep=True), cpu)
    assert held > 1000, "degenerate: nothing was traced"
    _, held, peak = footprint.measured(lambda: a_step_there_and_back(keep=False), cpu)
    assert peak > 1000 and held == 0


def test_a_plan_with_a_disk_needs_one(tmp_path):
    run, measure = digits_run(targets=3, steps=16)
    plan = dataclasses.replace(magic.plan(run, 3, states=4), tier_of=(0, 2, 0, 2))
    with pytest.raises(ValueError, match="the plan keeps states on disk: pass disk="):
        magic.attribute(run, measure, plan=plan, progress=False)
    scores = magic.attribute(run, measure, plan=plan, disk=tmp_path, progress=False)
    in_memory = magic.attribute(run, measure, plan=magic.plan(run, 3, states=4), progress=False)
    assert scores.values.abs().max() > 0 and torch.equal(scores.values, in_memory.values)
