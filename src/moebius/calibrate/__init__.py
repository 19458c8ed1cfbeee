"""Calibration: which tokens to look at, and what every expert saw and how much the loss depends on it."""
