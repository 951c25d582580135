"""A model from its config alone, and prompts of a given size for every family."""

from __future__ import annotations

import pytest
import torch

from evengaze import methods
from evengaze.errors import ConfigError, UnsupportedModelError
from evengaze.models.inspect import diagnose
from evengaze.profile import build
from evengaze.profile.build import random_model
from evengaze.profile.prompts import make_prompt, near_square, text_tokens
from evengaze.profile.shapes import SHAPES, shape_of
from evengaze.testing import families, tiny


@pytest.mark.parametrize("family", [f for f in families() if f != "llama"])
def test_every_family_gets_a_prompt_of_about_the_size_asked_for(family: str) -> None:
    config = tiny(family)[0].config
    model = random_model(config, dtype=torch.float32)
    prompt = make_prompt(model, 60, 20)
    inputs = prompt.rows(2)
    with torch.inference_mode():
        with methods.parse("fastv:keep=4")(model) as run:
            output = model(**inputs)
        alone = model(**prompt.without_pictures(model, 2))
    assert run.trace is not None and output.logits.isfinite().all() and alone.logits.shape[:2] == (2, prompt.text)
    candidates = [len(row) for row in run.trace.layout.rows]
    assert candidates[0] == candidates[1] and 0.75 * 60 <= candidates[0] <= 1.25 * 60  # newlines are none
    assert prompt.visual >= candidates[0] and abs(prompt.text - 20) <= 2
    assert inputs["input_ids"].shape == (2, prompt.visual + prompt.text) and " x " in prompt.shown


def test_more_visual_tokens_are_more_pictures_or_larger_ones() -> None:
    llava = random_model(tiny("llava")[0].config, dtype=torch.float32)
    assert [make_prompt(llava, n, 8).visual for n in (1, 16, 40, 160)] == [16, 16, 32, 160]
    assert make_prompt(llava, 160, 20).shown.startswith("10 pictures of 56 x 56")
    qwen = random_model(tiny("qwen2_5_vl")[0].config, dtype=torch.float32)
    assert [make_prompt(qwen, n, 8).visual for n in (1, 60, 101)] == [1, 60, 100]
    assert make_prompt(qwen, 60, 20).shown == "1 picture of 168 x 280 pixels"


def test_a_family_whose_pictures_are_not_known_is_refused() -> None:
    if "molmo2" not in families(generic=True):
        pytest.skip("not in this release of transformers")
    model, _ = tiny("molmo2")
    with pytest.raises(UnsupportedModelError, match="Profile a checkpoint with a picture"):
        make_prompt(model, 64, 8)
    with pytest.raises(UnsupportedModelError, match="no placeholder"):
        make_prompt(tiny("llama")[0], 64, 8)


def test_text_has_no_placeholders_or_marks() -> None:
    config = tiny("qwen2_vl")[0].config
    ids = set(text_tokens(config, 2000).tolist())
    assert not ids & {config.image_token_id, config.video_token_id, config.vision_start_token_id} and len(ids) > 100
    assert text_tokens(config, 5).tolist() == text_tokens(config, 5).tolist()


@pytest.mark.parametrize("cells", [1, 2, 60, 101, 576, 2304])
def test_pictures_are_nearly_square(cells: int) -> None:
    rows, columns = near_square(cells)
    assert abs(rows * columns - cells) <= 0.02 * cells and rows <= columns + 1 <= 2 * rows + 2
    assert max(near_square(cells, 8)) <= 8


def test_weights_are_finite_small_and_of_the_dtype_asked_for() -> None:
    model = random_model(tiny("llava")[0].config, dtype=torch.bfloat16, attention="eager")
    assert model.dtype == torch.bfloat16 and not model.training and model.config._attn_implementation == "eager"
    for name, p in model.named_parameters():
        middle = float("norm" in name and p.dim() == 1 and name.endswith("weight"))
        assert p.isfinite().all() and (p.float() - middle).abs().max() < 1
    assert model.generation_config.eos_token_id is None
    with pytest.raises(ConfigError, match="attention 'nonsense' cannot be used"):
        random_model(tiny("llava")[0].config, dtype=torch.float32, attention="nonsense")


def test_weights_that_do_not_fit_are_refused_before_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "free_bytes", lambda device: 14e9)
    with pytest.raises(ConfigError, match=r"need 28\.3 GB in float32, but cpu has 14\.0 GB free"):
        random_model(shape_of("llava-1.5-7b"), dtype=torch.float32)


@pytest.mark.parametrize("name", list(SHAPES))
def test_shapes_are_models_of_their_names(name: str) -> None:
    config = shape_of(name.upper())
    found = diagnose(config)
    with torch.device("meta"):
        from evengaze.models.inspect import skeleton_model

        billions = sum(p.numel() for p in skeleton_model(config).parameters()) / 1e9
    size = name.rpartition("-")[2]
    said = float(size[:-1]) / {"b": 1, "m": 1000}[size[-1]]
    assert found.model_type == config.model_type and said <= billions < said * 1.2
    assert shape_of("something else") is None
