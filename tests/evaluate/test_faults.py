"""Whatever the model or its processor raises on a record ends that record, never the cell or the grid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evengaze.cli import main
from evengaze.errors import ConfigError, DataError, LayoutError
from evengaze.evaluate.benchmarks import Record, get_benchmark
from evengaze.evaluate.predictor import ModelSpec, Prediction, Predictor
from evengaze.evaluate.runner import HOPELESS, Job, LocalBackend, Work, answer_work, run
from evengaze.evaluate.setting import Setting
from evengaze.methods import parse
from runner_fakes import save_model, save_pope

ODD = {"3", "10000002"}


class Fragile:
    """Raises on any batch that holds an odd record."""

    def __init__(self, error: Exception, odd: set[str] = ODD) -> None:
        self.error, self.odd, self.calls = error, odd, 0

    def describe(self, template: str) -> dict[str, Any]:
        return {"name": "fragile"}

    def answer(self, batch: Any, pruner: Any, **options: Any) -> list[Prediction]:
        self.calls += 1
        if self.odd & {record.key for record in batch}:
            raise self.error
        return [Prediction(record, "Yes", {}) for record in batch]


def work(keys: range) -> Work:
    return Work(0, parse("dense"), "vicuna_v1", 4, tuple(Record(str(key), key, "?") for key in keys))


@pytest.mark.parametrize("error", [RuntimeError("shape"), IndexError(), LayoutError("none found"), AssertionError("x")])
def test_an_exception_is_narrowed_down_to_its_record(error: Exception) -> None:
    fragile = Fragile(error)
    answered = answer_work(fragile, work(range(8)))  # type: ignore[arg-type]
    assert not isinstance(answered, str)
    assert [prediction.record.key for prediction in answered] == [str(key) for key in range(8)]
    assert [prediction.record.key for prediction in answered if prediction.raised] == ["3"]
    assert type(error).__name__ in str(answered[3].error)
    assert fragile.calls == 7  # 8; 4, 4; 2, 2; 1, 1


def test_what_the_method_cannot_do_ends_the_cell_at_once() -> None:
    fragile = Fragile(ConfigError("layer=9 is outside the model"))
    assert answer_work(fragile, work(range(8))) == "layer=9 is outside the model"  # type: ignore[arg-type]
    assert fragile.calls == 1


def job(tmp_path: Path, images: int = 4) -> Job:
    data = save_pope(tmp_path / "data", images=images)
    return Job(get_benchmark("pope"), data, parse("fastv:keep=4"), tmp_path / "out", Setting(batch_size=5))


def test_the_run_goes_on_lists_the_record_and_asks_it_again_later(tmp_path: Path) -> None:
    outcome = run(job(tmp_path), LocalBackend(Fragile(ValueError("odd"))))  # type: ignore[arg-type]
    assert set(outcome.errors) == ODD
    assert len(outcome.answers) == 10
    assert outcome.score is not None
    listed = [json.loads(line) for line in (tmp_path / "out/errors.jsonl").read_text().splitlines()]
    assert listed[0]["error"] == "the model raised ValueError: odd"
    again = Job(
        get_benchmark("pope"), tmp_path / "data", parse("fastv:keep=4"), tmp_path / "out", Setting(batch_size=5)
    )
    mended = run(again, LocalBackend(Fragile(ValueError(), set())))  # type: ignore[arg-type]
    assert (len(mended.answers), len(mended.errors)) == (12, 0)


def test_a_model_that_fails_on_everything_is_given_up_soon(tmp_path: Path) -> None:
    every = {str(base + i) for base in (0, 10_000_000, 20_000_000) for i in range(41)}
    fragile = Fragile(RuntimeError("no kernel"), every)
    outcome = run(job(tmp_path, images=40), LocalBackend(fragile))  # type: ignore[arg-type]
    assert outcome.failed
    assert "records in a row failed; the last: the model raised RuntimeError: no kernel" in str(outcome.problem)
    assert HOPELESS <= len(outcome.errors) <= HOPELESS + 5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def spoil(data: Path, text: str) -> None:
    path = data / "playground/data/eval/pope/llava_pope_test.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["text"], rows[4]["text"] = f"Is there {text} here?", f"{text}\nYes or no?"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("text", ["<image>", "<video>"])
def test_a_question_that_holds_a_placeholder_is_refused_by_name_and_the_grid_goes_on(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    data = save_pope(tmp_path / "data")
    spoil(data, text)
    given = ["evaluate", "--model", str(model), "--benchmarks", "pope", "--data", str(data), "--device", "cpu"]
    with pytest.raises(SystemExit) as end:
        main([*given, "--out", str(tmp_path / "out"), "--methods", "none,fastv:keep=4", "--max-new-tokens", "2"])
    assert end.value.code == 3
    results = [json.loads(path.read_text()) for path in (tmp_path / "out").rglob("result.json")]
    assert len(results) == 4
    for result in results:
        assert (result["answered"], len(result["errors"])) == (10, 2)
        assert all(f"the question holds '{text}'" in error for error in result["errors"].values())
        assert result["score"]["value"] is not None
    assert "Traceback" not in capsys.readouterr().err


def test_every_familys_own_placeholders_are_known(model: Path) -> None:
    predictor = Predictor.load(ModelSpec(str(model), device="cpu"))
    predictor.processor.tokenizer.add_special_tokens({"extra_special_tokens": ["<|vision_start|>", "<|IMG_CONTEXT|>"]})
    for text in ("<|vision_start|>", "<|IMG_CONTEXT|>", "<image>"):
        with pytest.raises(DataError, match="takes for a picture"):
            predictor.ask(f"what is {text}?", ["image"], "vicuna_v1")
    assert "what is < image >?" in predictor.ask("what is < image >?", ["image"], "vicuna_v1")


def test_a_processor_that_raises_on_one_picture_costs_one_record(model: Path, tmp_path: Path) -> None:
    predictor = Predictor.load(ModelSpec(str(model), device="cpu"))
    original = predictor.processor.image_processor

    class Picky:
        def __getattr__(self, name: str) -> Any:
            return getattr(original, name)

        def __call__(self, images: Any, *rest: Any, **options: Any) -> Any:
            if any(image.size == (40, 60) for image in images):
                raise ZeroDivisionError("a picture that is too odd")
            return original(images, *rest, **options)

    predictor.processor.image_processor = Picky()
    given = job(tmp_path)
    records = list(given.benchmark.records(given.data))
    assert predictor.geometry(records) == (6, 16)  # of the first picture that does not raise
    short = Job(given.benchmark, given.data, given.pruner, given.folder, Setting(max_new_tokens=2))
    outcome = run(short, LocalBackend(predictor))
    assert outcome.errors
    assert {"ZeroDivisionError" in line["error"] for line in outcome.errors.values()} == {True}
    assert len(outcome.answers) + len(outcome.errors) == 12
