"""The judge of answers that the rules call wrong, against a real HTTP server that behaves and misbehaves."""
import http.server
import json
import threading
import time
from types import SimpleNamespace

import pytest
import torch

import conftest
import evaluate
import judge
import rollout


@pytest.fixture
def endpoint():
    """An OpenAI-compatible server; .replies: what it does next (text, status, delay, bytes)."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            state.seen.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            reply = state.replies.pop(0) if state.replies else state.default
            reply = reply(state.seen[-1][1]["messages"][0]["content"]) if callable(reply) else reply
            if isinstance(reply, float):
                time.sleep(reply)
                reply = "YES"
            if isinstance(reply, int):
                return self.send_error(reply)
            body = reply
            if not isinstance(reply, bytes):
                body = json.dumps({"choices": [{"message": {"content": reply}}]}).encode()
            self.send_response(200)
            self.end_headers()
            try:
                self.wfile.write(body)
            except OSError:
                pass

        def log_message(self, *_):
            pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state = SimpleNamespace(replies=[], default="NO", seen=[],
                            url=f"http://127.0.0.1:{server.server_address[1]}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield state
    server.shutdown()


def ask(endpoint, *replies, timeout=5.0):
    endpoint.replies[:] = replies
    return judge.ask_judge(endpoint.url + "/v1", "m", "q", timeout=timeout, wait=0.01)


def test_a_verdict_is_the_last_word_and_anything_else_is_none(endpoint):
    assert ask(endpoint, "YES") is True and ask(endpoint, "no.") is False
    assert ask(endpoint, "Not yes ... NO") is False
    assert ask(endpoint, "I cannot say; yesterday I could") is None
    assert ask(endpoint, None) is None and ask(endpoint, "") is None
    path, body = endpoint.seen[0]
    assert path == "/v1/chat/completions" and body["model"] == "m" and body["temperature"] == 0


def test_errors_time_outs_and_broken_replies_are_tried_three_times(endpoint):
    assert ask(endpoint, 500, 503, "YES") is True and len(endpoint.seen) == 3
    assert ask(endpoint, b"not json", b'{"choices": []}', "NO") is False
    assert ask(endpoint, 1.0, "NO", timeout=0.2) is False
    with pytest.raises(OSError, match="500"):
        ask(endpoint, 500, 500, 500)
    with pytest.raises(OSError):
        judge.ask_judge("http://127.0.0.1:9", "m", "q", wait=0.01)


def args(endpoint, timeout=5.0):
    return SimpleNamespace(judge_url=endpoint.url, judge_model="m", judge_timeout=timeout)


PROBLEMS = {0: {"prompt": "P0", "answer": "1/2"},
            1: {"prompt": [{"role": "user", "content": "P1"}], "answer": ["2", "two"]}}


def test_only_wrong_boxed_answers_are_asked_each_once_and_verdicts_are_kept(endpoint, tmp_path):
    def default(question):
        return "YES" if "Given answer: half" in question else "hmm" if "odd" in question else "NO"
    endpoint.default = default
    responses = ["\\boxed{half}", "\\boxed{half}", "\\boxed{3}", "nothing", "\\boxed{odd}", "\\boxed{half}"]
    indices, wrong = torch.tensor([0, 0, 0, 0, 1, 0]), torch.tensor([True, True, True, True, True, False])
    accepted, counts = judge.judge(args(endpoint), PROBLEMS, responses, indices, wrong, tmp_path / "j.json")
    assert accepted.tolist() == [True, True, False, False, False, False]
    assert counts == {"asked": 4, "yes": 2, "unclear": 1, "unanswered": 0} and len(endpoint.seen) == 3
    questions = [body["messages"][0]["content"] for _, body in endpoint.seen]
    assert any("P1" in q and "2 or two" in q for q in questions)
    again, counts_again = judge.judge(args(endpoint), PROBLEMS, responses, indices, wrong,
                                      tmp_path / "j.json")
    # nothing is asked twice
    assert torch.equal(again, accepted) and counts_again == counts and len(endpoint.seen) == 3


def test_unanswered_questions_are_counted_and_asked_again_and_a_dead_judge_stops(endpoint, tmp_path,
                                                                                 monkeypatch):
    monkeypatch.setattr(judge.time, "sleep", lambda seconds: None)
    endpoint.default = lambda question: 500 if "Given answer: 3" in question else "YES"
    responses, indices, wrong = ["\\boxed{half}",
                                 "\\boxed{3}"], torch.tensor([0, 0]), torch.tensor([True, True])
    accepted, counts = judge.judge(args(endpoint), PROBLEMS, responses, indices, wrong, tmp_path / "j.json")
    assert accepted.tolist() == [True, False] and counts["unanswered"] == 1
    endpoint.default = "YES"
    accepted, counts = judge.judge(args(endpoint), PROBLEMS, responses, indices, wrong, tmp_path / "j.json")
    assert accepted.tolist() == [True, True] and counts["unanswered"] == 0
    endpoint.default = 500
    with pytest.raises(rollout.RunError):
        judge.judge(args(endpoint), PROBLEMS, responses, indices, wrong, tmp_path / "other.json")


def test_both_scores_stand_in_the_row(endpoint, tiny, tmp_path, monkeypatch):
    problems = tmp_path / "p.jsonl"
    problems.write_text("".join(json.dumps({"problem": f"{i}+1", "answer": i + 1}) + "\n" for i in range(3)))
    # a random model boxes nothing
    monkeypatch.setattr(judge, "last_boxed", lambda text: "x" if len(text) % 2 else None)
    endpoint.default = "YES"
    command = ["evaluate.py", "--model", tiny[0], "--data", f"t={problems}:4", "--out", tmp_path / "r.jsonl",
               "--engine", "hf", "--max-tokens", 60,
               "--temperature", 1]
    assert conftest.run_here(*command) == 0
    assert conftest.run_here(*command, "--judge-url", endpoint.url, "--judge-model", "m") == 0
    # asked once before anything is sampled
    assert endpoint.seen[0][1]["messages"][0]["content"].count("1 + 1") == 1
    plain, judged = evaluate.read_results(tmp_path / "r.jsonl")
    assert plain["avg_at_k_judge"] is None and judged["avg_at_k"] == plain["avg_at_k"] == 0
    assert judged["judge"]["asked"] > 0
    assert judged["avg_at_k_judge"] == pytest.approx(judged["judge"]["yes"] / 12)
    assert len(list((tmp_path / "samples" / "t").iterdir())) == 1  # the judge read the same samples
    assert conftest.run_here(*command, "--judge-url", endpoint.url) == 2
    dead = [*command[:-1], 0.5, "--judge-url", "http://127.0.0.1:9", "--judge-model", "m"]
    # a dead one: before sampling
    assert conftest.run_here(*dead) == 1 and len(list((tmp_path / "samples" / "t").iterdir())) == 1
