"""Does pruning work with the installed transformers? Answered in milliseconds, before the first pruner is attached.

The engine lives inside other people's forward calls. A release that calls decoder layers in a new way must not make it
silently wrong: a tiny decoder of the installed release is pruned by every kind of stage and compared with a masked one.
The masked one is the same layers in two halves, each run by its public arguments: the upper half sees the whole
sequence, too, but a mask hides what was dropped.
"""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn

from evengaze import compat
from evengaze.compat import cache_argument, cache_of
from evengaze.engine.session import Handle
from evengaze.errors import IncompatibleReleaseError, ReleaseWarning
from evengaze.layout import VisualLayout
from evengaze.protocol import Selection, Stage, View, top

LAYERS, LENGTH, PICTURE, KEEP = 3, 12, (4, 8), 2
TOLERANCE = 1e-4
"""Largest difference of normed states: float32 sums in another order."""

_lock = threading.Lock()
_passed = False


@dataclass(frozen=True)
class Probe:
    """A method of one stage. It keeps what is attended to most, or the first tokens if it reads nothing."""

    stage: Stage
    positions: Literal["original", "renumbered"] = "original"
    name: str = "selfcheck"

    def stages(self, layers: int) -> Sequence[Stage]:
        """The one."""
        return [self.stage]

    def select(self, view: View) -> Selection:
        """The `KEEP` best."""
        score = -view.tokens.x if self.stage.attention is None else view.attention(view.last)
        return Selection(keep=top(score, KEEP))

    def prepare(self, model: nn.Module, adapter: Any, shared: Any) -> Callable[[], None]:
        """Nothing."""
        return lambda: None

    def to_dict(self) -> dict[str, Any]:
        """For the trace."""
        return {"method": self.name}


KINDS = (
    Probe(Stage(0, None)),
    Probe(Stage(2, "previous")),
    Probe(Stage(2, "previous", trims_below=True)),
    Probe(Stage(1, "own"), "renumbered"),
)


def ensure() -> None:
    """Run the check once in a process, and warn once if the release of transformers is an untested one.

    Raises:
        IncompatibleReleaseError: pruning does not work with the installed transformers.
    """
    global _passed
    with _lock:
        if not _passed:
            check()
            _passed = True
            unknown = compat.untested()
            if unknown is not None:
                warnings.warn(unknown, ReleaseWarning, stacklevel=4)


def check() -> float:
    """Prune a tiny decoder by every kind of stage, in a prefill and in a decoding step of a padded batch.

    Returns:
        The largest difference to the masked decoder.

    Raises:
        IncompatibleReleaseError: it is larger than `TOLERANCE`, or a call fails.
    """
    worst = 0.0
    for attention in ("sdpa", "eager"):
        for probe in KINDS:
            try:
                distance = _distance(probe, attention)
            except Exception as error:
                raise _incompatible(probe, attention, f"fails: {type(error).__name__}: {error}") from error
            if not distance < TOLERANCE:
                raise _incompatible(probe, attention, f"is off by {distance:.1g} (at most {TOLERANCE:g} is rounding)")
            worst = max(worst, distance)
    return worst


def _incompatible(probe: Probe, attention: str, what: str) -> IncompatibleReleaseError:
    return IncompatibleReleaseError(
        f"pruning does not work with transformers {transformers.__version__}: in a self-check, a tiny decoder pruned "
        f"at a stage that reads {probe.stage.attention or 'no'} attention ({attention}) {what}. Nothing was attached. "
        "Upgrade evengaze (pip install -U evengaze); if that does not help, install a release of transformers that it "
        f"was tested with (pip install 'transformers=={compat.NEWEST}.*') and report it with `evengaze env`."
    )


def _decoder(attention: str) -> Any:
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=8,
        pad_token_id=None,
        attn_implementation=attention,
    )
    with torch.random.fork_rng(devices=[]):  # the caller's random state is left alone
        decoder = transformers.LlamaModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    for weight in decoder.parameters():
        noise = torch.randn(weight.shape, generator=generator)
        weight.data = noise * weight.shape[-1] ** -0.5 if weight.dim() > 1 else 1 + 0.1 * noise
    return decoder


@torch.no_grad()
def _distance(probe: Probe, attention: str) -> float:
    """Largest difference between the last states of pruned and masked decoder, in the prefill and in one step."""
    decoder = _decoder(attention)
    states = torch.randn(2, LENGTH + 1, 16, generator=torch.Generator().manual_seed(1))
    real = torch.ones(2, LENGTH + 1, dtype=torch.long)
    real[1, :2] = 0  # the second row is padded, and the picture stands at the same place in both
    positions = (real.cumsum(1) - 1).clamp(min=0)
    layout = VisualLayout.from_spans([[PICTURE], [PICTURE]], grid=(2, 2))
    handle = Handle(decoder, probe, layout)
    with handle:
        first = decoder(
            inputs_embeds=states[:, :-1], attention_mask=real[:, :-1], position_ids=positions[:, :-1], use_cache=True
        )
        step = decoder(
            inputs_embeds=states[:, -1:],
            attention_mask=real,
            position_ids=positions[:, -1:],
            **cache_argument(decoder, cache_of(first)),
        )
    assert handle.trace is not None
    gone = torch.zeros(2, LENGTH + 1, dtype=torch.bool)
    gone[:, PICTURE[0] : PICTURE[1]] = True
    for b in range(2):
        gone[b, PICTURE[0] + handle.trace.kept(b)] = False
    expected = _masked(decoder, probe, states, real.bool(), positions, gone)
    found = torch.stack([first.last_hidden_state[:, -1], step.last_hidden_state[:, -1]], 1)
    return float((found - expected[:, -2:]).abs().max())


def _masked(decoder: Any, probe: Probe, states: Tensor, real: Tensor, positions: Tensor, gone: Tensor) -> Tensor:
    """(B, L, d) what the decoder makes of a sequence if nobody sees the tokens that are gone from the stage on."""
    whole = torch.ones(real.shape[1], real.shape[1], dtype=torch.bool).tril() & real[:, None]
    seen = whole & ~gone[:, None]
    if probe.stage.trims_below:
        whole[:, -1] = seen[:, -1]  # the step finds the same in all caches
    if probe.positions == "renumbered":
        later = ((real & ~gone).long().cumsum(1) - 1).clamp(min=0)
    else:
        later = positions
    at = probe.stage.layer
    lower = _half(decoder, decoder.layers[:at], nn.Identity())
    upper = _half(decoder, decoder.layers[at:], decoder.norm)
    return _run(upper, _run(lower, states, whole, positions), seen, later)


def _half(decoder: Any, layers: Any, norm: nn.Module) -> Any:
    half = copy.copy(decoder)
    half.config = copy.copy(decoder.config)
    half.config.num_hidden_layers = len(layers)
    half._modules = {**decoder._modules, "layers": layers, "norm": norm}
    return half


def _run(half: Any, states: Tensor, seen: Tensor, positions: Tensor) -> Tensor:
    itself = torch.eye(seen.shape[1], dtype=torch.bool)  # rows of padding must not be empty
    mask = torch.zeros(seen.shape).masked_fill(~(seen | itself), torch.finfo(torch.float32).min)[:, None]
    out: Tensor = half(
        inputs_embeds=states, attention_mask=mask, position_ids=positions, use_cache=False
    ).last_hidden_state
    return out
