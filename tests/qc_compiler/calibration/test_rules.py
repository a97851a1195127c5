import numpy as np
import pytest

import qc_compiler
from qc_compiler.options import parse_options
from tiny_models import eager_backend, sample, tiny_dit


def backend(gm, example_inputs, options=None):
    return eager_backend(gm, example_inputs, options=options)


@pytest.mark.parametrize(("rule", "name", "length"), [("teacache", "polynomial", 5), ("magcache", "ratios", 12)])
def test_a_fitted_rule_is_valid_options(rule, name, length):
    fitted = qc_compiler.fit_rule(tiny_dit(), lambda m: sample(m, 12), rule, backend=backend)
    assert len(fitted[name]) == length
    assert np.isfinite(fitted[name]).all()
    assert getattr(parse_options(fitted), name) == fitted[name]


def test_other_rules_need_no_fit():
    with pytest.raises(qc_compiler.OptionError, match="'hlc' needs no fit"):
        qc_compiler.fit_rule(tiny_dit(), sample, "hlc")
