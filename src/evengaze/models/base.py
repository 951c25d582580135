"""The protocol of a model family's adapter, and what the engine tells it about a call."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from evengaze.errors import UnsupportedModelError
from evengaze.layout import VisualLayout


@dataclass(frozen=True)
class EncoderCall:
    """One call of the model's `get_image_features` or `get_video_features`, as it was made.

    transformers 5.x encodes images inside `generate()` before the model's forward runs, and drops the pixels; this is
    where an adapter still sees what really entered the vision tower.

    Attributes:
        kind: which of the two functions was called.
        arguments: its arguments by name (`pixel_values`, `image_sizes`, `image_grid_thw`, ... as the family has them).
        result: what it returned.
        inner: it was made by another encoding: some families encode a video through their function for images.
    """

    kind: Literal["image", "video"]
    arguments: dict[str, Any]
    result: Any = None
    inner: bool = False


@dataclass(frozen=True)
class Placement:
    """One call of the model's `get_placeholder_mask`, which says which tokens the features of pictures fill.

    Attributes:
        arguments: its arguments by name.
        masks: what it returned: of images, and of videos and sounds where the family has them; (B, L) bool each.
    """

    arguments: dict[str, Any]
    masks: tuple[Tensor, ...]


@dataclass(frozen=True)
class Call:
    """A forward call of the model that holds more than one token.

    Attributes:
        input_ids: (B, L) token ids with placeholders; None if the caller passed embeddings only.
        attention_mask: (B, L) bool, True for real tokens; None if all are real. Only this call's L tokens.
        past: number of tokens already in the cache.
        encoded: the image and video encodings since the last call, in order. With beams or `num_return_sequences` the
            rows of `input_ids` are repeated, but each image was encoded once: row b belongs to sample
            `b // (B // samples)`.
        placed: where the model put them, as far as it says so in a method of its own.
        device: where the layout is wanted; the engine asks for it on the host, and uploads what it needs of it.
    """

    input_ids: Tensor | None
    attention_mask: Tensor | None
    past: int
    encoded: Sequence[EncoderCall]
    placed: Sequence[Placement] = ()
    device: Any = "cpu"


@dataclass(frozen=True)
class VisionTower:
    """A vision tower whose patches are the decoder's visual tokens, one to one and in the same order.

    Attributes:
        module: the tower: pixels in, one state for each patch out.
        layers: its encoder layers.
        special: leading tokens (class token) of each image's sequence in the tower.
        output: index of the layer whose output becomes the visual features, counted as in `hidden_states`: layer
            `output` and later ones have no influence on them. Equal to `len(layers)` if all layers count.
    """

    module: nn.Module
    layers: nn.ModuleList
    special: int
    output: int


class Adapter:
    """What the engine must know about a model family. One subclass a family; instances hold no state.

    Attributes:
        name: the family's name for people.
        model_types: the `config.model_type` values that it serves.
        padding: in words, who pads pictures and how it is known which tokens show padding.
        limits: in words, what does not work with the family (apart from dropping patches in its tower).
        mixes: in words, what happens to patches between the tower and the decoder, if it is more than a projection.
        reads_ahead: whether the text of a prompt attends to what stands behind it.
        flash: whether flash attention can express the family's attention, pruned or not.
    """

    name: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    padding: ClassVar[str] = "none"
    limits: ClassVar[tuple[str, ...]] = ()
    mixes: ClassVar[str] = "what a patch of the vision tower becomes in the decoder is not known"
    reads_ahead: ClassVar[bool] = False
    flash: ClassVar[bool] = True

    def decoder(self, model: nn.Module) -> nn.Module:
        """The module whose `layers` the engine hooks."""
        return find_decoder(model)

    def layout(self, model: nn.Module, call: Call) -> VisualLayout | None:
        """Where the visual tokens of a call are; None (or an empty layout) if it has none.

        Raises:
            LayoutError: images were encoded, but their tokens cannot be located.
        """
        raise NotImplementedError

    def prepare(self, model: nn.Module, surviving: Callable[[], Tensor | None]) -> Callable[[], None]:
        """Called when a pruner attaches; whatever a family needs beyond layer hooks is set up here.

        Args:
            model: the model.
            surviving: while a prefill runs, gives the (B, M) indices of the call's tokens that are still there, or None
                if none has been dropped yet.

        Returns:
            A function that undoes it.
        """
        return lambda: None

    def full_attention_layers(self, model: nn.Module) -> tuple[int, ...]:
        """Decoder layers that attend to the whole sequence. A layer with a sliding window gives tokens outside of it
        exactly 0, so it cannot rank them."""
        return full_attention_layers(self.decoder(model))

    def check_windows(self, model: nn.Module, layers: Iterable[int], length: int) -> None:
        """Warn if a layer whose attention ranks tokens cannot see the whole of a sequence of `length` tokens."""
        decoder: Any = self.decoder(model)
        window = getattr(decoder.config, "sliding_window", None)
        if window is None or length <= window:
            return
        full = self.full_attention_layers(model)
        narrow = sorted(set(layers) - set(full))
        if narrow:
            advice = f"rank by layers {', '.join(map(str, full))}" if full else "no layer of this model sees more"
            warnings.warn(
                f"tokens are ranked by the attention of layers {narrow}, which see only the last {window} of {length} "
                f"tokens: all tokens before them score 0; {advice}.",
                stacklevel=2,
            )

    def vision_tower(self, model: nn.Module, kind: Literal["image", "video"] = "image") -> VisionTower:
        """The tower, for methods that drop patches in it.

        Raises:
            UnsupportedModelError: the family mixes patches between the tower and the decoder; the message says how.
        """
        raise UnsupportedModelError(
            f"{self.name}: {self.mixes}, so single patches cannot be dropped in the vision tower. Prune in the decoder "
            "instead."
        )

    def visual_token_ids(self, model: nn.Module) -> tuple[int, ...]:
        """Ids of the placeholder tokens of images and videos."""
        config: Any = model.config
        names = ("image_token_id", "video_token_id")
        return tuple(i for i in (getattr(config, n, None) for n in names) if i is not None)


_INNER = ("language_model", "text_model", "model", "decoder", "llm")
"""What models call the part in which their decoder is."""


def find_decoder(model: nn.Module) -> nn.Module:
    """Walk down from a model to the module that loops over its decoder layers (has a config and a ModuleList `layers`).

    Raises:
        UnsupportedModelError: there is none.
    """
    get = getattr(model, "get_decoder", None)
    module: nn.Module = get() if callable(get) else model
    for _ in range(6):
        if isinstance(getattr(module, "layers", None), nn.ModuleList) and hasattr(module, "config"):
            return module
        inner = next((m for m in (getattr(module, n, None) for n in _INNER) if isinstance(m, nn.Module)), None)
        if inner is None or inner is module:
            break
        module = inner
    raise UnsupportedModelError(
        f"{type(model).__name__}: no decoder layers found (looked for a ModuleList called 'layers' under "
        f"{', '.join(_INNER)}). Register an adapter whose decoder() returns the module that holds them."
    )


def full_attention_layers(decoder: Any) -> tuple[int, ...]:
    """Which of a decoder's layers attend to the whole sequence, as far as its config says so for all of them."""
    try:
        window = getattr(decoder.config, "sliding_window", None)
        types = getattr(decoder.config, "layer_types", None)
    except RuntimeError:  # every layer has a config of its own
        return ()
    if types is None:  # one kind for all layers
        types = ["full_attention" if window is None else "sliding_attention"] * len(decoder.layers)
    return tuple(i for i, kind in enumerate(types) if kind in ("full_attention", "attention"))


