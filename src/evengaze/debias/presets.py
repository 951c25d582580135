"""The 41 weight files published with arXiv 2508.17807 for LLaVA-1.5-7B, as curves.

40 of them are exact exponentials w_i = exp(-k i), i = 0 .. 575: one for each of four methods and ten benchmarks, fitted
on the benchmark itself. The FastV file is one curve for all benchmarks, the reciprocal of a cubic in i / 576.

"llava-1.5-7b/<method>/<benchmark>" names a published curve. "llava-1.5-7b/<method>" is the geometric mean of a method's
ten weight vectors (the mean of its ten k), for pictures that belong to no benchmark; for FastV it is the published one.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache

from evengaze.debias.curve import Origin
from evengaze.debias.padding import PaddingMask
from evengaze.debias.trend import Exponential, Polynomial, TrendCurve
from evengaze.errors import CurveError

_MODEL = "llava-1.5-7b"
_TOKENS = 576

_FASTV = (0.9999999999999994, 1.7367538195274923, -4.843235638865711, 4.909652391659825)

BENCHMARKS = (
    "vqav2",
    "gqa",
    "vizwiz",
    "scienceqa",
    "textvqa",
    "pope",
    "mme",
    "mmbench",
    "mmbench_cn",
    "mmvet",
)

_PER_INDEX = {
    "himap": (
        0.002214309688341261,
        0.00217225678898617,
        0.001971196071066007,
        0.001707097896908928,
        0.001478924951077572,
        0.002253080113141034,
        0.002041350581804998,
        0.001609359683375582,
        0.001479930720430071,
        0.00170275500199021,
    ),
    "pyramiddrop": (
        0.00375600056034892,
        0.003989270014974293,
        0.002518913099132776,
        0.002698493603369832,
        0.003146734488629462,
        0.004050629049808389,
        0.003265561761429662,
        0.002651867813324136,
        0.002596662032277333,
        0.004133642007740657,
    ),
    "sparsevlm": (
        0.004121101501666783,
        0.00230130431419889,
        0.002742035435404854,
        0.002992410911514761,
        0.003147614118023057,
        0.00463703725642687,
        0.003802760893450859,
        0.003195687079698488,
        0.002598937614074716,
        0.004224820732730811,
    ),
    "tokencarve": (
        0.001696595903591451,
        0.001668402878704256,
        0.001430717577172497,
        0.001179707580401525,
        0.001180272243408598,
        0.001714836543780013,
        0.001469520027784492,
        0.001295086297137785,
        0.001112505013224124,
        0.001696595903591451,
    ),
}

# Whose attention each method ranks by (0-based decoder layer), and how its published patch finds padding.
_LAYER = {"fastv": 1, "himap": 1, "tokencarve": 1, "pyramiddrop": 2, "sparsevlm": 2}
_PADDING = {
    "fastv": PaddingMask(0.5, "pad"),
    "himap": PaddingMask(0.5, "pad"),
    "tokencarve": PaddingMask(0.5, "pad"),
    "pyramiddrop": PaddingMask(0.01, "pad"),
    "sparsevlm": PaddingMask(formula="bilinear"),
}


@dataclass(frozen=True)
class Preset:
    """A published trend with the padding formula that its patch used.

    Attributes:
        name: see `preset`.
        trend: the trend.
        padding: the published patch's own formula.
        origin: what it was measured on.
        mean: whether it is a mean of a method's published curves rather than one of the 41.
    """

    name: str
    trend: TrendCurve
    padding: PaddingMask
    origin: Origin
    mean: bool = False


@lru_cache(maxsize=1)
def _all() -> dict[str, Preset]:
    curves: dict[str, TrendCurve] = {f"{_MODEL}/fastv": Polynomial(_FASTV)}
    for method, ks in _PER_INDEX.items():
        curves[f"{_MODEL}/{method}"] = Exponential.per_index(sum(ks) / len(ks), _TOKENS)
        for benchmark, k in zip(BENCHMARKS, ks, strict=True):
            curves[f"{_MODEL}/{method}/{benchmark}"] = Exponential.per_index(k, _TOKENS)
    presets = {}
    for name, trend in curves.items():
        method = name.split("/")[1]
        origin = Origin(
            model=_MODEL,
            architecture="llava/llama/32x4096",
            method=method,
            layer=_LAYER[method],
            grid=(24, 24),
            data=f"published with arXiv 2508.17807 ({name})",
        )
        mean = method in _PER_INDEX and name.count("/") == 1
        presets[name] = Preset(name, trend, _PADDING[method], origin, mean)
    return presets


def preset_names() -> tuple[str, ...]:
    """All presets' names."""
    return tuple(_all())


def published_trend(architecture: str, method: str, layer: int | None = None) -> TrendCurve | None:
    """The published trend of a method at a layer of a model (see `architecture_of`), if there is one."""
    found = _all().get(f"{_MODEL}/{method}")
    if found is None or found.origin.architecture != architecture or layer not in (None, found.origin.layer):
        return None
    return found.trend


def preset(name: str) -> Preset:
    """A preset by name; case does not matter, nor does "-" for "_" in a benchmark's name.

    Raises:
        CurveError: there is none; the message lists the nearest names.
    """
    presets = _all()
    wanted = name.strip().lower()
    for candidate in (wanted, wanted.replace("mm-vet", "mmvet"), wanted.replace("mmbench-cn", "mmbench_cn")):
        if candidate in presets:
            return presets[candidate]
    near = ", ".join(get_close_matches(wanted, presets, n=5, cutoff=0.4))
    raise CurveError(
        f"no preset {name!r}.{near and f' Nearest: {near}.'} `evengaze list presets` shows all {len(presets)}; a "
        "file's name must end in .json."
    )
