"""Bits depend on the thread count, so it is fixed; unit tests also run on CUDA where there is one."""

import contextlib
import importlib
import os
import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.support.kernels import use_forks

# Several workers share the cores. What they start, notebooks' kernels among it, takes one thread each, too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Some eighty processes import PyTorch, which takes six seconds without bytecode and two with it. Some
# machines are told to write none; whoever comes first writes it for the others all the same.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
use_forks()

# Files that take long, the longest of them first, so that at the end no worker is left with one.
LONG = (
    "test_exact.py", "test_site.py", "08_is_the_derivative_useful.ipynb",
    "test_planning.py", "test_transformers.py", "09_which_examples_mattered.ipynb", "10_is_it_right.ipynb",
    "test_true.py", "11_how_near_is_near_optimal.ipynb", "12_how_far_does_a_tangent_reach.ipynb",
    "13_language_models.ipynb", "14_what_the_derivative_is_for.ipynb", "test_metagradients.py",
    "test_properties.py", "test_resume.py", "test_outputs.py", "test_gpu_script.py", "test_state_value.py",
    "test_optimizers.py", "test_identity.py", "test_ranks.py", "test_packaging.py", "test_loading.py",
    "test_operations.py", "test_baselines.py", "test_judging.py", "test_models.py", "test_threads.py",
    "test_lora.py", "test_smollm2.py",
)  # fmt: skip

TESTS = Path(__file__).parent
WATCHED = tomllib.loads((TESTS / "watched.toml").read_text(encoding="utf-8"))


def is_watched(item) -> bool:
    """Whether coverage, if it is asked for, watches a test; a notebook's kernel is a process of its own."""
    if not item.path.is_relative_to(TESTS):
        return False
    functions = WATCHED.get(item.path.relative_to(TESTS).as_posix())
    return functions is None or item.originalname in functions


def only_starts_workers(config) -> bool:
    """Whether this process runs no test itself. Without PyTorch it starts them sooner."""
    return not hasattr(config, "workerinput") and bool(config.getoption("numprocesses", None))


def pytest_configure(config):
    """The files of scores that come with chapters must be those of the chapters' runs. What identifies a run
    has other bytes under another Python, and the files were made under this one, on a CPU."""
    if only_starts_workers(config) or sys.version_info[:2] != (3, 11):
        return
    with unwatched():
        import torch
    if not torch.cuda.is_available():
        os.environ.setdefault("MAGIC_SHIPPED", "required")


@contextlib.contextmanager
def unwatched():
    """Stop coverage for a while. pytest-cov's mark for that, no_cover, does nothing in a worker: coverage has
    been started twice there, and as the second is stopped, the first goes on."""
    tracer = sys.gettrace()
    sys.settrace(None)
    try:
        yield
    finally:
        sys.settrace(tracer)


@pytest.hookimpl(wrapper=True)
def pytest_collection(session):
    """Watch the import of magic, and not that of all that tests use, which takes half as long again."""
    if only_starts_workers(session.config) or not session.config.pluginmanager.hasplugin("_cov"):
        return (yield)
    import magic

    for module in pkgutil.walk_packages(magic.__path__, "magic."):
        importlib.import_module(module.name)
    with unwatched():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Stop coverage where it does not watch."""
    if is_watched(item) or not item.config.pluginmanager.hasplugin("_cov"):
        return (yield)
    with unwatched():
        return (yield)


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
    config.option.cov_source = None  # where nbval asks, when pytest-cov has begun already


@pytest.fixture(autouse=True)
def one_thread():
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_mode_is_left_behind():
    """Whatever is refused, no TorchFunctionMode stays on PyTorch's stack."""
    from torch.overrides import _get_current_function_mode_stack

    before = len(_get_current_function_mode_stack())
    yield
    assert len(_get_current_function_mode_stack()) == before


@pytest.fixture
def unwitnessed(monkeypatch):
    """Replays compare neither a step nor a measure with finite differences, a third of a small one's time.

    For tests of other things; of each kind of run at least one test leaves them on.
    """
    monkeypatch.setattr("magic.engine.listeners.check_step", lambda *args: 0.0)
    monkeypatch.setattr("magic.engine.replay.check_measure", lambda *args: 0.0)


@pytest.fixture
def printed(request):
    """printed(code, *arguments): what a Python process of its own prints, in the repository's root."""

    def run(code, *arguments):
        command = [sys.executable, "-c", code, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=request.config.rootpath)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    import torch

    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)
