"""EK-FAC influence functions, by the library kronfluence: a Newton step with a block for each layer.

Source: Grosse et al. 2023, arXiv 2308.03296, section 2.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from ..attribution import Attribution
from ..show import needs
from ..training import determinism
from ..training.run import Run
from ..training.state import State
from .classes import Classes, classes_of
from .estimates import Tensors, checked, estimate, quietly

STRATEGIES = ("ekfac", "kfac", "diagonal", "identity")


def ekfac(
    run: Run, test: Tensors, state: State, *, damping: float | None = None, strategy="ekfac", batch_size=64
) -> Attribution:
    """Influence functions with an EK-FAC curvature, by the library kronfluence.

        values[k, i] = −g_k · (G + λ)⁻¹ g_i / n

    G is the mean over the training examples of the Fisher matrix, a block for each layer: for a
    classification with cross-entropy and for a causal language model, whose classes are the next tokens
    (`magic.text.loss`), the true Fisher, each label drawn from the model's softmax (by the run's seed), for
    any other loss the empirical one, with the given targets. Only layers of class nn.Linear, nn.Conv2d and
    transformers' Conv1D are covered; all other parameters, such as embeddings, are treated as constant.

    damping   λ; None for kronfluence's heuristic, 0.1 of the mean eigenvalue of each layer's block
    strategy  "ekfac", "kfac", "diagonal", or "identity", where G + λ is 1

    Raises ValueError for a loss that calls a layer more than once or for a model without such layers, and
    ImportError without kronfluence. Source: Grosse et al. 2023, arXiv 2308.03296, section 2.
    """
    test, (state,) = checked(run, test, [state], batch_size)
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy={strategy!r}: choose one of {', '.join(STRATEGIES)}")
    layers, classes = layers_of(run, state, test), classes_of(run, test, state)
    with quietly() as folder, determinism.alone(run.seed):
        analyzer = fit(run, state, layers, classes, folder, (strategy, batch_size))
        options = {f"{kind}_dtype": run.dtype for kind in ("per_sample_gradient", "precondition", "score")}
        options = _library("arguments").ScoreArguments(damping_factor=damping, **options)
        both = TensorDataset(*test), TensorDataset(*run.data)
        analyzer.compute_pairwise_scores(
            "scores", "factors", *both, batch_size, batch_size, score_args=options
        )
        scores = analyzer.load_pairwise_scores("scores")["all_modules"]
    return estimate(run, test, state, -scores / run.n)


def fit(
    run: Run, state: State, layers: list[str], classes: Classes | str, folder: str, how: tuple[str, int]
) -> Any:
    """kronfluence's Analyzer, which has written the factors of these layers at this state into `folder`,
    under the name "factors"; `how` is the strategy and the batch size."""
    library, task, on_cpu = _library("analyzer"), _task(run, layers, classes), run.device.type == "cpu"
    model = library.prepare_model(_linear(run.model(state)), task)
    analyzer = library.Analyzer("run", model, task, on_cpu, disable_tqdm=True, output_dir=folder)
    kinds = ("activation_covariance", "gradient_covariance", "per_sample_gradient", "lambda")
    options = {f"{kind}_dtype": run.dtype for kind in kinds} | {
        "use_empirical_fisher": isinstance(classes, str)
    }
    options = _library("arguments").FactorArguments(strategy=how[0], **options)
    analyzer.fit_all_factors("factors", TensorDataset(*run.data), how[1], factor_args=options)
    return analyzer


def _library(part: str) -> Any:
    return needs(f"kronfluence.{part}", "baselines", "EK-FAC needs")


def layers_of(run: Run, state: State, test: Tensors) -> list[str]:
    """Names of the trained layers that kronfluence covers; ValueError if the loss calls one of them twice."""
    model = _linear(run.model(state))
    calls: Counter[nn.Module] = Counter()
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


def is_conv1d(layer: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, an nn.Linear that keeps its weight as (in, out)."""
    return (type(layer).__module__, type(layer).__name__) == ("transformers.pytorch_utils", "Conv1D")


def _linear(model: nn.Module) -> nn.Module:
    """The model with nn.Linear in place of each Conv1D of transformers, which is that with W transposed."""
    for module in list(model.modules()):
        for name, layer in module.named_children():
            if is_conv1d(layer):
                conv: Any = layer
                inputs, outputs = conv.weight.shape
                linear = nn.Linear(inputs, outputs, device=conv.weight.device, dtype=conv.weight.dtype)
                linear.weight, linear.bias = nn.Parameter(conv.weight.detach().T.contiguous()), conv.bias
                setattr(module, name, linear)
    return model


def _task(run: Run, layers: list[str], classes: Classes | str):
    """The run's loss as kronfluence's Task.

    `sample` is only asked where there are classes. Of a loss Σ_l c_l CE_l the Fisher matrix is Σ_l c_l F_l,
    where F_l is the mean of g gᵀ over gradients g of CE_l with drawn labels. The labels of several tokens are
    drawn independently, so gradients of Σ_l √c_l CE_l have that mean.
    """
    Task: Any = needs("kronfluence.task", "baselines", "EK-FAC needs").Task

    class Losses(Task):
        def compute_train_loss(self, batch, model, sample=False):
            if not sample:
                return run.loss(model, *batch).sum()
            assert isinstance(classes, Classes)
            logits, given = classes.logits(model, *batch), classes.labels(*batch)
            drawn = torch.multinomial(logits.detach().flatten(0, 1).softmax(-1), 1).view(given.shape)
            losses = classes.cross_entropy(logits, drawn)
            return (classes.shares(given).to(losses).sqrt() * losses).sum()

        def compute_measurement(self, batch, model):
            return run.loss(model, *batch).sum()

        def get_influence_tracked_modules(self):
            return layers

    return Losses()
