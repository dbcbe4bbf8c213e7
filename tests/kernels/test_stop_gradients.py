"""Losses that hold a part of themselves fixed: the derivative of the step flows through it.

Bits against the plain loop, scores against five-point differences of real trainings.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import magic
from magic.engine.measuring import measured_outputs
from tests.support import cases


def entropy(model, x, y):
    return F.cross_entropy(model(x), y, reduction="none")


def focal(model, x, y):
    losses = entropy(model, x, y)
    return (1 - torch.exp(-losses)).detach() ** 2 * losses


def teacher(model, x, y):
    with torch.no_grad():
        told = F.softmax(model(x.flip(1)), 1)
    return F.cross_entropy(model(x), told, reduction="none") + entropy(model, x, y)


def straight_through(model, x, y):
    h = model(x)
    return F.cross_entropy(h + (torch.tanh(3 * h) - h).detach(), y, reduction="none")


def chained(model, x, y):
    h = model(x)
    first = h.detach().sin()
    return F.cross_entropy(h * (1 + 0.1 * (first * h).data.cos()), y, reduction="none")


def first_order_inner_step(model, x, y):
    params = list(model.parameters())
    grads = torch.autograd.grad(F.cross_entropy(model(x), y), params)
    return entropy(model, x, y) + 0.1 * sum((p * g).sum() for p, g in zip(params, grads, strict=True))


def hard_gumbel(model, x, y):
    return F.cross_entropy(F.gumbel_softmax(model(x), hard=True) * 2, y, reduction="none")


class Averaged(nn.Module):
    """Keeps a moving average of its weights in buffers, written under no_grad or through .data."""

    def __init__(self, data: bool = False, every: int = 1):
        super().__init__()
        self.net, self.data, self.every = cases.mlp(), data, every
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        for i, p in enumerate(self.net.parameters()):
            self.register_buffer(f"mean{i}", p.detach().clone())

    def means(self):
        return [getattr(self, f"mean{i}") for i in range(4)]

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.count += 1
                if self.count % self.every == 0:
                    for mean, p in zip(self.means(), self.net.parameters(), strict=True):
                        if self.data:
                            mean.data.mul_(0.9).add_(p.data, alpha=0.1)
                        else:
                            mean.mul_(0.9).add_(p, alpha=0.1)
        return self.net(x)

    def target(self, x):
        a, b, c, d = self.means()
        return F.linear(F.gelu(F.linear(x, a, b)), c, d)


def distilled(model, x, y):
    out = model(x)
    with torch.no_grad():
        told = model.target(x)
    return F.cross_entropy(out, y, reduction="none") + (out - told).square().sum(1)


def of_the_average(model):
    x, y = cases.data()
    return F.cross_entropy(model.target(x[:3]), y[:3], reduction="none")


def last_losses(model):
    x, y = cases.data()
    return entropy(model, x[:3], y[:3])


CASES = {
    "focal": (cases.mlp, focal, last_losses),
    "teacher": (cases.mlp, teacher, last_losses),
    "straight-through": (cases.mlp, straight_through, last_losses),
    "chained": (cases.mlp, chained, last_losses),
    "first-order-inner-step": (cases.mlp, first_order_inner_step, last_losses),
    "average": (Averaged, entropy, of_the_average),
    "average-through-data": (lambda: Averaged(data=True), entropy, of_the_average),
    "average-now-and-then": (lambda: Averaged(every=4), entropy, of_the_average),
    "distilled": (Averaged, distilled, last_losses),
}


def build(name, at=None, **options):
    model, loss, measure = CASES[name]
    torch.manual_seed(0)
    model = model().double()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    return (
        magic.Run(model, optimizer, cases.data(), loss, cases.order(), **options),
        model,
        optimizer,
        measure,
    )


def relative_error(run, measure, scores, examples=(0, 33), h=4e-3):
    truths, found = [], []
    for i in examples:

        def out(moved, i=i):
            weights = scores.at.clone()
            weights[i] += moved
            final = run.train(weights, progress=False, allow_negative=True)
            return measured_outputs(run, final, measure)

        truths.append((8 * (out(h) - out(-h)) - (out(2 * h) - out(-2 * h))) / (12 * h))
        found.append(scores.values[:, i])
    truth = torch.stack(truths)
    assert truth.norm() > 1e-5, "degenerate: no influence at all"
    return ((torch.stack(found) - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("name", CASES)
def test_bits_and_scores(name):
    run, model, optimizer, measure = build(name)
    final = run.train(progress=False)
    plain = copy.deepcopy(model)
    optimizer = torch.optim.SGD(plain.parameters(), 0.05, momentum=0.9, foreach=False)
    (x, y), loss = cases.data(), CASES[name][1]
    for indices in cases.order():
        optimizer.zero_grad()
        loss(plain, x[indices], y[indices]).mean().backward()
        optimizer.step()
    ours = {**final.params, **final.buffers}
    assert all(torch.equal(v, ours[k]) for k, v in plain.state_dict().items())
    for plan in (None, magic.plan(run, 3, states=3)):
        scores = magic.attribute(run, measure, progress=False, plan=plan)
        assert relative_error(run, measure, scores) < 1e-8


def test_an_average_that_does_not_move_carries_derivative():
    """At w = 0 nothing moves, so every buffer keeps its bits; how it would move counts all the same."""
    run, _, _, measure = build("average")
    scores = magic.attribute(run, measure, at=0.0, progress=False)
    assert relative_error(run, measure, scores) < 1e-8


def test_in_a_measure_nothing_is_cut():
    run, *_ = build("focal")
    x, _ = cases.data()

    def detached(model):
        return (model(x[:3]).detach() ** 2).sum(1)

    @torch.no_grad()
    def without_grad(model):
        return (model(x[:3]) ** 2).sum(1)

    def shown(model):
        return (model(x[:3]) ** 2).sum(1)

    plain = magic.attribute(run, shown, progress=False).values
    for measure in (detached, without_grad):
        assert torch.equal(magic.attribute(run, measure, progress=False).values, plain)


def test_a_number_that_leaves_pytorch_is_found_at_every_step():
    """Also at one step in the middle, where the three steps that are always checked are not."""
    x, y = cases.data()

    def rarely(model, x, y):
        losses = entropy(model, x, y)
        return (
            losses * (1 + losses.mean().item())
            if (x == cases.data()[0][order[7][0]]).all(1).any()
            else losses
        )

    order = cases.order()
    assert sum(bool((b == order[7][0]).any()) for b in order) < 6, "degenerate: it happens everywhere"
    torch.manual_seed(0)
    model = cases.mlp().double()
    run = magic.Run(model, cases.sgd()(model), (x, y), rarely, order)
    with pytest.raises(magic.NotDifferentiable, match=r"\.item\(\)"):
        magic.attribute(run, last_losses, progress=False)


def test_a_number_that_is_only_looked_at_is_accepted():
    def logged(model, x, y):
        losses = entropy(model, x, y)
        assert losses.mean().item() < 1e9 and losses.detach().numpy().shape == (len(y),)
        return losses

    torch.manual_seed(0)
    model = cases.mlp().double()
    run = magic.Run(model, cases.sgd()(model), cases.data(), logged, cases.order())
    scores = magic.attribute(run, last_losses, progress=False)
    assert relative_error(run, last_losses, scores) < 1e-8


def test_what_cannot_be_cut_exactly_is_refused():
    def in_place(model, x, y):
        h = model(x) * 1.0
        with torch.no_grad():
            h.clamp_(-1, 1)
        return F.cross_entropy(h, y, reduction="none")

    torch.manual_seed(0)
    model = cases.mlp().double()
    run = magic.Run(model, cases.sgd()(model), cases.data(), in_place, cases.order())
    with pytest.raises(magic.NotDifferentiable, match=r"writes under no_grad\(\)"):
        magic.attribute(run, last_losses, progress=False)


def focal_of_logits(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    losses = F.cross_entropy(z, y, reduction="none")
    return (1 - torch.exp(-losses)).detach() ** 2 * losses


@pytest.mark.filterwarnings("ignore:.torch.jit.script")
@pytest.mark.parametrize("way", ["script", "vmap"])
def test_what_is_cut_out_of_sight_is_found_by_the_witness(way):
    """No mode of PyTorch's is told of what TorchScript runs, and inside vmap a graph cannot be kept whole."""
    scripted = torch.jit.script(focal_of_logits)

    def each(z, y):
        return focal_of_logits(z.unsqueeze(0), y.unsqueeze(0))[0]

    def loss(model, x, y):
        return scripted(model(x), y) if way == "script" else torch.func.vmap(each)(model(x), y)

    torch.manual_seed(0)
    model = cases.mlp().double()
    run = magic.Run(model, cases.sgd()(model), cases.data(), loss, cases.order())
    with pytest.raises(magic.NotDifferentiable, match="a finite difference gives"):
        magic.attribute(run, last_losses, progress=False)


