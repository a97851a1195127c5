import inspect

import pytest

from qc_compiler import errors
from qc_compiler.errors import OptionError, PassError, PlanError, QuantCacheError, UnsupportedModelError, nearest

CLASSES = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if cls.__module__ == errors.__name__]


@pytest.mark.parametrize("cls", CLASSES)
def test_every_error_is_a_quantcache_error_with_its_meaning_written_down(cls):
    assert issubclass(cls, QuantCacheError)
    assert cls.__doc__


def test_what_the_user_did_is_a_value_error_and_what_we_did_is_none():
    mistakes = [cls.__name__ for cls in CLASSES if issubclass(cls, ValueError)]
    assert mistakes == ["OptionError", "PackedFileError", "PlanError"]
    assert issubclass(OptionError, ValueError)
    assert issubclass(PlanError, ValueError)
    assert issubclass(errors.InvariantError, PassError)
    assert not issubclass(UnsupportedModelError, ValueError)


def test_nearest_hints_at_a_close_name():
    assert nearest("treshold", ["threshold", "interval"]) == "did you mean 'threshold'? valid: interval, threshold"


def test_nearest_lists_the_valid_names_where_none_is_close():
    assert nearest("xyz", ["b", "a"]) == "valid: a, b"
