"""The names that `import smartkv` gives, and its version."""

import tomllib

import smartkv
from tests.conftest import ROOT

PUBLIC = {
    "AdaptiveCache",
    "Architecture",
    "Backbone",
    "Calibration",
    "Fingerprint",
    "FootprintOutOfReach",
    "GateBank",
    "HybridPolicy",
    "LabelSpec",
    "LayerRule",
    "LifespanCache",
    "Manifest",
    "QuantizedCache",
    "SmartKVError",
    "__version__",
    "label_window",
    "load_backbone",
    "load_cache",
    "policy_of",
    "pretrained_gates",
    "read_policy",
    "save_cache",
    "solve",
}


def test_a_star_import_gives_the_public_names_and_nothing_else() -> None:
    names: dict[str, object] = {}
    exec("from smartkv import *", names)
    assert set(names) - {"__builtins__"} == PUBLIC == set(smartkv.__all__)


def test_everything_public_comes_from_smartkv_itself() -> None:
    modules = {name: getattr(smartkv, name).__module__ for name in PUBLIC - {"__version__"}}
    assert all(module.startswith("smartkv.") for module in modules.values()), modules


def test_the_version_is_that_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert smartkv.__version__ == project["version"]
