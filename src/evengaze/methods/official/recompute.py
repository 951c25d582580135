"""Methods whose released code has no KV cache: every new token repeats the prefill, and ranks anew.

FastV with `fast_v_inplace` and HiMAP's evaluation scripts run with `use_cache=False`. The newest token, or all text so
far, then takes part in the ranking, so that the kept tokens drift while the answer is written.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from evengaze.engine import Handle
from evengaze.layout import VisualLayout
from evengaze.methods.fastv import FastV
from evengaze.methods.himap import HiMAP
from evengaze.protocol import Mode


class RecomputingHandle(Handle):
    """A handle that forgets each call, where the engine would repeat its selection in the calls that follow."""

    def _leave_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        out = super()._leave_decoder(module, args, kwargs, out)
        self._frozen = None
        return out


@dataclass(frozen=True)
class FastVRecompute(FastV):
    """FastV as `fast_v_inplace=True` runs it. Use it with `use_cache=False`."""

    mode: Mode = field(default="official", kw_only=True)

    name: ClassVar[str] = "fastv-recompute"

    def __call__(self, model: nn.Module, *, layout: VisualLayout | None = None) -> Handle:
        """Attach to a model."""
        return RecomputingHandle(model, self, layout)


@dataclass(frozen=True)
class HiMAPRecompute(HiMAP):
    """HiMAP as its evaluation scripts run it. Use it with `use_cache=False`."""

    mode: Mode = field(default="official", kw_only=True)

    name: ClassVar[str] = "himap-recompute"

    def __call__(self, model: nn.Module, *, layout: VisualLayout | None = None) -> Handle:
        """Attach to a model."""
        return RecomputingHandle(model, self, layout)
