"""The pages of the site: their order, what is added to them, and what is left out of the notebooks.

The sources stay as they are: each page is completed as it is read. So the map in index.md needs no
directives, which GitHub would show as they are written, and a chapter needs no badges of its own.
"""

import inspect
import json
import re
from pathlib import Path

import magic
from magic.book import fill_in

REPOSITORY = BRANCH = ""
NOWHERE = "https://github.com/OWNER/NAME"

PARTS = {
    "I · A run is a function": ["00_*", "01_*", "02_*"],
    "II · Replay": ["03_*", "04_*", "05_*", "06_*", "07_*"],
    "III · Does it predict?": ["08_*", "09_*", "10_*", "11_*", "12_*"],
    "IV · In the world": ["13_*", "14_*", "15_*", "16_*"],
    "Beside the chapters": [
        "running.*", "solutions.*", "claims.*", "appendix*", "guide.*", "api.*", "syllabus.*", "instructor.*",
        "contributing.*", "*",
    ],
}  # fmt: skip
WINGS = {
    "attribution": "Scores",
    "training": "Training: a run as a function",
    "engine": "Engine: its derivative",
    "evidence": "Evidence: is the prediction true?",
    "text": "Text: language models",
    "identity": "Identity: the same run, to the bit",
    "": "Which examples, and where",
}
WIDGET = "application/vnd.jupyter.widget-view+json"
BAR = re.compile(r"\d+%\|.*\|")


def complete(app, docname, source):
    """Sphinx's event source-read: change the text of a page in place."""
    text = source[0]
    if app.env.doc2path(docname).suffix == ".ipynb":
        text = json.dumps(notebook(json.loads(text), docname, Path(app.srcdir)))
    elif docname == "index":
        text += contents(app.srcdir)
    elif docname == "running":
        text = text.replace(NOWHERE, REPOSITORY or NOWHERE)
    elif docname == "solutions":
        text += toctree(found(app.srcdir, "solutions/*"))
    elif docname == "api":
        text += api()
    source[0] = text


def found(folder, pattern):
    """The pages there are, in order: a chapter that is not written yet is not missed."""
    paths = {path.relative_to(folder).with_suffix("") for path in Path(folder).glob(pattern)
             if path.suffix in (".md", ".ipynb")}  # fmt: skip
    return sorted(path.as_posix() for path in paths)


def toctree(documents, *options):
    lines = ["", "```{toctree}", ":maxdepth: 1", *options, "", *documents, "```", ""]
    return "\n".join(lines) if documents else ""


def contents(folder):
    """The order of all pages, for the sidebar and for previous and next; nothing of it on the page."""
    trees, seen = [], {"index"}
    for caption, patterns in PARTS.items():
        documents = [document for pattern in patterns for document in found(folder, pattern)]
        new = [document for document in dict.fromkeys(documents) if document not in seen]
        seen.update(new)
        trees.append(toctree(new, ":hidden:", f":caption: {caption}"))
    return "".join(trees)


def notebook(content, docname, folder):
    """The notebook with links under its title, and without progress bars and widgets' states."""
    content["metadata"].pop("widgets", None)
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = [output for output in cell["outputs"] if not is_bar(output)]
            for output in cell["outputs"]:
                output.get("data", {}).pop(WIDGET, None)
    for cell in content["cells"]:
        title, line, rest = "".join(cell["source"]).partition("\n")
        if cell["cell_type"] == "markdown" and title.startswith("# "):
            cell["source"] = f"{title}\n\n{links(docname, folder, fill_in.has_stubs(content))}\n{line}{rest}"
            break
    return content


def is_bar(output):
    data = output.get("data", {})
    text = "".join(data.get("text/plain", ""))
    return WIDGET in data and "text/html" not in data and bool(BAR.search(text))


def links(docname, folder, to_fill_in):
    """What stands under a title: the notebook to take home, its other versions, and where to run it."""
    name = docname.split("/")[-1]
    up = "../" if docname != name else ""
    found = [f"{{download}}`Notebook <{name}.ipynb>`"]
    if to_fill_in:
        found.append(f'<a class="reference download" href="fill_in/{name}.ipynb" download>To fill in</a>')
    if up:
        found.append(f"[Chapter](../{name}.ipynb)")
    elif (folder / "solutions" / f"{name}.ipynb").exists():
        found.append(f"[Solutions](solutions/{name}.ipynb)")
    found.append(f"[How to run it]({up}running.md)")
    if REPOSITORY:
        there = elsewhere(f"notebooks/{docname}.ipynb")
        found += [f"[{name}]({address})" for name, address in there.items()]
    return ":::{container} run-links\n" + " ".join(found) + "\n:::\n"


def elsewhere(path):
    """Where a file of the published repository can be run in a browser."""
    owner = REPOSITORY.removeprefix("https://github.com/").strip("/")
    return {
        "Binder": f"https://mybinder.org/v2/gh/{owner}/{BRANCH}?labpath={path}",
        "Colab": f"https://colab.research.google.com/github/{owner}/blob/{BRANCH}/{path}",
    }


def api():
    """The public names, by the wing of the package that each comes from, with their docstrings."""
    wings = {wing: [] for wing in WINGS}
    for name in magic.__all__:
        value = getattr(magic, name)
        module = value.__name__ if inspect.ismodule(value) else value.__module__
        wing = module.split(".")[1]
        wings[wing if wing in WINGS else ""].append(name)
    sections = []
    for wing, names in wings.items():
        if names:
            sections += ["", f"## {WINGS[wing]}", ""]
            sections += [entry(name) for name in sorted(names, key=rank)]
    return "\n".join(sections) + "\n"


def rank(name):
    """Functions first, then classes, exceptions and modules."""
    value = getattr(magic, name)
    error = inspect.isclass(value) and issubclass(value, Exception)
    return (inspect.ismodule(value), error, inspect.isclass(value), name.lower())


def entry(name):
    value = getattr(magic, name)
    if inspect.ismodule(value):
        lines = [f"### magic.{name}", "", "```{eval-rst}", f".. automodule:: {value.__name__}"]
    else:
        kind = "autoclass" if inspect.isclass(value) else "autofunction"
        lines = ["```{eval-rst}", f".. {kind}:: magic.{name}"]
    return "\n".join([*lines, "```", ""])
