"""MSRVTT-QA in Video-LLaVA's layout."""

from __future__ import annotations

from typing import ClassVar

from evengaze.evaluate.benchmarks.types import DataFile
from evengaze.evaluate.benchmarks.video_qa import ANSWERS, DOWNLOAD, QUESTIONS, VideoQA


class MSRVTTQA(VideoQA):
    """MSRVTT-QA: open answers about short videos."""

    name = "msrvtt_qa"
    title = "MSRVTT-QA"
    size = 72821
    folders = ("MSRVTT_Zero_Shot_QA",)
    videos = "videos/all"
    files: ClassVar[tuple[DataFile, ...]] = (
        DataFile(QUESTIONS, DOWNLOAD),
        DataFile(ANSWERS, DOWNLOAD, needed="score"),
        DataFile(videos, DOWNLOAD, "dir", needed="run"),
    )
