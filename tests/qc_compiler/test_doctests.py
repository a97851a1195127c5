"""The examples in the docstrings are true."""

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import passes
import qc_compiler

MODULES = [
    module.name
    for package in (qc_compiler, passes)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
]
EXAMPLES = [path.stem for path in (Path(__file__).parents[2] / "examples").glob("*.py")]


@pytest.mark.parametrize("name", [*MODULES, *EXAMPLES])
def test_doctests(name):
    module = importlib.import_module(name)
    failures, _ = doctest.testmod(module)
    assert failures == 0


def test_the_examples_are_found():
    tried = {name: doctest.testmod(importlib.import_module(name)).attempted for name in MODULES}
    assert tried["qc_compiler.graph"] > 0
    assert tried["qc_compiler.extrapolation"] > 0
