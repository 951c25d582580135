"""Ray: the same files as one process makes, also when a node dies in mid-run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from evengaze.evaluate.benchmarks import get_benchmark
from evengaze.evaluate.predictor import ModelSpec, Predictor
from evengaze.evaluate.runner import Job, LocalBackend, run, run_jobs
from evengaze.evaluate.setting import Setting
from evengaze.methods import parse
from runner_fakes import save_model, save_pope

ray = pytest.importorskip("ray")
psutil = pytest.importorskip("psutil")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ray")
    save_pope(root / "data", images=20)
    save_model(root / "model")
    return root


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    # The workers import this test's helpers; metrics and dashboard processes only cost time here.
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield made
    ray.shutdown()
    made.shutdown()


def jobs(root: Path, name: str) -> list[tuple[Job, Any]]:
    benchmark = get_benchmark("pope")
    records = list(benchmark.records(root / "data"))
    return [
        (
            Job(
                benchmark,
                root / "data",
                parse(method),
                root / name / method[:5],
                Setting(batch_size=2, max_new_tokens=6),
            ),
            records,
        )
        for method in ("dense", "fastv:keep=4")
    ]


def files(root: Path, name: str) -> dict[str, str]:
    return {p.parent.name: p.read_text() for p in sorted((root / name).rglob("answers.jsonl"))}


def alone(root: Path) -> dict[str, str]:
    """What one process answers."""
    if not (root / "alone").exists():
        backend = LocalBackend(Predictor.load(ModelSpec(str(root / "model"), device="cpu")))
        for job, _ in jobs(root, "alone"):
            run(job, backend)
    return files(root, "alone")


def kill_worker(process: int) -> None:
    """Kill one process of the pool, as the system does when memory runs out; it must be one that this test started."""
    mine = {child.pid for child in psutil.Process().children(recursive=True)}
    assert process in mine
    psutil.Process(process).kill()


@pytest.mark.parametrize("loss", ["node", "worker"])
def test_what_dies_in_mid_run_costs_no_answer(place: Path, cluster: Any, loss: str) -> None:
    from evengaze.evaluate.ray_runner import RayBackend

    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    cluster.wait_for_nodes()
    backend = RayBackend(ModelSpec(str(place / "model"), device="cpu"), cluster.address, actors=2)
    assert backend.geometry(jobs(place, loss)[0][1], "vicuna_v1") == (6, 16)
    shard = place / loss / "dense" / "shards" / "answers-0.jsonl"
    killed = []

    def advance(job: int, count: int) -> None:
        if count and not killed:
            killed.append(len(shard.read_text().splitlines()))
            if loss == "node":
                cluster.remove_node(nodes[1], allow_graceful=False)
            else:
                kill_worker(next(iter(backend.processes)))

    outcomes = dict(run_jobs(jobs(place, loss), backend, advance=advance))
    assert killed[0] < 60
    assert [len(outcome.answers) for _, outcome in sorted(outcomes.items())] == [60, 60]
    assert files(place, loss) == alone(place)
    lines = [json.loads(line) for line in shard.read_text().splitlines()]
    assert len({line["metadata"]["key"] for line in lines}) == len(lines) == 60


@pytest.mark.parametrize("wrong", [{"actors": 0}, {"actors": -1}, {"gpus": -1.0}, {"cpus": 0}, {"cpus": -2}])
def test_fewer_than_nothing_is_refused(wrong: dict[str, Any]) -> None:
    from evengaze.errors import ConfigError
    from evengaze.evaluate.ray_runner import RayBackend

    with pytest.raises(ConfigError, match=f"ray_{next(iter(wrong))}"):
        RayBackend(ModelSpec("demo"), **wrong)
