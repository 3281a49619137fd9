"""How the site is built: `sphinx-build -W --keep-going -b html docs docs/_build/html`."""

from __future__ import annotations

import dataclasses

from docutils.nodes import Element, TextElement
from pydantic import BaseModel
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging
from sphinx.util.nodes import make_refnode
from torch import nn

import fxshare
import fxshare.errors
import passes

project = "fxshare"
author = "the fxshare developers"
release = version = fxshare.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"fxshare {version}"

myst_heading_anchors = 3  # links between headings are written as on GitHub: page.md#a-heading

napoleon_google_docstring = False
autodoc_member_order = "groupwise"
autodoc_inherit_docstrings = False  # a pass's `requires` says what it says of its own, or nothing
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 80
python_use_unqualified_type_names = True

copybutton_prompt_text = "$ "


def _documented(env: BuildEnvironment) -> dict[str, str]:
    """Where each public name is described, by the name that it has in the package's own modules."""
    described = env.domains.python_domain.objects
    places = {}
    for package in (fxshare, passes, fxshare.errors):
        for name in package.__all__:
            value = getattr(package, name)
            home = f"{value.__module__}.{value.__qualname__}"
            for candidate in (f"{package.__name__}.{name}", home):
                if candidate in described:
                    places[home] = places[f"{package.__name__}.{name}"] = candidate
                    break
    return places


def _check_public_names(app: Sphinx, env: BuildEnvironment) -> None:
    """Warn, and so fail the build, for a public name that the API pages do not have."""
    places = _documented(env)
    for package in (fxshare, passes, fxshare.errors):
        for name in package.__all__:
            if f"{package.__name__}.{name}" not in places:
                logging.getLogger(__name__).warning(
                    "%s.%s is public, but no page of docs/reference describes it; give it a"
                    " docstring, or take it off the page's :exclude-members:",
                    package.__name__,
                    name,
                )


def _link_by_last_name(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, text: TextElement
) -> Element | None:
    """Link a docstring's :class:`GuardError` from wherever it stands to where it is described."""
    if node.get("refdomain") != "py":
        return None
    last = node["reftarget"].rpartition(".")[2]
    targets = {place for name, place in _documented(env).items() if name.endswith(f".{last}")}
    if len(targets) != 1:
        return None
    entry = env.domains.python_domain.objects[targets.pop()]
    return make_refnode(
        app.builder, node["refdoc"], entry.docname, entry.node_id, text, node["reftarget"]
    )


def _skip_the_parents_of_torch(
    app: Sphinx, what: str, name: str, value: object, skip: bool, options: object
) -> bool | None:
    """Leave out what a model inherits of torch and a configuration of pydantic."""
    function = getattr(value, "fget", None) or getattr(value, "__func__", value)
    foreign = str(getattr(function, "__module__", "")).startswith(("torch.", "pydantic."))
    return True if foreign else None


def _plain_signature(
    app: Sphinx,
    what: str,
    name: str,
    value: object,
    options: object,
    signature: str | None,
    returns: str | None,
) -> tuple[str, str | None] | None:
    """The fields of a data class by name alone: their types have places of their own."""
    if what != "class" or not isinstance(value, type):
        return None
    if issubclass(value, (BaseModel, nn.Module)):
        return "", None
    if dataclasses.is_dataclass(value):
        return f"({', '.join(f.name for f in dataclasses.fields(value) if f.init)})", None
    return None


def setup(app: Sphinx) -> None:
    """Hold the API pages to what the packages hand out."""
    app.connect("autodoc-skip-member", _skip_the_parents_of_torch)
    app.connect("autodoc-process-signature", _plain_signature)
    app.connect("env-check-consistency", _check_public_names)
    app.connect("missing-reference", _link_by_last_name)
