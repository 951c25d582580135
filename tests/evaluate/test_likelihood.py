"""Likelihoods of answers: those of the pruned generation, whatever the answer is."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from evengaze.errors import DataError
from evengaze.evaluate.likelihood import likelihood
from evengaze.evaluate.predictor import ModelSpec, Predictor
from evengaze.methods import parse
from runner_fakes import save_model

PROMPT = "USER: <image>\nIs there a dog? ASSISTANT:"


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    return Predictor.load(ModelSpec(str(save_model(tmp_path_factory.mktemp("model"))), device="cpu"))


def media() -> dict[str, list[Image.Image]]:
    return {"images": [Image.linear_gradient("L").convert("RGB").resize((70, 50))]}


@pytest.mark.parametrize(
    "method", ["dense", "fastv:keep=4", "sparsevlm:keep=[6,3],layers=[1,3]", "himap:keep=[6,3],layers=[1,3]"]
)
def test_likelihoods_are_those_of_generation(predictor: Predictor, method: str) -> None:
    """Token by token: what `generate` would have said of each if it had come so far."""
    pruner, answer = parse(method), " yes"
    found = likelihood(predictor, PROMPT, answer, media(), pruner)
    inputs = predictor.inputs([PROMPT], media())
    ids = predictor.processor.tokenizer(answer, add_special_tokens=False)["input_ids"]
    wanted = iter(ids)

    def force(batch: int, sofar: torch.Tensor) -> list[int]:
        return [next(wanted)]

    with torch.no_grad(), pruner(predictor.model):
        out = predictor.model.generate(
            **inputs,
            max_new_tokens=len(ids),
            do_sample=False,
            prefix_allowed_tokens_fn=force,
            output_logits=True,
            return_dict_in_generate=True,
        )
    expected = sum(float(torch.log_softmax(step[0], -1)[i]) for step, i in zip(out.logits, ids, strict=True))
    assert found.tokens == len(ids) == 4
    assert found.log_probability == pytest.approx(expected, abs=1e-4)
    assert found.loss == pytest.approx(-expected / 4, abs=1e-4)


def test_the_greedy_answer_is_known_as_such(predictor: Predictor) -> None:
    pruner = parse("fastv:keep=4")
    inputs = predictor.inputs([PROMPT], media())
    with torch.no_grad(), pruner(predictor.model):
        out = predictor.model.generate(**inputs, max_new_tokens=3, do_sample=False)
        best = int(out[0, inputs["input_ids"].shape[1]])
    vocabulary = {v: k for k, v in predictor.processor.tokenizer.get_vocab().items()}
    if len(vocabulary[best]) == 1:
        assert likelihood(predictor, PROMPT, vocabulary[best], media(), pruner).greedy
    others = [c for c in "abcdefghij" if predictor.processor.tokenizer.get_vocab()[c] != best]
    assert not any(likelihood(predictor, PROMPT, c, media(), pruner).greedy for c in others)


def test_prompts_without_pictures_and_answers_without_tokens(predictor: Predictor) -> None:
    assert likelihood(predictor, "USER: hello ASSISTANT:", " hi", {}, parse("fastv:keep=4")).tokens == 3
    with pytest.raises(DataError, match="adds no token"):
        likelihood(predictor, PROMPT, "", media(), parse("fastv:keep=4"))
