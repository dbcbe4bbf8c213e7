"""What a run is: everything that its bits depend on, part by part."""

from __future__ import annotations

from ..identity import fingerprints
from ..identity.parts import Identity, of_callable, of_model
from .dataset_identity import of_dataset


def parts_of(run, fresh: bool = False) -> dict[str, str]:
    """`Run.identity`: a fingerprint of each part of the run, by a name that a reader understands."""
    model = run.network.module
    parts: dict[str, object] = {
        "the start s_0": run.initial.fingerprint(),
        "the model's constants or modes": (
            fingerprints.fingerprint(model),
            [module.training for module in model.modules()],
        ),
        "the optimizer or its hyper-parameters": (run.rule.__name__, run.hypers, run.group_of),
        "the order of the batches": [fingerprints.fingerprint(b) for b in run.batches],
        "normalize or seed": (run.normalize, run.seed),
    }
    if isinstance(run.data, tuple):
        parts["the data"] = [fingerprints.fingerprint(x) for x in run.data]
    found = {name: fingerprints.digest(repr(part)) for name, part in parts.items()}
    return found | written_by_the_user(run, fresh).parts


def written_by_the_user(run, fresh: bool = False) -> Identity:
    """The identity of what the user wrote: the model, the loss, the collate function, and a
    Dataset's items.

    The items are read once, and kept with the run; again only if `fresh`.
    """
    found = of_model(run.network.module) | of_callable(run.loss, "loss")
    if run.collate is not None:
        found = found | of_callable(run.collate, "collate function")
    if isinstance(run.data, tuple):
        return found
    if fresh or "_items" not in run.__dict__:
        run._items = of_dataset(run.data, run.n)
    return found | run._items
