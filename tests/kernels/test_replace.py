"""The second derivatives written here are right, and what stands in for training's kernels has their bits."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from magic.engine import adjoint
from magic.kernels import replace
from magic.kernels.replace import SAME_BITS, differentiable


def randn(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def statistics(channels, dtype=torch.float64):
    return torch.randn(channels, dtype=dtype), torch.rand(channels, dtype=dtype) + 0.5


def kernel(w, *shape):
    """A kernel made of the few numbers in w."""
    count = torch.Size(shape).numel()
    return w.repeat(-(-count // len(w)))[:count].view(shape).cumsum(0).cos()


# name -> (shape of x, number of channels of weight and bias or 0, f(x, w, b))
OPERATIONS = {
    "gelu": ((4, 5), 0, lambda x, w, b: F.gelu(x)),
    "layer_norm": ((4, 3, 5), 5, lambda x, w, b: F.layer_norm(x, (5,), w, b)),
    "layer_norm, vectors": ((4, 5), 5, lambda x, w, b: F.layer_norm(x, (5,), w, b)),
    "layer_norm, plain": ((4, 3, 5), 0, lambda x, w, b: F.layer_norm(x, (3, 5))),
    "layer_norm, no bias": ((4, 5), 5, lambda x, w, b: F.layer_norm(x, (5,), w) * b[0]),
    "group_norm, plain": ((3, 4, 2, 3), 0, lambda x, w, b: F.group_norm(x, 2)),
    "batch_norm, no bias": ((6, 3), 3, lambda x, w, b: F.batch_norm(x, None, None, w, training=True) * b[0]),
    "group_norm": ((3, 4, 2, 3), 4, lambda x, w, b: F.group_norm(x, 2, w, b)),
    "group_norm, sequence": ((3, 4, 5), 4, lambda x, w, b: F.group_norm(x, 4, w, b)),
    "batch_norm": ((6, 3), 3, lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True)),
    "batch_norm, images": ((3, 2, 3, 2), 2, lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True)),
    "batch_norm, plain": ((6, 3), 0, lambda x, w, b: F.batch_norm(x, None, None, training=True)),
    "conv2d": ((2, 3, 5, 4), 3, lambda x, w, b: F.conv2d(x, kernel(w, 2, 3, 3, 2), b[:2], padding=1)),
    "conv2d, data": (
        (2, 3, 5, 4),
        3,
        lambda x, w, b: (
            F.conv2d(kernel(w.detach() * 0 + 1.3, 2, 3, 5, 4), kernel(w, 2, 3, 3, 2), b[:2]) * x.mean()
        ),
    ),
    "conv2d, strides": (
        (2, 4, 6, 5),
        4,
        lambda x, w, b: F.conv2d(x, kernel(w, 4, 2, 2, 3), None, (2, 1), (1, 0), groups=2).sin() * b[0],
    ),
    "conv1d": ((2, 3, 6), 3, lambda x, w, b: F.conv1d(x, kernel(w, 2, 3, 3), b[:2], dilation=2)),
    "conv2d, same": (
        (2, 3, 4, 4),
        3,
        lambda x, w, b: F.conv2d(x, kernel(w, 2, 3, 3, 3), b[:2], padding="same"),
    ),
    "avg_pool": ((2, 3, 4, 6), 0, lambda x, w, b: F.avg_pool2d(x, 2)),
    "avg_pool, a row left over": ((2, 1, 7, 6), 0, lambda x, w, b: nn.AvgPool2d(3)(x)),
    "avg_pool, overlapping": ((2, 1, 5, 5), 0, lambda x, w, b: F.avg_pool2d(x, 3, stride=1, padding=1)),
}


def attend(x, more=False, attn_mask=None, **how):
    """Attention over sequences made of x; with `more`, there are more keys than queries."""
    k = torch.cat([x[..., 1:, :].sin(), x.cos()], dim=-2) if more else x.sin()
    mask = None if attn_mask is None else attn_mask.to(x.device)
    return F.scaled_dot_product_attention(x, k, k * k - x.mean(), attn_mask=mask, **how)


MASK = torch.tensor([[True, True, True], [False, False, False], [True, False, True]])
ATTENTION = {  # the shape of x, and how it is attended to
    "plain": ((2, 2, 3, 4), {}),
    "causal": ((2, 2, 3, 4), {"is_causal": True}),
    "scaled": ((2, 2, 3, 4), {"scale": 0.3, "more": True}),
    "causal, more keys than queries": ((1, 2, 3, 4), {"is_causal": True, "more": True}),
    "a mask with an empty row": ((1, 2, 3, 4), {"attn_mask": MASK}),
    "a mask for all heads and queries": ((3, 2, 3, 4), {"attn_mask": MASK[:, None, None]}),
    "one head": ((2, 3, 4), {}),
    "one head, a mask each": ((3, 3, 4), {"attn_mask": MASK[:, None].expand(3, 3, 3)}),
}
OPERATIONS |= {
    f"attention, {name}": (shape, 0, lambda x, w, b, how=how: attend(x, **how))
    for name, (shape, how) in ATTENTION.items()
}
OPERATIONS |= {
    "attention, bias": (
        (1, 2, 3, 4),
        0,
        lambda x, w, b: attend(x, attn_mask=torch.eye(3, dtype=x.dtype, device=x.device)),
    ),
    "attention, other values": (
        (1, 2, 3, 4),
        0,
        lambda x, w, b: F.scaled_dot_product_attention(x, x.sin(), x[..., :2].cos()),
    ),
    "attention, shared heads": (
        (1, 4, 3, 4),
        0,
        lambda x, w, b: F.scaled_dot_product_attention(x, x[:, ::2].sin(), x[:, 1::2].cos(), enable_gqa=True),
    ),
    "conv3d": ((1, 2, 3, 3, 3), 2, lambda x, w, b: F.conv3d(x, kernel(w, 2, 2, 2, 2, 2), b[:2])),
}


def arguments(name, dtype=torch.float64):
    torch.manual_seed(0)
    shape, channels, f = OPERATIONS[name]
    x = randn(*shape, dtype=dtype)
    if not channels:
        return f, (x,)
    w, b = (torch.rand(channels, dtype=dtype) + 0.5).requires_grad_(), randn(channels, dtype=dtype)
    return f, (x, w, b)


def call(f, inputs):
    return f(*inputs, *[None] * (3 - len(inputs)))


def gradient(f, inputs, g):
    """The gradients of ⟨g, f⟩, with their graph."""
    return torch.autograd.grad(call(f, inputs), inputs, g, create_graph=True)


@pytest.mark.parametrize("name", OPERATIONS)
def test_second_derivatives(name):
    """Finite differences of the first derivative, in every input and every output."""
    f, inputs = arguments(name)
    g = randn(*call(f, inputs).shape)

    def first(g, *inputs):
        with differentiable():
            return gradient(f, inputs, g)

    assert any(x.abs().max() > 1e-3 for x in first(g, *inputs)), "degenerate"
    assert torch.autograd.gradcheck(first, (g, *inputs), atol=1e-8, rtol=1e-6)
    with differentiable():
        assert torch.autograd.gradcheck(lambda *inputs: call(f, inputs), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_same_bits(name, dtype, device, monkeypatch):
    """Value and first derivative are those of training, where cuDNN takes the kernels that it takes there."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    f, inputs = arguments(name, dtype)
    inputs = [x.detach().to(device).requires_grad_() for x in inputs]
    plain = call(f, inputs)
    g = torch.randn(plain.shape, dtype=dtype).to(device)
    expected = torch.autograd.grad(plain, inputs, g)
    with differentiable() as replace:
        value = call(f, inputs)
    if name.startswith("attention") and device.type != "cpu":  # there it is of the other kind
        assert replace.rewritten
        return
    found = torch.autograd.grad(value, inputs, g, create_graph=True)
    assert not replace.rewritten
    assert torch.equal(plain, value)
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", OPERATIONS)
def test_many_cotangents_at_once(name):
    f, inputs = arguments(name)
    g = randn(*call(f, inputs).shape)
    with differentiable():
        outputs = gradient(f, inputs, g)
    outputs = [y for y in outputs if y.requires_grad]
    cotangents = [torch.randn(5, *y.shape, dtype=torch.float64) for y in outputs]

    def pull(*rows):
        return torch.autograd.grad(
            outputs, (g, *inputs), rows, retain_graph=True, allow_unused=True, materialize_grads=True
        )

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an operation that cannot be batched
        ((_, together),) = adjoint.pull(outputs, [g, *inputs], lambda rows: cotangents, 5)
    for k in range(5):
        for a, b in zip(pull(*(c[k] for c in cotangents)), together, strict=True):
            torch.testing.assert_close(a, b[k], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_running_statistics(dtype, device):
    """The bits of F.batch_norm, and a derivative in the batch and in the statistics before it."""
    torch.manual_seed(0)
    x = torch.randn(6, 3, 2, 2, dtype=dtype, device=device)
    mean, var = (s.to(device) for s in statistics(3, dtype))
    expected = mean.clone(), var.clone()
    F.batch_norm(x, *expected, training=True, momentum=0.3)
    with differentiable():
        found = mean.clone(), var.clone()
        F.batch_norm(x, *found, training=True, momentum=0.3)
    assert not torch.equal(mean, found[0])
    assert torch.equal(expected[0], found[0]) and torch.equal(expected[1], found[1])

    def after(x, mean, var):
        mean, var = mean.clone(), var.clone()
        with differentiable():
            F.batch_norm(x, mean, var, training=True, momentum=0.3)
        return mean, var

    inputs = [t.double().requires_grad_() for t in (x, mean, var)]
    assert torch.autograd.gradcheck(after, inputs)


@pytest.mark.parametrize("name", ["layer_norm", "group_norm", "batch_norm"])
def test_a_frozen_affine_part(name):
    f, (x, w, b) = arguments(name)
    w, b = w.detach(), b.detach()

    def first(x):
        with differentiable():
            return torch.autograd.grad(f(x, w, b).pow(3).sum(), x, create_graph=True)[0]

    assert torch.autograd.gradcheck(first, (x,))


@pytest.mark.parametrize("need_weights", [False, True])
def test_attention_inside_a_module_has_trainings_bits(need_weights):
    torch.manual_seed(0)
    layer, x = nn.MultiheadAttention(8, 2, batch_first=True).double(), randn(3, 5, 8)
    plain, _ = layer(x, x, x, need_weights=need_weights)
    g = torch.randn_like(plain)
    expected = torch.autograd.grad(plain, [x, *layer.parameters()], g)
    before = F.scaled_dot_product_attention
    with differentiable() as replace:
        value, _ = layer(x, x, x, need_weights=need_weights)
    found = torch.autograd.grad(value, [x, *layer.parameters()], g, create_graph=True)
    assert not replace.rewritten and F.scaled_dot_product_attention is before
    assert all(torch.equal(a, b) for a, b in zip([plain, *expected], [value, *found], strict=True))
    assert torch.autograd.grad(found[0].square().sum(), x)[0].abs().max() > 0


def test_attention_that_drops_keeps_its_dice():
    """With dropout PyTorch takes the plain kernel, which draws the same numbers here."""
    torch.manual_seed(0)
    q = randn(1, 2, 6, 4)
    torch.manual_seed(1)
    plain = F.scaled_dot_product_attention(q, q, q, dropout_p=0.5)
    torch.manual_seed(1)
    with differentiable() as replace:
        value = F.scaled_dot_product_attention(q, q, q, dropout_p=0.5)
    assert torch.equal(plain, value) and not replace.rewritten
    g = torch.randn_like(plain)
    (expected,) = torch.autograd.grad(plain, q, g)
    assert torch.equal(expected, torch.autograd.grad(value, q, g, create_graph=True)[0])


def test_attention_that_drops_on_a_gpu(monkeypatch):
    """A fused kernel draws its own random numbers, so that the plain form would be another function. The meta
    device stands for a GPU."""
    q, kernels = torch.randn(1, 2, 6, 4, device="meta"), torch.nn.attention.SDPBackend
    for chosen in (kernels.EFFICIENT_ATTENTION, kernels.MATH):
        monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *_, chosen=chosen, **__: chosen.value)
        with differentiable() as mode:
            assert F.scaled_dot_product_attention(q, q, q).shape == q.shape and mode.rewritten
            if chosen is kernels.MATH:
                assert F.scaled_dot_product_attention(q, q, q, dropout_p=0.5).shape == q.shape
                continue
            with pytest.raises(ValueError, match=r"attention with dropout on meta.*SDPBackend\.MATH"):
                F.scaled_dot_product_attention(q, q, q, None, 0.5)


