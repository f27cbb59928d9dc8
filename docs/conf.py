"""How the site is built: `make docs`. Nothing is fetched, and warnings are errors."""

import os
import sys
import warnings
from pathlib import Path

HERE = Path(__file__).parent
os.environ |= {"PYKEOPS_VERBOSE": "0", "KEOPS_VERBOSE": "0"}  # notes on this machine's libraries are no part of an example
sys.path.insert(0, str(HERE))

import figures  # noqa: E402
import torch  # noqa: E402
from docstrings import add_example, as_restructured_text  # noqa: E402
from tables import tables  # noqa: E402

import gpu_ot  # noqa: E402

torch.set_num_threads(1)  # the same pictures, and the same time, on every machine

project = "gpu_ot"
author = "The gpu_ot authors"
copyright = author
version = release = gpu_ot.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.autosummary", "myst_parser", "sphinx_gallery.gen_gallery"]
source_suffix = {".rst": "restructuredtext", ".md": "markdown"}
exclude_patterns = ["_build", "examples", "**/sg_execution_times.rst", "sg_execution_times.rst", "gallery/**/*.py.md5"]
templates_path = ["_templates"]
suppress_warnings = ["config.cache"]  # the sorting key of the gallery is a function

autosummary_generate = True
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # torch.nn.Module has its own to say
autodoc_typehints = "none"  # the signature says it
autodoc_preserve_defaults = True
add_module_names = False
python_use_unqualified_type_names = True

myst_enable_extensions = ["colon_fence", "deflist", "substitution"]
myst_heading_anchors = 3
myst_substitutions = tables()

html_theme = "pydata_sphinx_theme"
html_title = "gpu_ot"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_theme_options = {
    "navbar_align": "left",
    "header_links_before_dropdown": 5,
    "secondary_sidebar_items": ["page-toc"],
    "show_prev_next": True,
    "navigation_with_keys": False,
    "footer_start": ["copyright"],
    "footer_end": [],
}
html_sidebars = {path.stem: [] for path in HERE.glob("*.md") if path.stem != "api"}  # pages without pages below them
smartquotes = False  # what is quoted is code

#: The order of the gallery: what tempts first, what explains last.
ORDER = (
    "colour_transfer", "flow_matching", "gradient_flow", "every_pixel", "motorcycle", "domain_adaptation", "unbalanced_outliers",
    "partial_matching", "barycentres", "gromov_wasserstein", "low_rank", "ground_cost", "learn_eps", "training_loop", "soft_quantiles",
    "convergence", "cotraining",
)  # fmt: skip


def by_order(name):
    return ORDER.index(Path(name).stem)


sphinx_gallery_conf = {
    "examples_dirs": "examples",
    "gallery_dirs": "gallery",
    "filename_pattern": r"\.py$",
    "within_subsection_order": by_order,
    "download_all_examples": False,
    "show_memory": False,
    "show_signature": False,
    "remove_config_comments": True,
    "abort_on_example_error": True,
    "min_reported_time": 0,
    "matplotlib_animations": False,
    "plot_gallery": "True",
    "write_computation_times": False,
}
warnings.filterwarnings("ignore", category=UserWarning, message=".*non-interactive.*")


def setup(app):
    figures.draw(HERE / "pictures")
    app.connect("autodoc-process-docstring", as_restructured_text)
    app.connect("autodoc-process-docstring", add_example)
