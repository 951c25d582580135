"""Judges against a local HTTP server that speaks the chat-completions protocol."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from evengaze.errors import ConfigError, DataError
from evengaze.evaluate.benchmarks import ScoreOptions
from evengaze.evaluate.judge import CachedJudge, Judge, JudgeError, LocalJudge, OpenAIJudge, Reply, judge_all
from evengaze.evaluate.metrics import mmvet, video_judge
from evengaze.evaluate.scoring import score_file

EVAL = "playground/data/eval"
MMVET = f"{EVAL}/mm-vet/answers/gold.jsonl"
MSVD = "eval/GPT_Zero_Shot_QA/MSVD_Zero_Shot_QA/gold/merge.jsonl"


class FakeServer:
    """Answers every request through ``reply``: text, or a status code for an error."""

    def __init__(self) -> None:
        self.reply: Callable[[dict[str, Any]], str | int | None] = lambda body: "0.5"
        self.requests: list[dict[str, Any]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append(body)
                reply = outer.reply(body)
                status = reply if isinstance(reply, int) else 200
                message = {"role": "assistant", "content": reply}
                content: dict[str, Any] = {
                    "id": "1",
                    "object": "chat.completion",
                    "created": 0,
                    "model": "judge-2024-01-01",
                    "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                }
                if status != 200:
                    content = {"error": {"message": f"fake {status}"}}
                raw = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(raw)))
                self.send_header("Retry-After", "0")
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server() -> Iterator[FakeServer]:
    server = FakeServer()
    yield server
    server.close()


def judge_for(server: FakeServer, retries: int = 3) -> OpenAIJudge:
    return OpenAIJudge("gpt-x", base_url=server.url, api_key="secret-key", timeout=10, max_retries=retries)


# -- MM-Vet ------------------------------------------------------------------------------------------------------------


def test_mmvet_through_a_server_records_judge_and_prompt(golden: Path, server: FakeServer) -> None:
    score = score_file("mmvet", golden / MMVET, golden, options=ScoreOptions(judge=judge_for(server)))
    assert score.value == pytest.approx(50.0)
    assert score.judge is not None
    assert score.judge["model"] == "gpt-x" and score.judge["answered_as"] == ["judge-2024-01-01"]
    assert score.judge["base_url"].startswith(server.url) and score.judge["prompt"] == mmvet.PROMPT
    assert "secret-key" not in json.dumps(score.to_dict())
    assert set(score.offline) == {"exact_match", "exact_match_loose", "normalised_match", "containment"}
    assert any("gpt-4-0613" in note for note in score.notes)
    assert len(server.requests) == score.n_records  # the official number needs no second question
    first = server.requests[0]
    assert (first["max_tokens"], first["temperature"], first["model"]) == (3, 0.0, "gpt-x")


def test_mmvet_asks_again_hotter_and_lists_what_cannot_be_graded(golden: Path, server: FakeServer) -> None:
    server.reply = lambda body: "no idea" if "| This meme is poking fun at things. |" in str(body) else "1.0"
    score = score_file("mmvet", golden / MMVET, golden, options=ScoreOptions(judge=judge_for(server)))
    failed = [item["key"] for item in score.problems.errors]
    assert failed and score.n_scored == score.n_records - len(failed)
    assert score.value == pytest.approx(100.0)  # the failed ones are no zeros
    assert "no grade between 0 and 1 in 6 replies" in score.problems.errors[0]["error"]
    assert score.official is not None and score.official["value"] < 100  # upstream makes them zeros
    asked = [r["temperature"] for r in server.requests if "| This meme is poking fun at things. |" in str(r)]
    assert sorted(set(asked)) == [0.0, 0.5, 1.0, 1.5, 2.0]


def test_mmvet_several_runs_are_asked_separately(golden: Path, server: FakeServer) -> None:
    replies = iter(["0.0"] * 26 + ["1.0"] * 26)
    lock = threading.Lock()

    def reply(body: dict[str, Any]) -> str:
        with lock:
            return next(replies)

    server.reply = reply
    options = ScoreOptions(judge=judge_for(server), runs=2, workers=1)
    score = score_file("mmvet", golden / MMVET, golden, options=options)
    assert len(server.requests) == 52
    assert score.value == pytest.approx(50.0) and len(score.metrics["runs"]) == 2


def test_replies_are_kept_and_judging_resumes_after_a_torn_line(
    golden: Path, server: FakeServer, tmp_path: Path
) -> None:
    cache = tmp_path / "sub" / "cache.jsonl"
    options = ScoreOptions(judge=judge_for(server), cache=cache)
    wanted = score_file("mmvet", golden / MMVET, golden, options=options).value
    assert len(server.requests) == 26
    assert score_file("mmvet", golden / MMVET, golden, options=options).value == wanted
    assert len(server.requests) == 26
    cache.write_bytes(cache.read_bytes()[:-20])
    assert score_file("mmvet", golden / MMVET, golden, options=options).value == wanted
    assert len(server.requests) == 27
    other = ScoreOptions(judge=OpenAIJudge("gpt-y", base_url=server.url, api_key="x"), cache=cache)
    score_file("mmvet", golden / MMVET, golden, options=other)
    assert len(server.requests) == 27 + 26  # another model's replies are not its


def test_a_file_that_is_no_cache_is_refused(tmp_path: Path, golden: Path, server: FakeServer) -> None:
    cache = tmp_path / "notes.jsonl"
    cache.write_text('{"some": "thing"}\n')
    with pytest.raises(DataError, match=r"notes\.jsonl line 1.*no judge cache"):
        score_file("mmvet", golden / MMVET, golden, options=ScoreOptions(judge=judge_for(server), cache=cache))
    assert cache.read_text() == '{"some": "thing"}\n'


def test_judgements_of_other_answers_are_refused(golden: Path, tmp_path: Path) -> None:
    grades = tmp_path / "grade.json"
    grades.write_text(json.dumps({"v1_900": {"model": ["m"], "content": ["1"], "score": [1.0]}}))
    with pytest.raises(DataError, match="none of the 1 judgements"):
        score_file("mmvet", golden / MMVET, golden, options=ScoreOptions(judged=grades))


# -- errors ------------------------------------------------------------------------------------------------------------


def test_rate_limits_and_server_errors_are_retried(server: FakeServer) -> None:
    replies: Iterator[str | int] = iter([429, 500, "0.7"])
    server.reply = lambda body: next(replies)
    reply = judge_for(server).ask([{"role": "user", "content": "?"}], 3, 0.0)
    assert (reply.text, reply.model, len(server.requests)) == ("0.7", "judge-2024-01-01", 3)


@pytest.mark.parametrize("reply", [None, 400])
def test_an_item_without_a_reply_is_listed_and_the_rest_is_scored(
    golden: Path, server: FakeServer, reply: int | None
) -> None:
    server.reply = lambda body: reply if "| This meme is poking fun at things. |" in str(body) else "0.5"
    score = score_file("mmvet", golden / MMVET, golden, options=ScoreOptions(judge=judge_for(server, 0)))
    assert score.problems.errors and score.value == pytest.approx(50.0)


@pytest.mark.parametrize("status", [401, 404])
def test_a_refused_key_or_unknown_model_stops_at_once(golden: Path, server: FakeServer, status: int) -> None:
    server.reply = lambda body: status
    with pytest.raises(JudgeError, match=f"answered {status}"):
        score_file("mmvet", golden / MMVET, golden, options=ScoreOptions(judge=judge_for(server), workers=2))
    assert len(server.requests) < 26


def test_a_server_that_is_not_there(golden: Path) -> None:
    judge = OpenAIJudge("m", base_url="http://127.0.0.1:9/v1", api_key="x", timeout=2, max_retries=0)
    with pytest.raises(JudgeError, match="answers nothing"):
        score_file("mmvet", golden / MMVET, golden, options=ScoreOptions(judge=judge))


def test_no_key_for_the_public_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="OPENAI_API_KEY"):
        OpenAIJudge("gpt-4-0613")


def test_judge_all_keeps_order_and_collects_errors() -> None:
    def grade(key: str) -> int:
        if key in "bd":
            raise JudgeError(f"no {key}")
        return ord(key)

    grades, errors = judge_all(list("abcde"), grade, workers=3)
    assert list(grades) == ["a", "c", "e"] and [item["key"] for item in errors] == ["b", "d"]


# -- video -------------------------------------------------------------------------------------------------------------


def test_video_through_a_server(golden: Path, server: FakeServer) -> None:
    server.reply = lambda body: (
        "{'pred': 'yes', 'score': 4.8}" if "Answer: man" in str(body) else '{"pred":"no","score":1}'
    )
    score = score_file("msvd_qa", golden / MSVD, golden, options=ScoreOptions(judge=judge_for(server)))
    assert len(server.requests) == 22 and score.n_scored == 22 and len(score.problems.missing) == 5
    yes = sum("Correct Answer: man\n" in str(r["messages"][1]["content"]) for r in server.requests)
    assert score.metrics["yes_count"] == yes
    assert score.metrics["average_score"] == pytest.approx((yes * 4 + (22 - yes)) / 22)
    assert score.official == {"value": score.value, "error": None, "differs": False}
    assert "temperature" not in server.requests[0] and score.judge is not None
    assert score.judge["prompt"] == video_judge.PROMPT


def test_video_verdicts_that_cannot_be_read_are_errors_not_zeros(golden: Path, server: FakeServer) -> None:
    bad = [
        "Sure! yes",
        "{'pred': 'maybe', 'score': 3}",
        "['yes', 5]",
        "{'pred': 'yes', 'score': '2.5'}",
        "",
        "((((" * 99,
    ]
    counter = iter(range(10**6))
    lock = threading.Lock()

    def reply(body: dict[str, Any]) -> str:
        with lock:
            return bad[next(counter) % len(bad)]

    server.reply = reply
    with pytest.raises(JudgeError, match="answers nothing"):
        score_file("msvd_qa", golden / MSVD, golden, options=ScoreOptions(judge=judge_for(server)))
    server.reply = lambda body: "{'pred': 'yes', 'score': 5}" if "Answer: man" in str(body) else bad[1]
    score = score_file("msvd_qa", golden / MSVD, golden, options=ScoreOptions(judge=judge_for(server)))
    assert score.value == 100.0 and len(score.problems.errors) == 22 - score.n_scored > 0


def test_video_stored_wrong_answers_are_not_judged_twice(golden: Path, server: FakeServer) -> None:
    server.reply = lambda body: "{'pred': 'yes', 'score': 5}"
    answers = golden / Path(MSVD).parent.parent / "gold_2chunks/merge.jsonl"
    score = score_file("msvd_qa", answers, golden, options=ScoreOptions(judge=judge_for(server)))
    assert len(server.requests) == 22 and score.official is None and score.metrics["mispaired"]


def test_video_without_a_judge_reports_named_offline_matches_only(golden: Path) -> None:
    score = score_file("tgif_qa", golden / MSVD.replace("MSVD", "TGIF"), golden)
    assert score.value is None and score.judge is None
    assert 0 < score.offline["exact_match"] < score.offline["containment"] < 100
    assert any("no substitute" in note for note in score.notes)


# -- local -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with a byte-level tokenizer and a chat template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("judge")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *letters])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_local_judge_is_deterministic_per_question_and_turn(tiny_chat_model: Path) -> None:
    judge = LocalJudge(str(tiny_chat_model), device="cpu")
    assert judge.describe()["kind"] == "transformers"
    chat = [{"role": "user", "content": "Is 2 equal to 3? yes or no"}]
    greedy = judge.ask(chat, 4, 0.0)
    assert greedy == judge.ask(chat, 4, None) and greedy.model == str(tiny_chat_model)
    hot = judge.ask(chat, 8, 2.0, "run 1")
    assert hot == judge.ask(chat, 8, 2.0, "run 1")
    assert hot != judge.ask(chat, 8, 2.0, "run 2")


def test_local_judge_that_cannot_judge_gives_no_grade(tiny_chat_model: Path, tmp_path: Path) -> None:
    judge = CachedJudge(LocalJudge(str(tiny_chat_model), device="cpu"), tmp_path / "c.jsonl")
    with pytest.raises(JudgeError, match="no grade between 0 and 1 in 6 replies"):
        mmvet.grade(judge, "Is 2 equal to 3?", "run 1", official=False)
    assert len((tmp_path / "c.jsonl").read_text().splitlines()) == 6


class Counting(Judge):
    def __init__(self) -> None:
        self.calls = 0

    def describe(self) -> dict[str, Any]:
        return {"kind": "test", "model": "m"}

    def ask(self, messages: Any, max_tokens: Any, temperature: Any, turn: str = "") -> Reply:
        self.calls += 1
        return Reply(str(self.calls), "m")


def test_cache_tells_turns_and_temperatures_apart(tmp_path: Path) -> None:
    inner = Counting()
    judge = CachedJudge(inner, tmp_path / "c.jsonl")
    chat = [{"role": "user", "content": "ä?"}]
    replies = [judge.ask(chat, 3, t, turn).text for t, turn in [(0.0, "a"), (0.0, "b"), (0.5, "a"), (0.0, "a")]]
    assert replies == ["1", "2", "3", "1"]
    again = CachedJudge(inner, tmp_path / "c.jsonl")
    assert again.ask(chat, 3, 0.0, "b").text == "2" and inner.calls == 3


# -- attacks -----------------------------------------------------------------------------------------------------------
class RawServer:
    """Sends any bytes under any content type; `hang` keeps clients waiting until it is closed."""

    def __init__(
        self, body: bytes = b"", kind: str = "application/json", status: int = 200, hang: bool = False
    ) -> None:
        self.requests = 0
        self._over = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                outer.requests += 1
                if hang:
                    outer._over.wait(60)
                    return
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __enter__(self) -> RawServer:
        return self

    def __exit__(self, *error: Any) -> None:
        self._over.set()
        self._server.shutdown()
        self._server.server_close()


GARBAGE = {
    "html": (b"<html><body>504 Gateway</body></html>", "text/html"),
    "html that says it is json": (b"<html>", "application/json"),
    "a list": (b"[1, 2]", "application/json"),
    "null": (b"null", "application/json"),
    "a number": (b"7", "application/json"),
    "other fields": (b'{"reply": "0.5"}', "application/json"),
    "no choices": (b'{"choices": null}', "application/json"),
    "choices of something": (b'{"choices": [null]}', "application/json"),
    "a message without text": (b'{"choices": [{"message": {"content": [1]}}], "model": 3}', "application/json"),
    "nothing": (b"", "application/json"),
    "no utf-8": (b"\xff\xfe\x00", "application/json"),
    "nested": (b"[" * 100_000, "application/json"),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_is_the_replys_error_and_never_blamed_on_the_data(golden: Path, name: str) -> None:
    body, kind = GARBAGE[name]
    with RawServer(body, kind) as server:
        judge = OpenAIJudge("m", base_url=server.url, api_key="x", timeout=5, max_retries=0)
        with pytest.raises(JudgeError) as caught:
            judge.ask([{"role": "user", "content": "?"}], 3, 0.0)
        assert server.url in str(caught.value) and not caught.value.fatal
        if name == "html":
            with pytest.raises(JudgeError, match="answers nothing at all") as caught:
                score_file("mmvet", golden / MMVET, golden, options=ScoreOptions(judge=judge))
            assert "not as expected" not in str(caught.value)


@pytest.mark.parametrize("content", ['{"v1_0": 1}', '{"v1_0": {"score": ["x"], "model": ["m"], "content": ["c"]}}'])
def test_garbage_in_recorded_grades_names_their_file(golden: Path, tmp_path: Path, content: str) -> None:
    grades = tmp_path / "grade.json"
    grades.write_text(content)
    with pytest.raises(DataError, match=r"grade\.json: v1_0 is no item"):
        score_file("mmvet", golden / MMVET, golden, options=ScoreOptions(judged=grades))


def test_a_cache_whose_fields_are_no_texts_is_refused(tmp_path: Path) -> None:
    cache = tmp_path / "c.jsonl"
    cache.write_text('{"key": [1], "reply": "x", "model": "m"}\n')
    with pytest.raises(DataError, match="no judge cache"):
        CachedJudge(Counting(), cache)


def test_a_hanging_judge_is_given_up_after_the_time_that_was_set_and_says_so(
    golden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evengaze.evaluate.judge._QUIET_FOR", 0.3)
    monkeypatch.setattr("evengaze.evaluate.judge._REPORT_EVERY", 0.5)
    said: list[str] = []
    with RawServer(hang=True) as server:
        judge = OpenAIJudge("m", base_url=server.url, api_key="x", timeout=0.5, patience=1.5, say=said.append)
        start = time.monotonic()
        with pytest.raises(JudgeError, match=r"has not answered for \d+ s.*same command again") as caught:
            score_file("mmvet", golden / MMVET, golden, options=ScoreOptions(judge=judge, workers=4))
    assert caught.value.fatal
    assert time.monotonic() - start < 10
    assert said and "it is asked again until 2 s are over" in said[0]


def test_the_end_of_an_outage_is_said_and_nothing_is_lost(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evengaze.evaluate.judge._QUIET_FOR", 0.0)
    said: list[str] = []
    replies: Iterator[str | int] = iter([503, 503, "0.7"])
    server.reply = lambda body: next(replies)
    judge = OpenAIJudge("m", base_url=server.url, api_key="x", timeout=5, say=said.append)
    assert judge.ask([{"role": "user", "content": "?"}], 3, 0.0).text == "0.7"
    assert len(said) == 2 and "answered 503" in said[0] and "answers again" in said[1]


def test_a_judge_that_dies_after_a_success_stops_the_run() -> None:
    asked = []

    def grade(key: str) -> int:
        asked.append(key)
        if key == "0":
            return 1
        time.sleep(0.01)
        raise JudgeError("connection refused", silent=True)

    with pytest.raises(JudgeError, match="answers nothing any more"):
        judge_all([str(i) for i in range(500)], grade, workers=1)
    assert len(asked) < 100


def test_replies_of_no_use_never_stop_a_run_that_has_grades() -> None:
    def grade(key: str) -> int:
        if key == "0":
            return 1
        raise JudgeError("no grade")

    grades, errors = judge_all([str(i) for i in range(60)], grade, workers=1)
    assert (len(grades), len(errors)) == (1, 59)


def test_progress_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evengaze.evaluate.judge._REPORT_EVERY", 0.0)
    said: list[str] = []
    judge_all(["a", "b"], lambda key: 1, 1, said.append)
    assert said[-1] == "judged 2 of 2"


def test_an_address_that_is_none_is_an_error_of_ours() -> None:
    with pytest.raises((ConfigError, JudgeError)):
        OpenAIJudge("m", base_url="http://[::1", api_key="x", max_retries=0).ask([], None, None)


def test_a_cache_that_ends_in_a_thousand_brackets_is_cut_like_any_torn_line(tmp_path: Path) -> None:
    cache = tmp_path / "c.jsonl"
    cache.write_text('{"key": "k", "reply": "x", "model": "m"}\n' + "[" * 50_000)
    CachedJudge(Counting(), cache)
    assert cache.read_text().count("\n") == 1
