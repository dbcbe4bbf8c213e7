"""The explorer answers what scores, bank and retraining answer, and its widgets pass on what is clicked."""

import threading

import pytest
import torch

import magic
from magic.evidence import explorer as module
from tests.support import cases


@pytest.fixture(scope="module")
def scores():
    run, *_ = cases.build("sgd", torch.float64)
    x, y = cases.data(torch.float64)
    return magic.attribute(run, cases.measure_on(x, y), progress=False)


@pytest.fixture
def explored(scores, monkeypatch):
    for name in module.FRONTENDS:
        monkeypatch.delenv(name, raising=False)
    texts = [f"text <{i}>" for i in range(scores.run.n)]
    return magic.explore(scores, (texts, torch.arange(scores.run.n)), top=2)


def test_prediction_and_truth(explored, scores):
    assert explored.true is None and "Nothing is removed" in explored.answer()
    explored.choose(1)
    explored.remove([3, 1])
    assert explored.removed == (1, 3)
    assert explored.predicted == scores.removal_effect([1, 3])[1].item()
    assert "not trained yet" in explored.answer()
    found = explored.train(progress=False)
    weights = torch.ones(2, scores.run.n)
    weights[1, [1, 3]] = 0
    with_all, without = magic.outputs(scores.run, scores.measure, weights, progress=False)
    assert found == explored.true == (without - with_all)[1].item() != 0
    assert "2 examples" in explored.answer() and "true" in explored.answer()


def test_the_page_without_widgets_is_plain_html(explored):
    page = explored._repr_mimebundle_()
    assert set(page) == {"text/plain", "text/html"}
    html = page["text/html"]
    assert html.count("τ = ") == len(explored.ranked()) and "text &lt;" in html and "<script" not in html
    for role, i, score in explored.ranked():
        assert f"{i}: a {i}" in html and (score < 0) == (role == "helpful")
    assert "Explorer of" in page["text/plain"]


def test_widgets_pass_on_what_is_clicked(explored, monkeypatch):
    widgets = pytest.importorskip("ipywidgets")
    monkeypatch.setenv("JPY_SESSION_NAME", "a notebook")
    assert "application/vnd.jupyter.widget-view+json" in explored._repr_mimebundle_()
    choice, _, rows, below, _ = explored.live().children
    button, answer = below.children

    def ticks():
        return [w for row in rows.children for card in row.children[1].children for w in card.children
                if isinstance(w, widgets.Checkbox)]  # fmt: skip

    assert button.disabled and len(ticks()) == len(explored.ranked())
    ticks()[0].value = True
    first = explored.ranked()[0][1]
    assert explored.removed == (first,) and f"Without example {first}: predicted" in answer.value
    button.click()
    assert "true" in answer.value and button.disabled and explored.true is not None
    choice.value = 1
    assert explored.target == 1 and explored.removed == (first,)
    for tick in ticks():
        tick.value = False
    explored.remove([])


def test_it_answers_in_a_thread_of_its_own(explored):
    """Where JupyterLab calls it back."""
    found = []
    thread = threading.Thread(target=lambda: found.append(explored.train(progress=False)))
    explored.remove([4])
    thread.start()
    thread.join()
    assert found == [explored.true]


def test_an_error_is_shown(explored, monkeypatch):
    pytest.importorskip("ipywidgets")
    *_, below, _ = explored.live().children
    button, answer = below.children
    explored.remove([2])

    def broken(progress=True):
        raise ValueError("no room <here>")

    monkeypatch.setattr(explored, "train", broken)
    button.click()  # ipywidgets prints what a callback raises
    assert answer.value == "ValueError: no room &lt;here&gt;" and not button.disabled


def test_images_are_shown(scores):
    n = scores.run.n
    shown = magic.explore(
        scores, (torch.rand(n, 3, 4, 4), torch.zeros(n)), torch.rand(len(scores.outputs), 5, 5)
    )
    html = shown._repr_html_()
    assert html.count("data:image/png;base64,") == 1 + len(shown.ranked())


def test_what_does_not_fit_is_refused(scores, explored):
    with pytest.raises(ValueError, match="examples: 3 are given to be shown, and there are"):
        magic.explore(scores, ["a", "b", "c"])
    with pytest.raises(ValueError, match="targets: 1 are given"):
        magic.explore(scores, None, ["a"])
    with pytest.raises(IndexError, match="target=99: there are"):
        explored.choose(99)
    with pytest.raises(IndexError):
        explored.remove([10**6])
    with pytest.raises(ValueError, match="know no run and measure"):
        magic.explore(magic.Attribution(scores.values, scores.outputs, scores.at))
