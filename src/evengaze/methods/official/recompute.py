"""Methods whose released code has no KV cache: every new token repeats the prefill, and ranks anew.

FastV with `fast_v_inplace` and HiMAP's evaluation scripts run with `use_cache=False`. The newest token, or all text so
far, then takes part in the ranking, so that the kept tokens drift while the answer is written.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from evengaze.methods.base import Pruner
from evengaze.methods.fastv import FastV
from evengaze.methods.himap import HiMAP
from evengaze.methods.registry import register
from evengaze.protocol import Mode


@dataclass(frozen=True)
class _Recompute(Pruner):
    mode: Mode = field(default="official", kw_only=True)
    freezes: ClassVar[bool] = False


@register
@dataclass(frozen=True)
class FastVRecompute(_Recompute, FastV):
    """FastV as `fast_v_inplace=True` runs it. Use it with `use_cache=False`."""

    name: ClassVar[str] = "fastv-recompute"


@register
@dataclass(frozen=True)
class HiMAPRecompute(_Recompute, HiMAP):
    """HiMAP as its evaluation scripts run it. Use it with `use_cache=False`."""

    name: ClassVar[str] = "himap-recompute"
