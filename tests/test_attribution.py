"""Attribution: what the object a user holds can do, and that its predictions come true."""

import dataclasses
import json
import warnings

import numpy as np
import pandas as pd
import pytest
import torch

import magic
from tests.support import cases


@pytest.fixture(scope="module")
def scored():
    run, *_ = cases.build("sgd-momentum")
    scores = magic.attribute(run, cases.measure_on(*run.data), progress=False)
    assert scores.values.abs().max(dim=1).values.min() > 1e-4, "degenerate: a target without influence"
    return run, scores


def test_shapes_and_outputs(scored):
    run, scores = scored
    assert scores.values.shape == (3, run.n) and scores.at.shape == (run.n,)
    truth = cases.measure_on(*run.data)(run.model(run.train(progress=False)))
    assert torch.equal(scores.outputs, truth.detach())


def test_removal_effect_is_minus_the_sum(scored):
    _, scores = scored
    assert torch.equal(scores.removal_effect([4]), -scores.values[:, 4])
    torch.testing.assert_close(scores.removal_effect([4, 9, 2]), -scores.values[:, [2, 4, 9]].sum(1))
    assert torch.equal(scores.removal_effect([]), torch.zeros(3, dtype=torch.float64))
    assert torch.equal(scores.removal_effect(np.array([4])), scores.removal_effect(4))


def test_small_changes_come_true(scored):
    run, scores = scored
    weights = run.weights() - 1e-4 * torch.rand(run.n, dtype=torch.float64)
    measure = cases.measure_on(*run.data)
    true = measure(run.model(run.train(weights, progress=False))) - scores.outputs
    predicted = scores.predict(weights) - scores.outputs
    assert true.abs().min() > 1e-7
    torch.testing.assert_close(predicted, true.detach(), rtol=2e-3, atol=1e-9)


def test_predict_takes_one_or_many(scored):
    run, scores = scored
    many = torch.rand(5, run.n, dtype=torch.float64)
    assert scores.predict(many).shape == (5, 3)
    torch.testing.assert_close(scores.predict(many)[2], scores.predict(many[2]))
    by_hand = scores.outputs[1] + sum(scores.values[1, i] * (many[2, i] - 1) for i in range(run.n))
    torch.testing.assert_close(scores.predict(many[2])[1], by_hand)


def test_the_point_is_a_copy(scored):
    run, _ = scored
    at = run.weights(0.9)
    there = magic.attribute(run, cases.measure_on(*run.data), at=at, progress=False)
    at[3] = 0.0
    assert there.at[3] == 0.9


def test_the_point_of_the_derivative(scored):
    run, scores = scored
    there = magic.attribute(run, scores.measure, at=0.5, progress=False)
    half = run.weights(0.5)
    assert torch.equal(there.at, half)
    torch.testing.assert_close(there.predict(half), there.outputs)
    assert (there.values - scores.values).abs().max() > 1e-3


def test_top(scored):
    _, scores = scored
    table = scores.top(1, k=4)
    assert isinstance(table, pd.DataFrame) and len(table) == 8
    helpful, harmful = table[table.role == "helpful"], table[table.role == "harmful"]
    assert helpful.score.is_monotonic_increasing and harmful.score.is_monotonic_decreasing
    assert helpful.score.iloc[0] == scores.values[1].min() and harmful.score.iloc[0] == scores.values[1].max()
    assert (table.removal_effect == -table.score).all()
    assert torch.equal(
        scores.values[1, table["index"].tolist()], torch.tensor(table["score"].tolist(), dtype=torch.float64)
    )
    assert list(table.columns) == ["role", "index", "score", "removal_effect"]
    harmless = scores.like(-scores.values.abs())
    assert set(harmless.top(1, k=4).role) == {"helpful"}, "fewer than k of a kind"


def test_repr(scored):
    _, scores = scored
    assert "40" in repr(scores) and "16 steps" in repr(scores)
    assert "<table>" in scores._repr_html_() and "training examples" in scores._repr_html_()


def test_save_and_load(scored, tmp_path):
    run, scores = scored
    path = tmp_path / "scores.npz"
    scores.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["scores.npz"]
    with np.load(path, allow_pickle=False) as file:
        assert set(file.files) == {"meta", "values", "outputs", "at"}
    back = magic.Attribution.load(path, run, scores.measure)
    for name in ("values", "outputs", "at"):
        assert torch.equal(getattr(back, name), getattr(scores, name))
    assert torch.equal(magic.Attribution.load(path).removal_effect([1]), scores.removal_effect([1]))
    magic.Attribution.load(path).save(tmp_path / "again.npz")
    other, *_ = cases.build("adam")
    with pytest.raises(ValueError, match="holds scores of another run"):
        magic.Attribution.load(tmp_path / "again.npz", other)
    with pytest.raises(ValueError, match="holds scores of another run"):
        magic.Attribution.load(path, other)
    partly, model, *_ = cases.build("frozen-and-unused")
    with torch.no_grad():
        model.frozen.weight += 1
    moved = magic.Run(model, cases.adam(weight_decay=0.1)(model), cases.data(), cases.loss, cases.order())
    assert partly.initial.fingerprint() == moved.initial.fingerprint()
    assert partly.fingerprint() != moved.fingerprint(), "a frozen weight defines the run, too"
    (tmp_path / "bad.npz").write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"not written by Attribution.save"):
        magic.Attribution.load(tmp_path / "bad.npz")
    with pytest.raises(FileNotFoundError):
        magic.Attribution.load(tmp_path / "none.npz")


