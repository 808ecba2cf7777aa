"""The names that `import smartkv` gives, and its version."""

import tomllib
from importlib.metadata import PackageNotFoundError

import pytest

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


def test_an_installed_package_has_the_version_of_its_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smartkv, "__file__", "/nowhere/smartkv/__init__.py")  # no pyproject.toml beside it
    monkeypatch.setattr(smartkv, "version", lambda name: "1.2.3")
    assert smartkv._version() == "1.2.3"


def test_a_copy_that_was_never_installed_claims_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(smartkv, "__file__", "/nowhere/smartkv/__init__.py")
    monkeypatch.setattr(smartkv, "version", missing)
    assert smartkv._version() == "0+unknown"
