"""Controls: estimates that look at no training and at no curvature, which any other should beat.

Each is returned as an Attribution of the test examples' losses, (K, n), as the other baselines are. Their
size has no meaning.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attribution import Attribution
from ..show import needs
from ..training import determinism
from ..training.run import Run
from ..training.state import State
from .ekfac import is_conv1d
from .estimates import Tensors, checked, estimate, gradients, in_batches, losses_of


def random_scores(run: Run, test: Tensors, state: State, *, seed: int = 0) -> Attribution:
    """Normal random numbers: what chance alone achieves."""
    test, (state,) = checked(run, test, [state], 1)
    dice = torch.Generator().manual_seed(seed)
    return estimate(run, test, state, torch.randn(len(test[0]), run.n, generator=dice))


def loss(run: Run, test: Tensors, state: State, *, batch_size: int = 64) -> Attribution:
    """Minus each training example's own loss, for every target alike: what the model finds hard."""
    test, (state,) = checked(run, test, [state], batch_size)
    with torch.no_grad(), determinism.alone():
        model = run.model(state).eval()
        own = torch.cat([losses_of(run, model, batch) for batch in in_batches(run, run.data, batch_size)])
    return estimate(run, test, state, -own.expand(len(test[0]), -1))


def gradient_norm(run: Run, test: Tensors, state: State, *, batch_size: int = 64) -> Attribution:
    """Minus the norm of each training example's gradient, for every target alike (GraNd).

    Source: Paul et al. 2021, arXiv 2107.07075, definition 2.1, at any state.
    """
    test, (state,) = checked(run, test, [state], batch_size)
    with determinism.alone():
        norms = torch.cat([g.norm(dim=1) for g in gradients(run, state, run.data, batch_size)])
    return estimate(run, test, state, -norms.expand(len(test[0]), -1))


def embeddings(
    run: Run, test: Tensors, state: State, *, layer: str | None = None, batch_size: int = 64
) -> Attribution:
    """Minus the cosine of what the model makes of a test and of a training example: the input of its last
    linear layer, the mean over places where there are several, as the tokens of a text.

    layer   the name of another module, whose input is taken

    Raises ValueError for a name that the model does not have, or a model without a linear layer.
    """
    test, (state,) = checked(run, test, [state], batch_size)
    model = run.model(state).eval()
    named = dict(model.named_modules())
    if layer is not None and layer not in named:
        raise ValueError(f"layer={layer!r}: the model has no module of that name")
    seen: list[Tensor] = []
    for module in [named[layer]] if layer is not None else named.values():
        if layer is not None or type(module) is nn.Linear or is_conv1d(module):
            module.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))

    def seen_of(examples: Tensors) -> Tensor:
        found = []
        for batch in in_batches(run, examples, batch_size):
            seen.clear()
            losses_of(run, model, batch)
            if not seen:
                raise ValueError("the loss calls no linear layer of the model: name one as layer=")
            last = seen[-1]
            found.append(last.flatten(1, -2).mean(1) if last.dim() > 2 else last)
        return F.normalize(torch.cat(found).double())

    with torch.no_grad(), determinism.alone():
        values = -seen_of(test) @ seen_of(run.data).T
    return estimate(run, test, state, values)


def bm25(run: Run, test: Tensors, state: State, *, ignore: tuple[int, ...] = (0,)) -> Attribution:
    """Minus BM25, by the library bm25s: how many rare words a test text and a training text share.

    The run's data are token ids, (n, L) integers, alone or first. `ignore` are tokens that do not count, such
    as padding. Raises TypeError for other data, and ImportError without bm25s.
    Source: Robertson & Zaragoza 2009, The Probabilistic Relevance Framework, section 3.
    """
    test, (state,) = checked(run, test, [state], 1)
    if run.data[0].is_floating_point() or run.data[0].dim() != 2:
        raise TypeError("bm25 compares texts: data must be token ids, (n, L) integers, alone or first")
    library = needs("bm25s", "baselines", "BM25 needs")

    def words(tokens: Tensor) -> list[list[str]]:
        return [[str(x) for x in row if x not in ignore] for row in tokens.tolist()]

    index = library.BM25()
    index.index(words(run.data[0]), show_progress=False)
    values = torch.stack([torch.as_tensor(index.get_scores(query)) for query in words(test[0])])
    return estimate(run, test, state, -values)
