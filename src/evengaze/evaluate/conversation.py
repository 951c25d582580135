"""How a question becomes a prompt: LLaVA's conversation templates (`llava/conversation.py`) or the model's own.

LLaVA's and Video-LLaVA's scripts wrap every question in one turn of a fixed template, and published numbers depend on
its wording.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from evengaze.errors import ConfigError
from evengaze.evaluate.templates import render_template

Style = Literal["auto", "official", "chat"]
"""Which prompt: the benchmark's official template, the processor's chat template, or "auto", see `resolve`."""


def render(template: str, text: str, marker: str = "<image>") -> str:
    """Write a question in one of LLaVA's templates.

    Args:
        template: one of `evengaze.evaluate.templates.TEMPLATES`.
        text: the whole user text.
        marker: what stands for the picture, in front of the text; "" for a question without one.

    Raises:
        ConfigError: there is no such template.
    """
    return render_template(template, f"{marker}\n{text}" if marker else text)


Message = dict[str, Any]
"""A turn as chat templates take it: "role" and "content", a list of {"type": "image"} and {"type": "text", "text"}."""


def chat(processor: Any, text: str, media: Sequence[str] = ()) -> str:
    """Write a question in the chat template that the model's processor carries, behind each "image" or "video"."""
    parts = [*({"type": kind} for kind in media), {"type": "text", "text": text}]
    return converse(processor, [{"role": "user", "content": parts}])


def converse(processor: Any, messages: Sequence[Message]) -> str:
    """Write several turns in the chat template that the model's processor carries, up to where the answer begins."""
    return str(processor.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False))


def knows_role(processor: Any, role: str) -> bool:
    """Whether a chat template writes a turn of a role otherwise than one of the assistant's, and takes it at all."""
    question = {"role": "user", "content": [{"type": "text", "text": "?"}]}

    def written(name: str) -> str | None:
        try:
            return converse(processor, [{"role": name, "content": [{"type": "text", "text": "probe"}]}, question])
        except Exception:  # templates refuse with whatever their author chose
            return None

    found = written(role)
    return found is not None and "probe" in found and found != written("assistant")


def resolve(style: Style, processor: Any, model_type: str) -> Literal["official", "chat"]:
    """Decide which prompts a model gets.

    "auto" gives LLaVA's templates to models that were trained with them: those whose own chat template is Vicuna's
    (`USER: ... ASSISTANT:`), and LLaVA models without one. All others get their own chat template.

    Raises:
        ConfigError: the chat template is asked for or needed, but the processor has none.
    """
    has_own = getattr(processor, "chat_template", None) is not None
    if style == "official" or (style == "auto" and not has_own and model_type in ("llava", "video_llava")):
        return "official"
    if not has_own:
        raise ConfigError(
            "the model's processor has no chat template. Use prompt='official' for LLaVA's conversation template, or "
            "put a chat_template.jinja into the model's folder."
        )
    if style == "chat":
        return "chat"
    probe = chat(processor, "?")
    return "official" if "USER:" in probe and "ASSISTANT:" in probe else "chat"
