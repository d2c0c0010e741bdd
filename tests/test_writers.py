"""One run at a time in a folder: a second one is refused in one line, and the death of the first frees it at
once."""
import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import pytest

import conftest


def held(folder):
    """Whether a process holds a lock below a folder."""
    for path in folder.rglob(".writer-*"):
        with open(path, "a") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
    return False


def start_and_wait_for_lock(command, folder, nproc=1):
    launcher = [sys.executable] if nproc == 1 else [sys.executable, "-m", "torch.distributed.run",
                                                    "--standalone", "--nproc-per-node", str(nproc)]
    process = subprocess.Popen([*launcher, *map(str, command)], cwd=conftest.ROOT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, start_new_session=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
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
    problems.write_text("".join(json.dumps({"problem": f"{i % 10}A+{i // 10}", "answer": "1"}) + "\n"
                                for i in range(20000)))
    return {"rollout.py": ["--model", model, "--prompts", problems, "--num-prompts", 0, "-n", 4, "--engine",
                           "hf", "--out", folder / "out", "--shard-prompts", 50],
            "teacher.py": ["--model", model, "--rollouts", rollouts, "--loss", "ce", "--steps", 10 ** 6,
                           "--out", folder / "out"],
            "distill.py": ["--student", model, "--teacher", other, "--rollouts", rollouts, "--steps", 10 ** 6,
                           "--out", folder / "out"],
            "evaluate.py": ["--model", model, "--data", f"x={problems}:4", "--engine", "hf", "--out",
                            folder / "out" / "results.jsonl", "--shard-prompts", 50]}[stage]


@pytest.mark.parametrize("stage", ["rollout.py", "teacher.py", "distill.py", "evaluate.py"])
def test_a_second_run_in_a_folder_is_refused_and_a_kill_frees_it(stage, tiny, tmp_path):
    command = [stage, *long_command(stage, tiny, tmp_path)]
    first = start_and_wait_for_lock(command, tmp_path)
    refused = conftest.run_script(*command, check=False)
    assert refused.returncode == 2 and first.poll() is None
    message = [line for line in refused.stderr.splitlines() if "error" in line]
    assert len(message) == 1 and "another run is at work in it" in message[0], refused.stderr
    kill(first)
    assert not held(tmp_path)  # the kernel's doing: nothing was left to clean up
    kill(start_and_wait_for_lock(command, tmp_path))


def test_ranks_of_one_run_share_a_folder_that_a_second_run_is_kept_out_of(tiny, tmp_path):
    command = ["teacher.py", *long_command("teacher.py", tiny, tmp_path)]
    first = start_and_wait_for_lock(command, tmp_path, nproc=2)
    refused = conftest.run_script(*command, check=False, nproc=2)
    assert refused.returncode == 1 and refused.stderr.count("another run is at work in it") == 1
    assert first.poll() is None
    kill(first)


@pytest.mark.parametrize("argv, complaint", [(["--no-such-flag"], "required: --"),
                                             (["--engine", "magic"], "invalid choice: 'magic'")])
def test_argparses_own_errors_are_one_line_with_exit_code_2(argv, complaint):
    done = conftest.run_script("rollout.py", *(["--model", "m", "--prompts", "p", "--out", "o"]
                                               if len(argv) > 1 else []), *argv, check=False)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert complaint in done.stderr and done.stderr.startswith("rollout.py: error: ")
