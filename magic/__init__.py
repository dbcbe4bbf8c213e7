"""magic: what would this trained model have predicted, had it been trained on other data?

run = magic.Run(model, optimizer, data=(x, y), loss=loss, batches=magic.batches(len(x), 250, 10))
scores = magic.attribute(run, measure)          # (K, n), exact
scores.removal_effect([42])                     # predicted change of each measured output
magic.lds(scores, drop=0.01, subsets=100)       # is the prediction true? Retrain and see.
"""

from . import determinism, schedule
from .adjoint import NotDifferentiable
from .attribution import Attribution, attribute
from .counterfactual import LDS, lds, retrain
from .determinism import NotDeterministic, fingerprint
from .health import Health
from .planning import Plan, plan
from .replay import train
from .run import NonFinite, Run, batches
from .state import State
from .verify import ReplayMismatch

__all__ = [
    "LDS",
    "Attribution",
    "Health",
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
    "schedule",
    "train",
]
