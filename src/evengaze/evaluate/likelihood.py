"""How likely a model finds an answer: tasks that compare options, or ask for the probability of a text.

Prompt and answer are read in one call. Labels say where the answer begins, so that the prompt ranks, as in `generate`,
and every option is judged by the same visual tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from evengaze.errors import DataError
from evengaze.evaluate.predictor import Predictor
from evengaze.methods import Pruner


@dataclass(frozen=True)
class Likelihood:
    """What a model says of an answer that it is given.

    Attributes:
        log_probability: of the answer, in nats: the sum over its tokens.
        tokens: how many it has.
        greedy: whether greedy decoding would have begun with it.
    """

    log_probability: float
    tokens: int
    greedy: bool

    @property
    def loss(self) -> float:
        """Cross-entropy: the mean over tokens of their negative log-probabilities."""
        return -self.log_probability / self.tokens


@torch.inference_mode()
def likelihood(
    predictor: Predictor, prompt: str, answer: str, media: Mapping[str, Sequence[Any]], pruner: Pruner
) -> Likelihood:
    """The likelihood of an answer behind a prompt.

    Args:
        predictor: the model.
        prompt: with the model's picture markers.
        answer: what follows it, its leading space included.
        media: "images" and "videos", as for `Predictor.generate`.
        pruner: the method.

    Raises:
        DataError: the answer has no token of its own.
    """
    alone = predictor.inputs([prompt], media)["input_ids"][0]
    inputs = predictor.inputs([prompt + answer], media)
    ids = inputs["input_ids"][0]
    shared = min(len(alone), len(ids))
    same = (alone[:shared] == ids[:shared]).int().cumprod(0)  # where they meet, words may be cut otherwise
    start = int(same.sum())
    if start >= len(ids):
        raise DataError(f"the answer {answer!r} adds no token to its prompt")
    labels = ids.clone()
    labels[:start] = -100
    with pruner(predictor.model):
        logits = predictor.model(**inputs, labels=labels[None], use_cache=False).logits[0, start - 1 : -1]
    given = ids[start:]
    found = torch.log_softmax(logits.float(), -1).gather(1, given[:, None])
    return Likelihood(float(found.double().sum()), len(given), bool((logits.argmax(-1) == given).all()))
