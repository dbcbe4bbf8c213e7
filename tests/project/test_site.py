"""The site builds from stored outputs, without a warning; its pages render, and its links lead somewhere.

The pages are read as files everywhere. Where there is a Chromium, they are also opened in it, at the width of
a phone and of a laptop, in light and in dark; `MAGIC_SHOTS=folder` then keeps a picture of each.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

import magic
from tests.support.browser import chromium, complaints

soup = pytest.importorskip("bs4", reason="needs the extra 'site'").BeautifulSoup
pytest.importorskip("myst_nb", reason="needs the extra 'site'")

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
NOTEBOOKS = ROOT / "notebooks"
SITE = NOTEBOOKS / "site"
CHAPTERS = sorted(NOTEBOOKS.glob("*.ipynb"))
EXECUTED = CHAPTERS + sorted(NOTEBOOKS.glob("solutions/*.ipynb"))
COMMAND = "sphinx-build -c notebooks/site notebooks build/site"
WIDTHS = {"phone": (390, 844), "laptop": (1280, 800)}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site as the README's command makes it, elsewhere; a warning fails it."""
    place = tmp_path_factory.mktemp("site")
    arguments = COMMAND.replace("build/site", str(place / "html")).split()[1:]
    options = ["-q", "-d", str(place / "doctrees")]
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *options, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.splitlines() == []
    return place / "html"


@pytest.fixture(scope="module")
def pages(site):
    """The parsed pages by name, "solutions/04_one_step_backwards" among them."""
    paths = {path.relative_to(site).with_suffix("").as_posix(): path for path in site.rglob("*.html")}
    return {name: soup(path.read_text(encoding="utf-8"), "html.parser") for name, path in paths.items()}


def printed(path: Path) -> list[str]:
    """The claims that a notebook has stored."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    texts = ["".join(out.get("text", [])) for cell in cells for out in cell.get("outputs", [])]
    return [line for text in texts for line in text.splitlines() if line.startswith("✓")]


def test_every_source_is_a_page(pages):
    sources = [p.relative_to(NOTEBOOKS) for p in NOTEBOOKS.rglob("*") if p.suffix in (".md", ".ipynb")]
    left_out = {"site", "fill_in", ".ipynb_checkpoints"}
    names = {p.with_suffix("").as_posix() for p in sources if not left_out & set(p.parts)}
    assert len(names) > 10 and names <= set(pages)
    for name in names:
        assert pages[name].select("article h1"), f"{name} has no title"


def test_pages_show_what_is_stored(pages):
    for path in EXECUTED:
        page = pages[path.relative_to(NOTEBOOKS).with_suffix("").as_posix()]
        text = page.select_one("article").get_text()
        claims = printed(path)
        assert all(line in text for line in claims), path.name
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        stored = [kind for cell in cells for out in cell.get("outputs", []) for kind in out.get("data", {})]
        assert len(page.select(".cell_output > img")) == stored.count("image/png"), path.name
        folded = sum("hide-input" in cell["metadata"].get("tags", []) for cell in cells)
        assert len(page.select(".cell details.hide")) >= folded, path.name
        assert "it/s]" not in text, "a progress bar"


def outside(address: str) -> bool:
    return address.startswith(("http://", "https://", "mailto:"))


def link_problems(site: Path, pages) -> list[str]:
    problems = []
    ids = {name: {tag["id"] for tag in page.select("[id]")} for name, page in pages.items()}
    for name, page in pages.items():
        here = (site / f"{name}.html").parent
        for tag in page.select("a[href], img[src], script[src], link[href], iframe[src]"):
            address = tag.get("href") or tag.get("src")
            if outside(address):
                if tag.name != "a":
                    problems.append(f"{name} loads {address} from the network")
                continue
            if address.startswith("data:"):
                continue
            path, _, anchor = unquote(address).partition("#")
            file = (here / path.partition("?")[0]).resolve() if path else site / f"{name}.html"
            target = file.relative_to(site.resolve()).with_suffix("").as_posix() if file.exists() else None
            if not file.exists():
                problems.append(f"{name} links to {address}, which is not there")
            elif anchor and file.suffix == ".html" and anchor not in ids[target]:
                problems.append(f"{name} links to {address}, where there is no such anchor")
    return problems


def test_links_lead_somewhere(site, pages):
    assert sum(len(page.select("article a[href]")) for page in pages.values()) > 100, "no links were seen"
    assert link_problems(site.resolve(), pages) == []


def test_dead_links_are_found(tmp_path):
    text = '<p id="a"></p><a href="#a"></a><a href="#b"></a><a href="c.html"></a><img src="https://x.org/y.png"/>'
    (tmp_path / "one.html").write_text(text)
    found = link_problems(tmp_path, {"one": soup(text, "html.parser")})
    assert [problem.split()[-1] for problem in found] == ["network", "anchor", "there"] or len(found) == 3


def test_next_goes_through_the_whole_book(site, pages):
    name, order = "index", []
    while link := pages[name].select_one("a.next-page"):
        file = (site / f"{name}.html").parent / link["href"]
        name = file.resolve().relative_to(site.resolve()).with_suffix("").as_posix()
        assert name not in order, "it goes in circles"
        order.append(name)
    chapters = [path.stem for path in CHAPTERS]
    assert order[: len(chapters)] == chapters
    own = {"index", "genindex", "py-modindex", "search"}
    assert set(order) == set(pages) - own


def test_search_knows_every_page(site, pages):
    text = (site / "searchindex.js").read_text(encoding="utf-8")
    index = json.loads(re.fullmatch(r"Search\.setIndex\((.*)\)", text, re.DOTALL)[1])
    assert {path.stem for path in CHAPTERS} <= set(index["docnames"])
    assert "metasmooth" in index["terms"]


def test_the_api_is_the_public_surface(pages):
    page = pages["api"]
    ids = {tag["id"] for tag in page.select("[id]")}
    for name in magic.__all__:
        value = getattr(magic, name)
        there = f"module-{value.__name__}" if isinstance(value, type(magic)) else f"magic.{name}"
        assert there in ids, name
    assert not page.select(".system-message, .problematic")
    terms = [dt.get_text() for dt in page.find(id="magic.attribute").parent.select(".arguments dt")]
    assert terms == ["measure", "at", "last", "jobs", "progress", "memory", "plan", "disk", "trust"]


# What the configuration adds, without Sphinx.


@pytest.fixture
def own(monkeypatch):
    """The modules of the site's configuration."""
    monkeypatch.syspath_prepend(str(SITE))
    import docstrings
    import pages

    return pages, docstrings


