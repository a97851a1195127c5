"""What a calibration has measured so far, in a file: an interrupted one goes on where it stopped."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import OptionError, PlanError
from ..plan import Plan

VERSION = b"6"  # a file of another one is forgotten like that of another model


class Journal:
    """Remembers what was measured in a file, if it has one, for the same model and samples.

    Args:
        path: Of a JSON file, beside which plans are saved; None remembers nothing.

    Attributes:
        generations: Spent so far. What is remembered counts as when it was measured, so that a calibration that goes
            on decides what it would have decided without the interruption.
    """

    def __init__(self, path: str | Path | None) -> None:
        self._path = None if path is None else Path(path)
        if self._path is not None and (self._path.is_dir() or not os.access(self._path.parent, os.W_OK)):
            raise OptionError(f"resume={str(path)!r}: expected a file in a directory that exists and can be written to")
        self._known: dict[str, Any] = {"generations": {}}
        self.generations = 0.0

    def open(self, fingerprint: str, reference: Tensor) -> None:
        """Reads what is known of this model and these samples; anything else is forgotten."""
        key = hashlib.sha256(VERSION + fingerprint.encode() + reference.numpy().tobytes()).hexdigest()
        try:
            known = json.loads(self._path.read_text()) if self._path and self._path.exists() else {}
        except ValueError as error:
            raise PlanError(f"{self._path} is damaged ({error}): delete it to begin anew") from error
        is_ours = isinstance(known, dict) and known.get("key") == key
        self._known = known if is_ours else {"key": key, "generations": {}}

    def get(self, name: str, measure: Callable[[], Any]) -> Any:
        """Returns what is known by this name, or measures it and writes it down."""
        if name in self._known:
            self.generations = max(self.generations, self._known["generations"][name])
        else:
            self._known[name] = measure()
            self._known["generations"][name] = self.generations
            if self._path is not None:
                part = self._path.with_name(f"{self._path.name}.part")
                part.write_text(json.dumps(self._known))
                part.replace(self._path)
        return self._known[name]

    def plan(self, name: str, build: Callable[[], Plan]) -> Plan:
        """Returns the plan that was built by this name, or builds and saves it."""
        if self._path is None:
            return build()
        path = self._path.with_name(f"{self._path.name}.{hashlib.sha256(name.encode()).hexdigest()[:8]}.safetensors")

        def save() -> str:
            build().save(path)
            return path.name

        return Plan.load(path.with_name(self.get(name, save)))
