"""What a server is started with."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from evengaze.errors import ConfigError
from evengaze.evaluate.predictor import ModelSpec
from evengaze.evaluate.uploads import PIXELS


@dataclass(frozen=True)
class Limits:
    """What a client may ask for, and how long others wait for it.

    Attributes:
        body: bytes of a request.
        images: pictures of a request.
        pixels: of one picture.
        new_tokens: of an answer.
        context: tokens of prompt and answer together; None is what the model was made for.
        queue: requests that are in the server at once, those being answered included.
        seconds: from a request's arrival to the end of its answer.
        batch: requests of one batch.
        wait: seconds that the first request of a batch waits for others, if the model is free.
    """

    body: int = 32 << 20
    images: int = 8
    pixels: int = PIXELS
    new_tokens: int = 1024
    context: int | None = None
    queue: int = 64
    seconds: float = 120.0
    batch: int = 8
    wait: float = 0.02

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if value is not None and (value < 0 or (value == 0 and f.name != "wait")):
                raise ConfigError(f"the limit {f.name} must be positive, not {value}")


@dataclass(frozen=True)
class Settings:
    """A server's model, its defaults and limits. Picklable, so that every replica makes the same.

    Attributes:
        spec: what to load.
        name: what clients call the model; None is the last part of its path.
        method: for requests that name none, as `evengaze.methods.parse` takes it.
        debias: for requests that name none: "auto" (see `evengaze.evaluate.auto`), "none", or what `Debias.parse`
            takes.
        limits: see there.
        hosts: from which http(s) pictures are fetched; "*" is every public address. Empty: none are.
        graphs: capture the layers between stages as CUDA graphs; see `Pruner.__call__`.
        key: what clients must send as their API key; None lets everyone in.
    """

    spec: ModelSpec
    name: str | None = None
    method: str = "fastv:keep=0.25"
    debias: str = "auto"
    limits: Limits = field(default_factory=Limits)
    hosts: tuple[str, ...] = ()
    graphs: bool = False
    key: str | None = field(default=None, repr=False)

    @property
    def model(self) -> str:
        """What clients call the model."""
        return self.name or self.spec.name
