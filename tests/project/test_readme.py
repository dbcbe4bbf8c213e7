"""The README is true: its code runs, its figure is a stored output, its links lead somewhere."""

import base64
import re
from pathlib import Path

import nbformat
import torch

from magic.book import data, models

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text()


def test_the_code_runs_as_written():
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    x, y, x_test, y_test = data.digits(train=300, test=10)
    torch.manual_seed(0)
    names = {"model": models.MLP((64, 32, 10)), "x": x, "y": y, "x_test": x_test, "y_test": y_test}
    exec(code, names)
    assert names["scores"].values.shape == (10, 300)
    assert names["truth"].step == names["run"].steps == 30


def test_the_figure_is_the_quickstarts():
    (path,) = re.findall(r"!\[.*?\]\((.*?)\)", TEXT)
    notebook = nbformat.read(ROOT / "notebooks/00_quickstart.ipynb", 4)
    stored = [
        output["data"]["image/png"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert (ROOT / path).read_bytes() == base64.b64decode(stored[-1])


def test_links_and_chapters():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", TEXT) if not link.startswith("http")]
    assert len(links) >= 3
    for link in links:
        assert (ROOT / link).exists(), link
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        assert f"notebooks/{notebook.name}" in links, f"{notebook.name} is missing in the chapter table"


def test_ci_runs_what_the_readme_says():
    lines = [line for line in (ROOT / ".ci/run").read_text().splitlines() if line and line[0] != "#"]
    commands = [line for line in lines if not line.startswith(("set ", "cd "))]
    assert commands
    for line in commands:
        for command in line.split("&&"):
            assert command.strip() in TEXT, command
