"""The fields of a chat completion request, OpenAI's and ours. What is not listed is refused rather than ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ImageUrl(_Strict):
    """Where a picture is; `detail` has no meaning here."""

    url: str
    detail: str | None = None


class TextPart(_Strict):
    """A piece of text."""

    type: Literal["text"]
    text: str


class ImagePart(_Strict):
    """A picture."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(_Strict):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None


class StreamOptions(_Strict):
    """What a stream ends with."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class Pruning(_Strict):
    """Our extra field: how this request's visual tokens are pruned. What is left out is the server's default.

    Attributes:
        method: e.g. "fastv:keep=64,layer=2", or "none" for the dense model.
        keep: the method's budget: a number of tokens, or a share below 1. In a list, too, 1 is one token, and 1.0 all.
        debias: "auto", "none", "padding", or a preset's name.
    """

    method: str | None = None
    keep: float | int | list[float | int] | None = None
    debias: str | None = None


class ChatRequest(_Strict):
    """A chat completion request.

    `temperature` is 0 unless given: answers are greedy. Fields of the second block have no effect; those of the third
    may only have the value that has none.
    """

    model: str
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    evengaze: Pruning = Pruning()

    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    n: Literal[1] | None = None
    frequency_penalty: float | None = Field(default=None, ge=0, le=0)
    presence_penalty: float | None = Field(default=None, ge=0, le=0)
    logprobs: Literal[False] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    tool_choice: Literal["none"] | None = None

    @model_validator(mode="after")
    def _stops(self) -> ChatRequest:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > 4 or not all(0 < len(stop) <= 256 for stop in stops):
            raise ValueError("stop takes up to four strings of 1 to 256 characters")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """Where answers end."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def asked_tokens(self) -> int | None:
        """The longest answer that was asked for."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
