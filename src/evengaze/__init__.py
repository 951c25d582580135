"""Evengaze: drop most of a vision-language model's image tokens inside `model.generate()`.

Tokens are chosen by attention that has been freed of its position and padding bias (arXiv 2508.17807).

    import evengaze as eg

    with eg.FastV(keep=128, layer=2, debias=eg.Debias.preset("llava-1.5-7b/fastv"))(model) as run:
        output = model.generate(**inputs)
    print(run.trace)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from evengaze.version import __version__

_EXPORTS = {
    "attach": "evengaze.methods.base",
    "Handle": "evengaze.engine.session",
    "Graphs": "evengaze.engine.graphs",
    "Debias": "evengaze.debias",
    "PaddingMask": "evengaze.debias",
    "TrendCurve": "evengaze.debias",
    "VisualLayout": "evengaze.layout",
    "VisualTokens": "evengaze.layout",
    "ImageInfo": "evengaze.layout",
    "Trace": "evengaze.trace",
    "Schedule": "evengaze.schedule",
    "solve_for_budget": "evengaze.schedule",
    "Pruner": "evengaze.methods",
    "Stage": "evengaze.methods",
    "View": "evengaze.methods",
    "Selection": "evengaze.methods",
    "Merge": "evengaze.methods",
    "OneStage": "evengaze.methods",
    "ManyStages": "evengaze.methods",
    "register": "evengaze.methods",
    "parse": "evengaze.methods",
    "calibrate": "evengaze.calibration.calibrate",
    "Sample": "evengaze.calibration.observe",
    "FastV": "evengaze.methods.fastv",
    "PyramidDrop": "evengaze.methods.pyramiddrop",
    "SparseVLM": "evengaze.methods.sparsevlm",
    "HiMAP": "evengaze.methods.himap",
    "TokenCarve": "evengaze.methods.tokencarve",
    "ILLaVA": "evengaze.methods.illava",
    "VisionZip": "evengaze.methods.visionzip",
    "DivPrune": "evengaze.methods.divprune",
    "ToMe": "evengaze.methods.tome",
    "Dense": "evengaze.methods.baselines",
    "Random": "evengaze.methods.baselines",
    "Uniform": "evengaze.methods.baselines",
    "Pool": "evengaze.methods.baselines",
    "llava_processor": "evengaze.models",
}
_MODULES = ("demo", "errors", "methods", "models", "testing")

__all__ = [*_EXPORTS, *_MODULES, "__version__"]

if TYPE_CHECKING:
    from evengaze import demo, errors, methods, models, testing
    from evengaze.calibration.calibrate import calibrate
    from evengaze.calibration.observe import Sample
    from evengaze.debias import Debias, PaddingMask, TrendCurve
    from evengaze.engine.graphs import Graphs
    from evengaze.engine.session import Handle
    from evengaze.layout import ImageInfo, VisualLayout, VisualTokens
    from evengaze.methods import ManyStages, Merge, OneStage, Pruner, Selection, Stage, View, parse, register
    from evengaze.methods.base import attach
    from evengaze.methods.baselines import Dense, Pool, Random, Uniform
    from evengaze.methods.divprune import DivPrune
    from evengaze.methods.fastv import FastV
    from evengaze.methods.himap import HiMAP
    from evengaze.methods.illava import ILLaVA
    from evengaze.methods.pyramiddrop import PyramidDrop
    from evengaze.methods.sparsevlm import SparseVLM
    from evengaze.methods.tokencarve import TokenCarve
    from evengaze.methods.tome import ToMe
    from evengaze.methods.visionzip import VisionZip
    from evengaze.models import llava_processor
    from evengaze.schedule import Schedule, solve_for_budget
    from evengaze.trace import Trace


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = getattr(import_module(_EXPORTS[name]), name)
    elif name in _MODULES:
        value = import_module(f"evengaze.{name}")
    else:
        raise AttributeError(f"module 'evengaze' has no attribute {name!r}.{_hint(name)}")
    globals()[name] = value
    return value


_ELSEWHERE = {
    **dict.fromkeys(
        ("attention", "cache", "checks", "cut", "intercept", "prefill", "rotary", "steps"), "engine, private"
    ),
    "scope": "methods.scope",
    "Curve": "debias.Curve",
    "Exponential": "debias.Exponential",
    "Observations": "calibration.observe.Observations",
    "observe": "calibration.observe.observe",
    "validate": "calibration.validate.validate",
    "ModelSpec": "evaluate.predictor.ModelSpec",
    "Predictor": "evaluate.predictor.Predictor",
    "Adapter": "models.Adapter",
    "top": "methods.top",
}
"""Where names are that were here in 0.1.0, or that people look for here."""


def _hint(name: str) -> str:
    from evengaze.spelling import did_you_mean

    return f" It is in evengaze.{_ELSEWHERE[name]}" if name in _ELSEWHERE else did_you_mean(name, __all__)


def __dir__() -> list[str]:
    return sorted(__all__)
