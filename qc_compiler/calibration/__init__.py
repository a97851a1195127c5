"""Calibration: measures a model on its user's own sampling function and returns a plan."""

from .rules import fit_rule
from .schedule import calibrate

__all__ = ["calibrate", "fit_rule"]
