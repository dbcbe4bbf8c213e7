"""Judging: each judge is what it says, by other means, and good scores are told from bad ones."""

import pytest
import torch

import magic
from magic import baselines, subsets
from magic.evidence import judging
from tests.evidence.test_baselines import needs
from tests.support import cases

FEW = {"drop": 0.03, "subsets": 10, "examples": 6, "progress": False}


@pytest.fixture(scope="module")
def judged(digits):
    """Scores of five targets, those of chance, a bank, and what the judges say of both."""
    run, (x_test, y_test), states, _ = digits
    test = x_test[:5], y_test[:5]
    scores = magic.attribute(run, lambda model: cases.loss(model, *test), progress=False)
    methods = {"MAGIC": scores, "chance": scores.like(baselines.random_scores(run, test, states[-1]).values)}
    bank = magic.Bank(":memory:", run, scores.measure)
    return methods, bank, magic.judge(methods, bank=bank, planted=[3, 50], **FEW)


def test_the_figures_are_those_of_the_other_functions(judged):
    methods, bank, said = judged
    for name, scores in methods.items():
        assert said.lds[name] == magic.lds(scores, 0.03, 10, bank=bank, progress=False).spearman
        assert said.alone[name] == magic.leave_one_out(scores, 6, bank=bank, progress=False).spearman
    assert said.lds["MAGIC"].mean > 0.8 > 0.5 > said.lds["chance"].mean
    assert said.alone["MAGIC"].mean > 0.5
    assert len(bank) == 1 + 10 + 6 + 2 * 5


def test_the_top_is_removed_for_each_target(judged):
    methods, _, said = judged
    scores = methods["MAGIC"]
    run, measure, mine = scores.run, scores.measure, []
    for k, row in enumerate(scores.values):
        weights = torch.ones(300)
        weights[row.argsort()[:9]] = 0
        mine.append(magic.outputs(run, measure, weights, progress=False)[k])
    at_random = magic.outputs(run, measure, subsets.random(300, 0.03, 10), progress=False)
    expected = torch.stack(mine).mean() - at_random.mean()
    figure = said.removed["MAGIC"]
    assert figure.mean == pytest.approx(expected.item(), rel=1e-5) and figure.mean > 0
    assert figure.low <= figure.mean <= figure.high and said.removed["chance"].mean < figure.mean


@needs("sklearn")
def test_planted_examples_are_found_by_their_sum(judged):
    methods, _, said = judged
    for name, scores in methods.items():
        order = scores.values.sum(0)
        others = [i for i in range(300) if i not in (3, 50)]
        above = sum((order[i] > order[j]).item() for i in (3, 50) for j in others) / (2 * 298)
        assert said.planted[name].mean == pytest.approx(above)
        assert said.planted[name].low <= above <= said.planted[name].high


def test_the_table_and_the_frame(judged):
    _, _, said = judged
    assert repr(said).startswith(
        "LDS, leave-one-out, removal of the top, planted: 10 × 3 %, 6 single, 5 targets"
    )
    (name, figures), _ = said.rows()
    assert name == "MAGIC" and figures.split("   ")[0] == str(said.lds["MAGIC"])
    frame = said.frame()
    assert len(frame) == 8 and set(frame.judge) == {"LDS", "leave-one-out", "removal", "planted"}
    assert "planted" not in magic.Judgement(said.lds, said.alone, said.removed).caption


def test_brittleness_removes_what_holds_an_output(judged):
    methods, _, _ = judged
    scores = methods["MAGIC"]
    threshold = scores.outputs.median().item() + 1e-4  # some are below it, and some above
    found = magic.brittleness(scores, (60, 1, 6), threshold, progress=False)
    assert found.counts == (1, 6, 60) and found.outputs.shape == (3, 5)
    for k, row in enumerate(scores.values):
        above = scores.outputs[k] > threshold
        weights = torch.ones(300)
        weights[row.argsort(descending=bool(above))[:6]] = 0
        one = magic.outputs(scores.run, scores.measure, weights, progress=False)[k]
        assert one == found.outputs[1, k]
        passed = [
            c for c, x in zip(found.counts, found.outputs[:, k], strict=True) if (x > threshold) != above
        ]
        assert found.needed[k].item() == min(passed, default=torch.inf)
    assert found.needed.isfinite().any()
    assert found.rows()[2] == ("without 60 examples", f"{(found.needed <= 60).double().mean():.2f}")
    assert "5 targets" in repr(found)


def test_what_does_not_fit_is_told(judged):
    methods, _, _ = judged
    with pytest.raises(ValueError, match="no methods"):
        magic.judge({})
    other = magic.attribute(
        methods["MAGIC"].run, lambda model: 2 * methods["MAGIC"].measure(model), progress=False
    )
    with pytest.raises(
        ValueError, match="'double' is of another run or measures something else than 'MAGIC'"
    ):
        magic.judge(methods | {"double": other})
    with pytest.raises(ValueError, match="at least 1 and less than n=300"):
        magic.brittleness(methods["MAGIC"], (0, 5))


def test_scores_of_tokens_are_added_up():
    values = torch.arange(12.0).view(2, 3, 2)
    scores = magic.Attribution(values, torch.zeros(2), torch.ones(3, 2))
    assert judging._by_example(scores).tolist() == [[1, 5, 9], [13, 17, 21]]
