"""Programs of a model: right ones are right, and hostile ones cost time at most. With bubblewrap, and without
it."""
import base64
import json
import os
import pickle
import subprocess
import time
import zlib

import pytest

import conftest
import rollout

CODE = rollout.import_file(conftest.ROOT / "tests" / "tasks" / "code.py")


@pytest.fixture(scope="module")
def isolated():
    """Grading processes that last for all tests; skipped where programs cannot be isolated."""
    try:
        rollout.load_task("code")
    except rollout.InputError:
        pytest.skip("bubblewrap cannot isolate here")
    with rollout.grading_pool(2) as pool:
        yield pool


def verdict(pool, program, inputs, outputs, name=None, timeout=2.0):
    stats = {}
    tests = {"inputs": inputs, "outputs": outputs} | ({"fn_name": name} if name else {})
    reward, = rollout.grade([f"Here it is:\n```python\n{program}\n```\nDone."], [json.dumps(tests)], "code",
                            timeout=timeout, stats=stats, pool=pool)
    return reward, stats


def test_right_and_wrong_programs_in_both_styles(isolated):
    assert verdict(isolated, "print(2 * int(input()))", ["3\n", "5"], ["6", "10\n"])[0] == 1
    assert verdict(isolated, "print(2 * int(input()))", ["3\n", "5"], ["6", "11"])[0] == 0
    assert verdict(isolated, "print('1.50', 2)\nprint()", [""], ["1.5 2.0"])[0] == 1
    assert verdict(isolated, "print('a b')", [""], ["a  b"])[0] == 0
    assert verdict(isolated, "x = input(", [""], ["6"])[0] == 0
    assert verdict(isolated, "print(6)\nraise SystemExit(1)", [""], ["6"])[0] == 0
    assert verdict(isolated, "def f(a, b):\n    print('noise')\n    return a + b", [[1, 2], [[1], [2]]],
                   [3, [1, 2]], "f")[0] == 1
    assert verdict(isolated, "class Solution:\n    def f(self, a: List[int]) -> int:\n"
                             "        return (max(a), heapq.nsmallest(1, a))",
                   [[[3, 1]]], [[3, [1]]], "f")[0] == 1
    assert verdict(isolated, "def f(a):\n    return a", [[1], [2]], [1, 3], "f")[0] == 0
    assert verdict(isolated, "def g(a):\n    return a", [[1]], [1], "f")[0] == 0
    assert verdict(isolated, f"def f(a):\n    print({CODE.MARK!r} + 'x')\n    raise SystemExit", [[1]], [1],
                   "f")[0] == 0
    assert rollout.grade(["no code", "```\nprint(1)\n```"], ['{"inputs": [""], "outputs": ["1"]}'] * 2,
                         "code", pool=isolated) == [0, 1]
    stats = {}
    assert rollout.grade(["```\nprint(1)\n```"] * 2, ["not json", '{"inputs": []}'], "code", stats=stats,
                         pool=isolated) == [0, 0] and stats["unparsable_gold"] == 2


HOSTILE = {
    "fork bomb": "import os\nwhile True:\n    os.fork()",
    "endless loop": "while True: pass",
    "sleeps": "import time\ntime.sleep(100)",
    "memory": "x = bytearray(10 << 30)\nprint(6)",
    "output": "while True: print('x' * 10 ** 6)",
    "deaf": "import signal\nfor s in (1, 2, 15): signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
    "writes": "import pathlib\nfor f in ('/usr/erpd', '/tmp/erpd-was-here', '/erpd', OUTSIDE):\n"
              "    pathlib.Path(f).write_text('x')\nprint(6)",
    "home": "import os\nprint(6 if os.listdir(HOME) else 0)",
    "reads": "print(6 if open(SECRET).read() else 0)",
    "socket": "import socket\nsocket.create_connection(('127.0.0.1', PORT), 1)\nprint(6)",
    "environment": "import os\nprint(6 if 'ERPD_SECRET' in os.environ else 0)",
    "kills": "import os\nfor pid in {os.getppid(), PARENT, -1} - {0}:\n"
             "    try: os.kill(pid, 9)\n    except OSError: pass\nprint(7)",
    "mounts": "import subprocess\n"
              "subprocess.run(['mount', '-o', 'remount,bind,rw', '/usr'], check=True)\nprint(6)",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_programs_cost_the_time_limit_at_most_and_change_nothing(isolated, name, tmp_path,
                                                                         monkeypatch):
    import socket
    monkeypatch.setenv("ERPD_SECRET", "1")
    secret, outside = tmp_path / "secret", tmp_path / "outside"
    secret.write_text("x")
    tmp_path.chmod(0o777)
    with socket.create_server(("127.0.0.1", 0)) as server:
        values = {"SECRET": str(secret), "OUTSIDE": str(outside), "HOME": os.path.expanduser("~"),
                  "PORT": server.getsockname()[1], "PARENT": os.getpid()}
        program = "".join(f"{key} = {value!r}\n" for key, value in values.items()) + HOSTILE[name]
        reward, stats = verdict(isolated, program, [""], ["6"], timeout=1.0)
    assert reward == 0
    assert stats["timeouts"] == (name in ("endless loop", "sleeps", "deaf"))
    assert not outside.exists() and not os.path.exists("/tmp/erpd-was-here")
    assert not os.path.exists("/usr/erpd")
    for _ in range(50):                                     # a killed box is gone a moment later
        left = CODE.MARK in subprocess.run(["ps", "axww"], capture_output=True, text=True).stdout
        if not left:
            break
        time.sleep(0.1)
    assert not left


def test_a_machine_that_cannot_isolate_refuses_before_sampling(monkeypatch, tmp_path, tiny, capsys):
    monkeypatch.setattr(CODE.shutil, "which", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))               # and for the grading processes, which start anew
    CODE.sandbox.cache_clear()
    with pytest.raises(rollout.InputError, match="--unsafe-code"):
        rollout.grade(["```\nprint(1)\n```"], ['{"inputs": [""], "outputs": ["1"]}'], "code")
    assert rollout.grade(["```\nprint(1)\n```"], ['{"inputs": [""], "outputs": ["1"]}'], "code",
                         unsafe_code=True) == [1]
    problems = tmp_path / "p.jsonl"
    problems.write_text(json.dumps({"prompt": "x", "input_output": '{"inputs": [""], "outputs": ["1"]}'})
                        + "\n")
    assert conftest.run_here("rollout.py", "--model", tiny[0], "--prompts", problems, "--out", tmp_path / "r",
                             "--task", "code", "-n", 2, "--max-tokens", 4, "--engine", "hf") == 2
    assert "bubblewrap" in capsys.readouterr().err and not (tmp_path / "r").exists()
    CODE.sandbox.cache_clear()


