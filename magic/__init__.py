"""magic: what would this trained model have predicted, had it been trained on other data?

run = magic.Run(model, optimizer, data=(x, y), loss=loss, batches=magic.batches(len(x), 250, 10))
scores = magic.attribute(run, measure)          # (K, n), exact
scores.removal_effect([42])                     # predicted change of each measured output
magic.lds(scores, drop=0.01, subsets=100)       # is the prediction true? Retrain and see.
"""

from . import determinism
from .adjoint import NotDifferentiable
from .attribution import Attribution, attribute
from .counterfactual import LDS, lds, retrain
from .determinism import NotDeterministic, fingerprint
from .replay import Plan, plan
from .run import NonFinite, ReplayMismatch, Run, batches
from .state import State

__all__ = [
    "LDS",
    "Attribution",
    "NonFinite",
    "NotDeterministic",
    "NotDifferentiable",
    "Plan",
    "ReplayMismatch",
    "Run",
    "State",
    "attribute",
    "batches",
    "determinism",
    "fingerprint",
    "lds",
    "plan",
    "retrain",
]
