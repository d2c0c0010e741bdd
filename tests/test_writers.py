"""One run at a time in a folder: a second one is refused in one line, and the death of the first frees it at once."""
import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import pytest

import conftest
import rollout


def held(folder):
    """Whether a process holds a lock below a folder."""
    for path in folder.rglob(".writer-*"):
        with open(path, "a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
    return False


def start_and_wait_for_lock(command, folder, nproc=1):
    launcher = [sys.executable] if nproc == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)]
    process = subprocess.Popen([*launcher, *map(str, command)], cwd=conftest.ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.time() + 120
    while not held(folder) and process.poll() is None and time.time() < deadline:
        time.sleep(0.05)
    assert held(folder) and process.poll() is None
    return process


def kill(process):
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def long_command(stage, tiny, folder):
    """A command of a stage that would run for many minutes, into folder/out."""
    model, rollouts, other = tiny
    problems = folder / "p.jsonl"
    problems.write_text("".join(json.dumps({"problem": f"{i % 10}A+{i // 10}", "answer": "1"}) + "\n" for i in range(20000)))
    return {"rollout.py": ["--model", model, "--prompts", problems, "--num-prompts", 0, "-n", 4, "--engine", "hf", "--out", folder / "out", "--shard-prompts", 50],
            "teacher.py": ["--model", model, "--rollouts", rollouts, "--loss", "ce", "--steps", 10 ** 6, "--out", folder / "out"],
            "distill.py": ["--student", model, "--teacher", other, "--rollouts", rollouts, "--steps", 10 ** 6, "--out", folder / "out"],
            "evaluate.py": ["--model", model, "--data", f"x={problems}:4", "--engine", "hf", "--out", folder / "out" / "results.jsonl", "--shard-prompts", 50]}[stage]


@pytest.mark.parametrize("stage", ["rollout.py", "teacher.py", "distill.py", "evaluate.py"])
def test_a_second_run_in_a_folder_is_refused_and_a_kill_frees_it(stage, tiny, tmp_path):
    command = [stage, *long_command(stage, tiny, tmp_path)]
    first = start_and_wait_for_lock(command, tmp_path)
    refused = conftest.run_script(*command, check=False)
    assert refused.returncode == 2 and first.poll() is None
    message = [line for line in refused.stderr.splitlines() if "error" in line]
    assert len(message) == 1 and "another run is at work in it" in message[0], refused.stderr
    kill(first)
    assert not held(tmp_path)                                       # the kernel's doing: nothing was left to clean up
    kill(start_and_wait_for_lock(command, tmp_path))


def test_ranks_of_one_run_share_a_folder_that_a_second_run_is_kept_out_of(tiny, tmp_path):
    command = ["teacher.py", *long_command("teacher.py", tiny, tmp_path)]
    first = start_and_wait_for_lock(command, tmp_path, nproc=2)
    refused = conftest.run_script(*command, check=False, nproc=2)
    assert refused.returncode == 1 and refused.stderr.count("another run is at work in it") == 1
    assert first.poll() is None
    kill(first)


def test_a_folder_that_is_replaced_is_never_absent(tmp_path):
    """Two folders are swapped 200 times while another process looks for a file in the one that counts."""
    watch = "import os, sys\nwhile not os.path.exists(sys.argv[2]):\n    if not os.path.exists(sys.argv[1]): sys.exit(1)\n"
    target = tmp_path / "final"
    rollout.write_atomic(target, lambda p: (p.mkdir(), (p / "file").write_text("0")))
    watcher = subprocess.Popen([sys.executable, "-c", watch, target / "file", tmp_path / "stop"])
    for i in range(1, 201):
        rollout.write_atomic(target, lambda p: (p.mkdir(), (p / "file").write_text(str(i))))
    (tmp_path / "stop").write_text("")
    assert watcher.wait(timeout=60) == 0 and (target / "file").read_text() == "200"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["final", "stop"]


def test_replacing_a_folder_works_where_the_kernel_cannot_swap(tmp_path, monkeypatch):
    class Kernel:
        def __init__(self, _):
            self.renameat2 = lambda *_: -1
    monkeypatch.setattr(rollout.ctypes, "CDLL", Kernel)
    for text in ("old", "new"):
        rollout.write_atomic(tmp_path / "final", lambda p: (p.mkdir(), (p / "file").write_text(text)))
    assert (tmp_path / "final" / "file").read_text() == "new" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("argv, complaint", [(["--no-such-flag"], "required: --"), (["--engine", "magic"], "invalid choice: 'magic'")])
def test_argparses_own_errors_are_one_line_with_exit_code_2(argv, complaint):
    done = conftest.run_script("rollout.py", *(["--model", "m", "--prompts", "p", "--out", "o"] if len(argv) > 1 else []), *argv, check=False)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and complaint in done.stderr and done.stderr.startswith("rollout.py: error: ")
