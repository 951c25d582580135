"""The same application on Ray Serve (extra `evengaze[ray]`): replicas on one machine or many, that come and go.

Fronts let requests in and hand them on (`evengaze.serve.front`); each replica of the model is the whole application of
`evengaze.serve.app`, which batches what reaches it. Every node must see the model under the same path.
"""

from __future__ import annotations

import asyncio
import re
import signal
import sys
import threading
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from evengaze.cluster import connect, last_line
from evengaze.errors import ConfigError, DataError
from evengaze.evaluate.predictor import ModelSpec
from evengaze.extras import require
from evengaze.serve.ports import check_free
from evengaze.serve.settings import Limits, Settings

APP, FRONT, MODEL = "evengaze", "front", "model"
_PATIENCE = 5.0
"""Seconds that fronts and replicas have to say how they are."""
_PACKAGES = ("ray", "fastapi", "uvicorn", "prometheus_client")


@dataclass(frozen=True)
class Scale:
    """How many replicas of the model, and what each takes.

    Attributes:
        least: replicas that are always there.
        most: replicas at times of many requests; as many as make `Limits.batch` requests for each.
        gpus: of a replica; may be a fraction. None takes one if the cluster has any.
        cpus: of a replica.
        fronts: processes that let requests in.
    """

    least: int = 1
    most: int = 1
    gpus: float | None = None
    cpus: float = 1.0
    fronts: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise ConfigError(f"{self.least}:{self.most} replicas: give a number of 1 or more, or two as in 1:4")
        if self.cpus <= 0 or self.fronts < 1 or (self.gpus or 0.0) < 0:
            raise ConfigError("a replica takes 0 GPUs or more, and more than 0 CPUs; there is 1 front or more")

    def __str__(self) -> str:
        several = f"{self.least} to {self.most} replicas" if self.least < self.most else f"{self.least} replicas"
        return "1 replica" if self.most == 1 else several

    @classmethod
    def parse(cls, replicas: str, **others: Any) -> Scale:
        """A scale from "2", or from "1:4" for 1 to 4 replicas."""
        least, _, most = replicas.partition(":")
        try:
            return cls(int(least), int(most or least), **others)
        except ValueError:
            raise ConfigError(f"{replicas!r} replicas: give a number of 1 or more, or two as in 1:4") from None


class Replica:
    """One copy of the model, and the application around it."""

    async def __init__(self, settings: Settings, threads: int | None) -> None:  # type: ignore[misc]  # Ray awaits it
        import torch

        from evengaze.serve.app import build_app

        if threads is not None:
            torch.set_num_threads(threads)
        self._app = build_app(settings)
        self._running = self._app.router.lifespan_context(self._app)
        await self._running.__aenter__()

    async def answer(self, head: Mapping[str, Any], body: bytes) -> AsyncIterator[Any]:
        """The messages of the application's answer."""
        from evengaze.serve.asgi import messages

        async for message in messages(self._app, head, body):
            yield message

    async def alive(self) -> bool:
        """Whether questions are answered."""
        return bool(self._app.state.service.worker.alive)

    async def check_health(self) -> None:
        """Ray starts another replica where this raises."""
        if not await self.alive():
            raise RuntimeError("the model's thread has ended")

    async def metrics(self) -> tuple[str, str]:
        """Its name, and what it has counted."""
        from prometheus_client import generate_latest

        return _replica_name(), generate_latest(self._app.state.metrics.registry).decode()


class Front:
    """What clients meet; its application is built by `_ingress`, and finds the model by its name."""

    def __init__(self, model: Any) -> None:
        """Takes the model's handle, which makes both one application."""

    async def alive(self) -> bool:
        """Whether requests are let in."""
        return True

    async def metrics(self) -> tuple[str, str]:
        """Its name, and what it has counted."""
        from evengaze.serve.front import front_text

        return _replica_name(), front_text()


def application(settings: Settings, scale: Scale) -> Any:
    """The Ray Serve application.

    Raises:
        MissingExtraError: Ray Serve is not installed.
    """
    require("ray", "evengaze serve --ray", *_PACKAGES)
    from ray import serve

    limits, gpus = settings.limits, scale.gpus or 0.0
    if scale.least == scale.most:
        size: dict[str, Any] = {"num_replicas": scale.least}
    else:
        size = {
            "autoscaling_config": {
                "min_replicas": scale.least,
                "max_replicas": scale.most,
                "target_ongoing_requests": limits.batch,
            }
        }
    model = serve.deployment(Replica).options(
        name=MODEL,
        # Some more than a batch: what shares no batch with the first that wait must not keep the model idle.
        max_ongoing_requests=min(limits.queue, 4 * limits.batch),
        graceful_shutdown_timeout_s=limits.seconds + 1,
        max_constructor_retry_count=2,
        ray_actor_options={"num_gpus": gpus, "num_cpus": scale.cpus},
        **size,
    )
    front = serve.deployment(serve.ingress(_ingress(settings))(Front)).options(
        name=FRONT,
        num_replicas=scale.fronts,
        max_ongoing_requests=2 * limits.queue + 16,  # the gate says what is too much
        graceful_shutdown_timeout_s=limits.seconds + 2,
        ray_actor_options={"num_cpus": 0},
    )
    return front.bind(model.bind(settings, None if gpus else max(1, int(scale.cpus))))


