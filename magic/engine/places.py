"""Places for states further away than the model's device: the host's memory, and files on a disk.

Of the buffers, only those that training has written are kept there. The others are still those of s_0, which
the run holds anyway, so they are put back from it.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ..training.record import ReplayMismatch
from ..training.state import State
from .files import PARTS, Misplaced, read, write
from .store import Memory


class Host(Memory):
    """States of a GPU's run, copied into the host's memory, which is pinned so that the copy is fast.

    The copy is made on a stream of its own, while the GPU goes on with the training. A tensor that was on the
    CPU before, such as Adam's count of steps, is on the CPU when it is given back.
    """

    name = "host memory"

    def __init__(self, device: torch.device, constant: State):
        super().__init__()
        self._device = device
        self._constant = constant
        self._on_host: dict[int, set[str]] = {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def keep(self, state: State) -> State:
        self._on_host[state.step] = {k for k, x in state.flatten().items() if x.device.type == "cpu"}
        if self._stream is not None:  # what is copied must have been computed
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):  # None is the current one
            flat = {name: _pinned(x, self._stream) for name, x in written(state).items()}
        return with_constants(flat, state.step, state.moved, self._constant)

    def give_back(self, state: State) -> State:
        there = self._on_host[state.step]
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        flat = {k: x if k in there else x.to(self._device) for k, x in written(state).items()}
        return with_constants(flat, state.step, state.moved, self._constant)


def written(state: State) -> dict[str, torch.Tensor]:
    """The tensors of a state, flat, without the buffers that are still those of s_0."""
    constant = {f"buffers/{name}" for name in state.buffers if name not in state.moved}
    return {name: x for name, x in state.flatten().items() if name not in constant}


def with_constants(flat: dict, step: int, moved: frozenset[str], initial: State) -> State:
    """The state that `written` gives this of; its other buffers are those of s_0."""
    buffers = {
        f"buffers/{name}": flat[f"buffers/{name}"] if name in moved else b
        for name, b in initial.buffers.items()
    }
    return State.unflatten({**buffers, **flat}, step, moved=moved)


def _pinned(x: torch.Tensor, stream: torch.cuda.Stream | None) -> torch.Tensor:
    # A tensor's layout in memory is kept, since it decides how sums are rounded.
    there = torch.empty_like(x, device="cpu", pin_memory=torch.cuda.is_available())
    there.copy_(x, non_blocking=stream is not None)
    if stream is not None and x.is_cuda:
        x.record_stream(stream)  # its memory is not used again before it has been read
    return there


class Disk:
    """States in safetensors files of a folder, each whole or not there at all, with its fingerprint.

    `constant` is s_0, whose buffers are not written again where training has not written them. A file says
    of itself its step, its kind and whose it is (`owner`), and is refused in another place.
    """

    name = "disk"

    def __init__(self, folder: Path, constant: State, kind: str = "state", owner: str = ""):
        self.folder, self._constant = Path(folder), constant
        self._kind, self._owner = kind, owner

    def _meta(self, t: int) -> dict:
        return {"step": t, "kind": self._kind, "run": self._owner}

    def path(self, t: int) -> Path:
        return self.folder / f"state-{t:09}.safetensors"

    def save(self, t: int, state: State) -> None:
        """Write s_t."""
        write(self.path(t), written(state), self._meta(t) | {"moved": sorted(state.moved)})

    def load(self, t: int) -> State:
        """s_t; KeyError if it is not kept, ReplayMismatch if its file is damaged."""
        if not self.path(t).exists():
            raise KeyError(t)
        flat, meta = read(self.path(t), next(iter(self._constant.params.values())).device, self._meta(t))
        return with_constants(flat, t, frozenset(meta["moved"]), self._constant)

    def drop(self, t: int) -> None:
        """Remove the file of s_t."""
        self.path(t).unlink(missing_ok=True)

    def steps(self) -> list[int]:
        """The steps whose files are there."""
        digits = (p.stem.removeprefix("state-") for p in self.folder.glob("state-*.safetensors"))
        return sorted(int(t) for t in digits if t.isdecimal())

    def kept(self) -> list[int]:
        """The steps whose files are there and undamaged; what a kill left behind is removed.

        Raises ReplayMismatch for a whole file of something else, which is not ours to remove.
        """
        for part in self.folder.glob(PARTS):
            part.unlink(missing_ok=True)
        whole = []
        for t in self.steps():
            try:
                read(self.path(t), torch.device("cpu"), self._meta(t))
                whole.append(t)
            except Misplaced:
                raise
            except ReplayMismatch:
                self.drop(t)
        return whole
