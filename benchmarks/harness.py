"""What the benchmarks share: where they ran, and how a result is written down."""

import platform
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch

from qc_compiler.kernels.timing import cpu_name

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

RESULTS = Path(__file__).parent / "results"


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"{cpu_name()}, {threads} thread{'s' if threads > 1 else ''}"


def header(title: str, command: str) -> str:
    """Returns the top of a results page: date, device, versions and command."""
    return (
        f"# {title}\n\n"
        f"{date.today()} · {device_name()} · torch {torch.__version__} · Python {platform.python_version()}\n\n"
        f"    {command}\n"
    )


def table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Returns a Markdown table."""
    lines = ["| " + " | ".join(headings) + " |", "|" + " --- |" * len(headings)]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def write(name: str, text: str) -> None:
    """Writes a results page and prints it."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / name).write_text(text)
    print(text)
