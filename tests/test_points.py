"""Where the derivative is taken: named points and means, and that predictions use them rightly."""

import pytest
import torch

import magic
from magic import points
from tests.support import cases

pytestmark = pytest.mark.usefixtures("unwitnessed")


@pytest.fixture(scope="module")
def sgd():
    run, *_ = cases.build("sgd-momentum")
    return run, cases.measure_on(*run.data)


def attribute(sgd, at, **options):
    return magic.attribute(*sgd, at, progress=False, **options)


def true(sgd, weights):
    return magic.outputs(*sgd, weights)


def test_full_is_one_and_centre_is_one_less_the_drop(sgd):
    assert torch.equal(attribute(sgd, "full").values, attribute(sgd, None).values)
    centre = attribute(sgd, "centre", drop=0.2)
    assert torch.equal(centre.values, attribute(sgd, 0.8).values)
    assert torch.equal(centre.predict(centre.at), true(sgd, centre.at)) and (centre.at == 0.8).all()
    assert "centre of a 0.2 drop" in repr(centre)
    assert not torch.equal(centre.values, attribute(sgd, "full").values)


def test_the_path_predicts_its_end(sgd):
    """∫ ∇f dw = f(1 − p) − f(1), to the order of the quadrature."""
    run, _ = sgd
    end = run.weights(0.5)
    change = (true(sgd, end) - true(sgd, run.weights())).norm()
    errors = [
        (attribute(sgd, points.path(run, 0.5, count)).predict(end) - true(sgd, end)).norm() / change
        for count in (1, 2, 4)
    ]
    assert errors[0] > 3 * errors[1] > 9 * errors[2] and errors[2] < 1e-3
    path = attribute(sgd, "path", drop=0.5)
    assert torch.equal(path.predict(run.weights()), true(sgd, run.weights()))


def test_average_is_the_mean(sgd):
    run, _ = sgd
    chosen = points.average(run, 0.2, subsets=3, seed=5)
    mean = attribute(sgd, chosen)
    alone = [attribute(sgd, weights) for weights in chosen.points]
    assert not torch.allclose(alone[0].values, alone[1].values)
    assert torch.allclose(mean.values, torch.stack([a.values for a in alone]).mean(0))
    assert torch.allclose(mean.outputs, torch.stack([a.outputs for a in alone]).mean(0))
    assert torch.allclose(mean.at.mean(), torch.tensor(0.8).double())
    assert [int((w == 0).sum()) for w in chosen.points] == [8, 8, 8]


def test_removal_is_the_difference_of_two_predictions(sgd):
    run, _ = sgd
    without = run.weights()
    without[[3, 7]] = 0.0
    for options in ({"at": "centre", "drop": 0.2}, {"at": "path", "drop": 0.2}):
        scores = attribute(sgd, **options)
        assert scores.removal_effect([3, 7]).abs().min() > 1e-6
        expected = scores.predict(without) - scores.predict(run.weights())
        assert torch.allclose(scores.removal_effect([3, 7]), expected)
    assert torch.allclose(scores.effect(2 * run.weights()), scores.values.sum(1))


def test_lds_takes_the_value_with_the_slope(sgd):
    scores = attribute(sgd, "centre", drop=0.2)
    result = magic.lds(scores, drop=0.2, subsets=12, progress=False)
    assert torch.allclose(result.predicted, scores.predict(result.weights))
    full = magic.lds(attribute(sgd, "full"), drop=0.2, subsets=12, progress=False)
    assert torch.equal(full.true, result.true) and result.r2[0] > full.r2[0]


def test_the_point_is_saved(sgd, tmp_path):
    scores = attribute(sgd, "path", drop=0.2)
    assert scores.point == "the mean along w = 1 → 0.8, 3 points"
    scores.save(tmp_path / "scores.npz")
    assert magic.Attribution.load(tmp_path / "scores.npz").point == scores.point
    assert scores.like(scores.values).point == scores.point


def test_old_names_warn(sgd):
    scores = attribute(sgd, None)
    with pytest.warns(DeprecationWarning, match=r"Attribution\.where is Attribution\.point now"):
        assert scores.where == scores.point == "w = 1"
    with pytest.warns(DeprecationWarning, match=r"magic\.points\.Where is Points now"):
        from magic.points import Where
    with pytest.warns(DeprecationWarning, match="settle is points_of now"):
        assert torch.equal(points.settle(sgd[0], 0.5).points, points.points_of(sgd[0], 0.5).points)
    assert Where is points.Points
    with pytest.raises(AttributeError, match="has no attribute 'nowhere'"):
        points.nowhere  # noqa: B018


def test_a_mean_goes_on_in_its_folder(sgd, tmp_path, monkeypatch):
    whole = attribute(sgd, "path", drop=0.2)
    assert whole.values.abs().max() > 0
    found = magic.shares.metagradient

    def killed(*arguments, **options):
        if "point 1" in f"{arguments} {options}":
            raise KeyboardInterrupt
        return found(*arguments, **options)

    monkeypatch.setattr(magic.shares, "metagradient", killed)
    with pytest.raises(KeyboardInterrupt):
        attribute(sgd, "path", drop=0.2, disk=tmp_path)
    monkeypatch.undo()
    assert (tmp_path / "point 0").exists()
    assert torch.equal(attribute(sgd, "path", drop=0.2, disk=tmp_path).values, whole.values)


@pytest.mark.parametrize(
    "at, options, message",
    [
        ("center", {"drop": 0.2}, "at='center'.*'full', 'centre', 'path', 'average'"),
        ("centre", {}, "give drop="),
        (0.8, {"drop": 0.2}, 'drop=0.2 belongs to at="centre"'),
        ("full", {"drop": 0.2}, "drop=0.2 belongs to"),
        ("path", {"drop": 1.0}, "between 0 and 1"),
        ("average", {"drop": 0.001}, "rounds to 0"),
    ],
)
def test_refusals(sgd, at, options, message):
    with pytest.raises(ValueError, match=message):
        attribute(sgd, at, **options)


def test_no_points(sgd):
    with pytest.raises(ValueError, match="points=0"):
        points.path(sgd[0], 0.2, 0)
