"""The plug-in inside the real lmms-eval, on a local task with local parquet data. Runs where lmms-eval is installed."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from runner_fakes import save_model

lmms_eval = pytest.importorskip("lmms_eval")
pytestmark = pytest.mark.slow

TASK = """
dataset_path: parquet
dataset_kwargs:
  data_files: {{test: {data}}}
task: tiny_pope
test_split: test
output_type: generate_until
doc_to_visual: !function tiny_pope.visual
doc_to_text: !function tiny_pope.text
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 4, temperature: 0, until: ["##"]}}
process_results: !function tiny_pope.results
metric_list:
- {{metric: exact, aggregation: mean, higher_is_better: true}}
"""
CHOICES = """
dataset_path: parquet
dataset_kwargs:
  data_files: {{test: {data}}}
task: tiny_choices
test_split: test
output_type: multiple_choice
doc_to_visual: !function tiny_pope.visual
doc_to_text: !function tiny_pope.text
doc_to_choice: ["yes", "no", "maybe"]
doc_to_target: 0
metric_list:
- {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
CODE = """
from io import BytesIO
from PIL import Image

def visual(doc):
    return [Image.open(BytesIO(doc["picture"])).convert("RGB")] * doc["copies"]

def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def results(doc, results):
    return {"exact": float(results[0].strip() == doc["answer"])}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    root = tmp_path_factory.mktemp("lmms")
    save_model(root / "model")
    rows = []
    for i in range(8):
        picture = BytesIO()
        Image.new("RGB", (30 + 5 * i, 60 - 5 * i), (20 * i, 90, 255 - 20 * i)).save(picture, "PNG")
        copies = i % 3  # some questions have no picture, some two
        rows.append({"picture": picture.getvalue(), "question": f"Is it {i}?", "answer": "yes", "copies": copies})
    pq.write_table(pa.Table.from_pylist(rows), root / "test.parquet")
    (root / "tasks").mkdir()
    (root / "tasks" / "tiny_pope.yaml").write_text(TASK.format(data=root / "test.parquet"))
    (root / "tasks" / "tiny_choices.yaml").write_text(CHOICES.format(data=root / "test.parquet"))
    (root / "tasks" / "tiny_pope.py").write_text(CODE)
    return root


def evaluate(place: Path, model_args: str, task: str = "tiny_pope", **options: Any) -> Any:
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    tasks = TaskManager(include_path=[str(place / "tasks")], include_defaults=False)
    return simple_evaluate(
        model="evengaze",
        model_args=f"pretrained={place / 'model'},device=cpu,{model_args}",
        tasks=[task],
        task_manager=tasks,
        log_samples=True,
        **options,
    )


def answers(result: Any) -> list[str]:
    samples = sorted(result["samples"]["tiny_pope"], key=lambda sample: sample["doc_id"])
    return [json.dumps(sample["filtered_resps"]) for sample in samples]


def test_the_entry_point_is_found() -> None:
    from lmms_eval.models import get_model

    assert get_model("evengaze").__name__ == "Evengaze"


def test_all_parameters_travel_in_model_args_and_batches_do_not_matter(place: Path) -> None:
    dense = answers(evaluate(place, "method=none", batch_size=1))
    assert len(dense) == 8
    assert answers(evaluate(place, "method=fastv,keep=32,layer=2", batch_size=3)) == dense
    pruned = evaluate(place, "method=pyramiddrop,keep=[0.5,0.1],layers=[1,3],debias=padding", batch_size=1)
    assert answers(pruned) == answers(
        evaluate(place, "method=pyramiddrop,keep=[0.5,0.1],layers=[1,3],debias=padding", batch_size=4)
    )
    assert "tiny_pope" in pruned["results"]


def test_the_response_cache_tells_settings_apart(place: Path, tmp_path: Path) -> None:
    from evengaze.evaluate import lmms_eval as ours

    asked: list[int] = []
    original = ours.Evengaze._answer

    def counting(self: Any, prepared: Any) -> Any:
        asked.append(len(prepared))
        return original(self, prepared)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ours.Evengaze, "_answer", counting)
        for arguments in ("method=none", "method=fastv,keep=4", "method=fastv,keep=4"):
            evaluate(place, arguments, batch_size=4, use_cache=str(tmp_path / "cache"))
    assert sum(asked) == 16


def test_options_are_compared_by_their_likelihoods(place: Path) -> None:
    result = evaluate(place, "method=fastv,keep=4", "tiny_choices", force_simple=True)
    samples = result["samples"]["tiny_choices"]
    assert len(samples) == 8 and all(len(sample["resps"]) == 3 for sample in samples)
    losses = [float(loss) for sample in samples for ((loss, _),) in sample["resps"]]
    assert min(losses) > 0 and len(set(losses)) > 8
    best = [min(range(3), key=lambda k: float(sample["resps"][k][0][0])) for sample in samples]
    accuracy = next(v for k, v in result["results"]["tiny_choices"].items() if k.startswith("acc,"))
    assert accuracy == best.count(0) / 8


def test_older_tasks_of_generation_give_the_same_answers(place: Path) -> None:
    simple = evaluate(place, "method=fastv,keep=4", batch_size=2, force_simple=True)
    assert len(answers(simple)) == 8


def test_wrong_parameters_are_refused(place: Path) -> None:
    from evengaze.errors import ConfigError

    with pytest.raises(ConfigError, match="has no parameter keeps"):
        evaluate(place, "method=fastv,keeps=4")
    with pytest.raises(ConfigError, match="without a method"):
        evaluate(place, "keep=4")
