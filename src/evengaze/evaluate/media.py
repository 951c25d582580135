"""Pictures and videos of records: read as viewers show them, or as LLaVA's scripts do, and told apart by content.

LLaVA's scripts call PIL's `convert("RGB")` on whatever was opened. That clips 16-bit and float pictures to white or
black, leaves transparent pixels in the colour that is hidden below them, and ignores the rotation that cameras note.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from evengaze.errors import DataError
from evengaze.evaluate.benchmarks.types import Record

OFFICIAL_PICTURE = "official_picture"
"""Set in the trace of an answer whose picture the official conversion shows otherwise than viewers do."""
_ORIENTATION = 0x0112
_PIECE = 1 << 16


@dataclass(frozen=True)
class Media:
    """A record's picture or video.

    Attributes:
        kind: "images", "videos", or "text" for neither.
        content: the RGB picture, the frames (n, height, width, 3), or None.
        differs: whether viewers show the picture otherwise than LLaVA's scripts.
    """

    kind: str
    content: Any = None
    differs: bool = False


def open_media(record: Record, *, official: bool = False) -> tuple[str, Any]:
    """Kind and content of a record's media; see `read_media`."""
    media = read_media(record, official=official)
    return media.kind, media.content


def read_media(record: Record, *, official: bool = False) -> Media:
    """Read a record's picture or video.

    Args:
        record: the record.
        official: convert pictures as LLaVA's scripts do instead of as viewers do.

    Raises:
        DataError: it is missing or cannot be decoded.
    """
    if record.video is not None:
        from evengaze.evaluate.video import read_frames

        return Media("videos", np.stack([np.asarray(frame) for frame in read_frames(record.video)]))
    if record.image is None:
        return Media("text")
    name = f"the picture of record {record.key}" if isinstance(record.image, bytes) else str(record.image)
    try:
        with Image.open(BytesIO(record.image) if isinstance(record.image, bytes) else record.image) as picture:
            return Media("images", as_rgb(picture, official=official), _differs(picture))
    except FileNotFoundError:
        raise DataError(f"{name} does not exist. The image folder is incomplete: extract it again.") from None
    except Image.DecompressionBombError as error:
        raise DataError(
            f"{name} has more pixels than are read ({error}). Make it smaller: models see about a thousand a side."
        ) from None
    except Exception as error:  # decoders of damaged files raise whatever they stumble over
        raise DataError(f"{name} cannot be read as a picture ({error}). Fetch or extract it again.") from None


def as_rgb(picture: Image.Image, *, official: bool = False) -> Image.Image:
    """Make a picture RGB.

    As viewers do: rotated as its EXIF orientation says; values beyond 8 bits scaled (see `_eight_bits`); transparent
    parts white. Official: nothing of this.

    Args:
        picture: of any mode.
        official: as LLaVA's scripts do.
    """
    if official:
        return picture.convert("RGB")
    upright: Image.Image = ImageOps.exif_transpose(picture)
    if upright.mode[0] in "IF":
        return _eight_bits(upright).convert("RGB")
    if not _transparent(upright):
        return upright.convert("RGB")
    layer = upright.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Bring integers of more than 8 bits, and floats, to 0..255.

    Floats in [0, 1] are shares of white. Values in [0, 255] stay, those up to 65535 are 16-bit ones; others are
    stretched from the least to the greatest. What is no number is black.
    """
    values = np.nan_to_num(np.asarray(picture, dtype=np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 65535:
        values = (values - low) * (255 / (high - low)) if high > low else np.full_like(values, 255.0)
    elif high > 255:
        values = values / 257
    elif picture.mode == "F" and high <= 1:
        values = values * 255
    return Image.fromarray(np.round(values).astype(np.uint8), "L")


def _transparent(picture: Image.Image) -> bool:
    return picture.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in picture.info


def _differs(picture: Image.Image) -> bool:
    turned = picture.getexif().get(_ORIENTATION, 1) not in (0, 1)
    return turned or picture.mode[0] in "IF" or _transparent(picture)


# -- which picture it was ----------------------------------------------------------------------------------------------
def media_name(record: Record, root: Path) -> str:
    """What tells a record's media from others by name: the path below `root`, or a digest of encoded pictures."""
    if isinstance(record.image, bytes):
        return _digest(len(record.image), record.image)
    path = record.image or record.video
    return "" if path is None else os.path.relpath(path, root)


def media_digest(record: Record) -> str | None:
    """What tells a file's content from another's under the same name: its size and parts of it.

    Files up to 192 KiB count in full, of larger ones the beginning, middle and end.

    Returns:
        16 hex digits; None without a file.
    """
    path = record.video if record.video is not None else record.image
    if not isinstance(path, Path):
        return None
    try:
        state = path.stat()
        return _file_digest(path, state.st_size, state.st_mtime_ns)
    except (OSError, ValueError):
        return None


@lru_cache(maxsize=1 << 17)
def _file_digest(path: Path, size: int, changed: int) -> str:
    """`changed` is only there for the cache: many records ask about one picture, in many cells."""
    with path.open("rb") as handle:
        if size <= 3 * _PIECE:
            return _digest(size, handle.read())
        pieces = []
        for start in (0, (size - _PIECE) // 2, size - _PIECE):
            handle.seek(start)
            pieces.append(handle.read(_PIECE))
    return _digest(size, *pieces)


def _digest(size: int, *pieces: bytes) -> str:
    total = hashlib.blake2b(str(size).encode(), digest_size=8)
    for piece in pieces:
        total.update(piece)
    return total.hexdigest()
