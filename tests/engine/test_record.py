"""Trust, then verify: whatever makes a replay another run than the training is caught, by name."""

import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import magic
from magic import schedule
from magic.engine import health as health_of
from magic.engine import store
from magic.engine.replay import metagradient
from magic.training import record
from tests.support import cases


def flip_a_bit(x, element=0, bit=0):
    """Flip one bit of one number of a tensor in place."""
    words = x.view(-1).view(torch.uint8)
    words[element * x.element_size() + bit // 8] ^= 1 << (bit % 8)


@pytest.mark.parametrize("shape", [(7,), (8,), (3, 5), (), (1,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bool])
def test_a_checksum_sees_every_bit(dtype, shape):
    x = torch.randn(shape).mul(3).to(dtype)
    state = magic.State({"p": x}, {}, {"p": {}})
    before = record.checksums(state)
    assert before == record.checksums(state.map(torch.clone))
    for element in range(x.numel()):
        for bit in range(0, 8 * x.element_size(), 5):
            other = x.clone()
            flip_a_bit(other, element, bit)
            assert record.checksums(magic.State({"p": other}, {}, {"p": {}})) != before


def test_a_checksum_of_a_view():
    x = torch.randn(9)
    state = magic.State({"p": x[1:], "q": x[::2]}, {}, {})
    assert record.checksums(state) == record.checksums(state.map(torch.clone))


def test_the_noted_steps_cost_little():
    passed = record.Passed(steps=1000)
    noted = [t for t in range(1001) if passed.notes(t)]
    assert len(noted) <= record.NOTED + 1 and noted[-1] == 1000 and noted[0] > 0
    assert [t for t in range(6) if record.Passed(5).notes(t)] == [1, 2, 3, 4, 5]


class Tampering(store.Memory):
    """Memory in which a bit of a state flips after it is stored."""

    def __init__(self, at, slot=None, bit=0):
        super().__init__()
        self.at, self.slot, self.bit = at, slot, bit

    def save(self, t, state):
        super().save(t, state)
        if t == self.at:
            kept, sums = self._states[t]
            name = next(iter(kept.params))
            copied = kept.map(torch.clone)
            flip_a_bit(copied.slots[name][self.slot] if self.slot else copied.params[name], bit=self.bit)
            self._states[t] = copied, sums


@pytest.mark.parametrize("slot", [None, "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("at", [3, 8, 13])
def test_a_flipped_bit_in_a_stored_state(monkeypatch, at, slot):
    run, *_ = cases.build("adamw", torch.float32)
    measure, plan = cases.measure_on(*cases.data(torch.float32)), magic.plan(run, 3, states=run.steps)
    monkeypatch.setattr(magic.engine.replay, "Memory", lambda: Tampering(at, slot))
    with pytest.raises(magic.ReplayMismatch, match=rf"step {at}: .*stored in memory, is not what was stored"):
        metagradient(run, measure, run.weights(), plan, progress=False)


def test_a_wrong_step_between_the_noted_ones(monkeypatch):
    """A recomputed state that differs in the last bit stops the replay at the next noted step."""
    run, *_ = cases.build("sgd-momentum", torch.float32)
    run.train(progress=False)
    step, seen = run.step, []

    def faulty(state, *rest):
        after = step(state, *rest)
        seen.append(state.step)
        if len(seen) > 20 and state.step == 2:  # not on the way down, but when it is computed again
            flip_a_bit(after.params["0.weight"])
        return after

    monkeypatch.setattr(run, "step", faulty)
    plan = magic.plan(run, 3, states=2)
    with pytest.raises(
        magic.ReplayMismatch, match=r"step 3: 'params/0.weight' is not what it was when training"
    ):
        metagradient(run, cases.measure_on(*cases.data(torch.float32)), run.weights(), plan, progress=False)
    assert len(seen) > 20


def test_a_changed_row():
    x, y = cases.data()
    torch.manual_seed(0)
    model = cases.mlp().double()
    run = magic.Run(model, cases.sgd(momentum=0.9)(model), (x, y), cases.loss, cases.order())
    run.train(progress=False)
    x[cases.order()[0][0]] += 1e-9
    for plan in (None, magic.plan(run, states=2)):
        with pytest.raises(
            magic.ReplayMismatch, match=r"step 0: the total loss is .* and was .*data, model or loss"
        ):
            magic.attribute(run, cases.measure_on(x, y), progress=False, plan=plan)


def test_another_thread_count():
    """More threads sum in another order; that is named as the cause."""
    torch.set_num_threads(1)
    dice = torch.Generator().manual_seed(0)
    x, y = torch.randn(2000, 64, generator=dice), torch.randint(10, (2000,), generator=dice)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 10))
    order = magic.batches(2000, 1000, 4)
    run = magic.Run(model, torch.optim.SGD(model.parameters(), 0.5), (x, y), cases.loss, order)
    one = run.train(progress=False).fingerprint()
    torch.set_num_threads(2)
    other = magic.Run(model, torch.optim.SGD(model.parameters(), 0.5), (x, y), cases.loss, order)
    if other.train(progress=False).fingerprint() == one:
        pytest.skip("on this machine two threads give one thread's bits")
    with pytest.raises(magic.ReplayMismatch, match=r"Since then, the thread count was 1, is 2: restore it"):
        magic.attribute(run, cases.measure_on(x, y), progress=False)


@pytest.mark.parametrize("plan", ["traced", "stepped"])
def test_an_operation_that_is_not_deterministic(plan):
    """It behaves while a Run tries it, and later does not."""
    later = []

    def drifting(model, x, y):
        noise = 1e-7 * np.random.rand() if later else 0.0
        return F.cross_entropy(model(x) * (1 + noise), y, reduction="none")

    torch.manual_seed(0)
    model = cases.mlp().double()
    x, y = cases.data()
    run = magic.Run(model, cases.sgd()(model), (x, y), drifting, cases.order())
    run.train(progress=False)
    later.append(True)
    plan = None if plan == "traced" else magic.plan(run, states=3)
    with pytest.raises(magic.ReplayMismatch, match="not deterministic"):
        magic.attribute(run, cases.measure_on(x, y), progress=False, plan=plan)


def test_a_state_changed_in_place_by_a_measure():
    """measure sees a copy; a loss that writes into a stored state is caught."""
    run, *_ = cases.build("sgd", torch.float32)
    kept = store.Memory()
    state = run.step(run.initial, run.weights())
    kept.save(1, state)
    state.params["0.weight"].add_(1e-3)
    with pytest.raises(magic.ReplayMismatch, match="something wrote into it"):
        kept.load(1)


def test_every_rebuilt_state_is_compared():
    """With one state kept, each noted step is passed again and again, and each time compared."""
    run, *_ = cases.build("sgd", torch.float32)
    scores = magic.attribute(
        run, cases.measure_on(*cases.data(torch.float32)), progress=False, plan=magic.plan(run, states=1)
    )
    again = sum(
        sum(record.Passed(run.steps).notes(t) for t in range(a.t + 1, a.to + 1))
        for a in list(schedule.binomial(run.steps, 1))[3:]  # after Save(0), Load(0) and the training
        if isinstance(a, schedule.Advance)
    )
    assert scores.health.verified == again > 50


def test_health_of_a_good_run():
    run, *_ = cases.build("adamw")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        health = magic.attribute(run, cases.measure_on(*run.data), progress=False).health
    assert health.ok and health.problems == []
    steps = [t for t, _ in health.sizes]
    assert steps == sorted(steps, reverse=True) and steps[-1] == 0 and steps[0] == run.steps - 1
    assert all(len(row) == 3 and min(row) > 0 for _, row in health.sizes)
    assert set(health.witnessed) == {5, 10, 15, 16} and max(health.witnessed.values()) < 1e-3
    assert all(0 < d < 3 for d in health.decades)
    assert "none seen" in repr(health) and "<table>" in health._repr_html_()


def test_moves_are_what_random_removals_do():
    dice = torch.Generator().manual_seed(0)
    values = torch.randn(3, 300, 2, generator=dice).double() + 0.5
    start, outputs = torch.tensor([3.0, 1.0, float("inf")]), torch.tensor([-4.0, 0.0, 1e-9]).double()
    sets = [torch.randperm(300, generator=dice)[:3] for _ in range(4000)]
    effects = torch.stack([values[:, chosen].sum((1, 2)) for chosen in sets])
    expected = effects.std(0) / torch.tensor([4.0, 1.0, 1.0])  # the third has the median of the sizes
    found = torch.tensor(health_of.moved(values, outputs, start.double()))
    torch.testing.assert_close(found, expected.float(), rtol=0.05, atol=0)
    one = health_of.moved(values[:, :7, 0], outputs, start.double())  # 1 % of seven examples is one
    alone = values[:, :7, 0].std(1, correction=0) * (6 / 7) ** 0.5 / torch.tensor([4.0, 1.0, 1.0])
    torch.testing.assert_close(torch.tensor(one), alone.float())
    assert health_of.moved(torch.zeros(2, 5), torch.zeros(2), torch.zeros(2)) == (0.0, 0.0)


def tanh_network(rate):
    """A run of ten steps, and what is measured of it: at a rate of 1 it is rough."""
    torch.manual_seed(0)
    pairs = [(torch.nn.Linear(i, o), torch.nn.Tanh()) for i, o in pairwise((8, 16, 16, 3))]
    model = torch.nn.Sequential(*[part for pair in pairs for part in pair][:-1]).double()
    optimizer, data = torch.optim.SGD(model.parameters(), rate, momentum=0.9), cases.data()
    run = magic.Run(model, optimizer, data, cases.loss, magic.batches(len(data[0]), 4, 1))
    return run, cases.measure_on(*data)


def test_scores_that_would_move_an_output_by_more_than_its_size_warn(tmp_path):
    """Here the cotangent tells nothing: it ranges over little more than one power of ten."""
    with pytest.warns(UserWarning, match="more than their own size, output 0 by 3.2 times it; no training"):
        rough = magic.attribute(*tanh_network(1.0), progress=False)
    assert max(rough.health.decades) < 2 and rough.health.rough == [0] and rough.health.ok is False
    assert "would move 1 of 3 outputs" in repr(rough.health)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        smooth = magic.attribute(*tanh_network(0.1), progress=False)
    assert smooth.health.ok and 0 < min(smooth.health.moves) < max(smooth.health.moves) < 0.1
    rough.save(tmp_path / "rough.npz")
    assert magic.Attribution.load(tmp_path / "rough.npz").health == rough.health


def test_the_sizes_are_the_cotangents():
    run, *_ = cases.build("sgd-momentum")
    measure, weights = cases.measure_on(*run.data), run.weights()
    states = [run.initial]
    for _ in range(run.steps):
        states.append(run.step(states[-1], weights))
    cotangent = magic.engine.adjoint.measure_vjp(run, states[-1], measure)
    expected = []
    for state in reversed(states[:-1]):
        cotangent, _ = magic.engine.adjoint.step_vjp(run, state, cotangent, weights)
        rows = torch.cat([c.flatten(1) for c in cotangent.params.values()], dim=1)
        expected.append(rows.norm(dim=1))
    health = magic.attribute(run, measure, progress=False).health
    assert len(health.sizes) == run.steps
    torch.testing.assert_close(torch.tensor([row for _, row in health.sizes]), torch.stack(expected).float())


def test_a_derivative_that_sweeps_many_decades_warns():
    """Above the edge of stability each step multiplies a perturbation."""
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 3).double()
    x, y = cases.data()
    optimizer = torch.optim.SGD(model.parameters(), lr=10.0)

    def squares(model, x, y):
        return (model(x) - F.one_hot(y, 3)).square().mean(1)

    run = magic.Run(model, optimizer, (x, y), squares, cases.order())
    with pytest.warns(
        UserWarning, match=r"ranges over \d+ powers of ten .*growing on the way back.*likely to fail"
    ):
        scores = magic.attribute(run, lambda m: squares(m, x[:2], y[:2]), progress=False)
    assert not scores.health.ok and min(scores.health.decades) > 6
    assert "powers of ten" in repr(scores.health)


def test_a_derivative_that_vanishes_warns():
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 3).double()
    x, y = cases.data()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, weight_decay=99.9999)  # forgets in a step
    run = magic.Run(model, optimizer, (x, y), cases.loss, cases.order())
    with pytest.warns(UserWarning, match="shrinking on the way back: the training forgets"):
        scores = magic.attribute(run, cases.measure_on(x, y), progress=False)
    assert min(scores.health.decades) > 6