def build(args: dict[str, Any]) -> Any:
    """The application from the arguments of a Serve config file, `import_path: evengaze.serve.ray_serve:build`.

    Args:
        args: `model`; whatever else `ModelSpec`, `Settings`, `Limits` and `Scale` have, by its name.

    Raises:
        ConfigError: there is no such argument.
    """
    left = {"source": "demo", **args}
    left["source"] = left.pop("model", left["source"])
    made: dict[type, Any] = {}
    for kind in (ModelSpec, Limits, Scale):
        made[kind] = kind(**{f.name: left.pop(f.name) for f in fields(kind) if f.name in left})
    names = {f.name for f in fields(Settings)} - {"spec", "limits"}
    if unknown := set(left) - names:
        raise ConfigError(f"unknown arguments: {', '.join(sorted(unknown))}")
    if "hosts" in left:
        left["hosts"] = tuple(left["hosts"])
    return application(Settings(made[ModelSpec], limits=made[Limits], **left), made[Scale])


def run(settings: Settings, scale: Scale, address: str, host: str, port: int) -> None:
    """Serve on Ray until interrupted.

    Args:
        settings: what to serve.
        scale: how often.
        address: see `evengaze.cluster.connect`.
        host: where Ray's proxies listen.
        port: where Ray's proxies listen.

    Raises:
        MissingExtraError: Ray Serve is not installed.
        ConfigError: there is no such cluster, or it is too small; or the port is taken.
        DataError: the replicas cannot start.
    """
    require("ray", "evengaze serve --ray", *_PACKAGES)
    check_free(host, port)
    gpus = connect(address, gpus=scale.gpus, cpus=scale.cpus)
    import ray
    from ray import serve

    scale = Scale(scale.least, scale.most, gpus, scale.cpus, scale.fronts)
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    serve.start(
        proxy_location="HeadOnly" if address == "local" else "EveryNode", http_options={"host": host, "port": port}
    )
    try:
        try:
            serve.run(application(settings, scale), name=APP, route_prefix="/")
        except RuntimeError as error:
            raise DataError(f"the replicas cannot start: {_why(error)}") from None
        print(f"{settings.model} at http://{host}:{port}/v1, {scale}", file=sys.stderr, flush=True)
        stopped.wait()
    finally:
        serve.delete(APP)
        if address == "local":
            ray.shutdown()


def _ingress(settings: Settings) -> Any:
    """What builds a front's application in the front's own process."""

    def build_here() -> Any:
        from ray import exceptions, serve
        from ray.serve.exceptions import DeploymentUnavailableError

        from evengaze.serve.front import build_front

        here = serve.get_replica_context().app_name
        model, front = (serve.get_deployment_handle(name, app_name=here) for name in (MODEL, FRONT))
        answer = model.answer.options(stream=True)

        async def ask(handle: Any, method: str) -> list[Any]:
            try:
                found = await handle.broadcast(method).results_async(timeout_s=_PATIENCE, return_exceptions=True)
            except (TimeoutError, DeploymentUnavailableError):
                return []
            return [one for one in found if not isinstance(one, BaseException)]

        async def everywhere(method: str) -> tuple[list[Any], list[Any]]:
            return await asyncio.gather(ask(front, method), ask(model, method))

        died = (exceptions.RayActorError, exceptions.ObjectLostError, exceptions.WorkerCrashedError)
        return build_front(settings, answer.remote, everywhere, died)

    return build_here


def _why(error: Exception) -> str:
    """What the first deployment that does not start says."""
    from ray import serve

    state = serve.status().applications.get(APP)
    said = [one.message for one in state.deployments.values()] if state is not None else []
    errors = re.findall(r"^\S*(?:Error|Exception): .+$", "\n".join(said), re.M)
    return errors[-1] if errors else last_line(error)


def _replica_name() -> str:
    from ray import serve

    return str(serve.get_replica_context().replica_tag)
