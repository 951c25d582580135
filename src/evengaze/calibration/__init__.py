"""Measuring a model's bias: what text attends to by position, curves fitted to it, and whether they help."""

from evengaze.extras import require

require("calibrate", "calibrating", "scipy")
