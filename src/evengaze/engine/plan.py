"""What is known before any call: which layers a model has, where a method lets tokens leave, what each stage reads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from evengaze.engine import checks, compiled
from evengaze.engine.intercept import Mark, put
from evengaze.engine.sharing import lenders
from evengaze.errors import UnsupportedModelError
from evengaze.layout import VisualLayout
from evengaze.models import BareDecoder, adapter_for, find_decoder
from evengaze.models.base import Adapter, attending_layers, full_attention_layers
from evengaze.models.refusals import refuse_decoder
from evengaze.protocol import Method, Stage

_MARK = "_evengaze_handle"
"""Where a decoder says whose it is."""

_claiming = threading.Lock()


@dataclass(frozen=True, eq=False)
class Plan:
    """A model and a method that fit each other.

    Attributes:
        model: the module whose forward and `generate` are called, without what compiles or wraps it.
        adapter: its family's; None if the caller says where visual tokens are.
        layout: where they are, as the caller says; None if the adapter finds them.
        decoder: the module that calls the layers.
        layers: the decoder layers.
        pruner: the method, fitted to the layers that have attention.
        settings: the method's, for traces.
        stages: by layer, the number of a stage and the stage.
        previous: layers whose attention is listened to while they run.
        own: layers whose attention is read before they run.
        recurrent: layers without attention, whose state runs through the sequence.
        lenders: layers that attend to the keys of another -> the layer whose keys those are.
    """

    model: Any
    adapter: Adapter | None
    layout: VisualLayout | None
    decoder: Any
    layers: Sequence[nn.Module]
    pruner: Method
    settings: Mapping[str, Any]
    stages: Mapping[int, tuple[int, Stage]]
    previous: frozenset[int]
    own: frozenset[int]
    recurrent: frozenset[int]
    lenders: Mapping[int, int]

    @classmethod
    def of(cls, model: nn.Module, pruner: Method, layout: VisualLayout | None) -> Plan:
        """The plan of an attachment.

        Raises:
            EvengazeError: model and method do not fit, or another pruner is attached; the message says what does fit.
        """
        model = _whole(model)
        adapter = None if layout is not None else adapter_for(model)
        if isinstance(adapter, BareDecoder):
            raise UnsupportedModelError(
                f"{type(model).__name__} is a text decoder: it cannot know which of its inputs are visual tokens. Say "
                "where they are: pruner(model, layout=VisualLayout.from_spans(spans, grid))."
            )
        decoder: Any = compiled.inner(find_decoder(model) if adapter is None else adapter.decoder(model))
        if adapter is None:
            refuse_decoder(decoder)
        held: Mark | None = decoder.__dict__.get(_MARK)
        checks.refuse_second(model, None if held is None else held.value.pruner)
        layers = list(map(compiled.inner, decoder.get_submodule("layers").children()))
        attending, lending = attending_layers(layers), lenders(layers, decoder.config)
        # Behind the first layer whose keys later ones attend to, tokens must stay.
        able = tuple(i for i in attending if i < min(lending.values(), default=len(layers)))
        if getattr(pruner, "layers", ()) is None:  # nobody chose: a window may hide tokens, so where there is none
            wide = tuple(i for i in able if i in full_attention_layers(decoder))
            able = wide if len(wide) >= len(pruner.stages(len(layers))) else able
        if len(able) < len(layers) and hasattr(pruner, "fitted"):
            pruner = pruner.fitted(len(layers), able)
        stages = list(pruner.stages(len(layers)))
        checks.check_stages(pruner, stages, layers)
        checks.check_lending(pruner, stages, frozenset(lending.values()))
        return cls(
            model=model,
            adapter=adapter,
            layout=layout,
            decoder=decoder,
            layers=layers,
            pruner=pruner,
            settings=pruner.to_dict(),
            stages={stage.layer: (number, stage) for number, stage in enumerate(stages)},
            previous=frozenset(s.layer - 1 for s in stages if s.attention == "previous"),
            own=frozenset(s.layer for s in stages if s.attention == "own"),
            recurrent=frozenset(range(len(layers))) - frozenset(attending),
            lenders=lending,
        )

    @property
    def base(self) -> nn.Module:
        """The module inside of the model that encodes pictures and calls the decoder."""
        base: nn.Module = getattr(self.model, "base_model", self.model)
        return base

    @property
    def outer(self) -> list[nn.Module]:
        """The modules around the decoder that may be called; the model first."""
        return list({id(m): m for m in (self.model, self.base) if m is not self.decoder}.values())

    @property
    def first(self) -> int:
        """The first layer that a pruner has business with; their number if it has none."""
        if self.trims:
            return 0
        return min([*self.previous, *self.stages], default=len(self.layers))

    @property
    def trims(self) -> bool:
        """Whether the method drops tokens from the caches of layers that have run."""
        return any(stage.trims_below for _, stage in self.stages.values())

    @property
    def ranked_by(self) -> list[int]:
        """The layers whose attention ranks tokens."""
        return [stage.attended for _, stage in self.stages.values() if stage.attended is not None]


def claim(plan: Plan, handle: Any) -> Callable[[], None]:
    """Make a decoder the handle's; returns what gives it back.

    Raises:
        AttachError: it is another's, perhaps since a moment ago.
    """
    with _claiming:
        held: Mark | None = plan.decoder.__dict__.get(_MARK)
        checks.refuse_second(plan.model, None if held is None else held.value.pruner)
        return put(plan.decoder, _MARK, Mark(handle))


def _whole(model: nn.Module) -> nn.Module:
    """The model itself: adapters such as LoRA, and `torch.compile`, wrap the module whose forward runs."""
    model = compiled.inner(model)
    unwrap = getattr(model, "get_base_model", None)
    return compiled.inner(unwrap()) if callable(unwrap) else model
