import hashlib
import shutil

import numpy as np
import pytest
import torch

from evengaze import demo
from evengaze.demo.model import FOLDER, choose_dtype, dequantise, load_model, quantise
from evengaze.demo.scenes import make_scene
from evengaze.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def loaded():
    return demo.load()


def answer(loaded, questions, images):
    model, processor = loaded
    inputs = processor(images=images, text=[one.prompt for one in questions], return_tensors="pt", padding=True)
    output = model.generate(**inputs, max_new_tokens=2)
    return [
        text.strip()
        for text in processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    ]


def test_standard_classes(loaded):
    model, processor = loaded
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert type(processor).__name__ == "LlavaProcessor"
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert not model.training


def test_weights_are_small_and_checked(tmp_path):
    assert (FOLDER / "model.safetensors").stat().st_size <= 40e6
    damaged = tmp_path / "weights"
    shutil.copytree(FOLDER, damaged)
    raw = bytearray((damaged / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (damaged / "model.safetensors").write_bytes(raw)
    with pytest.raises(DataError, match="SHA-256"):
        load_model(damaged)
    (damaged / "model.safetensors").unlink()
    with pytest.raises(DataError, match="incomplete"):
        load_model(damaged)


def test_other_dtypes():
    model, _ = demo.load(torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.model.language_model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize(("seconds", "expected"), [(0.2, torch.bfloat16), (0.9, torch.float32), (4, torch.float32)])
def test_the_fastest_dtype(monkeypatch, seconds, expected):
    now = [0.0]

    def linear(states, weight):
        now[0] += 1.0 if states.dtype == torch.float32 else seconds

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    monkeypatch.setattr("evengaze.demo.model.perf_counter", lambda: now[0])
    assert choose_dtype("auto") is expected
    assert choose_dtype("float32") is torch.float32
    with pytest.raises(ConfigError, match="int8"):
        choose_dtype("int8")


def test_processor_pads_with_the_mean_colour(loaded):
    _, processor = loaded
    scene = next(s for s in (make_scene(5, i) for i in range(20)) if s.pixels.shape[0] < 90)
    record = demo.make_dataset(images=1)[0]
    inputs = processor(images=scene.pixels, text=record.questions[0].prompt, return_tensors="pt")
    settings = processor.image_processor
    expected = (scene.padded() / 255 - np.array(settings.image_mean)) / np.array(settings.image_std)
    assert inputs["pixel_values"].shape == (1, 3, 112, 112)
    np.testing.assert_allclose(inputs["pixel_values"][0].permute(1, 2, 0).numpy(), expected, atol=1e-5)
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == 196


def test_chat_template_gives_the_trained_prompt(loaded):
    _, processor = loaded
    record = demo.make_dataset(images=1)[0]
    content = [{"type": "image"}, {"type": "text", "text": record.questions[0].text}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert text == record.questions[0].prompt


@pytest.mark.slow
def test_it_answers(loaded):
    records = demo.make_dataset(images=16)
    kinds = ("color", "shape", "exists")
    asked = [one for record in records for one in record.questions if one.type in kinds]
    images = [records[one.image_index].image for one in asked]
    right = [given == one.answer for given, one in zip(answer(loaded, asked, images), asked, strict=True)]
    wrong = images[7:] + images[:7]
    blind = [given == one.answer for given, one in zip(answer(loaded, asked, wrong), asked, strict=True)]
    assert np.mean(right) >= 0.85
    assert np.mean(blind) <= 0.5


def test_any_picture_size(loaded):
    model, processor = loaded
    record = demo.make_dataset(images=1)[0]
    big = record.image.resize((record.image.width * 3, record.image.height * 3))
    assert len(answer((model, processor), record.questions[:1], [big])) == 1


def test_quantisation_error_is_half_a_step():
    weights = {"a": torch.randn(5, 7), "b": torch.randn(4)}
    back = dequantise(quantise(weights), torch.float32)
    step = weights["a"].abs().amax(1, keepdim=True) / 127
    assert ((back["a"] - weights["a"]).abs() <= 0.52 * step).all()
    assert (back["b"] - weights["b"]).abs().max() < 1e-2


def test_recorded_checksum_belongs_to_the_file():
    recorded = (FOLDER / "model.safetensors.sha256").read_text().split()[0]
    assert hashlib.sha256((FOLDER / "model.safetensors").read_bytes()).hexdigest() == recorded
