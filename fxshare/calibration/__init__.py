"""Calibration: statistics of what the linears read and of the gradient of what they write."""
