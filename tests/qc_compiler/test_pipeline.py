import hashlib
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import fx

import qc_compiler
from capture import capture
from qc_compiler import pipeline
from qc_compiler.errors import InvariantError, OptionError, PassError, UnsupportedModelError
from qc_compiler.graph import GraphPass, Report
from qc_compiler.pipeline import run_passes, source_key

aten = torch.ops.aten


@dataclass(frozen=True)
class DoubleSums(GraphPass):
    """x + y → (x + y)·factor, for the tests."""

    factor: int = 2

    def run(self, gm: fx.GraphModule) -> Report:
        adds = [node for node in gm.graph.nodes if node.target is aten.add.Tensor]
        for node in adds:
            with gm.graph.inserting_after(node):
                twice = gm.graph.call_function(aten.mul.Tensor, (node, self.factor))
            twice.meta = dict(node.meta)
            node.replace_all_uses_with(twice, lambda user, twice=twice: user is not twice)
        return Report(len(adds))


@dataclass(frozen=True)
class DoubleSumsAgain(DoubleSums):
    pass


@dataclass(frozen=True)
class Fails(GraphPass):
    error: Exception

    def run(self, gm: fx.GraphModule) -> Report:
        raise self.error


@dataclass(frozen=True)
class DropsMetadata(GraphPass):
    def run(self, gm: fx.GraphModule) -> Report:
        for node in gm.graph.nodes:
            node.meta.clear()
        return Report(1)


@pytest.fixture
def gm():
    return capture(lambda x: x + 1, torch.ones(2)).normalized()


def test_names_are_the_class_names_in_kebab_case():
    assert [p.name for p in (DoubleSums, DoubleSumsAgain, Fails)] == ["double-sums", "double-sums-again", "fails"]


def test_passes_run_in_order_and_the_code_is_the_new_one(gm):
    runs = run_passes(gm, [DoubleSums(), DoubleSumsAgain(factor=5)])
    assert [(run.name, run.report.changed) for run in runs] == [("double-sums", 1), ("double-sums-again", 1)]
    assert all(run.elapsed_ms > 0 for run in runs)
    assert gm(torch.ones(2))[0].tolist() == [20.0, 20.0]


def test_a_pass_is_disabled_by_its_exact_name_only(gm):
    runs = run_passes(gm, [DoubleSums(), DoubleSumsAgain(factor=5)], disable=["double-sums"])
    assert [run.name for run in runs] == ["double-sums-again"]
    assert gm(torch.ones(2))[0].tolist() == [10.0, 10.0]


def test_disabling_a_pass_that_does_not_exist(gm):
    with pytest.raises(OptionError, match=r"disable='double-sum': did you mean 'double-sums'\? valid: double-sums"):
        run_passes(gm, [DoubleSums()], disable=["double-sum"])


def test_disabling_reaches_the_default_pipeline():
    from tiny_models import tiny_dit

    captured = capture(tiny_dit(1), torch.ones(1, 2, 8), torch.ones(1))
    gm = captured.rewritten(cache="static", disable="guard-regions")
    assert "interface" not in gm.meta
    with pytest.raises(OptionError, match="did you mean 'guard-regions'"):
        captured.rewritten(cache="static", disable=("guard-region",))


def test_a_failing_pass_is_named_and_its_error_kept(gm):
    with pytest.raises(PassError, match="pass fails failed: ZeroDivisionError: by zero") as caught:
        run_passes(gm, [Fails(ZeroDivisionError("by zero"))])
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_an_error_raised_on_purpose_passes_through_with_the_name_of_the_pass(gm):
    with pytest.raises(UnsupportedModelError, match=r"no blocks here \(in pass fails\)"):
        run_passes(gm, [Fails(UnsupportedModelError("no blocks here"))])


def test_a_broken_graph_is_found_after_the_pass_that_broke_it(gm):
    with pytest.raises(InvariantError, match=r"has no meta\['val'\] \(in pass drops-metadata\)"):
        run_passes(gm, [DoubleSums(), DropsMetadata()])


def test_dumps_show_the_graph_after_each_pass(gm, tmp_path, monkeypatch):
    folder = tmp_path / "new" / "dumps"
    monkeypatch.setenv("QC_DUMP", str(folder))
    run_passes(gm, [DoubleSums(), DoubleSumsAgain()])
    assert sorted(path.name for path in folder.iterdir()) == ["0-double-sums.txt", "1-double-sums-again.txt"]
    assert (
        (folder / "0-double-sums.txt").read_text()
        == """\
graph(%L_x_: f32[2]):
  %add = aten.add(%L_x_, 1) : f32[2]
  %mul_tensor = aten.mul(%add, 2) : f32[2]
  return (%mul_tensor)
"""
    )


def test_nothing_is_written_without_being_asked(gm, tmp_path, monkeypatch):
    monkeypatch.delenv("QC_DUMP", raising=False)
    monkeypatch.chdir(tmp_path)
    run_passes(gm, [DoubleSums()])
    assert list(tmp_path.iterdir()) == []


def test_watch_sees_the_graph_after_each_pass(gm):
    seen = []
    run_passes(gm, [DoubleSums(), DoubleSumsAgain()], watch=lambda name, gm: seen.append((name, len(gm.graph.nodes))))
    assert seen == [("double-sums", 4), ("double-sums-again", 5)]


def test_the_source_key_is_the_same_in_every_process():
    code = "import json; from qc_compiler.pipeline import source_key; print(json.dumps(source_key()))"
    root = Path(qc_compiler.__file__).parent.parent
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    source_key.cache_clear()
    assert json.loads(printed.stdout) == source_key()


def test_the_source_key_changes_with_any_source(tmp_path, monkeypatch):
    for name in ("qc_compiler/pipeline.py", "qc_compiler/sub/rule.py", "passes/one.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    monkeypatch.setattr(pipeline, "__file__", str(tmp_path / "qc_compiler" / "pipeline.py"))
    keys = set()
    for name in ("passes/one.py", "qc_compiler/sub/rule.py", "passes/two.py"):
        source_key.cache_clear()
        keys.add(source_key())
        (tmp_path / name).write_text("changed")
    source_key.cache_clear()
    keys.add(source_key())
    source_key.cache_clear()
    assert len(keys) == 4
    assert all(len(key) == len(hashlib.sha256().hexdigest()) for key in keys)
