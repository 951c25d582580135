from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from evengaze.errors import DataError
from evengaze.evaluate.video import find_video, frame_indices, read_frames


def write_video(path: Path, n: int, size: int = 64) -> Path:
    """Write n grey frames; frame i has the value 10 + 5 i."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        for i in range(n):
            frame = av.VideoFrame.from_ndarray(np.full((size, size, 3), 10 + 5 * i, dtype=np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("suffix", [".mp4", ".avi", ".mkv"])
@pytest.mark.parametrize("n", [1, 3, 8, 9, 30])
def test_eight_uniform_frames_in_order(tmp_path: Path, suffix: str, n: int) -> None:
    frames = read_frames(write_video(tmp_path / f"v{suffix}", n))
    assert len(frames) == 8
    assert {frame.mode for frame in frames} == {"RGB"} and {frame.size for frame in frames} == {(64, 64)}
    grey = [float(np.asarray(frame).mean()) for frame in frames]
    assert grey == pytest.approx([10 + 5 * i for i in frame_indices(n)], abs=4)


def test_reading_twice_gives_the_same_pixels(tmp_path: Path) -> None:
    """Upstream flips at random at test time."""
    path = write_video(tmp_path / "v.mp4", 20)
    first, second = read_frames(path), read_frames(path)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_another_number_of_frames(tmp_path: Path) -> None:
    assert len(read_frames(write_video(tmp_path / "v.mp4", 5), 3)) == 3
    assert frame_indices(5, 3) == [0, 2, 4]


def test_extensions_in_order(tmp_path: Path) -> None:
    assert find_video(tmp_path, "v") == tmp_path / "v.mp4"
    for suffix in (".mkv", ".avi", ".mp4"):
        (tmp_path / f"v{suffix}").touch()
        assert find_video(tmp_path, "v").suffix == suffix


@pytest.mark.parametrize("content", [b"", b"not a video at all", None])
def test_unreadable_videos_name_the_file(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "v.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"v\.mp4"):
        read_frames(path)


def test_of_a_cut_off_video_what_is_there_is_read(tmp_path: Path) -> None:
    """Its header still states 30 frames."""
    path = write_video(tmp_path / "v.avi", 30)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
    frames = read_frames(path)
    assert len(frames) == 8
    grey = [float(np.asarray(frame).mean()) for frame in frames]
    assert grey == sorted(grey) and grey[-1] < 10 + 5 * 28


def test_a_file_with_sound_only_is_named(tmp_path: Path) -> None:
    path = tmp_path / "v.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), dtype=np.int16), format="s16", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(DataError, match="cannot be decoded"):
        read_frames(path)
