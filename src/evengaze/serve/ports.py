"""Whether a port can be listened at: found out before a model is loaded for it."""

from __future__ import annotations

import socket

from evengaze.errors import ConfigError


def check_free(host: str, port: int) -> None:
    """Raise a ConfigError if a port is taken, or is not ours to take; 0 is any free one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: what has just ended is free
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"port {port} of {host} cannot be listened at ({error.strerror}): give another") from None
