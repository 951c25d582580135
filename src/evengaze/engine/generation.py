"""What a call of `generate` is asked to do: what is refused of it before anything runs, and where its prompt ends."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from evengaze.compat import cache_in
from evengaze.errors import ConfigError
from evengaze.models.base import attending_layers
from evengaze.protocol import Method


class Request:
    """One call of `generate`.

    Args:
        model: the model.
        arguments: of the call, by name; what `generate` takes as keywords of its own choice is under "kwargs".
    """

    def __init__(self, model: Any, arguments: Mapping[str, Any]) -> None:
        self._model, self._arguments = model, arguments
        self._given: Mapping[str, Any] = arguments.get("kwargs", {})

    def option(self, name: str) -> Any:
        """A generation parameter: as a keyword, else from the call's configuration, else from the model's."""
        if name in self._given:
            return self._given[name]
        configs = (self._arguments.get("generation_config"), getattr(self._model, "generation_config", None))
        return next((v for c in configs if (v := getattr(c, name, None)) is not None), None)

    @property
    def loop(self) -> bool:
        """Whether it was given a decoding loop, in place of transformers' own."""
        return callable(self._arguments.get("custom_generate"))

    @property
    def assistant(self) -> Any:
        """The model that drafts; None without one."""
        return self._arguments.get("assistant_model")

    @property
    def prompt(self) -> Tensor | None:
        """(B, L) token ids or (B, L, d) embeddings of the prompt; None if `generate` makes them up."""
        for name in ("inputs_embeds", "input_ids"):
            value = self._given.get(name)
            if isinstance(value, Tensor) and value.dim() >= 2 and value.shape[1]:
                return value
        value = self._arguments.get("inputs")
        return value if isinstance(value, Tensor) and value.dim() >= 2 else None

    @property
    def cache(self) -> Any:
        """The cache that the call goes on with; None without one."""
        return cache_in((), self._given)

    @property
    def brings_pictures(self) -> bool:
        """Whether it is given pictures."""
        return brings_pictures(self._given)

    @property
    def drafted_from(self) -> int | None:
        """Length of the prompt if candidates of a draft may follow it in the first forward call; None if none do."""
        drafts = self.assistant is not None or self.option("prompt_lookup_num_tokens") is not None
        return None if not drafts or self.prompt is None else self.prompt.shape[1]

    @property
    def drafts(self) -> bool:
        """Whether the call itself makes a draft for another model's `generate`."""
        return bool(self.option("is_assistant"))

    # -- what is refused ----------------------------------------------------------------------------------------------
    def check(
        self, pruner: Method, decoder: nn.Module, layers: Sequence[nn.Module], *, trims: bool, ahead: bool
    ) -> None:
        """Raise a ConfigError if the call cannot be right under a pruner.

        Args:
            pruner: the method, which prunes somewhere.
            decoder: the module that holds the layers.
            layers: the decoder layers.
            trims: whether the method drops tokens from the caches of layers that have run.
            ahead: whether the text of a prompt attends to what stands behind it.
        """
        self._refuse_chunks()
        self._refuse_drafts_from_states()
        self._refuse_checkpointing(layers)
        if self.drafted_from is not None:
            self._refuse_drafts(pruner, trims=trims, ahead=ahead)
        if pruner.positions == "renumbered" and not _several_axes(decoder):
            self._refuse_right_padding(
                "Their answers would begin behind the padding, at positions that count from it, and "
                f"{pruner.name} moves positions down: they would become negative"
            )
        if len(attending_layers(layers)) < len(layers):
            self._refuse_right_padding(
                "Layers with a state (linear attention, convolution, Mamba) read the padding before the answer: the "
                "state fades over it, and pruning takes padding away"
            )

    def _refuse_chunks(self) -> None:
        if self.option("prefill_chunk_size") is not None:
            raise ConfigError(
                "prefill_chunk_size splits the prompt, so that visual tokens would be ranked by a question that has "
                "not been read yet. Set prefill_chunk_size=None; pruning already lowers the prefill's memory."
            )

    def _refuse_drafts_from_states(self) -> None:
        what = {
            "assistant_early_exit": "the model's own first layers draft, which prune as well, or end before they do",
            "use_mtp": "prediction layers draft from the hidden states of all tokens",
        }
        reason = next((f"{name}: {why}" for name, why in what.items() if self.option(name)), None)
        kind, drafter = self.option("speculation_type"), type(self.assistant).__name__
        if reason is None and kind not in (None, "assistant"):
            reason = f"speculation_type={kind!r}: the assistant drafts from the hidden states of all tokens"
        if reason is None and drafter.startswith(("Gemma4Assistant", "Gemma4UnifiedAssistant")):
            reason = f"{drafter} drafts from the keys and values of all tokens"
        if reason is not None:
            raise ConfigError(
                f"{reason}, but of a pruned prompt some are gone. Use an assistant_model that reads the prompt by "
                "itself, or prompt_lookup_num_tokens: both give what greedy decoding gives."
            )

    def _refuse_drafts(self, pruner: Method, *, trims: bool, ahead: bool) -> None:
        if ahead:
            raise ConfigError(
                f"{type(self._model).__name__} reads a prompt in both directions: candidates of a draft, read "
                "together with it, change what it makes of the prompt and which tokens are kept. Generate without "
                "assistant_model and prompt_lookup_num_tokens."
            )
        if trims:
            raise ConfigError(
                f"{pruner.name} drops tokens from the caches of layers that have read them; candidates of a draft, "
                "which are read together with the prompt, would have seen them. Generate without assistant_model and "
                "prompt_lookup_num_tokens, or use another method."
            )
        cache, prompt, mask = cache_in((), self._given), self.prompt, self._given.get("attention_mask")
        whole = prompt is not None and (not isinstance(mask, Tensor) or mask.shape[1] == prompt.shape[1])
        if whole and cache is not None and int(cache.get_seq_length()):
            raise ConfigError(
                "a draft on a cache that holds the beginning of the prompt: transformers would read it all once more, "
                "behind what the cache holds. Pass the new tokens only, input_ids[:, cache.get_seq_length():], and the "
                "attention_mask of everything."
            )
        wanted = [name for name in ("output_hidden_states", "output_attentions") if self.option(name)]
        if wanted:
            raise ConfigError(
                f"{' and '.join(wanted)} with a draft: transformers hands them out by their places in the prompt, of "
                "which layers behind a stage have a part only. Generate without a draft, or without them."
            )

    def _refuse_checkpointing(self, layers: Iterable[nn.Module]) -> None:
        if self.option("use_cache") is False:
            return
        if any(layer.training and getattr(layer, "gradient_checkpointing", False) for layer in layers):
            raise ConfigError(
                "generate() counts on a cache, but in training mode with gradient checkpointing the decoder layers "
                "store nothing in it: every token behind the first would be made up without the prompt. Call "
                "model.eval() before generate() and model.train() behind it, or pass use_cache=False."
            )

    def _refuse_right_padding(self, why: str) -> None:
        mask, prompt, pad = self._given.get("attention_mask"), self.prompt, self.option("pad_token_id")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            ends = mask[:, -1] == 0
        elif isinstance(pad, int) and prompt is not None and prompt.dim() == 2 and pad != self.option("eos_token_id"):
            ends = prompt[:, -1] == pad  # transformers takes it for padding
        else:
            return
        if bool(ends.any()):
            raise ConfigError(
                f"the prompts are padded at their right. {why}. Pad at the left, as generate() expects: "
                "processor.tokenizer.padding_side = 'left'."
            )


