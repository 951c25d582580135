"""Pictures that strangers send: how large they are is found out before they are decoded."""

from __future__ import annotations

import warnings
from io import BytesIO
from typing import TYPE_CHECKING

from PIL import Image as images

from evengaze.errors import DataError
from evengaze.evaluate.benchmarks.types import Record
from evengaze.evaluate.media import read_media

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""What is taken. Others need programs of their own (EPS) or are rare enough to be an attack."""
PIXELS = 40_000_000
"""Most pixels of a picture, unless said otherwise: more than today's cameras make."""


def picture_of(data: bytes, *, pixels: int = PIXELS, official: bool = False) -> Image:
    """The RGB picture that a file's bytes hold.

    Args:
        data: the whole file.
        pixels: the most that it may have.
        official: convert as LLaVA's scripts do (see `evengaze.evaluate.media`).

    Raises:
        DataError: it is no picture of one of `FORMATS`, is damaged, or has too many pixels.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", images.DecompressionBombWarning)  # the limit below is the stricter one
        try:
            with images.open(BytesIO(data), formats=FORMATS) as found:
                width, height = found.size
        except images.DecompressionBombError:
            raise DataError(f"the picture has more than {pixels:,} pixels; send a smaller one") from None
        except Exception:  # decoders of damaged files raise whatever they stumble over
            raise DataError(
                f"this is no picture that can be read; send one of {', '.join(FORMATS)}, not damaged"
            ) from None
        if width * height > pixels:
            raise DataError(
                f"the picture has {width} x {height} pixels, more than the {pixels:,} allowed; send a smaller one"
            )
        try:
            picture: Image = read_media(Record("sent", 0, "", image=data), official=official).content
        except DataError:
            raise DataError("the picture is damaged: its size can be read, but not its pixels; send it again") from None
    return picture
