"""Settings of the site that `make docs` builds from these pages, without a network."""

import re
import tomllib
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

import smartkv

ROOT = Path(__file__).parents[1]

project = "SmartKV"
author = copyright = "SmartKV developers"
version = release = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
exclude_patterns = ["data", "pictures"]
suppress_warnings = [
    "myst.header",  # the tables that `make bench` writes have no title
    "ref.python",  # `key` in a docstring is a word, and also an attribute of two classes
]
nitpicky = False  # types of torch and transformers are named, and their sites cannot be asked without a network

html_theme = "furo"
html_title = f"SmartKV {version}"
html_copy_source = False

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_mock_imports = ["kvpress"]  # its environment holds an older transformers
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes in the class's text: a dataclass's fields would stand there twice


# -- api/: a page for each package of the library, written from the tree at each build ---------------------------------

API = Path(__file__).parent / "api"
OLD_PATHS = {"smartkv.budgets", "smartkv.objectives", "smartkv.sparsity.mask_sources", "smartkv.sparsity.schedule"}
DIRECTIVE = "```{{eval-rst}}\n.. automodule:: {name}\n   {option}\n```\n"
SURFACE = f":exclude-members: {', '.join(smartkv.__all__)}"  # what `smartkv` exports stands in api.md, and only there


def write_package_pages() -> None:
    """Write `api/<package>.md`: the package's own line, then each of its modules."""
    API.mkdir(exist_ok=True)
    library = ROOT / "smartkv"
    packages = {init.parent: sorted(init.parent.glob("*.py")) for init in sorted(library.glob("*/__init__.py"))}
    packages[library] = sorted(library.glob("*.py"))
    for folder, files in packages.items():
        package = ".".join(folder.relative_to(ROOT).parts)
        modules = [f"{package}.{file.stem}" for file in files if not file.stem.startswith("_")]
        parts = [f"# {package}\n"]
        if folder != library:  # the classes of `smartkv` itself stand on the page api.md
            parts.append(DIRECTIVE.format(name=package, option=":no-members:"))
        parts += [
            f"## {name}\n\n" + DIRECTIVE.format(name=name, option=SURFACE) for name in modules if name not in OLD_PATHS
        ]
        (API / f"{package}.md").write_text("\n".join(parts))


def mark_code(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Mark code in a docstring: indented lines of a module's text, an `Example:`, and `names`s with an ending."""
    lines[:] = [re.sub(r"(`[^`]+`)(?=\w)", r"\1\\ ", line) for line in lines]
    for number in range(len(lines) - 1, 0, -1):
        if not lines[number].startswith("    "):
            continue
        if lines[number - 1] == "Example:":
            lines[number - 1 : number] = ["Example::", ""]
        elif what == "module" and not lines[number - 1] and not lines[max(0, number - 2)].startswith("    "):
            lines[number:number] = ["::", ""]


def keep_sentence(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Join what napoleon took for a type and its description: a property's first sentence that has a colon."""
    taken = next((line for line in lines if line.startswith(":type: ")), None)
    if what in ("attribute", "data", "property") and taken:
        lines.remove(taken)
        lines[0] = f"{taken.removeprefix(':type: ')}: {lines[0]}"


def setup(app: Sphinx) -> None:
    """Called by Sphinx when a build begins."""
    write_package_pages()
    app.connect("autodoc-process-docstring", mark_code, priority=400)  # before napoleon
    app.connect("autodoc-process-docstring", keep_sentence, priority=600)  # after napoleon
