"""How Sphinx builds these pages: `make docs`, into docs/_build. Nothing is fetched, neither to build nor to read them."""

import configparser
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

import trainers

from dacal_addon import __version__

_config = configparser.ConfigParser()
_config.read(str(Path(__file__).parent.parent / "setup.cfg"), encoding="utf-8")
project = _config["metadata"]["name"]
author = _config["metadata"]["author"]
copyright = author
version = release = __version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "docstrings",
    "mathml",
    "repository_pages",
]
exclude_patterns = ["_build"]
nitpicky = True
# Other projects' names; their pages are not asked for, since that needs a network. What stands in single backquotes in a
# docstring is a link where it names something here, and code where it does not.
nitpick_ignore_regex = [
    ("py:obj", r".*"),
    ("py:exc", r"(ValueError|TypeError|RuntimeError|OSError|ImportError|UserWarning|a warning)(, \w+)*"),
    ("py:class", r"(torch|numpy|np|nn|matplotlib|typing|pathlib|io|lightning|torchmetrics)\..*|optional"),
    # Types in signatures that users do not name.
    ("py:class", r"dacal_addon\.integrations\.segmentor_training\.SegmentorTraining"),
    ("py:class", r"dacal_addon\.(ranks\.Ranks|learners\.networks\.\w+|learners\.learner\.(_Self|OwnLoss))"),
    ("py:class", r"dacal_addon\.(pseudo_labels\.TemperatureNet|calibrate\.(curves|pixels)\.\w+)"),
    ("py:class", r"dacal_addon\.metrics\.counting\.(Counting|_Self)"),
]

myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 4

html_theme = "furo"
html_title = f"dacal-addon {version}"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": False}
smartquotes_action = "D"  # dashes; quotation marks stay what they are in code
pygments_style = "friendly"

default_role = "py:obj"
autodoc_mock_imports = trainers.loaded()
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False  # of torch's and matplotlib's classes
python_maximum_signature_line_length = 100
