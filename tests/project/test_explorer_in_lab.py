"""The explorer in a real JupyterLab: a box ticked in the browser changes the prediction, a button trains."""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from nbformat import v4

from tests.support.browser import chromium

ROOT = Path(__file__).parents[2]
CELL = """
import torch, magic
from tests.support import cases
torch.set_num_threads(1)
run, *_ = cases.build("sgd", torch.float64)
scores = magic.attribute(run, cases.measure_on(*cases.data(torch.float64)), progress=False)
magic.explore(scores, [f"text number {i}" for i in range(run.n)], top=2)
"""


@contextmanager
def lab(folder: Path):
    """The address of a JupyterLab that serves the folder, for as long as the block takes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [
        "--no-browser",
        f"--port={port}",
        "--ip=127.0.0.1",
        "--IdentityProvider.token=",
        "--allow-root",
    ]
    paths = {name: str(folder / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR")}
    settings = {"JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", *options, str(folder)],
        env={**os.environ, **paths, **settings}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{address}/api").close()
                break
            except OSError:
                assert process.poll() is None, "JupyterLab ended"
                time.sleep(0.25)
        yield address
    finally:
        process.terminate()
        process.wait()


@pytest.mark.slow
def test_ticking_and_training_in_jupyterlab(tmp_path):
    folder = tmp_path / "shown"
    folder.mkdir()
    notebook = v4.new_notebook(cells=[v4.new_code_cell(CELL.strip())])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    (folder / "explore.ipynb").write_text(json.dumps(notebook))
    with chromium() as browser, lab(folder) as address:
        page = browser.new_page(viewport={"width": 1280, "height": 1100})
        page.set_default_timeout(120_000)
        page.goto(f"{address}/lab/tree/explore.ipynb?reset")
        page.locator(".jp-Notebook .cm-content").first.click()
        page.keyboard.press("Shift+Enter")
        shown = page.locator(".jp-OutputArea-output")
        shown.get_by_text("Nothing is removed.").wait_for()
        shown.locator("input[type=checkbox]").first.check()
        shown.get_by_text("not trained yet").wait_for()
        shown.get_by_role("button", name="Train without them").click()
        answer = shown.get_by_text(re.compile(r"Without example \d+: predicted [+−]\d.*, true [+−]\d"))
        answer.wait_for()
        shown.locator("select").select_option(index=1)
        shown.get_by_text(re.compile("output 1")).first.wait_for()
        if place := os.environ.get("MAGIC_SHOTS"):
            page.screenshot(path=Path(place) / "explorer.png")