def test_code_is_the_last_fenced_block():
    assert CODE.extract_code("```python\na\n```\ntext\n```py\nb\nc\n```<end>") == "b\nc"
    assert CODE.extract_code("no fence") is None and CODE.extract_code("```one") is None


def livecodebench_row(private, **more):
    return {"question_content": "Double it.", "starter_code": "",
            "public_test_cases": json.dumps([{"input": "1\n", "output": "2", "testtype": "stdin"}]),
            "private_test_cases": private, "metadata": "{}", **more}


def packed(value):
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


def test_code_problems_of_both_sources_load(tmp_path):
    areal, lcb = {"inputs": ["1"], "outputs": ["2"]}, json.dumps([{"input": "2\n", "output": "4",
                                                                   "testtype": "stdin"}])
    call = livecodebench_row(json.dumps([{"input": "[1, 2]\n\"x\"", "output": "[2]"}]),
                             metadata='{"func_name": "f"}', starter_code="class Solution:",
                             public_test_cases='[{"input": "[]\\n\\"y\\"", "output": "0"}]')
    rows = [{"prompt": "P", "input_output": json.dumps(areal)}, livecodebench_row(lcb),
            livecodebench_row(packed(lcb)), call]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = rollout.load_prompts(tmp_path / "c.jsonl")
    answers = [json.loads(p["answer"]) for p in loaded]
    assert answers[0] == areal and answers[1] == answers[2] == {"inputs": ["1\n", "2\n"],
                                                                "outputs": ["2", "4"]}
    assert answers[3] == {"inputs": [[[], "y"], [[1, 2], "x"]], "outputs": [0, [2]], "fn_name": "f"}
    assert "Double it." in loaded[1]["prompt"] and "class Solution:" in loaded[3]["prompt"]


def test_a_pickle_that_is_more_than_text_is_refused_and_runs_nothing(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))
    (tmp_path / "c.jsonl").write_text(json.dumps(livecodebench_row(packed(Bomb()))) + "\n")
    with pytest.raises(rollout.InputError, match="c.jsonl:1 has test cases or fields that cannot be read"):
        rollout.load_prompts(tmp_path / "c.jsonl")
    assert not (tmp_path / "exploded").exists()


def test_a_task_is_a_file_and_the_order_of_a_list_counts_there(isolated, tmp_path):
    task = str(conftest.ROOT / "tests" / "tasks" / "sorting.py")
    (tmp_path / "n.jsonl").write_text('{"numbers": [3, 1, 2]}\n')
    problem, = rollout.load_prompts(tmp_path / "n.jsonl", read_row=rollout.load_task(task).read_row)
    assert problem["answer"] == [1, 2, 3] and "3, 1, 2" in problem["prompt"]
    responses = [r"\boxed{1, 2, 3}", r"\boxed{2}", r"\boxed{3, 1, 2}", r"\boxed{1,2,3} or \boxed{}",
                 "1, 2, 3"]
    assert rollout.grade(responses, [problem["answer"]] * 5, task, pool=isolated) == [1, 0, 0, 0, 0]


def test_the_grader_of_a_task_is_stopped_at_the_time_limit_and_its_faults_are_counted(isolated, tmp_path):
    (tmp_path / "t.py").write_text("def read_row(row):\n    return row['q'], row['a']\n\n\n"
                                   "def grade(responses, answers):\n"
                                   "    while responses == ['hang']:\n        pass\n"
                                   "    return [{'x': 1.0, 'none': None}[r] for r in responses]\n")
    stats = {}
    graded = rollout.grade(["x", "hang", "none", "raises"], [1] * 4, str(tmp_path / "t.py"), timeout=1.0,
                           stats=stats, pool=isolated)
    assert graded == [1, 0, 0, 0] and (stats["timeouts"], stats["unparsable_gold"], stats["errors"]) == (1, 1,
                                                                                                         1)
    for wrong in ("nosuch", str(tmp_path / "missing.py"), str(tmp_path)):
        with pytest.raises(rollout.InputError, match="--task"):
            rollout.grade(["x"], [1], wrong)