def test_what_is_one_kernel_on_a_gpu_only():
    """There its gradient has other bits where it is differentiated again. The meta device stands in."""
    for device in ("cpu", "meta"):
        x, cell = torch.randn(3, 8, device=device), nn.LSTMCell(8, 4, device=device)
        for f in (nn.RMSNorm(8, device=device), cell, nn.GRUCell(8, 4, device=device)):
            with differentiable() as mode:
                f(x)
            assert mode.rewritten == (device == "meta")


def test_a_mask_may_be_filled_anew_before_the_pull():
    """As a scratch buffer is, at each step: what a trace keeps is the mask of its own step."""
    torch.manual_seed(0)
    q, mask = randn(1, 2, 3, 4), torch.randn(3, 3, dtype=torch.float64)

    def twice(refill):
        held = mask.clone()
        with differentiable():
            value = F.scaled_dot_product_attention(q, q.sin(), q.cos(), held)
        (first,) = torch.autograd.grad(value.square().sum(), q, create_graph=True)
        if refill:
            held.fill_(7.0)
        return torch.autograd.grad(first.sin().sum(), q)[0]

    assert torch.equal(twice(refill=True), twice(refill=False)) and twice(refill=False).abs().max() > 1e-3


def test_each_replacement_is_tested():
    names = {"layer_norm", "group_norm", "batch_norm", "gelu", "avg_pool2d", "conv1d", "conv2d", "conv3d"}
    assert {f.__name__ for f in SAME_BITS} == names
    assert set(replace.REWRITTEN) == {
        torch.cdist, torch.native_layer_norm, getattr(F, "linear_cross_entropy", torch.cdist),
        torch._weight_norm, torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu
    }  # fmt: skip
