"""Does it rescue a rough training to clip the cotangent? `python -m tests.experiments.rough_clipped`

On the way back the cotangent of each target is kept at the size that it has at the end of training, at most.
What comes out is no derivative any more, and the engine refuses it: targets pulled together and alone
differ. So its check is silenced here. Prints the LDS of the roughest recipes with and without.
"""

from __future__ import annotations

import contextlib
import os
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

import magic
from magic.book.recipes import classify
from magic.engine import listeners, replay
from tests.experiments import rough, rough_tables


@contextlib.contextmanager
def clipped():
    """Within the block, replays clip the cotangent to its size after the pull through the last step."""
    pull, most = replay.traced_vjp, []

    def shorter(run, traced, cotangent, *options):
        cotangent, rows = pull(run, traced, cotangent, *options)
        size = sum(x.flatten(1).square().sum(1) for x in cotangent.params.values()).sqrt()
        most.append(size)
        share = (most[0] / size.clamp_min(1e-300)).clamp(max=1)
        slots = [x for slot in cotangent.slots.values() for x in slot.values()]
        for x in [*cotangent.params.values(), *cotangent.buffers.values(), *slots]:
            x.mul_(share.view(-1, *[1] * (x.dim() - 1)))
        return cotangent, rows

    with (
        mock.patch.object(replay, "traced_vjp", shorter),
        mock.patch.object(listeners, "check_batching", lambda *_: None),
    ):
        yield


def main() -> None:
    torch.set_num_threads(1)
    cells = rough_tables.cells()
    for name in rough.ROUGHEST:
        run, (x, y) = rough.recipe(0, **rough.RECIPES[name])

        def measure(model, x=x, y=y):
            return classify(model, x[: rough.TARGETS], y[: rough.TARGETS])

        with clipped():
            values = magic.attribute(run, measure, progress=False).values
        found = cells[name, 0]
        plainly, shorter = (rough_tables.judged(found, v) for v in (found["w = 1"], values.double().numpy()))
        print(f"{name}: LDS {plainly}, clipped {shorter}", flush=True)


if __name__ == "__main__":
    main()