def test_a_docstring_becomes_text(own):
    text = [
        "Words about `magic.lds` and `x*`s, |a| * b_.", "loss     one number", "         for each", "",
        "a, b     two", "long_name", "         below", "optimise said with one blank", "",
        "    a   formula, b  c", "", "Raises ValueError.",
    ]  # fmt: skip
    said = own[1].converted(text)
    assert "Words about :py:obj:`magic.lds` and ``x*``\\ s, \\|a\\| \\* b\\_." in said
    for name, what in [
        ("``loss``", "one number for each"), ("``a``, ``b``", "two"), ("``long_name``", "below"),
        ("``optimise``", "said with one blank"),
    ]:  # fmt: skip
        assert said[said.index(f"    {name}") + 1] == f"        {what}"
    assert said[said.index("::") + 2] == "    a   formula, b  c"
    assert said[-2:] == ["Raises ValueError.", ""]


def test_a_notebook_loses_its_bars_and_gains_links(own, monkeypatch):
    pages = own[0]
    widget = "application/vnd.jupyter.widget-view+json"
    bar = {
        "output_type": "display_data",
        "data": {widget: {}, "text/plain": ["run:  0%|    | 0/9 [00:00<?]"]},
    }
    explorer = {"output_type": "display_data", "data": {widget: {}, "text/html": "<p>who helped</p>"}}

    def completed():
        content = {"metadata": {"widgets": {}}, "cells": [
            {"cell_type": "markdown", "source": ["# 04 · One\n", "\n", "Text."]},
            {"cell_type": "code", "outputs": [dict(bar), {**explorer, "data": dict(explorer["data"])}]},
        ]}  # fmt: skip
        return pages.notebook(content, "solutions/04_one", NOTEBOOKS)

    made = completed()
    assert made["metadata"] == {}
    assert [out["data"] for out in made["cells"][1]["outputs"]] == [{"text/html": "<p>who helped</p>"}]
    text = made["cells"][0]["source"]
    assert text.startswith("# 04 · One\n") and text.endswith("Text.")
    assert "<04_one.ipynb>" in text and "(../running.md)" in text and "(../04_one.ipynb)" in text
    assert "Colab" not in text

    monkeypatch.setattr(pages, "REPOSITORY", "https://github.com/someone/book")
    monkeypatch.setattr(pages, "BRANCH", "main")
    text = completed()["cells"][0]["source"]
    there = "someone/book/blob/main/notebooks/solutions/04_one.ipynb"
    assert f"(https://colab.research.google.com/github/{there})" in text
    assert "(https://mybinder.org/v2/gh/someone/book/main?labpath=notebooks/solutions/04_one.ipynb)" in text


def test_a_chapter_to_fill_in_is_a_download(site, pages):
    links = {name: page.select('a[href^="fill_in/"]') for name, page in pages.items()}
    found = {name for name, there in links.items() if there}
    assert {name[:2] for name in found} == {"03", "04", "05", "06"}
    for name in found:
        assert "your turn" in (site / links[name][0]["href"]).read_text(encoding="utf-8")


