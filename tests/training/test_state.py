"""A State is total over its leaves, and its fingerprint sees every bit."""

import torch

import magic
from tests.support import cases


def test_flatten_and_map_reach_every_tensor():
    run, *_ = cases.build("batchnorm-adamw")
    state = run.train(progress=False)
    flat = state.flatten()
    kinds = {name.split("/")[0] for name in flat}
    assert kinds == {"params", "buffers", "slots"}
    assert "slots/0.weight/exp_avg_sq" in flat and "buffers/1.running_var" in flat
    copied = state.map(torch.clone).flatten()
    assert all(torch.equal(flat[k], copied[k]) and flat[k] is not copied[k] for k in flat)
    assert state.nbytes == sum(x.numel() * x.element_size() for x in flat.values())


def test_one_flipped_bit_changes_the_fingerprint():
    state = cases.build("batchnorm-adamw", torch.float32)[0].train(progress=False)
    for name in state.flatten():
        copied = state.map(torch.clone)
        assert copied.fingerprint() == state.fingerprint()
        copied.flatten()[name].view(-1).view(torch.uint8)[0] ^= 1
        assert copied.fingerprint() != state.fingerprint(), name


def test_fingerprint_of_other_things():
    model = cases.mlp()
    a, b = magic.fingerprint(model), magic.fingerprint(model.state_dict())
    assert a == b and len(a) == 16
    x = torch.zeros(3)
    assert magic.fingerprint(x) != magic.fingerprint(-x), "−0.0 has other bits"
    assert magic.fingerprint(x) != magic.fingerprint(x.double())
    assert magic.fingerprint(x) != magic.fingerprint(x.view(3, 1))


def test_constant_buffers_are_handed_on():
    class WithTable(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm = torch.nn.Linear(8, 3, bias=False), torch.nn.BatchNorm1d(3)
            self.register_buffer("table", torch.linspace(0, 1, 8))

        def forward(self, x):
            return self.norm(self.a(x + self.table))

    torch.manual_seed(0)
    model = WithTable().double()
    run = magic.Run(model, cases.sgd()(model), cases.data(), cases.loss, cases.order())
    final = run.train(progress=False)
    assert run.moved(run.initial) == []
    assert run.moved(final) == ["norm.running_mean", "norm.running_var"]
    assert final.buffers["table"] is run.initial.buffers["table"], "no memory for what does not change"


def test_frozen_parameters_stay_out_of_the_state():
    run, model, *_ = cases.build("frozen-and-unused")
    final = run.train(progress=False)
    assert not any(name.startswith("frozen") for name in final.params)
    assert final.slots["unused.weight"] == {} and final.slots["used.weight"] != {}
    trained = run.model(final)
    assert torch.equal(trained.frozen.weight, model.frozen.weight)
    assert torch.equal(trained.unused.weight, model.unused.weight)


def test_the_trained_model_is_a_module_of_its_own():
    run, *_ = cases.build("batchnorm-sgd")
    final = run.train(progress=False)
    model = run.model(final)
    assert not model.training
    before = final.fingerprint()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert final.fingerprint() == before
    assert "fingerprint=" + before in repr(final)
