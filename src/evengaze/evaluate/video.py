"""Reading videos: eight frames at equal distances (Video-LLaVA `languagebind/video/processing_video.py`).

Upstream flips frames at random even at test time; this does not.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evengaze.errors import DataError
from evengaze.extras import require

if TYPE_CHECKING:
    from PIL.Image import Image

N_FRAMES = 8
EXTENSIONS = (".mp4", ".avi", ".mov", ".mkv")


def frame_indices(n: int, k: int = N_FRAMES) -> list[int]:
    """Return the indices of `k` frames out of `n`, ends included, truncated; they repeat when `n < k`."""
    return [int(i) for i in np.linspace(0, n - 1, k, dtype=int)]


def find_video(folder: Path, name: str) -> Path:
    """Return the video's file: the first known extension that is there, else where it should be."""
    candidates = [folder / f"{name}{extension}" for extension in EXTENSIONS]
    return next((path for path in candidates if path.is_file()), candidates[0])


def read_frames(path: Path, k: int = N_FRAMES) -> list[Image]:
    """Decode `k` frames at equal distances as RGB images.

    Containers may state a wrong number of frames; then the file is read again with the number that was decoded.

    Raises:
        DataError: The file is missing or cannot be decoded.
        MissingExtraError: PyAV is not installed.
    """
    require("video", "a video", "av")
    import av

    if not path.is_file():
        raise DataError(f"{path} does not exist (nor with another of {', '.join(EXTENSIONS)}). Fetch the video.")
    try:
        stated = _stated_frames(av, path)
        frames, n = _pick(av, path, frame_indices(stated, k) if stated else [])
        if n and n != stated:
            frames, n = _pick(av, path, frame_indices(n, k))
    except (av.error.FFmpegError, ValueError, IndexError) as error:
        raise DataError(f"{path} ({path.stat().st_size} bytes) cannot be decoded: {error}. Fetch it again.") from error
    if not n:
        raise DataError(f"{path} ({path.stat().st_size} bytes) holds no video frame. Fetch it again.")
    return frames


def _stated_frames(av: Any, path: Path) -> int:
    with av.open(str(path)) as container:
        return int(container.streams.video[0].frames)


def _pick(av: Any, path: Path, indices: list[int]) -> tuple[list[Image], int]:
    """Decode the file once; return the frames at `indices` and how many frames there are."""
    wanted = Counter(indices)
    picked: list[Image] = []
    n = 0
    with av.open(str(path)) as container:
        container.streams.video[0].thread_type = "AUTO"
        for frame in container.decode(video=0):
            if n in wanted:
                picked += [frame.to_image()] * wanted[n]
            n += 1
    return picked, n
