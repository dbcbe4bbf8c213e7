"""Data that is no tuple of tensors: dicts, lists of them, and functions that make a batch out of items."""

import copy
from collections import UserDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import magic
from magic.training.determinism import seed_step
from tests.kernels.test_stop_gradients import relative_error
from tests.support import cases

N, WORDS = 12, 20
ORDER = [[0, 5, 3], [7, 1, 11], [2, 5, 9], [4, 10, 6]]


def sentences():
    """Lists of words of different lengths, with a class and a text that no tensor holds."""
    dice = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 6, (N,), generator=dice).tolist()
    return [
        {"words": torch.randint(1, WORDS, (n,), generator=dice).tolist(), "class": i % 3, "text": f"text {i}"}
        for i, n in enumerate(lengths)
    ]


def padded(items):
    """Words and classes of a batch; word 0 is padding."""
    longest = max(len(item["words"]) for item in items)
    rows = [item["words"] + [0] * (longest - len(item["words"])) for item in items]
    return {"words": torch.tensor(rows), "class": torch.tensor([item["class"] for item in items])}


class Bag(nn.Module):
    """The mean of the embeddings of the words that are not padding, to a class."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(WORDS, 6), nn.Linear(6, 3)

    def forward(self, words):
        seen = (words > 0).unsqueeze(-1)
        return self.head(F.gelu((self.embed(words) * seen).sum(1) / seen.sum(1)))


def loss(model, batch):
    return F.cross_entropy(model(batch["words"]), batch["class"], reduction="none")


def measure(model):
    return loss(model, padded(sentences()[:2]))


def bag():
    torch.manual_seed(0)
    return Bag().double()


def run_with(data=None, collate=padded, loss=loss, model=None):
    model = model or bag()
    optimizer = torch.optim.SGD(model.parameters(), 0.5, momentum=0.9)
    return magic.Run(model, optimizer, data or sentences(), loss, ORDER, collate=collate)


def plain_loop(items, collate, loss=loss):
    """The user's: a DataLoader with this collate function."""
    model = bag()
    optimizer = torch.optim.SGD(model.parameters(), 0.5, momentum=0.9)
    for t, indices in enumerate(ORDER):
        seed_step(0, t)
        optimizer.zero_grad()
        loss(model, collate([items[i] for i in indices])).mean().backward()
        optimizer.step()
    return dict(model.named_parameters())


class Listed(torch.utils.data.Dataset):
    """A Dataset that also gives many items at once, as those of the library `datasets` do."""

    def __init__(self, items):
        self.items, self.asked = items, []

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]

    def __getitems__(self, indices):
        self.asked.append(list(indices))
        return [self.items[i] for i in indices]


@pytest.mark.parametrize("make", [list, Listed, lambda items: copy.deepcopy(items)])
def test_a_collate_function_gives_the_bits_of_a_loader_and_exact_scores(make):
    run = run_with(make(sentences()))
    final, truth = run.train(progress=False), plain_loop(sentences(), padded)
    assert all(torch.equal(final.params[name], p) for name, p in truth.items())
    if make is Listed:
        assert run.data.asked[:1] == [ORDER[0]]
    scores = magic.attribute(run, measure, progress=False)
    assert scores.health.ok and len(scores.health.witnessed) >= 3
    assert relative_error(run, measure, scores, (5, 7), 1e-3) < 1e-8


def test_what_is_a_mapping_arrives_as_it_is():
    class Encoding(UserDict):
        def __getattr__(self, name):
            if name == "data":  # while it is copied
                raise AttributeError(name)
            return self.data[name]

    def by_attribute(model, batch):
        assert type(batch) is Encoding
        return F.cross_entropy(model(batch.words), batch["class"], reduction="none")

    run = run_with(collate=lambda items: Encoding(padded(items)), loss=by_attribute)
    assert run.train(progress=False).fingerprint() == run_with().train(progress=False).fingerprint()
    assert magic.attribute(run, measure, progress=False).health.ok


def test_a_tuple_of_tensors_is_collated_as_a_tensor_dataset():
    """A batch is made from the list of its items, each a tuple; the tuple that is returned is unpacked."""
    x, y = cases.data()

    def stacked(items):
        assert all(isinstance(item, tuple) and len(item) == 2 for item in items)
        return torch.stack([x for x, _ in items]), torch.stack([y for _, y in items])

    torch.manual_seed(0)
    model, trained = cases.mlp().double(), []
    for data, collate in [((x, y), None), ((x, y), stacked), (torch.utils.data.TensorDataset(x, y), stacked)]:
        run = magic.Run(model, cases.sgd()(model), data, cases.loss, cases.order(), collate=collate)
        trained.append(run.train(progress=False).fingerprint())
    assert len(set(trained)) == 1


