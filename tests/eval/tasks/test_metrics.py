"""What generated text is scored by."""

import pytest

from eval.tasks.metrics import METRICS, same_answer
from eval.tasks.reasoning import first_solution


@pytest.mark.parametrize(
    ("metric", "said", "reference", "score"),
    [
        ("f1", "the Cat, sat", "a cat", 2 / 3),
        ("f1", "dog", "cat", 0.0),
        ("rouge", "", "cat", 0.0),
        ("rouge", "the cat sat", "the cat", 0.8),
        ("count", "3 or 4", "Paragraph 4", 0.5),
        ("count", "none", "4", 0.0),
        ("code", "# no\nx = f(1)", "x = f(1)", 1.0),
        ("classes", "Human body and Animal", "Animal", 0.5),
    ],
)
def test_metrics_are_those_of_longbench(metric: str, said: str, reference: str, score: float) -> None:
    assert METRICS[metric](said, reference, ["Animal", "Human body"]) == pytest.approx(score, abs=1e-6)


@pytest.mark.parametrize(
    "said",
    [
        "18\nQuestion: How many?\nAnswer: 7\n#### 7",
        "9 * 2\n#### 18 #### 7",
        "= 18\n#### 18\n\nAnd 3 more.",
        "is 18.\n\nProblem: 4",
    ],
)
def test_what_a_model_goes_on_with_does_not_count(said: str) -> None:
    assert same_answer(first_solution(said, "gsm8k"), "#### 18") == 1.0


def test_a_heading_is_no_answer_where_answers_are_boxed() -> None:
    said = "#### Step 1: add\n9 + 9\n#### Step 2\nso $\\boxed{18}$"
    assert same_answer(first_solution(said, "math500"), "$\\boxed{18}$") == 1.0
    assert first_solution("#### Step 1\n#### $18 in all", "gsm8k").endswith("#### $18")


@pytest.mark.parametrize(
    ("said", "reference", "same"),
    [
        ("so 9 * 2 = 18", "9*2=18\n#### 18", 1.0),
        ("the answer is 17", "#### 18", 0.0),
        (r"$\boxed{0.5}$", r"hence $\boxed{\frac{1}{2}}$", 1.0),
        ("nothing", "#### 18", 0.0),
    ],
)
def test_two_solutions_come_to_the_same_answer(said: str, reference: str, same: float) -> None:
    assert same_answer(said, reference) == same
