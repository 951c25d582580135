"""The benchmarks, by name."""

from __future__ import annotations

from evengaze.errors import ConfigError
from evengaze.evaluate.benchmarks.base import Benchmark
from evengaze.evaluate.benchmarks.gqa import GQA
from evengaze.evaluate.benchmarks.mmbench import MMBench
from evengaze.evaluate.benchmarks.mmbench_cn import MMBenchCN
from evengaze.evaluate.benchmarks.mme import MME
from evengaze.evaluate.benchmarks.mmvet import MMVet
from evengaze.evaluate.benchmarks.msrvtt_qa import MSRVTTQA
from evengaze.evaluate.benchmarks.msvd_qa import MSVDQA
from evengaze.evaluate.benchmarks.pope import POPE
from evengaze.evaluate.benchmarks.questions import Questions
from evengaze.evaluate.benchmarks.scienceqa import ScienceQA
from evengaze.evaluate.benchmarks.textvqa import TextVQA
from evengaze.evaluate.benchmarks.tgif_qa import TGIFQA
from evengaze.evaluate.benchmarks.types import DataFile, OfficialError, Problems, Record, Score, ScoreOptions
from evengaze.evaluate.benchmarks.vizwiz import VizWiz, VizWizVal
from evengaze.evaluate.benchmarks.vqav2 import VQAv2, VQAv2Val

__all__ = [
    "BENCHMARKS",
    "Benchmark",
    "DataFile",
    "OfficialError",
    "Problems",
    "Record",
    "Score",
    "ScoreOptions",
    "get_benchmark",
]

BENCHMARKS: dict[str, Benchmark] = {
    item.name: item
    for item in (
        VQAv2(),
        VQAv2Val(),
        GQA(),
        VizWiz(),
        VizWizVal(),
        ScienceQA(),
        TextVQA(),
        POPE(),
        MME(),
        MMBench(),
        MMBenchCN(),
        MMVet(),
        TGIFQA(),
        MSVDQA(),
        MSRVTTQA(),
        Questions(),
    )
}


def get_benchmark(name: str) -> Benchmark:
    """Return a benchmark by name; case and the marks `-`, `_` do not matter.

    Raises:
        ConfigError: There is no such benchmark.
    """

    def plain(text: str) -> str:
        return text.lower().replace("-", "").replace("_", "")

    for known, benchmark in BENCHMARKS.items():
        if plain(known) == plain(name):
            return benchmark
    raise ConfigError(f"no benchmark {name!r}; there are {', '.join(BENCHMARKS)}.")
