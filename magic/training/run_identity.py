"""What a run is: everything that its bits depend on, part by part."""

from __future__ import annotations

from ..identity import fingerprints
from ..identity.parts import Identity, of_callable, of_model
from .dataset_identity import of_dataset


def parts_of(run, fresh: bool = False) -> dict[str, str]:
    """`Run.identity`: a fingerprint of each part of the run, by a name that a reader understands."""
    model = run.network.module
    rules = [update.rule.__name__ for update in run.updates]
    rule = rules[0] if len(set(rules)) == 1 else rules
    parts: dict[str, object] = {
        "the start s_0": run.initial.fingerprint(),
        "the model's constants or modes": (
            fingerprints.fingerprint(model),
            [module.training for module in model.modules()],
        ),
        "the optimizer or its hyper-parameters": (rule, run.hypers, run.group_of),
        "the order of the batches": [fingerprints.fingerprint(b) for b in run.batches],
        "normalize or seed": (run.normalize, run.seed, *([run.first] if run.first else [])),
    }
    if (
        run.clip is not None or run.accumulate > 1
    ):  # a part only where there is one: older banks know no other
        parts["clip or accumulate"] = (run.clip, run.accumulate)
    if run.ranks is not None:
        parts["the number of ranks"] = (run.ranks.world, run.ranks.backend)
    if isinstance(run.data, tuple):
        parts["the data"] = [fingerprints.fingerprint(x) for x in run.data]
    found = {name: fingerprints.digest(repr(part)) for name, part in parts.items()}
    return found | written_by_the_user(run, fresh).parts


def written_by_the_user(run, fresh: bool = False) -> Identity:
    """The identity of what the user wrote: the model, the loss, the collate function, a rule of an optimizer
    of their own, and a Dataset's items.

    The items are read once, and kept with the run; again only if `fresh`.
    """
    found = of_model(run.network.module) | of_callable(run.loss, "loss")
    if run.collate is not None:
        found |= of_callable(run.collate, "collate function")
    for update in run.updates:
        if not update.rule.__module__.startswith("magic."):
            found |= of_callable(update.rule, f"rule of {update.told}")
    if isinstance(run.data, tuple):
        return found
    if fresh or "_items" not in run.__dict__:
        run._items = of_dataset(run.data, run.n)
    return found | run._items
