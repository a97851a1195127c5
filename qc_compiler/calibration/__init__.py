"""Calibration: measures a model on its user's own sampling function and returns a plan."""

from .planning import calibrate
from .rules import fit_rule

__all__ = ["calibrate", "fit_rule"]
