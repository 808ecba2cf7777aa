"""Class names in files: those of SmartKV are bare, so that a class may move and older files still match."""

from typing import Any

OWN = "smartkv."


class Persisted:
    """A class whose name and arguments are written into checkpoints and exported gates.

    Attributes:
        arguments: the constructor's arguments, for JSON.
    """

    arguments: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """`{"class_path", "init_args"}` as in a config. A class of SmartKV is named alone, another with its module."""
        path = f"{type(self).__module__}.{type(self).__name__}"
        return bare_class_paths({"class_path": path, "init_args": self.arguments})


def bare_class_paths(content: Any) -> Any:
    """Shorten every `class_path` of SmartKV's in JSON-like content to the name of the class.

    SmartKV 0.1.0 wrote whole paths, such as `smartkv.sparsity.mask_sources.RandomDropping`.
    """
    if isinstance(content, dict):
        bare = {name: bare_class_paths(value) for name, value in content.items()}
        path = bare.get("class_path")
        if isinstance(path, str) and path.startswith(OWN):
            bare["class_path"] = path.rpartition(".")[2]
        return bare
    return [bare_class_paths(value) for value in content] if isinstance(content, list) else content
