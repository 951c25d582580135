"""How the published scripts run, where that differs from pruning once and decoding from a pruned cache.

None of this is of use beyond reproducing published numbers; the engine knows nothing about it.
"""

from __future__ import annotations

from evengaze.methods.official.masked import FastVMasked
from evengaze.methods.official.recompute import FastVRecompute, HiMAPRecompute

__all__ = ["FastVMasked", "FastVRecompute", "HiMAPRecompute"]
