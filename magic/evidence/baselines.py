"""Other people's estimates of the same scores, each returned as the same Attribution.

    values[k, i] ≈ ∂φ_k(f(w)) / ∂w_i  at w = 1,      φ_k the loss of test example k, in eval mode

They look at the trained model, or at a few states on the way to it, and not at the training between
them: from there they take one step of gradient descent (gradient similarity, TracIn) or of Newton's
method (TRAK, EK-FAC). All take per-example gradients in eval mode and know nothing of momentum, of
Adam or of `normalize`. They are scaled to be estimates of the derivative; `magic.lds` judges their
order alone.

All take a run whose data are tensors, and `test`, tensors of the same kinds with K examples first;
`batch_size` examples are taken together. Values are (K, n). What does not fit raises ValueError or
TypeError; a library that is missing, ImportError.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ..attribution import Attribution
from ..engine.replay import measured_outputs
from ..training import determinism
from ..training.run import Run
from ..training.state import State

Tensors = tuple[Tensor, ...]
STRATEGIES = ("ekfac", "kfac", "diagonal", "identity")


def gradient_similarity(run: Run, test: Tensors, state: State, *, cosine=False, batch_size=64) -> Attribution:
    """Minus the dot product of a test and a training example's gradients, over n; or minus their cosine.

    This is one step of gradient descent on the mean loss with rate 1, so the size has no meaning. The
    cosine is 0 where a gradient is. 2 · batch_size gradients are held at once.
    Source: Charpiat et al. 2019, arXiv 2102.05262.
    """
    test, (state,) = _checked(run, test, [state], batch_size)
    products = _products(run, test, state, batch_size, cosine=cosine)
    return _attribution(run, test, state, -products if cosine else -products / run.n)


def tracin(run: Run, test: Tensors, states: list[State], *, batch_size=64) -> Attribution:
    """TracInCP: products of gradients, summed over states of the run with their learning rates.

    When a step of SGD with rate η has example i in its batch of B, w_i moves the loss of test example k
    by −(η/B) g_k·g_i, and i is in a batch with frequency B/n. Each of m states stands for T/m steps:

        values[k, i] = −T/(m n) Σ_states η g_k·g_i

    with η the rate of the step that led to the state, for each parameter that of its group. The states
    should be spread evenly over the run; outputs are those of the last. 2 · batch_size gradients are
    held at once. Source: Pruthi et al. 2020, arXiv 2002.08484, section 3.
    """
    test, states = _checked(run, test, states, batch_size)
    total = 0.0
    for state in states:
        groups = run.hypers[max(state.step - 1, 0)]
        rates = {name: groups[run.group_of[name]]["lr"] for name in state.params}
        total = total + _products(run, test, state, batch_size, rates=rates)
    return _attribution(run, test, states[-1], -run.steps / (len(states) * run.n) * total)


def trak(
    run: Run, test: Tensors, states: list[State], *, dim: int | None = None, seed=0, batch_size=64
) -> Attribution:
    """TRAK, by the library traker: a Newton step on randomly projected gradients of the margin.

    traker scores the margin log(p/(1−p)) of the right class, p its probability. With the loss −log p,
    ∂loss/∂margin = −(1 − p): the scores of test example k are multiplied by −(1 − p_k). So the run must
    be a classification with cross-entropy, its data (images, int64 labels).

    states  trained states, over which traker averages; outputs and p_k are those of the last
    dim     dimension of the projection; None for traker's 2048, but at most n/4. Towards n the
            dim × dim matrix that traker inverts, without a ridge, turns singular and the scores noise
    seed    of the projection

    Computes in float32, not in traker's half precision. traker divides the inverse by the mean size of
    its entries, which takes the scores' size away; that is left out.
    Source: Park et al. 2023, arXiv 2303.14186, section 3.
    """
    test, states = _checked(run, test, states, batch_size)
    if reason := _no_classification(run, test, states[-1]):
        raise ValueError(f"TRAK needs (images, int64 labels) and cross-entropy: {reason}")
    dim = max(1, min(2048, run.n // 4)) if dim is None else dim
    if not 1 <= dim <= run.n:
        raise ValueError(f"dim={dim}: the projection has between 1 and n={run.n} dimensions; n/4 is a start")
    with _quietly() as folder, determinism.alone():
        traker = _traker(run, folder, dim, seed)
        checkpoints = [run.model(state).state_dict() for state in states]
        for number, checkpoint in enumerate(checkpoints):
            traker.load_checkpoint(checkpoint, number)
            for batch in _batches(run, run.data, batch_size):
                traker.featurize(batch, num_samples=len(batch[0]))
        traker.finalize_features()
        for number, checkpoint in enumerate(checkpoints):
            traker.start_scoring_checkpoint("test", checkpoint, number, len(test[0]))
            for batch in _batches(run, test, batch_size):
                traker.score(batch, num_samples=len(batch[0]))
        scores = torch.tensor(traker.finalize_scores("test"))
    found = _attribution(run, test, states[-1], scores.T)
    found.values *= torch.expm1(-found.outputs).unsqueeze(1)
    return found


def ekfac(
    run: Run, test: Tensors, state: State, *, damping: float | None = None, strategy="ekfac", batch_size=64
) -> Attribution:
    """Influence functions with an EK-FAC curvature, by the library kronfluence.

        values[k, i] = −g_k · (G + λ)⁻¹ g_i / n

    G is the mean over the training examples of the Fisher matrix, a block for each layer: for a
    classification with cross-entropy the true Fisher, each example's label drawn from the model's
    softmax (by the run's seed), for any other loss the empirical one, of the given targets. Only layers
    of class nn.Linear and nn.Conv2d are covered; every other parameter is taken as fixed.

    damping   λ; None for kronfluence's heuristic, 0.1 of the mean eigenvalue of each layer's block
    strategy  "ekfac", "kfac", "diagonal", or "identity", where G + λ is 1

    Source: Grosse et al. 2023, arXiv 2308.03296, section 2.
    """
    test, (state,) = _checked(run, test, [state], batch_size)
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy={strategy!r}: choose one of {', '.join(STRATEGIES)}")
    layers = _layers(run, state, test)
    empirical, train = _no_classification(run, test, state) is not None, TensorDataset(*run.data)
    with _quietly() as folder, determinism.alone(run.seed):
        try:
            from kronfluence.analyzer import Analyzer, prepare_model
            from kronfluence.arguments import FactorArguments, ScoreArguments
        except ImportError as error:
            raise _missing("EK-FAC", "kronfluence") from error
        task = _task(run, layers)
        model = prepare_model(run.model(state), task)
        on_cpu = run.device.type == "cpu"
        analyzer = Analyzer("run", model, task, on_cpu, disable_tqdm=True, output_dir=folder)
        kinds = ("activation_covariance", "gradient_covariance", "per_sample_gradient", "lambda")
        options = {f"{kind}_dtype": run.dtype for kind in kinds}
        options = FactorArguments(strategy=strategy, use_empirical_fisher=empirical, **options)
        analyzer.fit_all_factors("factors", train, batch_size, factor_args=options)
        options = {f"{kind}_dtype": run.dtype for kind in ("per_sample_gradient", "precondition", "score")}
        options = ScoreArguments(damping_factor=damping, **options)
        analyzer.compute_pairwise_scores(
            "scores", "factors", TensorDataset(*test), train, batch_size, batch_size, score_args=options
        )
        scores = analyzer.load_pairwise_scores("scores")["all_modules"]
    return _attribution(run, test, state, -scores / run.n)


def _checked(run: Run, test, states, batch_size: int) -> tuple[Tensors, list[State]]:
    """The test's tensors, on the run's device, and the states as a list, if they fit the run."""
    if not isinstance(run.data, tuple):
        raise TypeError(f"the run's data is a {type(run.data).__name__}; baselines take tensors, data=(x, y)")
    if any(group["maximize"] for group in run.hypers[0]):
        raise ValueError("the run maximizes its loss, and baselines minimize: negate the loss")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: at least one example at a time")
    test = (test,) if isinstance(test, Tensor) else tuple(torch.as_tensor(x) for x in test)
    same = [(x.dim(), x.shape[1:]) for x in test] == [(x.dim(), x.shape[1:]) for x in run.data]
    if not same or len({len(x) for x in test}) != 1 or len(test[0]) == 0:
        raise ValueError(
            "test must be tensors like the run's data, with K examples first; they have shapes "
            f"{[tuple(x.shape) for x in test]}, the data {[tuple(x.shape) for x in run.data]}"
        )
    states = [states] if isinstance(states, State) else list(states)
    if not states:
        raise ValueError("states is empty: give at least one State, such as run.train() returns")
    for state in states:
        if not isinstance(state, State):
            raise TypeError(f"a {type(state).__name__} is no State, such as run.train() returns")
        if state.params.keys() != run.initial.params.keys():
            raise ValueError("a state is of another run: its parameters have other names")
    return tuple(x.to(run.device) for x in test), states


def _attribution(run: Run, test: Tensors, state: State, values: Tensor) -> Attribution:
    def measure(model):
        return run.loss(model, *test)

    outputs = measured_outputs(run, state, measure)
    return Attribution(values.to(outputs), outputs, run.weights(), run, measure)


def _batches(run: Run, examples: Tensors, size: int) -> Iterator[Tensors]:
    for batch in zip(*(x.split(size) for x in examples), strict=True):
        yield tuple(x.to(run.device) for x in batch)


def _gradients(run: Run, state: State, examples: Tensors, size: int) -> Iterator[Tensor]:
    """The gradient of each example's loss, in eval mode: (at most size, parameters) at a time."""

    def loss(params, *example):
        one = [x.unsqueeze(0) for x in example]
        return run.measured(lambda model: run.loss(model, *one), params, state.buffers)[0]

    def flat(*example):
        return torch.cat([g.flatten() for g in torch.func.grad(loss)(state.params, *example).values()])

    for batch in _batches(run, examples, size):
        try:
            gradients = torch.vmap(flat, randomness="different")(*batch)
        except RuntimeError as error:
            warnings.warn(f"examples are differentiated one by one, which is slower: {error}", stacklevel=4)
            gradients = torch.stack([flat(*example) for example in zip(*batch, strict=True)])
        yield gradients


def _products(run: Run, test: Tensors, state: State, size: int, *, rates=None, cosine=False) -> Tensor:
    """(K, n): g_k·g_i, with each parameter's part times its rate; or the cosine."""
    rates = rates or dict.fromkeys(state.params, 1.0)
    scale = torch.cat([torch.full_like(p, rates[name]).flatten() for name, p in state.params.items()])
    unit, rows = F.normalize if cosine else nn.Identity(), []
    with determinism.alone():
        for left in _gradients(run, state, test, size):
            left = unit(left * scale)
            row = [left @ unit(right).T for right in _gradients(run, state, run.data, size)]
            rows.append(torch.cat(row, dim=1))
    return torch.cat(rows)


def _no_classification(run: Run, test: Tensors, state: State) -> str | None:
    """Why this is no classification with cross-entropy; None if it is one."""
    if len(test) != 2:
        return f"the data are {len(test)} tensors"
    x, y = test
    if y.dim() != 1 or {y.dtype, run.data[1].dtype} != {torch.int64}:
        return f"data[1] is {run.data[1].dtype} and test[1] {y.dtype}, {y.dim() - 1} axes for each example"
    with torch.no_grad(), determinism.alone():
        model = run.model(state)
        losses = run.loss(model, x, y)
        try:
            same = torch.allclose(F.cross_entropy(model(x), y, reduction="none"), losses, 1e-3, 1e-5)
        except Exception as error:
            return f"the cross-entropy of model(images) raises {type(error).__name__}: {error}"
    return None if same else "the loss is not the cross-entropy of model(images)"


def _traker(run: Run, folder: str, dim: int, seed: int):
    try:
        from trak import TRAKer
        from trak.score_computers import BasicScoreComputer
    except ImportError as error:
        raise _missing("TRAK", "traker") from error

    class ScoreComputer(BasicScoreComputer):
        def get_x_xtx_inv(self, grads: Tensor, xtx: Tensor) -> Tensor:
            return grads @ torch.linalg.inv(xtx.double()).to(grads.dtype)

    traker = TRAKer(
        run.model(run.initial),
        "image_classification",
        run.n,
        folder,
        device=str(run.device),
        score_computer=ScoreComputer,
        proj_dim=dim,
        logging_level=logging.CRITICAL,
        use_half_precision=False,
        projector_seed=seed,
        grad_wrt=list(run.initial.params),
    )
    # traker frees the projection before it scores, and in up to 100 dimensions does not make it again.
    traker.projector.free_memory = lambda: None
    return traker


def _layers(run: Run, state: State, test: Tensors) -> list[str]:
    """The names of the trained layers that kronfluence covers, if the loss calls each of them once."""
    model, calls = run.model(state), Counter()
    trained = {id(p) for name, p in model.named_parameters() if name in state.params}
    count = nn.modules.module.register_module_forward_hook(lambda module, *_: calls.update([module]))
    with count, torch.no_grad():
        run.loss(model, *(x[:1] for x in test))
    layers = {
        name: calls[module]
        for name, module in model.named_modules()
        if name and type(module) in (nn.Linear, nn.Conv2d) and id(module.weight) in trained and calls[module]
    }
    what = "use gradient_similarity, which takes all parameters"
    if not layers:
        name = type(model).__name__
        raise ValueError(f"kronfluence covers nn.Linear and nn.Conv2d, and {name} contains none: {what}")
    if twice := [name for name in layers if layers[name] > 1]:
        raise ValueError(f"layer {twice[0]!r} is called more than once, which kronfluence cannot do: {what}")
    return list(layers)


def _task(run: Run, layers: list[str]):
    """The run's loss as kronfluence wants it; `sample` is asked of a classification only."""
    from kronfluence.task import Task

    class Losses(Task):
        def compute_train_loss(self, batch, model, sample=False):
            if not sample:
                return run.loss(model, *batch).sum()
            logits = model(batch[0])
            labels = torch.multinomial(logits.detach().softmax(-1), 1).flatten()
            return F.cross_entropy(logits, labels, reduction="sum")

        def compute_measurement(self, batch, model):
            return run.loss(model, *batch).sum()

        def get_influence_tracked_modules(self):
            return layers

    return Losses()


@contextlib.contextmanager
def _quietly() -> Iterator[str]:
    """A folder that is gone afterwards; no progress bar, no warning, and no log handler that stays."""
    handlers = logging.root.handlers[:]
    try:
        hidden, silent = contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings(action="ignore")
        with tempfile.TemporaryDirectory() as folder, hidden, silent:
            yield folder
    finally:
        logging.root.handlers[:] = handlers


def _missing(what: str, package: str) -> ImportError:
    return ImportError(f"{what} needs {package}: pip install 'magic-attribution[baselines]'")
