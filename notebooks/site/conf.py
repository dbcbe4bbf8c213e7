"""The site: the chapters with their stored outputs, typeset, searchable, readable on a phone, without a network.

uv run sphinx-build -c notebooks/site notebooks build/site     then open build/site/index.html

Nothing is executed, and nothing comes from the network. Which pages there are, and in which order, is in `pages.py`; how a docstring becomes
text, in `docstrings.py`.
"""

import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import docstrings
import pages

from magic.book import fill_in

# Where the project is published, such as "https://github.com/OWNER/NAME". While it is empty, no page offers
# Binder or Colab, which start from there.
REPOSITORY = ""
BRANCH = "main"

project = "magic"
author = "The magic authors"
html_title = "magic: the book that runs"
language = "en"

extensions = ["myst_nb", "sphinx.ext.mathjax", "sphinx.ext.autodoc", "sphinx_copybutton"]
exclude_patterns = ["site", "fill_in", "banks", "figures", "**.ipynb_checkpoints", "**/__pycache__"]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb"}
root_doc = "index"

nb_execution_mode = "off"
nb_output_stderr = "remove"
nb_ipywidgets_js = {}  # they would come from the network
nb_code_prompt_show = "Show the code"
nb_code_prompt_hide = "Hide the code"
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 3

# MathJax in one file, which draws formulas itself and loads neither fonts nor parts
MATHJAX = Path(find_spec("sphinx-mathjax-offline").origin).parent / "static/mathjax/tex-svg.js"
mathjax_path = MATHJAX.name
mathjax3_config = {
    "svg": {"fontCache": "global"},
    "options": {"enableMenu": False, "renderActions": {"assistiveMml": []}},
}

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True}
add_module_names = False
python_maximum_signature_line_length = 100
python_use_unqualified_type_names = True

html_theme = "furo"
html_static_path = ["_static", str(MATHJAX)]
EXTRA = Path(tempfile.mkdtemp())
fill_in.write(HERE.parent, EXTRA / "fill_in")
html_extra_path = [str(EXTRA)]  # chapters to fill in have no page; their links download them
html_css_files = ["site.css"]
html_js_files = ["site.js"]
pygments_dark_style = "github-dark"  # Furo's own underlines what is imported
html_copy_source = False
html_show_search_summary = False  # it fetches pages, and browsers forbid that where a page is a file
html_show_copyright = html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True, "top_of_page_buttons": []}
copybutton_exclude = ".linenos, .gp, .go"
copybutton_selector = ".cell_input pre, .highlight-sh pre, .highlight-python pre, .highlight-ipython3 pre"


def setup(app):
    pages.REPOSITORY, pages.BRANCH = REPOSITORY, BRANCH
    app.connect("source-read", pages.complete)
    app.connect("autodoc-process-docstring", docstrings.process)
    app.connect("autodoc-skip-member", docstrings.skip)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
