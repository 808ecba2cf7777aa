"""How classes are named in checkpoints and exported gates."""

from smartkv.gates.objectives import Log4Lifespan
from smartkv.io.class_names import Persisted, bare_class_paths
from smartkv.sparsity import Linear


class Mine(Persisted):
    """A user's own class."""

    def __init__(self) -> None:
        self.arguments = {"a": 1}


def test_smartkvs_own_classes_are_named_without_their_module() -> None:
    assert Log4Lifespan("mse").to_dict() == {
        "class_path": "Log4Lifespan",
        "init_args": {"loss": "mse", "huber_delta": 1.0},
    }
    assert Linear().to_dict()["class_path"] == "Linear"


def test_a_users_own_class_keeps_its_module_which_alone_can_find_it() -> None:
    assert Mine().to_dict() == {"class_path": f"{__name__}.Mine", "init_args": {"a": 1}}


def test_paths_of_version_0_1_become_bare_wherever_they_stand() -> None:
    schedule = {"class_path": "smartkv.sparsity.schedule.Linear", "init_args": {"start": 1}}
    shortened = bare_class_paths({"runs": [{"schedule": schedule}], "n": 2})
    assert shortened == {"runs": [{"schedule": {"class_path": "Linear", "init_args": {"start": 1}}}], "n": 2}


def test_other_paths_and_other_content_stay() -> None:
    content = {"class_path": "mine.Linear", "x": ["smartkv.objectives.Ranking", None, {"class_path": 3}]}
    assert bare_class_paths(content) == content
