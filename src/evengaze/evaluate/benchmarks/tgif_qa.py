"""TGIF-QA in Video-LLaVA's layout."""

from __future__ import annotations

from typing import ClassVar

from evengaze.evaluate.benchmarks.types import DataFile
from evengaze.evaluate.benchmarks.video_qa import ANSWERS, DOWNLOAD, QUESTIONS, VideoQA


class TGIFQA(VideoQA):
    """TGIF-QA: open answers about short videos."""

    name = "tgif_qa"
    title = "TGIF-QA"
    size = 25751
    folders = ("TGIF_Zero_Shot_QA",)
    videos = "mp4"
    files: ClassVar[tuple[DataFile, ...]] = (
        DataFile(QUESTIONS, DOWNLOAD),
        DataFile(ANSWERS, DOWNLOAD, needed="score"),
        DataFile(videos, DOWNLOAD, "dir", needed="run"),
    )