def test_random_numbers_of_a_collate_function_replay():
    def noisy(items):
        batch = padded(items)
        hidden = torch.rand(batch["words"].shape) < 0.2
        hidden[:, 0] = False
        return batch | {"words": batch["words"].masked_fill(hidden, 0)}

    run = run_with(collate=noisy)
    final, truth = run.train(progress=False), plain_loop(sentences(), noisy)
    assert all(torch.equal(final.params[name], p) for name, p in truth.items())
    assert final.fingerprint() != run_with().train(progress=False).fingerprint()
    scores = magic.attribute(run, measure, progress=False)
    assert relative_error(run, measure, scores, (5,), 1e-3) < 1e-8


def test_a_run_is_another_with_another_collate_function_or_item():
    def other(items):
        return padded(items[::-1][::-1])

    whole = run_with()
    assert whole.fingerprint() == run_with().fingerprint() != run_with(collate=other).fingerprint()
    changed = sentences()
    changed[3]["words"] = [1]
    differ = {
        name for name, part in run_with(changed).identity().items() if part != whole.identity().get(name)
    }
    assert differ == {"the items of the data set"}
    length = 7

    def cut(items):
        return {name: x[:, :length] if x.dim() > 1 else x for name, x in padded(items).items()}

    before = run_with(collate=cut).identity()
    length = 3
    after = run_with(collate=cut).identity()
    assert [name for name in after if after[name] != before[name]] == [
        "what the collate function holds: length"
    ]
    assert not any("collate" in name for name in cases.build("sgd-momentum")[0].identity())


def of_one_row(items):
    return {name: x[:1] for name, x in padded(items).items()}


@pytest.mark.parametrize(
    ("collate", "error", "says"),
    [
        (3, TypeError, "collate is a int; pass a function"),
        (
            lambda items: [item["text"] for item in items],
            TypeError,
            "returned a batch that is text or an obj",
        ),
        (lambda items: padded(items) | {"x": ["a"]}, TypeError, r"batch\['x'\] that is text .*\(list\)"),
        (lambda items: padded(items) | {"x": None}, TypeError, r"batch\['x'\] that is .*\(NoneType\)"),
        (lambda items: None, TypeError, "NoneType.*must return tensors"),
        (lambda items: {}, ValueError, r"an empty batch \(dict\)"),
        (of_one_row, ValueError, r"batch\['words'\] of shape \(1, \d\) for 3 examples"),
        (lambda items: padded(items) | {"count": torch.tensor(3)}, ValueError, r"\['count'\] of shape \(\)"),
        (
            lambda items: {}["words"],
            RuntimeError,
            r"collate fails for examples \[0, 5, 3\]: KeyError: 'words'",
        ),
    ],
)
def test_bad_collate_functions(collate, error, says):
    items = sentences()
    with pytest.raises(error, match=says):
        run_with(items, collate)
    assert items == sentences()


def test_a_collate_function_that_remembers_is_refused():
    calls = []

    def counted(items):
        calls.append(1)
        return padded(items)

    with pytest.raises(magic.NotDeterministic, match="'calls', which collate holds, changes"):
        run_with(collate=counted)


class Broken(Listed):
    def __getitem__(self, i):
        if i == 5:
            raise FileNotFoundError("page5.txt")
        return super().__getitem__(i)

    def __getitems__(self, indices):
        return [self[i] for i in indices]


def test_an_item_that_fails_is_named():
    with pytest.raises(RuntimeError, match="example 5 of the data cannot be read: FileNotFoundError: page5"):
        run_with(Broken(sentences()))


def test_lists_of_dicts_without_a_collate_function():
    items = [{"x": x, "y": y} for x, y in zip(*cases.data(), strict=True)]

    def of_dict(model, batch):
        return cases.loss(model, batch["x"], batch["y"])

    torch.manual_seed(0)
    model = cases.mlp().double()
    run = magic.Run(model, cases.sgd()(model), items, of_dict, cases.order())
    plain = magic.Run(model, cases.sgd()(model), cases.data(), cases.loss, cases.order())
    assert run.train(progress=False).fingerprint() == plain.train(progress=False).fingerprint()
    with pytest.raises(TypeError, match="pass collate="):
        run_with(collate=None)
    with pytest.raises(ValueError, match="data is empty"):
        magic.Run(model, cases.sgd()(model), [], of_dict, cases.order())


def test_baselines_refuse_a_run_with_a_collate_function():
    x, y = cases.data()
    torch.manual_seed(0)
    model = cases.mlp().double()
    collate = torch.utils.data.default_collate
    run = magic.Run(model, cases.sgd()(model), (x, y), cases.loss, cases.order(), collate=collate)
    with pytest.raises(TypeError, match="collate function; baselines take"):
        magic.baselines.gradient_similarity(run, (x[:2], y[:2]), [run.initial])


def test_datasets():
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(sentences())
    run = run_with(data)
    assert run.train(progress=False).fingerprint() == run_with().train(progress=False).fingerprint()
    assert run.identity() == run_with(datasets.Dataset.from_list(sentences())).identity()
    assert run.identity() != run_with(data.select([*range(11), 0])).identity()
    scores = magic.attribute(run, measure, progress=False)
    assert torch.equal(scores.values, magic.attribute(run_with(), measure, progress=False).values)
