"""The project's own import graph, read from its source: imports inside functions count too."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOPS = ("smartkv", "datamodules", "lightning_modules", "eval", "callbacks", "cli")


def module_name(path: Path) -> str:
    """`smartkv/cache/layer.py` -> `smartkv.cache.layer`; a package's `__init__.py` -> the package."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for top in TOPS for path in sorted((ROOT / top).rglob("*.py"))}


def imported_names(path: Path) -> set[tuple[str, str]]:
    """(module, name) of everything that a file imports from anywhere; the name is empty for `import module`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {(node.module or "", alias.name) for alias in node.names}
    return found


def own_module(module: str, name: str) -> str | None:
    """The project's module that an import reaches, by `from package import module` too; None: somebody else's."""
    if name and f"{module}.{name}" in MODULES:
        return f"{module}.{name}"
    return module if module in MODULES else None


def import_graph() -> dict[str, set[str]]:
    """Module -> the project's modules that it imports."""
    return {
        module: {own for names in imported_names(path) if (own := own_module(*names)) and own != module}
        for module, path in MODULES.items()
    }


def by_folder(graph: dict[str, set[str]], folders: set[str]) -> dict[str, set[str]]:
    """The graph between folders: each module counts as the deepest of `folders` that it lies in, or as itself."""

    def room(module: str) -> str:
        parts = module.split(".")
        inside = [".".join(parts[:depth]) for depth in range(len(parts), 0, -1)]
        return next((name for name in inside if name in folders), module)

    rooms: dict[str, set[str]] = {}
    for module, imports in graph.items():
        rooms.setdefault(room(module), set()).update(room(other) for other in imports)
    return {name: others - {name} for name, others in rooms.items()}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Some circle of the graph, empty where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []
