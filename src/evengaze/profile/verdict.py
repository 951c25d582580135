"""What follows from a profile, in plain sentences by fixed rules.

What limits a prefill of the dense model (the first that holds):

1. *host*: on a GPU, launching the decoder's work takes at least `HOST` of the decoder's time. The launches are timed on
   the prompt's text alone, where the GPU has least to do.
2. *tower*: the vision tower and all else in front of the decoder take at least `TOWER` of the prefill.
3. *short*: the decoder on the prompt's text alone takes at least `FLOOR` of its time.
4. *tokens*: none of these; the decoder's time grows with its tokens.

No method that prunes in the decoder can save more than the decoder's time beyond that on the text alone. A ratio counts
as different from 1 if it differs by `CLEAR` and its interval does not hold 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from evengaze.profile.rows import DENSE, ProfileRow, label

HOST = 0.8
TOWER = 0.5
FLOOR = 0.8
CLEAR = 0.02
_READS = 0.9
"""Share of the bytes of a step above which a smaller cache cannot be noticed."""
_IDLE = 0.8
"""Share of a prefill in which the GPU works, below which graphs are worth a word."""

Limit = Literal["host", "tower", "short", "tokens"]


@dataclass(frozen=True)
class Reach:
    """What a batch size allows.

    Attributes:
        limit: what limits the dense prefill.
        most: largest share of the prefill that pruning in the decoder can save; None if it is not known.
    """

    limit: Limit
    most: float | None


def reach(dense: ProfileRow) -> Reach | None:
    """What the dense model's row says; None if it was not measured."""
    if dense.prefill_seconds is None or dense.decoder_seconds is None or dense.tower_seconds is None:
        return None
    floor, whole, decoder = dense.floor_seconds, dense.prefill_seconds, dense.decoder_seconds
    most = None if floor is None else min(1.0, max(0.0, (decoder - floor) / whole))
    if dense.launch_seconds is not None and dense.launch_seconds >= HOST * decoder:
        return Reach("host", most)
    if dense.tower_seconds >= TOWER * whole:
        return Reach("tower", most)
    if floor is not None and floor >= FLOOR * decoder:
        return Reach("short", most)
    return Reach("tokens", most)


def verdicts(rows: Sequence[ProfileRow]) -> list[ProfileRow]:
    """The rows with their sentences."""
    found = []
    for row in rows:
        dense = next((r for r in rows if r.batch == row.batch and r.name == DENSE), None)
        graphed = next((r for r in rows if r.batch == row.batch and r.name == label(row.method, "graphs")), None)
        peer = next((r for r in rows if r.batch == row.batch and r.name == label(DENSE, row.variant)), None)
        found.append(replace(row, verdict=sentence(row, dense, graphed, peer)))
    return found


def sentence(
    row: ProfileRow, dense: ProfileRow | None, graphed: ProfileRow | None = None, peer: ProfileRow | None = None
) -> str:
    """One row's sentence.

    Args:
        row: the row.
        dense: the dense model's at the same batch.
        graphed: the same method's with graphs, if that was measured.
        peer: the dense model's of the same variant.
    """
    if row.failed:
        return f"not measured: {row.failed}."
    allows = None if dense is None else reach(dense)
    if dense is None or allows is None:
        return "the dense model was not measured at this batch, so nothing can be compared."
    if row.name == DENSE:
        parts = [_limit(row, allows), _graphs(row, graphed)]
    else:
        parts = [_nothing(row), _prefill(row, allows), _graphs(row, graphed) if not row.variant else ""]
        parts += [_answer(row), _beside(row, peer)]
    return "; ".join(part for part in parts if part) + "."


def _limit(dense: ProfileRow, allows: Reach) -> str:
    decoder, whole = dense.decoder_seconds or 0.0, dense.prefill_seconds or 0.0
    most = "" if allows.most is None else f": at most {allows.most:.0%} of the prefill can be saved in the decoder"
    if allows.limit == "host":
        why = f"the host is the limit (launching takes {_ms(dense.launch_seconds)}, the decoder {_ms(decoder)})"
    elif allows.limit == "tower":
        why = f"the vision tower is the limit ({_ms(dense.tower_seconds)} of {_ms(whole)})"
    elif allows.limit == "short":
        why = f"the prompt is short (without pictures the decoder takes {_ms(dense.floor_seconds)} of {_ms(decoder)})"
    else:
        why = f"the decoder's tokens are the limit ({_ms(decoder)} of {_ms(whole)})"
    if dense.answer_seconds and dense.step_seconds:
        most += f"; decoding is {(dense.new_tokens - 1) * dense.step_seconds / dense.answer_seconds:.0%} of an answer"
    return why + most


def _nothing(row: ProfileRow) -> str:
    if row.average_tokens < row.visual_tokens or row.method.startswith(DENSE):
        return ""
    return f"its budget keeps all {row.visual_tokens} visual tokens, so nothing is dropped"


def _prefill(row: ProfileRow, allows: Reach) -> str:
    if row.time is None:
        return ""
    side = _side(row.time, row.time_low, row.time_high)
    if side < 0:
        said = f"saves {1 - row.time:.0%} of the prefill"
        known = allows.most is not None and row.variant != "graphs"  # it is what eager launches allow
        return f"{said}, of {allows.most:.0%} that can be saved in the decoder" if known else said
    if side == 0:
        return "its prefill cannot be told from the dense model's"
    why = {
        "host": ": the host is the limit, and its own stages keep it busy",
        "tower": ": the vision tower is the limit",
        "short": ": the prompt is short",
        "tokens": ": its own work takes longer than it saves",
    }[allows.limit]
    return f"its prefill takes {row.time - 1:.0%} longer{why}"


def _graphs(row: ProfileRow, graphed: ProfileRow | None) -> str:
    """What graphs give: measured, or the time that the GPU works, which is the least they could leave."""
    if graphed is not None and graphed.time is not None:
        return f"with graphs it takes {graphed.time:.0%} of dense"
    if row.busy_seconds is None or row.prefill_seconds is None:
        return ""
    if row.busy_seconds >= _IDLE * row.prefill_seconds:
        return ""
    return f"graphs would give about {_ms(row.busy_seconds)}, which is what the GPU works of {_ms(row.prefill_seconds)}"


def _answer(row: ProfileRow) -> str:
    if row.step is None or row.answer is None:
        return ""
    side = _side(row.step, row.step_low, row.step_high)
    if side < 0:
        said = f"a decoding step saves {1 - row.step:.0%}"
    elif side > 0:
        said = f"a decoding step takes {row.step - 1:.0%} longer"
    elif row.predicted_step >= _READS:
        said = f"decoding gains nothing (a step still reads {row.predicted_step:.0%} of the bytes)"
    else:
        said = "a decoding step cannot be told from the dense model's"
    return f"{said}, a whole answer takes {row.answer:.0%} of dense"


def _beside(row: ProfileRow, peer: ProfileRow | None) -> str:
    """Against the dense model with the same graphs or cache, for those who have them anyway."""
    if peer is None or not row.variant or row.method == DENSE:
        return ""
    what = "step" if row.variant == "static" else "prefill"
    own, other = getattr(row, f"{what}_seconds"), getattr(peer, f"{what}_seconds")
    return f"{own / other:.0%} of the {what} of {peer.name}" if own and other else ""


def _side(ratio: float, low: float | None, high: float | None) -> int:
    """-1 if a ratio is clearly below 1, 1 if it is clearly above, else 0."""
    if abs(ratio - 1) < CLEAR or low is None or high is None:
        return 0
    return -1 if high < 1 else int(low > 1)


def _ms(seconds: float | None) -> str:
    return "?" if seconds is None else f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
