"""A run on digits that several baselines and judges look at."""

import pytest
import torch

import magic
from magic.book import data, models
from tests.support import cases


@pytest.fixture(scope="module")
def digits():
    """A run on digits, its test batch, five states on its way, and the exact scores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    x, y, x_test, y_test = data.digits(300, 20)
    torch.manual_seed(0)
    model = models.MLP((64, 32, 10))
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    run = magic.Run(model, optimizer, (x, y), cases.loss, magic.batches(300, 50, 10))
    test = (x_test, y_test)
    exact = magic.attribute(run, lambda model: cases.loss(model, *test), progress=False)
    yield run, test, cases.states_of(run, 12), exact
    torch.set_num_threads(before)
