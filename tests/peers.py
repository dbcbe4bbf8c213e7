"""Other ways to the same derivative, for the benchmark: a full unroll, and bergson where it is installed.

bergson (EleutherAI) is made for language models; here it gets the tensors of a small classifier through
the smallest shim that its trainer takes, its own default checkpointing, a folder, and no progress bars.
It trains once for all targets and goes back once for each.
"""

from __future__ import annotations

import copy
import functools
import shutil
import tempfile
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.support.unroll import unroll


def jobs(work, targets: list[int]) -> dict[tuple[str, int], Callable]:
    """(what, K) -> a job: the peers that can do this work."""
    found: dict[tuple[str, int], Callable] = {}
    if work.name == "mlp":
        found["full unroll, autograd", 1] = lambda: full_unroll(work, 1)
        try:
            import bergson
            import torchopt
        except ImportError:
            print("bergson and torchopt are not installed: no comparison with them")
        else:
            name = f"bergson {getattr(bergson, '__version__', '')}".strip()
            found |= {(name, k): lambda k=k: with_bergson(work, k) for k in targets if k <= 16}
            del torchopt
    return found


def full_unroll(work, targets: int) -> Tensor:
    """One autograd graph over the whole run (tests/support/unroll.py)."""
    model = copy.deepcopy(work.model)
    optimizer = work.optimizer(model)
    weights = torch.ones(len(work.data[0]))
    return unroll(model, optimizer, None, work.data, work.loss, work.order, work.measure(targets), weights)


def with_bergson(work, targets: int) -> Tensor:
    """(K, n) scores at w = 1 by bergson's trainer: `train` once, `backward` once for each target."""
    import torchopt
    from bergson.magic.cli import compute_query_gradients
    from bergson.magic.trainer import BackwardState, Trainer
    from torchopt.pytree import tree_iter

    (x, y), (x_test, y_test) = work.data, work.test
    shim, stream = _shim(copy.deepcopy(work.model), x.shape[1:], work.loss), _stream(x, y, work.order)
    queries = [
        [{
            "input_ids": x_test[k : k + 1].flatten(1),
            "targets": y_test[k : k + 1],
            "labels": y_test[k : k + 1, None].expand(1, 2),  # says only that the query is one token
        }]
        for k in range(targets)
    ]  # fmt: skip
    folder = tempfile.mkdtemp(prefix="bergson-")
    try:
        with _quiet():
            optimizer = torchopt.adamw(1e-3, betas=(0.9, 0.999), eps=1e-8, eps_root=0.0, weight_decay=1e-2)
            trainer, state = Trainer.initialize(shim, optimizer)
            state.detach_()
            stream.requires_grad = False
            state = trainer.train(state, stream, inplace=True, save_dir=folder, save_mode="sqrt")
            shim.eval()
            gradients = [compute_query_gradients(state, shim, query)[0] for query in queries]
            shim.train()
            scores = []
            for gradient in gradients:
                state.detach_()
                stream.requires_grad = True
                moments = [m for m in tree_iter(state.opt_state) if m.is_floating_point()]
                seed = BackwardState(
                    gradient, [torch.zeros_like(m) for m in moments], torch.zeros_like(stream.weights)
                )
                back = trainer.backward(
                    folder, stream, seed, state, cleanup=False, inplace=True, save_mode="sqrt"
                )
                scores.append(back.weight_grads.detach())
    finally:
        shutil.rmtree(folder)
    return torch.stack(scores)


def _shim(model: nn.Module, shape, loss: Callable) -> nn.Module:
    """The classifier in the place of a language model; the loss is Σ wᵢℓᵢ / B."""

    class Shim(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, targets, example_weight=None, labels=None):
            losses = loss(self.model, input_ids.view(-1, *shape), targets)
            return (losses if example_weight is None else losses * example_weight).mean()

    return Shim()


def _stream(x: Tensor, y: Tensor, order: Tensor):
    """bergson's DataStream over tensors; its own reads lists of tokens."""
    from bergson.magic.data_stream import DataStream

    class Stream(DataStream):
        def __init__(self):
            super().__init__(order.reshape(-1), order.shape[1], device=x.device, weight_shape=(len(x),))
            self.weights = nn.Parameter(self.weights.detach().to(x.dtype))

        def __getitem__(self, i: int) -> dict:
            if not 0 <= i < len(self):
                raise IndexError(i)
            rows = order[i]
            return {
                "input_ids": x[rows].flatten(1), "targets": y[rows], "example_weight": self.weights[rows]
            }  # fmt: skip

    return Stream()


class _quiet:
    """No progress bars of bergson's."""

    def __enter__(self):
        from bergson.magic import cli, trainer

        self._bars = [
            (module, name, getattr(module, name))
            for module, name in ((trainer, "tqdm"), (trainer, "RtlTqdm"), (cli, "tqdm"))
        ]
        for module, name, bar in self._bars:
            silent = functools.partial(lambda bar, *a, **k: bar(*a, **k | {"disable": True}), bar)
            setattr(module, name, silent)

    def __exit__(self, *_):
        for module, name, bar in self._bars:
            setattr(module, name, bar)