def test_the_set_up_cell_fetches_what_it_says(tmp_path):
    """The lines for Colab, with this repository in the place of the published one, and without pip."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is no git checkout")
    (cell,) = re.findall(r"```ipython3\n(.*?)```", (NOTEBOOKS / "running.md").read_text(), re.DOTALL)
    there, fetch, inside = cell.strip().splitlines()
    assert there == "%cd /content"
    clone, install = fetch.removeprefix("!").split(" && ")
    clone = clone.replace("https://github.com/OWNER/NAME", ROOT.as_uri())
    subprocess.run(clone, shell=True, check=True, cwd=tmp_path)
    package, extra = re.fullmatch(r'pip install -q "\./(\w+)\[(\w+)\]"', install).groups()
    assert f"\n{extra} = [" in (tmp_path / package / "pyproject.toml").read_text()
    folder = tmp_path / inside.removeprefix("%cd ")
    assert (folder / "00_quickstart.ipynb").exists() and list(folder.glob("banks/*.sqlite"))


# In a real browser.

LOOK = """() => {
    const wide = [...document.querySelectorAll('body *')].filter(tag => {
        const style = getComputedStyle(tag);
        const hidden = ['hidden', 'clip'].includes(style.overflowX) && style.clip === 'auto';
        const more = tag.clientWidth > 1 && tag.scrollWidth > tag.clientWidth + 1;
        return hidden && more && tag.closest('article');
    });
    const broken = [...document.querySelectorAll('article pre')].filter(tag => {
        const style = getComputedStyle(tag);
        const wraps = tag.classList.contains('claims') ? 'pre-wrap' : 'pre';
        return style.whiteSpace !== wraps || style.wordBreak === 'break-all' || style.overflowX === 'visible';
    });
    const images = [...document.querySelectorAll('article img')].filter(tag => !tag.naturalWidth);
    const name = tag => `${tag.tagName} ${tag.className} ${tag.textContent.slice(0, 40)}`;
    return {
        'the page is as wide as the window': document.documentElement.scrollWidth <= innerWidth,
        'nothing is cut off': wide.map(name).join() || true,
        'code and outputs keep their lines': broken.map(name).join() || true,
        'images are there': images.map(tag => tag.src).join() || true,
        'formulas are drawn': document.querySelectorAll('article .math').length
            <= document.querySelectorAll('article mjx-container').length,
        'formulas are right': !document.querySelector('mjx-merror, [data-mjx-error]'),
        'there is a title': Boolean(document.querySelector('article h1, #search-results')?.offsetParent),
    };
}"""
BACKGROUND = "() => getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number)"


def look(page, name: str, scheme: str, device: str) -> list[str]:
    """What is wrong with the open page at this width and in this scheme."""
    width, height = WIDTHS[device]
    page.set_viewport_size({"width": width, "height": height})
    page.emulate_media(color_scheme=scheme)
    seen = page.evaluate(LOOK)
    problems = [f"not so: {what} ({value})" for what, value in seen.items() if value is not True]
    if (sum(page.evaluate(BACKGROUND)) > 384) != (scheme == "light"):
        problems.append("the background is that of the other scheme")
    if folder := os.environ.get("MAGIC_SHOTS"):
        file = f"{name.replace('/', '_')}-{device}-{scheme}.png"
        page.screenshot(path=Path(folder, file), full_page=True)
    return [f"{name}, {device}, {scheme}: {problem}" for problem in problems]


def test_every_page_in_a_browser(site, pages):
    """In two views, which differ in width and in scheme; solutions in the narrow one, and some pages with all
    there is in all four."""
    everywhere = {"index", "04_one_step_backwards", "solutions/04_one_step_backwards", "api", "claims"}
    assert everywhere <= set(pages)
    problems = []
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 390, "height": 844})
        told = complaints(page)
        for name in sorted(pages):
            page.goto((site / f"{name}.html").as_uri())
            page.evaluate("() => window.MathJax && MathJax.startup.promise")
            views = [("phone", "light")]
            views += [("laptop", "dark")] if name in everywhere or "/" not in name else []
            views += [("laptop", "light"), ("phone", "dark")] if name in everywhere else []
            for device, scheme in views:
                problems += look(page, name, scheme, device)
            problems += [f"{name}: {one}" for one in told]
            told.clear()
    assert problems == []


def test_search_and_folds_work_in_a_browser(site):
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 390, "height": 844})
        told = complaints(page)
        page.goto((site / "search.html").as_uri() + "?q=cotangent")
        page.wait_for_selector("#search-results li a", timeout=20_000)
        found = [link.get_attribute("href") for link in page.query_selector_all("#search-results li a")]
        assert any(link.startswith("04_one_step_backwards.html") for link in found), found
        # the scheme is kept when a reader chooses it
        page.goto((site / "index.html").as_uri())
        page.click(".mobile-header .theme-toggle")
        page.click(".mobile-header .theme-toggle")
        chosen = page.evaluate("() => document.body.dataset.theme")
        page.goto((site / "00_quickstart.html").as_uri())
        assert page.evaluate("() => document.body.dataset.theme") == chosen != "auto"
        assert told == []