def test_a_loss_may_ask_the_model_outside_for_shapes():
    """As a loss does that cuts one vector into parameters; their values stay those of the model given."""
    torch.manual_seed(0)
    outer = cases.mlp().double()

    def cut(model, x, y):
        vector = torch.cat([p.flatten() for p in model.parameters()])
        pieces = vector.split([p.numel() for p in outer.parameters()])
        names = [name for name, _ in outer.named_parameters()]
        values = [piece.view(p.shape) for piece, p in zip(pieces, outer.parameters(), strict=True)]
        out = torch.func.functional_call(outer, dict(zip(names, values, strict=True)), (x,))
        return F.cross_entropy(out, y, reduction="none")

    run = magic.Run(outer, cases.sgd()(outer), cases.data(), cut, cases.order())
    scores = magic.attribute(run, last_losses, progress=False)
    assert relative_error(run, last_losses, scores) < 1e-8


@pytest.mark.parametrize("name", ["average", "distilled"])
def test_a_copy_of_a_state_is_the_same_state(name):
    run, *_ = build(name)
    state = run.step(run.initial, run.weights())
    again = state.map(torch.clone)
    assert again.moved == state.moved and run.moved(again) == run.moved(state) != []
    assert run.step(again, run.weights()).fingerprint() == run.step(state, run.weights()).fingerprint()
