"""The predictor on a tiny LLaVA: prompts, batches, digests, loading errors."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from PIL import Image

from evengaze.errors import ConfigError, DataError
from evengaze.evaluate.benchmarks import Record, get_benchmark
from evengaze.evaluate.conversation import resolve
from evengaze.evaluate.media import open_media
from evengaze.evaluate.predictor import ModelSpec, Predictor, digest_folder
from evengaze.methods import parse
from evengaze.testing import tiny
from runner_fakes import VideoProcessor, byte_tokenizer, save_model, save_pope, write_video

FASTV = parse("fastv:keep=4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def predictor(folder: Path) -> Predictor:
    return Predictor.load(ModelSpec(str(folder), device="cpu"))


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    data = save_pope(tmp_path_factory.mktemp("data"), images=2)
    return list(get_benchmark("pope").records(data))


def test_batches_do_not_change_answers_also_with_text_only_rows(predictor: Predictor, records: list[Record]) -> None:
    mixed = [*records[:3], Record("t", 0, "How many legs has a dog?"), *records[3:]]
    together = predictor.answer(mixed, FASTV, max_new_tokens=6)
    alone = [predictor.answer([record], FASTV, max_new_tokens=6)[0] for record in mixed]
    assert [p.text for p in together] == [p.text for p in alone]
    assert [p.trace for p in together] == [p.trace for p in alone]
    assert together[3].trace == {}
    assert together[0].trace["average_tokens"] == (2 * 16 + 4 * 4) / 6
    assert 0 < together[0].trace["relative_flops"] < 1


def test_dense_costs_all(predictor: Predictor, records: list[Record]) -> None:
    trace = predictor.answer(records[:1], parse("dense"), max_new_tokens=2)[0].trace
    assert trace == {"visual_tokens": 16, "average_tokens": 16.0, "relative_flops": 1.0}
    assert predictor.geometry(records) == (6, 16)


def test_pictures_are_padded_to_squares_as_llava_does(predictor: Predictor) -> None:
    assert predictor.processor.image_processor.do_pad


def test_prompts_are_those_of_the_official_scripts(predictor: Predictor, records: list[Record]) -> None:
    system = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions."
    )
    text = records[0].prompt
    assert predictor.prompt(records[0], "vicuna_v1") == f"{system} USER: <image>\n{text} ASSISTANT:"
    assert predictor.prompt(Record("t", 0, "Why?"), "vicuna_v1") == f"{system} USER: Why? ASSISTANT:"
    video = Record("v", 0, "Who?", video=Path("x.mp4"))
    assert "curious human" in predictor.prompt(video, "llava_v1")
    assert "USER: <video>\nWho? ASSISTANT:" in predictor.prompt(video, "llava_v1")


def test_which_prompt_a_model_gets() -> None:
    class Processor:
        def __init__(self, template: str | None) -> None:
            self.chat_template, self._tokenizer = template, byte_tokenizer()

        def apply_chat_template(self, messages: object, **options: object) -> str:
            return str(self._tokenizer.apply_chat_template(messages, chat_template=self.chat_template, **options))

    vicuna, other = Processor("USER: hello ASSISTANT:"), Processor("<|user|>")
    assert resolve("auto", vicuna, "llava") == "official"
    assert resolve("auto", other, "llava") == "chat"
    assert resolve("official", other, "qwen2_vl") == "official"
    assert resolve("auto", Processor(None), "llava") == "official"
    with pytest.raises(ConfigError, match="no chat template"):
        resolve("auto", Processor(None), "qwen2_vl")
    with pytest.raises(ConfigError, match="no chat template"):
        resolve("chat", Processor(None), "llava")


def test_a_folder_that_is_no_model_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"model .*this folder cannot be loaded"):
        Predictor.load(ModelSpec(str(tmp_path)))


def test_a_name_that_is_neither_folder_nor_hub_id_is_not_looked_for_on_the_hub() -> None:
    with pytest.raises(DataError, match=r"model demoo: there is no such folder.*'demo' is the embedded model"):
        Predictor.load(ModelSpec("demoo"))


@pytest.mark.parametrize("source", [None, "demo"])
@pytest.mark.parametrize(
    ("field", "value"),
    [("dtype", "float31"), ("dtype", "nn"), ("dtype", "int8"), ("device", "toaster"), ("device", "cuda:99")],
)
def test_dtypes_and_devices_that_do_not_exist(folder: Path, source: str | None, field: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"{field} '{value}' (does not exist|cannot be used)"):
        Predictor.load(ModelSpec(source or str(folder), **{field: value}))


def test_the_revision_changes_with_the_weights(folder: Path, tmp_path: Path) -> None:
    other = save_model(tmp_path, seed=1)
    assert digest_folder(folder) == digest_folder(folder)
    assert digest_folder(folder) != digest_folder(other)


def test_names_of_checkpoints_are_llavas() -> None:
    assert ModelSpec("liuhaotian/llava-v1.5-7b").name == "llava-v1.5-7b"
    assert ModelSpec("out/run7/checkpoint-500/").name == "run7_checkpoint-500"


def test_nothing_is_deprecated(predictor: Predictor, records: list[Record]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predictor.answer(records[:2], FASTV, max_new_tokens=2)


def test_videos_are_read_pruned_and_answered(tmp_path: Path) -> None:
    pytest.importorskip("av")
    write_video(tmp_path / "a.mp4")
    (tmp_path / "b.mp4").write_bytes(b"")
    model, _ = tiny("video_llava", video=True)
    predictor = Predictor(model, VideoProcessor(), ModelSpec("tiny"))
    records = [Record(name, name, "who?", video=tmp_path / f"{name}.mp4") for name in ("a", "b", "c")]
    answered = predictor.answer(records, parse("fastv:keep=32"), template="llava_v1", max_new_tokens=3)
    assert answered[0].text is not None
    assert answered[0].trace["visual_tokens"] == 128
    assert answered[0].trace["average_tokens"] == (2 * 128 + 4 * 32) / 6
    assert "cannot be decoded" in str(answered[1].error)
    assert "does not exist" in str(answered[2].error)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_pictures_of_any_mode_become_rgb(mode: str, tmp_path: Path) -> None:
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    Image.new("RGB", (9, 5), (200, 30, 90)).convert(mode).save(path)
    for source in (path, path.read_bytes()):
        kind, picture = open_media(Record("a", "a", "?", image=source))
        assert (kind, picture.mode, picture.size) == ("images", "RGB", (9, 5))


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"\xff\xd8\xff\xe0 cut off", None])
def test_what_is_no_picture_is_named(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    if content is not None:
        path.write_bytes(content)
        with pytest.raises(DataError, match="the picture of record a cannot be read"):
            open_media(Record("a", "a", "?", image=content))
    with pytest.raises(DataError, match=r"x\.jpg"):
        open_media(Record("a", "a", "?", image=path))