def refuse_packing(arguments: Mapping[str, Any]) -> AbstractContextManager[None]:
    """Raise a ConfigError in place of continuous batching."""
    raise ConfigError(
        "continuous batching (generate_batch, cache_implementation='paged') packs the tokens of several requests "
        "into one row and hands no pictures to the model: there is nothing to prune. Remove the pruner, or use "
        "generate() or `evengaze serve`."
    )


def _several_axes(decoder: Any) -> bool:
    """Whether a decoder's rotary positions have several axes; methods that renumber leave those alone."""
    tables = (getattr(decoder.config, name, None) or {} for name in ("rope_parameters", "rope_scaling"))
    return any("mrope_section" in table for table in tables if isinstance(table, Mapping))


def brings_pictures(arguments: Mapping[str, Any]) -> bool:
    """Whether a forward call of a model is given pixels, features or encodings of pictures."""
    given = (arguments[name] for name in _of_pictures(tuple(arguments)))
    return any(any(v is not None for v in (g.values() if isinstance(g, Mapping) else [g])) for g in given)


@lru_cache
def _of_pictures(names: tuple[str, ...]) -> tuple[str, ...]:
    """Those of some arguments' names that say that they hold pictures."""
    return tuple(name for name in names if any(mark in name for mark in ("pixel", "image", "video", "mm_encoder")))
