"""MSVD-QA in Video-LLaVA's layout."""

from __future__ import annotations

from typing import ClassVar

from evengaze.evaluate.benchmarks.types import DataFile
from evengaze.evaluate.benchmarks.video_qa import ANSWERS, DOWNLOAD, QUESTIONS, VideoQA


class MSVDQA(VideoQA):
    """MSVD-QA: open answers about short videos."""

    name = "msvd_qa"
    title = "MSVD-QA"
    size = 13157
    folders = ("MSVD_Zero_Shot_QA",)
    videos = "videos"
    files: ClassVar[tuple[DataFile, ...]] = (
        DataFile(QUESTIONS, DOWNLOAD),
        DataFile(ANSWERS, DOWNLOAD, needed="score"),
        DataFile(videos, DOWNLOAD, "dir", needed="run"),
    )
