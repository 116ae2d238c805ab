"""Measured and compared: what storage gives, side by side."""
