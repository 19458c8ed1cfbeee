"""Calibration: which tokens to look at, and what every expert saw and felt while the model read them."""
