"""A plugin of pytest for tests/gpu: a share of the tests, and each that fails told at once."""

import os

from tests.gpu.stages import Teller

SHARE, SHARES = (int(os.environ.get(name, default)) for name, default in (("SHARE", "0"), ("SHARES", "1")))
teller = Teller(os.environ["GPU_INTO"], os.environ["GPU_LABEL"])
counts: dict[str, int] = {}


def pytest_collection_modifyitems(items):
    items[:] = items[SHARE::SHARES]


def pytest_runtest_logstart(nodeid):
    print(f"begins {nodeid}", flush=True)


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