def test_a_file_of_format_2_still_loads(scored, tmp_path):
    """There `point` was called `where`; the rest is the same."""
    run, scores = scored
    scores.save(tmp_path / "new.npz")
    with np.load(tmp_path / "new.npz", allow_pickle=False) as file:
        arrays = {name: file[name] for name in ("values", "outputs", "at")}
        meta = json.loads(file["meta"].tobytes())
    assert meta["format"] == 3 and meta["point"] == "w = 1"
    old = meta | {"format": 2, "where": meta.pop("point")}
    np.savez(tmp_path / "old.npz", meta=np.frombuffer(json.dumps(old).encode(), dtype=np.uint8), **arrays)
    back = magic.Attribution.load(tmp_path / "old.npz", run, scores.measure)
    assert (back.point, back.tangent, back.made) == (scores.point, True, scores.made)
    assert torch.equal(back.values, scores.values)


def test_keywords_that_there_are_not(scored):
    run, scores = scored
    with pytest.raises(TypeError, match=r"attribute\(\) got an unexpected keyword argument 'disc'"):
        magic.attribute(run, scores.measure, disc="folder", progress=False)
    with pytest.raises(TypeError, match="positional"):
        magic.attribute(run, scores.measure, None, False)


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"\(K, n\)"):
        magic.Attribution(torch.zeros(3, 5), torch.zeros(2), torch.ones(5))


def bits_told(name):
    """Of a training in float32, and of scores."""
    run, *_ = cases.build(name)
    scores = magic.attribute(run, cases.measure_on(*run.data), progress=False)
    final = cases.build(name, torch.float32)[0].train(progress=False)
    return final.fingerprint() + magic.fingerprint(scores.values)


def test_the_same_bits_in_another_process(printed):
    names = ["dropout", "batchnorm-adamw"]
    code = (
        "import torch; torch.set_num_threads(1)\nfrom tests.test_attribution import bits_told\n"
        f"print(*map(bits_told, {names}))"
    )
    here = [bits_told(name) for name in names]
    assert printed(code).split() == here and here[0] != here[1]


def biased_before_a_normalisation(optimizer):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 6), torch.nn.BatchNorm1d(6), torch.nn.GELU(), torch.nn.Linear(6, 3)
    ).double()
    return magic.Run(model, optimizer(model), cases.data(), cases.loss, cases.order())


def test_a_bias_before_a_normalisation_is_told():
    """Its gradient is rounding noise, which Adam divides by itself: a warning, not silence."""
    run = biased_before_a_normalisation(cases.adam())
    with pytest.warns(UserWarning, match="'0.bias' is rounding noise.*bias in front of a normalisation"):
        magic.attribute(run, cases.measure_on(*run.data), progress=False)


def test_without_adam_the_noise_is_harmless_and_the_rest_is_checked():
    run = biased_before_a_normalisation(cases.sgd())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = magic.attribute(run, cases.measure_on(*run.data), progress=False)
    assert scores.health.ok is True and max(scores.health.witnessed.values()) < 1e-6


def test_no_warning_without_cause(scored):
    run, scores = scored
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        magic.attribute(run, scores.measure, progress=False)


def test_the_cost_is_said_before(scored, capsys):
    run, scores = scored
    magic.attribute(run, scores.measure, plan=magic.plan(run, states=4))
    assert "replay of 16 steps: 4 states kept" in capsys.readouterr().out
    magic.attribute(run, scores.measure, plan=magic.plan(run, states=4), progress=False)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("group", "chunk"), [(3, 1), (3, 2), (2, 2), (2, 1), (1, 1)])
def test_more_targets_than_go_back_at_once(scored, group, chunk):
    run, scores = scored
    plan = dataclasses.replace(magic.plan(run, targets=3), group=group, chunk=chunk)
    again = magic.attribute(run, scores.measure, plan=plan, progress=False)
    assert again.plan.sweeps == -(-3 // group)
    torch.testing.assert_close(again.values, scores.values, rtol=1e-12, atol=1e-15)
    assert torch.equal(again.outputs, scores.outputs)


def test_one_tensor_of_data():
    """A language model's data is one tensor; the loss takes what there is."""
    torch.manual_seed(0)
    tokens = torch.randint(20, (30, 6))
    model = torch.nn.Sequential(torch.nn.Embedding(20, 8), torch.nn.GELU(), torch.nn.Linear(8, 20)).double()

    def next_token(model, tokens):
        logits = model(tokens[:, :-1]).transpose(1, 2)
        return torch.nn.functional.cross_entropy(logits, tokens[:, 1:], reduction="none").mean(1)

    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    run = magic.Run(model, optimizer, tokens, next_token, magic.batches(30, 10, 3))
    scores = magic.attribute(run, lambda model: next_token(model, tokens[:2]), progress=False)
    assert scores.values.shape == (2, 30)
    assert scores.values[0, 0] < 0, "an example helps itself"


def test_batching_falls_back_by_name():
    """Where vmap cannot batch an operation, targets go back one by one, with a warning that says so."""

    class Odd(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            if grad.abs().sum().item() < 0:  # .item() cannot be batched
                raise AssertionError
            return grad

    run, *_ = cases.build("sgd")
    measure = cases.measure_on(*run.data)

    def odd(model):
        return Odd.apply(measure(model))

    with pytest.warns(UserWarning, match="one by one"):
        together = magic.attribute(run, odd, progress=False)
    torch.testing.assert_close(together.values, magic.attribute(run, measure, progress=False).values)
