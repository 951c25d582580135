"""The conversation templates of LLaVA and Video-LLaVA (`llava/conversation.py`), for one question.

The ten image benchmarks use `vicuna_v1`, the video ones `llava_v1`, which says "human" for "user". The others
belong to LLaVA checkpoints on other language models and to older ones.
"""

from __future__ import annotations

from evengaze.errors import ConfigError

_HELPFUL = (
    "A chat between a curious {who} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {who}'s questions."
)
_LLAMA_2 = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\nIf a question does not make "
    "any sense, or is not factually coherent, explain why instead of answering something not correct. If "
    "you don't know the answer to a question, please don't share false information."
)
_V0_QUESTION = "What are the key differences between renewable and non-renewable energy sources?"
_V0_ANSWER = (
    "Renewable energy sources are those that can be replenished naturally in a relatively short amount of time, such "
    "as solar, wind, hydro, geothermal, and biomass. Non-renewable energy sources, on the other hand, are finite and "
    "will eventually be depleted, such as coal, oil, and natural gas. Here are some key differences between "
    "renewable and non-renewable energy sources:\n"
    "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable energy sources are "
    "finite and will eventually run out.\n"
    "2. Environmental impact: Renewable energy sources have a much lower environmental impact than non-renewable "
    "sources, which can lead to air and water pollution, greenhouse gas emissions, and other negative effects.\n"
    "3. Cost: Renewable energy sources can be more expensive to initially set up, but they typically have lower "
    "operational costs than non-renewable sources.\n"
    "4. Reliability: Renewable energy sources are often more reliable and can be used in more remote locations than "
    "non-renewable sources.\n"
    "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to different situations and "
    "needs, while non-renewable sources are more rigid and inflexible.\n"
    "6. Sustainability: Renewable energy sources are more sustainable over the long term, while non-renewable sources "
    "are not, and their depletion can lead to economic and social instability.\n"
)
# What stands before the question, between question and answer, in place of both separators when the question is empty.
_FRAMES: dict[str, tuple[str, str, str]] = {
    "vicuna_v1": (f"{_HELPFUL.format(who='user')} USER:", " ASSISTANT:", "ASSISTANT:"),
    "llava_v1": (f"{_HELPFUL.format(who='human')} USER:", " ASSISTANT:", "ASSISTANT:"),
    "v0": (
        f"{_HELPFUL.format(who='human')}###Human: {_V0_QUESTION}###Assistant: {_V0_ANSWER}###Human:",
        "###Assistant:",
        "Assistant:",
    ),
    "mpt": (
        "<|im_start|>system\nA conversation between a user and an LLM-based AI assistant. "
        "The assistant gives helpful and honest answers.<|im_end|><|im_start|>user\n",
        "<|im_end|><|im_start|>assistant\n",
        "<|im_start|>assistant\n",
    ),
    "chatml_direct": (
        "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n",
        "<|im_end|><|im_start|>assistant\n",
        "<|im_start|>assistant\n",
    ),
    "llama_2": (f"[INST] <<SYS>>\n{_LLAMA_2}\n<</SYS>>\n\n", " [/INST]", ""),
    "mistral_instruct": ("[INST] ", " [/INST]", ""),
    "plain": ("", "\n", ""),
}
_FRAMES["v1"] = _FRAMES["vicuna_v1"]
# These put a space between the role and what it says.
_SPACED = ("vicuna_v1", "v1", "llava_v1", "v0")
TEMPLATES = tuple(_FRAMES)
"""Names of the templates."""


def render_template(name: str, message: str) -> str:
    """Write the prompt for one question.

    Args:
        name: One of `TEMPLATES`.
        message: The user's message, image markers included.

    Raises:
        ConfigError: No such template, or an empty message in one that needs some.
    """
    if name not in _FRAMES:
        raise ConfigError(f"no conversation template {name!r}; there are {', '.join(TEMPLATES)}.")
    before, after, empty = _FRAMES[name]
    if message:
        return f"{before}{' ' if name in _SPACED else ''}{message}{after}"
    if name in ("llama_2", "mistral_instruct"):
        raise ConfigError(f"the conversation template {name} needs a message.")
    return before + empty
