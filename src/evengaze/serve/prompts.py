"""From a request's messages to the model's prompt and pictures."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

from evengaze.errors import DataError
from evengaze.evaluate.conversation import Message as Turn
from evengaze.evaluate.conversation import converse, knows_role
from evengaze.evaluate.predictor import Predictor
from evengaze.serve.errors import ApiError
from evengaze.serve.pictures import read_picture
from evengaze.serve.schema import ImagePart, Message, Part, TextPart
from evengaze.serve.settings import Settings

if TYPE_CHECKING:
    from PIL.Image import Image

TEMPLATE = "vicuna_v1"
"""Of models that are asked as LLaVA's scripts do; see `evengaze.evaluate.conversation`."""


class Prompts:
    """Writes prompts for one model.

    A single question becomes what `evengaze run` asks, so that both get the same answer: its pictures come first,
    unless text stands on both sides of one. Several turns and system messages take the model's own chat template.
    """

    def __init__(self, predictor: Predictor, settings: Settings) -> None:
        self._predictor, self._settings = predictor, settings
        processor = predictor.processor
        self._has_template = getattr(processor, "chat_template", None) is not None
        self._has_system = self._has_template and knows_role(processor, "system")

    def of(self, messages: list[Message]) -> tuple[str, list[Image]]:
        """The prompt, and its pictures in order. Decodes and perhaps fetches them: not for the event loop.

        Raises:
            ApiError: a picture is none or too large, or the model cannot be told the messages.
        """
        turns = [_turn(message) for message in messages]
        if turns[-1]["role"] != "user":
            raise ApiError(400, "the last message must be the user's", param="messages")
        self._check_text(turns)
        urls = [part["image_url"] for turn in turns for part in turn["content"] if part["type"] == "image"]
        limits = self._settings.limits
        if len(urls) > limits.images:
            raise ApiError(400, f"{len(urls)} pictures; at most {limits.images} are allowed", param="messages")
        official = self._predictor.spec.official
        pictures = [read_picture(url, limits, self._settings.hosts, official=official) for url in urls]
        return self._written(turns), pictures

    def _check_text(self, turns: list[Turn]) -> None:
        for turn in turns:
            for part in turn["content"]:
                try:
                    self._predictor.refuse_markers(part.get("text", ""))
                except DataError as error:
                    raise ApiError(400, str(error), param="messages") from None

    def _written(self, turns: list[Turn]) -> str:
        parts = turns[0]["content"]
        if len(turns) == 1 and not _interleaved(parts):
            texts = [part["text"] for part in parts if part["type"] == "text"]
            media = ["image" for part in parts if part["type"] == "image"]
            return self._predictor.ask("\n".join(texts), media, TEMPLATE)
        if not self._has_template:
            raise ApiError(
                400,
                "the model has no chat template: send one message of the user's, its pictures in front of the text",
                param="messages",
            )
        if not self._has_system and any(turn["role"] == "system" for turn in turns):
            raise ApiError(
                400, "the model's chat template knows no system messages; put it into the user's", param="messages"
            )
        bare = [{**turn, "content": [_bare(part) for part in turn["content"]]} for turn in turns]
        try:
            return converse(self._predictor.processor, bare)
        except Exception as error:  # templates refuse with whatever their author chose
            raise ApiError(
                400, f"the model's chat template refuses these messages: {error}", param="messages"
            ) from None


def _turn(message: Message) -> Turn:
    parts: list[Part] = (
        [TextPart(type="text", text=message.content)] if isinstance(message.content, str) else message.content
    )
    if not parts:
        raise ApiError(400, "a message has no content", param="messages")
    role = "system" if message.role == "developer" else message.role
    if role != "user" and any(isinstance(part, ImagePart) for part in parts):
        raise ApiError(400, f"a picture in a message of the {role}; only the user's may have some", param="messages")
    return {"role": role, "content": [_part(part) for part in parts]}


def _part(part: Part) -> dict[str, Any]:
    if isinstance(part, ImagePart):
        return {"type": "image", "image_url": part.image_url.url}
    return {"type": "text", "text": part.text}


def _bare(part: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in part.items() if key != "image_url"}


def _interleaved(parts: list[dict[str, Any]]) -> bool:
    """Whether a picture has text on both sides, or text one on both of its sides."""
    kinds = [part["type"] for part in parts]
    return len(list(groupby(kinds))) > 2
