"""run.train() is the plain PyTorch loop, bit for bit (in another process, too: tests/test_attribution.py)."""

import pytest
import torch

import magic
from tests.support import cases

DTYPES = [torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("name", cases.CASES)
def test_same_bits_as_the_plain_loop(name, dtype, device):
    run, model, optimizer, scheduler = cases.build(name, dtype, device)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    trained = run.model(run.train(progress=False)).state_dict()
    assert all(torch.equal(start[k], v) for k, v in model.state_dict().items()), "the user's model changed"
    assert all(one.state[p]["step"] == 0 for one in cases.listed(optimizer) for p in one.state)
    truth = cases.plain_loop(run, model, optimizer, scheduler).state_dict()
    assert any(not torch.equal(start[k], truth[k]) for k in truth), "degenerate: nothing was trained"
    assert truth.keys() == trained.keys()
    for key in truth:
        assert torch.equal(truth[key], trained[key]), key


@pytest.mark.parametrize("name", ["sgd-nesterov-decay", "adam-decay", "batchnorm-adamw", "dropout"])
@pytest.mark.parametrize("normalize", ["batch", "weights"])
def test_a_saved_state_goes_on_to_the_same_bits(name, normalize):
    run, *_ = cases.build(name, torch.float32, normalize=normalize)
    states, weights = [run.initial], run.weights(0.7)
    for _ in range(run.steps):
        states.append(run.step(states[-1], weights))
    copied = states[5].map(torch.clone)
    for _ in range(5, run.steps):
        copied = run.step(copied, weights)
    assert copied.fingerprint() == states[-1].fingerprint()
    assert len({s.fingerprint() for s in states}) == run.steps + 1, "degenerate: states repeat"


def test_a_step_is_pure():
    run, *_ = cases.build("batchnorm-adamw", torch.float32)
    state, weights = run.step(run.initial, run.weights()), run.weights()
    before = state.fingerprint()
    first = run.step(state, weights)
    assert state.fingerprint() == before
    assert run.step(state, weights).fingerprint() == first.fingerprint()


def test_the_global_generators_are_left_alone():
    run, *_ = cases.build("dropout")
    before = torch.get_rng_state()
    run.train(progress=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_removed_by_weight_or_left_out_of_the_batch():
    """Under normalize="weights", weight 0 is what leaving the rows out of their batches does."""
    run, model, optimizer, _ = cases.build("sgd-momentum", normalize="weights")
    without = {3, 17, 31}
    x, y = run.data
    for indices in cases.order():
        kept = torch.tensor([i for i in indices.tolist() if i not in without])
        optimizer.zero_grad()
        cases.loss(model, x[kept], y[kept]).mean().backward()
        optimizer.step()
    state = magic.retrain(run, without=without, progress=False)
    for name, p in model.named_parameters():
        torch.testing.assert_close(state.params[name], p.detach(), rtol=1e-12, atol=1e-13)
    fixed, *_ = cases.build("sgd-momentum", normalize="batch")
    other = magic.retrain(fixed, without=without, progress=False).params["0.weight"]
    assert (other - state.params["0.weight"]).abs().max() > 1e-4


class Squares(torch.utils.data.Dataset):
    """Item i as a (features, label) pair, with noise drawn from torch's generator."""

    def __init__(self, noise=0.1):
        self.x, self.y = cases.data()
        self.noise = noise

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i] + self.noise * torch.randn(cases.FEATURES, dtype=torch.float64), int(self.y[i])


def test_a_dataset_and_its_augmentation_replay():
    torch.manual_seed(0)
    model = cases.mlp().double()
    run = magic.Run(model, cases.sgd()(model), Squares(), cases.loss, cases.order())
    assert run.n == cases.N
    first, second = run.train(progress=False), run.train(progress=False)
    assert first.fingerprint() == second.fingerprint()
    still = magic.Run(model, cases.sgd()(model), Squares(0.0), cases.loss, cases.order()).train(
        progress=False
    )
    plain = magic.Run(model, cases.sgd()(model), cases.data(), cases.loss, cases.order()).train(
        progress=False
    )
    assert still.fingerprint() == plain.fingerprint() != first.fingerprint()


def test_activation_checkpointing_trains_the_same(monkeypatch):
    """Its backward pass calls the model again, which must still hold the state's tensors."""
    monkeypatch.setitem(cases.CASES, "checkpoint", cases.Case(cases.Checkpointed, cases.sgd(momentum=0.9)))
    run, model, optimizer, scheduler = cases.build("checkpoint")
    trained = run.model(run.train(progress=False)).state_dict()
    truth = cases.plain_loop(run, model, optimizer, scheduler).state_dict()
    assert all(torch.equal(truth[key], trained[key]) for key in truth)


def test_the_trained_model_asks_for_gradients_where_the_users_did():
    run, model, *_ = cases.build("frozen-and-unused")
    again = run.model(run.train(progress=False))
    flags = [p.requires_grad for p in model.parameters()]
    assert [p.requires_grad for p in again.parameters()] == flags and len(set(flags)) == 2
    other, *_ = cases.build("lstm")
    with pytest.raises(ValueError, match="another run"):
        run.model(other.initial)


def test_batches_are_permutations_and_depend_on_the_seed_alone():
    order = magic.batches(103, 10, 4, seed=3)
    assert order.shape == (40, 10)
    for epoch in order.view(4, 100):
        assert len(epoch.unique()) == 100
    torch.manual_seed(9)
    assert torch.equal(order, magic.batches(103, 10, 4, seed=3))
    assert not torch.equal(order, magic.batches(103, 10, 4, seed=4))
    assert not torch.equal(order[:10], order[10:20])


def test_batches_of_unequal_size_and_as_lists():
    torch.manual_seed(0)
    model = cases.mlp().double()
    unequal = [[0, 1, 2], [3, 4, 5, 6, 7], torch.tensor([8])]
    run = magic.Run(model, cases.sgd()(model), cases.data(), cases.loss, unequal)
    optimizer = cases.sgd()(model)
    for indices in unequal:
        optimizer.zero_grad()
        x, y = run.data
        cases.loss(model, x[indices], y[indices]).mean().backward()
        optimizer.step()
    state = run.train(progress=False)
    assert all(torch.equal(state.params[n], p) for n, p in model.named_parameters())
