"""Class names in checkpoints and exported gates.

SmartKV's own classes are written without their module, so that a class may move and older files still match.
"""

from typing import Any

OWN = "smartkv."


class Persisted:
    """Base of classes whose name and arguments are written into checkpoints and exported gates.

    Attributes:
        arguments: The constructor's arguments, as JSON values.
    """

    arguments: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return `{"class_path": …, "init_args": …}` as in a config.

        A class of SmartKV is named without its module, any other class with it.
        """
        path = f"{type(self).__module__}.{type(self).__name__}"
        return bare_class_paths({"class_path": path, "init_args": self.arguments})


def bare_class_paths(content: Any) -> Any:
    """Return a copy of JSON-like content in which each `class_path` of SmartKV is the bare name of the class.

    SmartKV 0.1.0 wrote full paths, such as `smartkv.sparsity.mask_sources.RandomDropping`.
    """
    if isinstance(content, dict):
        bare = {name: bare_class_paths(value) for name, value in content.items()}
        path = bare.get("class_path")
        if isinstance(path, str) and path.startswith(OWN):
            bare["class_path"] = path.rpartition(".")[2]
        return bare
    return [bare_class_paths(value) for value in content] if isinstance(content, list) else content
