"""`--graphs`: a method stays attached while it is asked for, and prompts share shapes. Without CUDA: refused by name.

A CPU captures nothing: a stand-in runs what was captured again, in buffers of its own.
"""

from __future__ import annotations

import socket
from typing import Any

import pytest
import torch

from evengaze.cli import main
from evengaze.engine import graphs
from serve.serving import ask, serving


class Replay:
    """Runs the function again on its own copies of the inputs."""

    made = replayed = 0

    def __init__(self, function: Any, inputs: Any, pool: Any) -> None:
        self._inputs, self._function = {name: tensor.clone() for name, tensor in inputs.items()}, function
        Replay.made += 1

    def __call__(self, inputs: Any) -> Any:
        for name, tensor in inputs.items():
            self._inputs[name].copy_(tensor)
        Replay.replayed += 1
        return self._function(self._inputs)

    @staticmethod
    def pool() -> None:
        return None


def test_graphs_outlive_requests(predictor, scenes, monkeypatch):
    monkeypatch.setattr(graphs, "recorder", lambda model: Replay)
    with serving(predictor, graphs=True) as server:
        client = server.client()
        asked = [
            (scene, question.text, {"method": method})
            for method in ("fastv:keep=0.25", "none", "fastv:keep=0.25")
            for scene in scenes[:2]
            for question in scene.questions[:2]  # of different lengths
        ]
        found = [
            ask(client, text, scene.image, evengaze=pruning).choices[0].message.content
            for scene, text, pruning in asked
        ]
        text_only = ask(client, "what color is the star?", max_tokens=4)
        assert "visual_tokens" not in text_only.model_extra["evengaze"]
        assert server.idle()
        # Three attachments of at most three graphs (tower, before and after the stage), and all that came again.
        assert 0 < Replay.made <= 3 * 3 + 2 and Replay.replayed > Replay.made
    with serving(predictor) as server:
        assert found == [server.offline([scene.image], text, **pruning) for scene, text, pruning in asked]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("options", "expected"),
    [(["--graphs"], "CUDA graphs, but the model is on cpu"), (["--method", "fastv:layer=99"], "layer")],
)
def test_what_cannot_be_served_is_told_at_once(options, expected, capsys):
    with pytest.raises(SystemExit) as error:
        main(["serve", *options])
    assert error.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("Error: ") and expected in said and "Traceback" not in said


def test_a_taken_port_is_told_before_a_model_is_loaded(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit) as error:
            main(["serve", "--model", "no/such-model", "--port", str(port)])
    assert error.value.code == 2 and f"port {port} of 127.0.0.1 cannot be listened at" in capsys.readouterr().err


def test_a_plugin_is_not_seen_by_replicas(tmp_path, capsys):
    (tmp_path / "own.py").write_text("")
    with pytest.raises(SystemExit) as error:
        main(["serve", "--ray", "--plugin", str(tmp_path / "own.py")])
    assert error.value.code == 2 and "every node can import" in capsys.readouterr().err
