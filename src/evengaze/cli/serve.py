"""`evengaze serve`: a pruned model behind an endpoint that OpenAI's clients can talk to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from evengaze.cli import output
from evengaze.cli.options import loads_model
from evengaze.errors import ConfigError

if TYPE_CHECKING:
    from evengaze.evaluate.spec import ModelSpec


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("serve")(serve)


@loads_model
def serve(
    spec: ModelSpec,
    method: Annotated[
        str, typer.Option("--method", "-m", help="For requests that name none, e.g. fastv:keep=128; or none.")
    ] = "fastv:keep=0.25",
    debias: Annotated[
        str, typer.Option(help="auto (the best that is known for the model), none, padding, a preset, or curve.json.")
    ] = "auto",
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    name: Annotated[str | None, typer.Option(help="What clients call the model.")] = None,
    key: Annotated[
        str | None, typer.Option("--api-key", envvar="EVENGAZE_API_KEY", help="Ask clients for this key.")
    ] = None,
    fetch: Annotated[
        list[str] | None,
        typer.Option("--fetch-from", help="Host that pictures may be fetched from; '*': any public one. Repeatable."),
    ] = None,
    graphs: Annotated[bool, typer.Option("--graphs", help="Replay the layers as CUDA graphs.")] = False,
    batch: Annotated[int, typer.Option(min=1, help="Most requests answered together.")] = 8,
    wait: Annotated[float, typer.Option(min=0, help="Seconds that a request waits for others.")] = 0.02,
    queue: Annotated[int, typer.Option(min=1, help="Most requests in the server; others get status 429.")] = 64,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds until a request is given up.")] = 120.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 1024,
    max_images: Annotated[int, typer.Option(min=1, help="Most pictures of a request.")] = 8,
    max_pixels: Annotated[int, typer.Option(min=1, help="Most pixels of a picture.")] = 40_000_000,
    max_megabytes: Annotated[int, typer.Option(min=1, help="Largest request.")] = 32,
    ray: Annotated[bool, typer.Option("--ray", help="Serve by replicas on Ray.")] = False,
    ray_address: Annotated[
        str, typer.Option(help="'local' starts Ray here; 'auto' or an address: a cluster.")
    ] = "local",
    ray_replicas: Annotated[str, typer.Option(help="Copies of the model: 2; or 1:4, as many as are needed.")] = "1",
    ray_fronts: Annotated[int, typer.Option(min=1, help="Processes that let requests in.")] = 1,
    ray_gpus: Annotated[float | None, typer.Option(help="GPUs a copy (default: 1 if the cluster has any).")] = None,
    ray_cpus: Annotated[float, typer.Option(help="CPUs a copy.")] = 1,
) -> None:
    """Serve OpenAI's chat completions, pruned. A request may choose its own method in the extra field "evengaze"."""
    from evengaze.serve.settings import Limits, Settings
    from evengaze.serve.start import run

    limits = Limits(
        body=max_megabytes << 20,
        images=max_images,
        pixels=max_pixels,
        new_tokens=max_new_tokens,
        queue=queue,
        seconds=timeout,
        batch=batch,
        wait=wait,
    )
    settings = Settings(spec, name, method, debias, limits, tuple(fetch or ()), graphs, key)
    if not ray:
        run(settings, host, port)
        return
    from evengaze.serve import ray_serve

    if output.voice.plugins:
        raise ConfigError(
            "--plugin is read by this process alone, not by replicas on Ray: name the method as my_module:MyMethod, of "
            "a module that every node can import"
        )
    scale = ray_serve.Scale.parse(ray_replicas, gpus=ray_gpus, cpus=ray_cpus, fronts=ray_fronts)
    ray_serve.run(settings, scale, ray_address, host, port)
