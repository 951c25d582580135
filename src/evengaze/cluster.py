"""Reaching a Ray cluster (extra `evengaze[ray]`), for the evaluation and for the server alike."""

from __future__ import annotations

import os

from evengaze.errors import ConfigError
from evengaze.extras import require


def connect(address: str, *, gpus: float | None, cpus: float) -> float:
    """Connect to a cluster, or start Ray on this machine.

    Args:
        address: "local" starts Ray on this machine, "auto" finds a running cluster, else the cluster's address.
        gpus: GPUs that a copy of the model takes; None is one if the cluster has any.
        cpus: CPUs that a copy takes.

    Returns:
        GPUs that a copy takes.

    Raises:
        MissingExtraError: Ray is not installed.
        ConfigError: there is no cluster at the address, or it has less in all than a copy takes.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent elsewhere unless somebody wants it
    require("ray", "running on Ray", "ray")
    import ray

    if not ray.is_initialized():
        try:
            ray.init(address=None if address == "local" else address, log_to_driver=False, logging_level="warning")
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"ray {address}: no Ray cluster there ({error}). Use 'local', or start one: `ray start --head`."
            ) from None
    have = ray.cluster_resources()
    taken = gpus if gpus is not None else (1.0 if have.get("GPU", 0) >= 1 else 0.0)
    if taken > have.get("GPU", 0) or cpus > have.get("CPU", 0):
        raise ConfigError(
            f"ray {address}: a copy of the model asks for {taken:g} GPUs and {cpus:g} CPUs; the cluster "
            f"has {have.get('GPU', 0):g} and {have.get('CPU', 0):g} in all. Lower ray_gpus or ray_cpus."
        )
    return taken


def last_line(error: Exception) -> str:
    """What a traceback from another machine ends with."""
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
