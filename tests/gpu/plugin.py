"""A plugin of pytest for tests/gpu: a share of the tests, and each that fails told at once.

Cells of a notebook come here, too, if nbval runs it. The first that needs a package which is not installed is
told as skipped, and so are the cells after it, which could only fail for what it has not defined.
"""

import os
import re

import pytest

from tests.gpu.stages import Teller, absent

SHARE, SHARES = (int(os.environ.get(name, default)) for name, default in (("SHARE", "0"), ("SHARES", "1")))
FIRST = int(os.environ.get("FIRST", "0")) or None  # so many tests only
teller = Teller(os.environ["GPU_INTO"], os.environ["GPU_LABEL"])
counts: dict[str, int] = {}
missing: dict[str, str] = {}  # notebook -> the package


def pytest_collection_modifyitems(items):
    items[:] = items[SHARE::SHARES][:FIRST]


def pytest_runtest_logstart(nodeid):
    print(f"begins {nodeid}", flush=True)


def pytest_runtest_setup(item):
    if item.path.name in missing:
        pytest.skip(f"no module {missing[item.path.name]}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if item.path.suffix == ".ipynb" and report.failed:
        module = absent(*re.findall(r"No module named '([\w.]+)'", report.longreprtext))
        if module:
            missing[item.path.name] = module
            teller.tell(test=report.nodeid, skipped=f"no module {module}")
            report.outcome, report.longrepr = "skipped", (str(item.path), 0, f"no module {module}")
    return report


def pytest_runtest_logreport(report):
    if report.failed:
        last = report.longreprtext.strip().splitlines()[-12:]
        teller.tell(
            test=report.nodeid, outcome="FAILED", why="\n".join(last), seconds=round(report.duration, 2)
        )
    if report.when == "call" or report.outcome != "passed":
        counts[report.outcome] = counts.get(report.outcome, 0) + 1


def pytest_sessionfinish():
    teller.tell(**(counts or {"passed": 0}))
