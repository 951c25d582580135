"""Figures: kept tokens over pictures, comparisons of methods, curves. Every function returns a matplotlib Figure."""

from evengaze.extras import require

require("viz", "drawing", "matplotlib")
