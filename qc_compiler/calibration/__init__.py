"""Calibration: measures a model on its user's own sampling function and returns a plan."""

from .schedule import calibrate

__all__ = ["calibrate"]
