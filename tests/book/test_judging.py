"""An answer is never just wrong: whatever the reader's function does, the reply says what to look at."""

import contextlib
import time

import pytest
import torch

from magic.book import check
from magic.book.exercises import judging
from magic.book.exercises.judging import Cases, exercise, judge

RATE, NUMBER = 0.05, "99.1"
X = torch.tensor([1.0, -2.0, 4.0], dtype=torch.float64)


@pytest.fixture(autouse=True)
def double(monkeypatch):
    """An exercise for these tests: double the vector, then its square."""
    monkeypatch.setattr(judging, "EXERCISES", {})
    monkeypatch.setattr(judging.importlib, "import_module", lambda name: None)

    @exercise(NUMBER, "a function that doubles a vector")
    def checker(answer):
        cases = Cases({"the rate": RATE})
        for case, x in (("a vector", X), ("its square", X**2)):
            got = cases.call(case, answer, x)
            cases.same(case, got, 2 * x, {"the vector came back unchanged": x})
        cases.true("the last one", answer is not abs, "abs is not allowed")


def never(x):
    while True:
        time.sleep(0.01)


def stubborn(x):
    while True:
        with contextlib.suppress(Exception):
            time.sleep(0.01)


def leaves(x):
    raise SystemExit


@pytest.mark.parametrize(
    "answer, words",
    [
        (lambda x: x, ["wrong for a vector", "the vector came back unchanged"]),
        (
            lambda x: 2 * x if x[1] < 0 else 3 * x,
            ["right for a vector; wrong for its square", "factor of 1.5"],
        ),
        (lambda x: 2 * RATE * x, ["off by a factor of 0.05, everywhere: the rate once too often"]),
        (lambda x: 2 * x / RATE, ["off by a factor of 20, everywhere: the rate is missing"]),
        (lambda x: -2 * x, ["the sign is the other way round"]),
        (lambda x: x**3, ["the numbers differ", "of the largest entry"]),
        (lambda x: 0 * x, ["all entries are zero"]),
        (lambda x: x / 0, ["not finite"]),
        (lambda x: x[:2], ["the shape is (2,), and it should be (3,)"]),
        (lambda x: None, ["returned None", "`return`"]),
        (lambda x: "2 x", ["came str", "a tensor of shape (3,)"]),
        (lambda x: x.no_such_thing, ["raised AttributeError for a vector", "no_such_thing"]),
        (lambda: 0, ["raised TypeError", "positional argument"]),
        (leaves, ["raised SystemExit"]),
        (3, ["asked for is a function", "type int"]),
        (None, ["there is no answer yet", "a function that doubles a vector"]),
        (..., ["there is no answer yet"]),
        (never, ["no answer after 0.3 seconds"]),
        (stubborn, ["no answer after 0.3 seconds"]),
    ],
)
def test_a_wrong_answer_is_explained(answer, words):
    ok, text = judge(NUMBER, answer, seconds=0.3)
    assert not ok and text.startswith(f"✗ {NUMBER}: ")
    assert all(word in text for word in words), text


def test_a_right_answer_is_praised_by_what_it_is(capsys):
    check(NUMBER, lambda x: x.mul_(2))  # an argument may be changed: it is a copy
    assert capsys.readouterr().out == f"✓ {NUMBER}: right. You wrote a function that doubles a vector.\n"
    assert X.tolist() == [1, -2, 4]


def test_a_number_without_an_exercise_is_named():
    with pytest.raises(ValueError, match=r"no exercise has the number '99.7': chapter 99 has 99.1"):
        check("99.7", abs)
    with pytest.raises(ValueError, match=r'write it like "04.2"'):
        check("four", abs)


def test_the_reader_may_still_interrupt(monkeypatch):
    def interrupted(x):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judge(NUMBER, interrupted)
