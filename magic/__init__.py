"""magic: what would this trained model have predicted, had it been trained on other data?

run = magic.Run(model, optimizer, data=(x, y), loss=loss, batches=magic.batches(len(x), 250, 10))
scores = magic.attribute(run, measure)          # (K, n), exact
scores.removal_effect([42])                     # predicted change of each measured output
magic.lds(scores, drop=0.01, subsets=100)       # is the prediction true? Retrain and see.

The package has seven wings and a few modules beside them. A module uses only what stands before it in this
list:

show        tables and progress bars
identity    is it the same run, to the bit and to the last line of its code?
kernels     derivatives of a derivative that PyTorch lacks, has slowly, or cuts off
training    a training run as a pure function of its data weights
engine      REPLAY: the derivative of the whole run, from few states
subsets, points, saved, attribution    which examples are left out; where the derivative is taken; the scores
workers, shares    work in several processes; the targets of an attribution, shared between them
metagradients    the derivative by everything else: the start, the rates of each step, the training inputs
evidence    is the prediction true? Train again, and see
text        what language models need: losses per sequence and per token, packing, loading
book        what the chapters share: data, models, plots, claims

To see how `attribute()` works, read these files in this order, a thousand lines of code in all; each
opens with what it is for. A run as a function: training/state, update, sgd, network, gradient, run. Its
derivative: engine/vjp, tracing, adjoint, actions, schedule, store, replay. Last `attribute` in attribution,
which calls them. It takes two hours; in the first one leave out proofs, the table of scores, and how a Run
reads its arguments. The other files are checks, places and conveniences. Chapters 03 to 06 tell the same at
leisure.
"""

from . import _moved, points, subsets, text
from .attribution import Attribution, attribute
from .engine import schedule
from .engine.health import Health
from .engine.planning import Plan, plan
from .engine.refusals import NotDifferentiable
from .engine.resume import train
from .engine.verdict import Verification
from .evidence import baselines, smoothness
from .evidence.bank import Bank
from .evidence.comparison import Comparison, compare, lds, leave_one_out
from .evidence.curvature import Curvature, curvature
from .evidence.explorer import explore
from .evidence.forecast import Forecast, forecast
from .evidence.judging import Brittleness, Judgement, brittleness, judge
from .evidence.optimality import Optimality, optimality
from .evidence.outputs import outputs
from .evidence.retraining import retrain
from .evidence.verification import verify
from .metagradients import Metagradient, metagradient
from .show import Figure
from .training import determinism
from .training.determinism import NotDeterministic, fingerprint
from .training.finite import NonFinite
from .training.order import batches
from .training.ranks import distributed
from .training.record import ReplayMismatch
from .training.run import Run
from .training.state import State
from .training.variants import changed, hyper, tail

__all__ = [
    "Attribution",
    "Bank",
    "Brittleness",
    "Comparison",
    "Curvature",
    "Figure",
    "Forecast",
    "Health",
    "Judgement",
    "Metagradient",
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
    "brittleness",
    "changed",
    "compare",
    "curvature",
    "determinism",
    "distributed",
    "explore",
    "fingerprint",
    "forecast",
    "hyper",
    "judge",
    "lds",
    "leave_one_out",
    "metagradient",
    "optimality",
    "outputs",
    "plan",
    "points",
    "retrain",
    "schedule",
    "smoothness",
    "subsets",
    "tail",
    "text",
    "train",
    "verify",
]

__getattr__ = _moved.attribute
_moved.install()
