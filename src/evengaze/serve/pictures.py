"""The pictures of a request: data URLs, and addresses if the server may fetch them."""

from __future__ import annotations

import base64
import binascii
import http.client
import ipaddress
import socket
import ssl
from collections.abc import Collection
from time import monotonic
from typing import TYPE_CHECKING
from urllib.parse import unquote_to_bytes, urlsplit

from evengaze.errors import DataError
from evengaze.evaluate.uploads import picture_of
from evengaze.serve.errors import ApiError
from evengaze.serve.settings import Limits

if TYPE_CHECKING:
    from PIL.Image import Image

_SECONDS = 10.0
"""To connect, for each read, and for a picture in all."""
_PIECE = 1 << 16


def read_picture(url: str, limits: Limits, hosts: Collection[str] = (), *, official: bool = False) -> Image:
    """The RGB picture behind a URL.

    Args:
        url: "data:image/png;base64,..." or http(s).
        limits: the server's.
        hosts: from which may be fetched; "*" is every public address.
        official: convert as LLaVA's scripts do.

    Raises:
        ApiError: it is none, may not be fetched, or is too large.
    """
    scheme = url[:8].partition(":")[0].lower()
    try:
        if scheme == "data":
            data = _inline(url)
        elif scheme in ("http", "https"):
            data = fetch(url, limits.body, hosts)
        else:
            raise DataError("a picture's url must begin with data:" + (", http: or https:" if hosts else ""))
        return picture_of(data, pixels=limits.pixels, official=official)
    except DataError as error:
        raise ApiError(400, str(error), param="messages", code="invalid_image") from None


def _inline(url: str) -> bytes:
    head, comma, body = url.partition(",")
    if not comma:
        raise DataError("the data url has no comma; it must look like data:image/png;base64,iVBORw0...")
    if not head.lower().endswith(";base64"):
        return unquote_to_bytes(body)
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"the data url is no base64 ({error})") from None


def fetch(url: str, size: int, hosts: Collection[str]) -> bytes:
    """What a GET of an address answers. Redirects are not followed.

    With "*" the host's address must be public, and the very address that was looked at is connected to: a name cannot
    point elsewhere in between. Hosts that are named may have any address.

    Args:
        url: http or https.
        size: most bytes.
        hosts: allowed names.

    Raises:
        DataError: not allowed, or not to be had.
    """
    if not hosts:
        raise DataError("this server fetches no pictures; send them as data: urls")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as error:
        raise DataError(f"this is no address ({error})") from None
    named = host.lower() in {h.lower() for h in hosts}
    if not named and "*" not in hosts:
        raise DataError(f"this server fetches no pictures from {host!r}")
    try:
        address = _address(host, port, anywhere=named)
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        return _get(parts.scheme == "https", host, port, address, path, size)
    except DataError:
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise DataError(f"the picture cannot be fetched from {host!r} ({type(error).__name__})") from None


def _address(host: str, port: int, *, anywhere: bool) -> str:
    found = [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    if not anywhere and not all(ipaddress.ip_address(a.partition("%")[0]).is_global for a in found):
        raise DataError(f"{host!r} has no public address")
    return found[0]


def _get(secure: bool, host: str, port: int, address: str, path: str, size: int) -> bytes:
    """GET from one address, of a host whose certificate is checked by name."""
    end = monotonic() + _SECONDS
    connection = http.client.HTTPConnection(host, port, timeout=_SECONDS)
    try:
        plain = socket.create_connection((address, port), timeout=_SECONDS)
        connection.sock = ssl.create_default_context().wrap_socket(plain, server_hostname=host) if secure else plain
        connection.request("GET", path, headers={"Accept": "image/*", "Accept-Encoding": "identity"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise DataError(f"the picture cannot be fetched: {host!r} answered {answer.status}")
        pieces, total = [], 0
        while piece := answer.read1(_PIECE):
            total += len(piece)
            if total > size:
                raise DataError(f"the picture at {host!r} has more than {size:,} bytes")
            if monotonic() > end:
                raise DataError(f"{host!r} did not send the picture within {_SECONDS:g} seconds")
            pieces.append(piece)
        return b"".join(pieces)
    finally:
        connection.close()
