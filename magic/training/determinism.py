"""What must be fixed for a training run to be a function, and the proof that it is.

A run is a function of its data weights only if running it twice gives the same bits. Three things
stand in the way: random numbers, operations whose result depends on the order in which threads
finish, and kernels chosen by timing. `fix` removes all three and says what it did; `fingerprint` turns
"the same bits" into a string that can be printed and compared.

Importing this module sets the environment variable CUBLAS_WORKSPACE_CONFIG to ":4096:8" unless it is
set already: cuBLAS reads it once, at a process's first matrix product on CUDA, and without it has no
deterministic form.

What cannot be fixed here is recorded instead: the thread count, the device and the version of
PyTorch all change the bits of a sum, so fingerprints are compared only between runs that share them.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import threading
from collections.abc import Callable, Iterator

import numpy as np
import torch

from ..identity.fingerprints import fingerprint

__all__ = ["NotDeterministic", "Settings", "alone", "fingerprint", "fix", "numerics", "seed_step"]

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Only the thread that holds this lock draws the process's random numbers, changes its settings, or puts
# tensors into a run's module. The thread that holds it may take it again.
TURN = threading.RLock()


class NotDeterministic(RuntimeError):
    """An operation gives other bits when it is run again; the message names it."""


class Settings:
    """What `fix` has set, as {name: (before, now)}; restores it on `restore()` or leaving `with`."""

    def __init__(self):
        self.changed: dict[str, tuple] = {}
        self.recorded = {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "CUBLAS_WORKSPACE_CONFIG": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        }
        self._undo = contextlib.ExitStack()

    def _set(self, name: str, access: tuple[Callable, Callable], value) -> None:
        """Set what is read and written by `access`, and note what it was before."""
        read, write = access
        before = read()
        self.changed[name] = (before, value)
        if before != value:
            self._undo.callback(write, before)
            write(value)

    def restore(self) -> None:
        """Put every setting, and the random number generators, back as they were."""
        with TURN:
            self._undo.close()

    def __enter__(self) -> Settings:
        return self

    def __exit__(self, *exc) -> None:
        self.restore()

    def __repr__(self) -> str:
        rows = [f"{name:<34} {before!s:>10} -> {now}" for name, (before, now) in self.changed.items()]
        rows += [f"{name:<34} {'recorded':>10}    {value}" for name, value in self.recorded.items()]
        return "\n".join(rows)


def _attribute(owner, name: str) -> tuple[Callable, Callable]:
    """How an attribute is read, and how it is written."""
    return (lambda: getattr(owner, name)), (lambda value: setattr(owner, name, value))


def fix(seed: int | None = None) -> Settings:
    """Make PyTorch deterministic, in one call.

    Sets: deterministic algorithms (an operation that has none then raises), cuDNN's deterministic
    kernels without benchmarking, full float32 precision instead of TF32 and, if `seed` is given, the
    seeds of torch, numpy and random. The thread count is recorded, not changed. Use it as
    `with magic.determinism.fix(seed=0): ...`, or call `.restore()` later; either way the random
    number generators, too, go back to where they were.
    """
    settings = Settings()
    with TURN:
        try:
            _fix(settings)
        except BaseException:
            settings.restore()
            raise
        if seed is not None:
            settings.recorded["seed"] = seed
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.manual_seed(seed)
    return settings


@contextlib.contextmanager
def alone(seed: int | None = None) -> Iterator[Settings]:
    """`fix` for the length of a `with`, while all other threads that train or differentiate wait.

    Random numbers and settings belong to the process, so trainings in two threads would mix theirs. A thread
    that draws torch's random numbers without magic cannot be made to wait.
    """
    with TURN, fix(seed) as settings:
        yield settings


def in_turn(f: Callable) -> Callable:
    """f, made to wait while another thread trains or differentiates."""

    @functools.wraps(f)
    def waiting(*args, **kwargs):
        with TURN:
            return f(*args, **kwargs)

    return waiting


def _fix(settings: Settings) -> None:
    """Set everything, and note in `settings` how to undo it."""
    settings._undo.callback(torch.set_rng_state, torch.get_rng_state())
    if torch.cuda.is_available():
        settings._undo.callback(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all())
    settings._undo.callback(np.random.set_state, np.random.get_state())
    settings._undo.callback(random.setstate, random.getstate())
    # Filling fresh memory with NaN is a debugging aid that costs time and changes no result.
    memory = torch.utils.deterministic
    settings._set("fill_uninitialized_memory", _attribute(memory, "fill_uninitialized_memory"), False)
    modes = torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode
    settings._set("deterministic_algorithms", modes, 2)  # 0: off, 1: warns, 2: raises
    cudnn, mha = torch.backends.cudnn, torch.backends.mha
    settings._set("cudnn.deterministic", _attribute(cudnn, "deterministic"), True)
    settings._set("cudnn.benchmark", _attribute(cudnn, "benchmark"), False)
    # Where no gradient is taken, attention layers in eval mode take a fused path, but not inside a
    # TorchFunctionMode such as the adjoint's. Without that path they compute the same in both.
    settings._set("mha.fastpath", (mha.get_fastpath_enabled, mha.set_fastpath_enabled), False)
    # torch.set_float32_matmul_precision("medium") changes these, too; on the CPU they are oneDNN's.
    owners = {"cuda.matmul": torch.backends.cuda.matmul}
    for library, kinds in (("cudnn", ("conv", "rnn")), ("mkldnn", ("matmul", "conv", "rnn"))):
        owners |= {f"{library}.{kind}": getattr(getattr(torch.backends, library), kind) for kind in kinds}
    for name, owner in owners.items():
        settings._set(f"{name}.fp32_precision", _attribute(owner, "fp32_precision"), "ieee")


def numerics() -> dict[str, object]:
    """What the bits of a sum depend on besides the code: version, thread count, processor, device."""
    return {
        "PyTorch": torch.__version__,
        "the thread count": torch.get_num_threads(),
        "the processor's instruction set": torch.backends.cpu.get_cpu_capability(),
        "the GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def seed_step(seed: int, t: int, part: int = 0) -> None:
    """Seed torch for training step t of the run with this seed, or for a later part of its batch.

    Dropout and every other use of torch's random numbers in step t is then a function of (seed, t):
    the step can be replayed without remembering a generator's state. A plain loop that calls
    `seed_step(seed, t)` at the top of step t draws the same numbers as `magic.Run(..., seed=seed)`; one that
    accumulates the gradients of several parts of a batch calls `seed_step(seed, t, part)` before each.
    """
    # (seed, t, part) is made one number, which is mixed by the first and the last of the three steps of
    # splitmix64 (Steele et al. 2014), so that neighbouring ones give unrelated generators.
    z = seed * 0x9E3779B97F4A7C15 + t * 0xD1B54A32D192ED03 + part * 0xABC98388FB8FAC03
    z = (z + 0x632BE59BD9B4E019) % 2**64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z ^= z >> 31
    # torch.manual_seed would do the same, but it formats a stack trace in each call while CUDA is unused.
    torch.default_generator.manual_seed(z)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(z)


@contextlib.contextmanager
def refusing_nondeterminism() -> Iterator[None]:
    """Turn PyTorch's refusal of an operation that has no deterministic form into NotDeterministic."""
    try:
        yield
    except RuntimeError as error:
        what = str(error)
        if "deterministic" not in what.lower() or type(error) is not RuntimeError:  # one of ours
            raise
        if "CUBLAS_WORKSPACE_CONFIG" in what:
            raise NotDeterministic(
                "cuBLAS was first used without CUBLAS_WORKSPACE_CONFIG, which it reads only once: "
                "import magic before the first matrix product on CUDA, or set the variable to :4096:8, "
                "and start the process again"
            ) from error
        raise NotDeterministic(
            f"{what.split('. ')[0]}. Replace that operation; a run that cannot be repeated has no derivative"
        ) from error
