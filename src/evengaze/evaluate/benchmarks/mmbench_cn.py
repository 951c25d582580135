"""MMBench-CN dev: the Chinese table, asked in Chinese (LLaVA `scripts/v1_5/eval/mmbench_cn.sh`)."""

from __future__ import annotations

from typing import ClassVar

from evengaze.evaluate.benchmarks.mmbench import TABLES_AT, MMBench
from evengaze.evaluate.benchmarks.types import DataFile


class MMBenchCN(MMBench):
    """MMBench-CN dev: as MMBench, another table and instruction."""

    name = "mmbench_cn"
    title = "MMBench-CN"
    size = None
    # LLaVA's script looks in one folder, its documentation names the other.
    folders = ("mmbench_cn", "mmbench")
    table = "mmbench_dev_cn_20231003.tsv"
    instruction = "请直接回答选项字母。"
    files: ClassVar[tuple[DataFile, ...]] = (DataFile(table, f"{TABLES_AT}/{table}"),)
