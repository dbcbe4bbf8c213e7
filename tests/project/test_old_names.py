"""Names from before the wings still work, with a warning that says the new one."""

import importlib
import sys

import pytest

import magic
from magic._moved import MOVED, PUBLIC


@pytest.mark.parametrize("old", sorted(set(MOVED) - PUBLIC))
def test_an_old_module_is_the_new_one(old):
    sys.modules.pop(f"magic.{old}", None)
    with pytest.warns(DeprecationWarning, match=f"magic.{old} is magic.{MOVED[old]} now"):
        found = importlib.import_module(f"magic.{old}")
    assert found is importlib.import_module(f"magic.{MOVED[old]}")
    assert found.__name__ == found.__spec__.name == f"magic.{MOVED[old]}"


def test_names_imported_from_the_package_and_from_its_modules(printed):
    code = """
import warnings
warnings.simplefilter("ignore", DeprecationWarning)
from magic import best_linear, data, plot, where
from magic.checks import claim
from magic.retraining import retrained
from magic.schedule import Save
import magic, magic.judgement
assert where is magic.points and magic.where is where and magic.schedule.Save is Save
assert magic.compare is magic.judgement.compare and magic.optimality is best_linear.optimality
assert callable(magic.curvature) and callable(magic.train)
"""
    printed(code)


def test_what_was_never_there_is_not_found():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        magic.nothing  # noqa: B018
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("magic.nothing")