def has_windows(config: Any) -> bool:
    """Whether a decoder's config names a sliding window, as far as it says so for all layers."""
    try:
        return getattr(config, "sliding_window", None) is not None
    except RuntimeError:  # every layer has a config of its own
        return False


def attending_layers(layers: Iterable[nn.Module]) -> tuple[int, ...]:
    """Which of a decoder's layers have attention."""
    return tuple(i for i, layer in enumerate(layers) if attention_of(layer) is not None)


ATTENTION_NAMES = ("self_attn", "attention", "attn", "self_attention", "mixer")
"""What transformers calls the self-attention module of a layer."""


def attention_of(layer: nn.Module) -> nn.Module | None:
    """The self-attention module of a decoder or encoder layer; None if none of the usual names holds one with a config.

    A layer without it (linear attention, convolution, Mamba) has a state that runs through the sequence, or looks at
    single tokens only.
    """
    for name in ATTENTION_NAMES:
        module = getattr(layer, name, None)
        # Nemotron-H calls all of its layers' parts mixer: attention, Mamba and MLP.
        anything = name == "mixer" and not hasattr(module, "num_key_value_groups")
        if isinstance(module, nn.Module) and hasattr(module, "config") and not anything:
            return module
    return None


def architecture_of(config: Any) -> str:
    """What must agree between two models for their trends to be comparable, from a transformers configuration.

    Returns:
        model type / decoder type / layers x hidden size, e.g. "llava/llama/32x4096".
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = f"{getattr(text, 'num_hidden_layers', '?')}x{getattr(text, 'hidden_size', '?')}"
    return f"{getattr(config, 'model_type', '?')}/{getattr(text, 'model_type', '?')}/{size}"
