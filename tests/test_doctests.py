"""Every example in a docstring runs and prints what it says."""

import doctest
import importlib
import importlib.util
import pkgutil

import pytest

import weightdyn

MODULES = [module.name for module in pkgutil.walk_packages(weightdyn.__path__, "weightdyn.")]
if importlib.util.find_spec("lightning") is None:
    MODULES.remove("weightdyn.integrations.lightning")


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = [test for name in MODULES for test in finder.find(importlib.import_module(name)) if test.examples]
    assert len(found) > 40
