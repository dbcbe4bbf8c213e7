"""magic: what would this trained model have predicted, had it been trained on other data?

run = magic.Run(model, optimizer, data=(x, y), loss=loss, batches=magic.batches(len(x), 250, 10))
scores = magic.attribute(run, measure)          # (K, n), exact
scores.removal_effect([42])                     # predicted change of each measured output
magic.lds(scores, drop=0.01, subsets=100)       # is the prediction true? Retrain and see.
"""

from . import baselines, best_linear, determinism, schedule, smoothness, subsets, where
from .adjoint import NotDifferentiable
from .attribution import Attribution, attribute
from .bank import Bank
from .best_linear import Optimality, optimality
from .determinism import NotDeterministic, fingerprint
from .finite import NonFinite
from .health import Health, Verification
from .judgement import Comparison, compare, lds, leave_one_out
from .order import batches
from .planning import Plan, plan
from .record import ReplayMismatch
from .replay import train
from .retraining import retrain
from .run import Run
from .second_order import Curvature, curvature
from .state import State
from .verification import verify

__all__ = [
    "Attribution",
    "Bank",
    "Comparison",
    "Curvature",
    "Health",
    "NonFinite",
    "NotDeterministic",
    "NotDifferentiable",
    "Optimality",
    "Plan",
    "ReplayMismatch",
    "Run",
    "State",
    "Verification",
    "attribute",
    "baselines",
    "batches",
    "best_linear",
    "compare",
    "curvature",
    "determinism",
    "fingerprint",
    "lds",
    "leave_one_out",
    "optimality",
    "plan",
    "retrain",
    "schedule",
    "smoothness",
    "subsets",
    "train",
    "verify",
    "where",
]
