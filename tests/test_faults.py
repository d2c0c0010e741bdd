"""Nothing is lost, nothing lies: real processes that get real signals, full disks, and files from strangers.

The short part runs with the other tests. ERPD_ALL_FAULTS=1 adds the long one: kill -9 at twenty moments,
torchrun, the driver.
"""
import ast
import contextlib
import json
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import conftest
import rollout
import teacher

long_part = pytest.mark.skipif(not os.environ.get("ERPD_ALL_FAULTS"),
                               reason="ERPD_ALL_FAULTS=1 runs the long part")
TIMING = ("seconds", "tok_per_s", "peak_mem_gib")
STEPS = 24
TRAIN = ["--steps", STEPS, "--batch-prompts", 3, "--lr", "1e-3", "--save-every", 5, "--no-checkpointing"]


# ---- processes ---------------------------------------------------------------------------------------------
# One process per run, forked from a server that has imported torch: a kill then falls into the work, not into
# the imports.

def grade_by_equality(answer, gold, stats):
    """In the place of math-verify, whose processes take seconds to start; it is tested elsewhere."""
    return float(answer == gold)


@pytest.fixture(autouse=True)
def quick_grading(monkeypatch):
    monkeypatch.setattr(rollout, "quick_verdict", grade_by_equality)


def main_of(script, argv, log):
    rollout.quick_verdict = grade_by_equality
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    sys.exit(conftest.run_here(script, *argv))


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """start(script, *argv) -> a running process; its output is in process.log."""
    context, folder = multiprocessing.get_context("forkserver"), tmp_path_factory.mktemp("logs")
    os.environ["OMP_NUM_THREADS"] = "1"
    context.set_forkserver_preload(["conftest", "rollout", "teacher", "distill", "evaluate", "test_faults"])
    started = []

    def launch(script, *argv):
        process = context.Process(target=main_of, args=(script, argv, folder / f"{len(started)}.log"))
        process.start()
        process.log = folder / f"{len(started)}.log"
        started.append(process)
        return process
    finish(launch("rollout.py", "--help"))                  # the server has started
    yield launch
    for process in started:
        process.kill()


def finish(process, code=0):
    process.join(120)
    assert process.exitcode == code, process.log.read_text()[-3000:]


def torchrun(script, *argv, log):
    """A running torchrun with two ranks, in a session of its own."""
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone",
                             "--nproc-per-node", "2", script, *map(str, argv)],
                            cwd=conftest.ROOT, stdout=open(log, "a"), stderr=subprocess.STDOUT,
                            start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def children(pid):
    """Processes that `pid` started and that still run; [] once it is gone."""
    try:
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def command_line(pid):
    """Of a running process; "" once it is gone, as the driver's own helpers are at once."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode()
    except OSError:
        return ""


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
    return value


def lines(path):
    return path.read_text().count("\n") if path.exists() else 0


# ---- what a run leaves behind, for comparison --------------------------------------------------------------

def plain(value):
    """A value without its timing; tensors as their bytes."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().numpy().tobytes()
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items() if key not in TIMING}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def contents(folder, other=""):
    """{file: what it holds} of a finished run, timing, figures and the folder's name aside; other: where it
    or its like was written."""
    def anonymous(text):
        return text.replace(str(folder), "OUT").replace(str(other or folder), "OUT")
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        assert not name.endswith(".partial")
        if path.suffix == ".safetensors":
            value = path.read_bytes()
        elif path.suffix == ".pt":
            value = plain(torch.load(path, weights_only=True))
        elif path.suffix in (".json", ".jsonl"):
            text = anonymous(path.read_text())
            value = plain([json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl"
                          else json.loads(text))
        else:
            value = path.is_file()
        if path.suffix == ".pt":
            value = anonymous(repr(value))
        found[name] = value
    return found


def same(a, b):
    a, b = contents(a, b), contents(b, a)
    assert sorted(a) == sorted(b)
    assert [name for name in a if a[name] != b[name]] == []


def commands(tiny, folder, stage):
    """(script, flags) of a stage that reads its own copy of the rollouts, so that kills during scoring count
    too; it writes FOLDER/out."""
    model, rollouts, other = tiny
    if stage == "rollout":
        prompts = folder / "prompts.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        prompts.write_text("".join(json.dumps({"problem": f"{i}A+{i}", "answer": str(2 * i % 10)}) + "\n"
                                   for i in range(9)))
        return "rollout.py", ["--model", model, "--prompts", prompts, "--out", folder / "out",
                              "--num-prompts", 0, "-n", 4, "--max-tokens", 60, "--engine", "hf",
                              "--shard-prompts", 1, "--temperature", 1]
    if not (folder / "rollouts").exists():
        shutil.copytree(rollouts, folder / "rollouts", ignore=shutil.ignore_patterns("scores"))
    data = ["--rollouts", folder / "rollouts", "--out", folder / "out", *TRAIN]
    if stage == "distill":
        return "distill.py", ["--student", model, "--teacher", other, *data, "--kl-coef", 0.1, "--kl-kind",
                              "exact", "--entropy-coef", 0.01]
    if stage == "ppo":
        return "teacher.py", ["--model", model, "--loss", "ppo", "--value-steps", STEPS, "--value-lr", "1e-2",
                              *data]
    return "teacher.py", ["--model", model, "--loss", "ce", "--beta", 0.5, *data]


# ---- kill -9 -----------------------------------------------------------------------------------------------

def moments(n, duration, seed):
    """n random moments, one in each n-th of the time that an undisturbed run takes."""
    rng = random.Random(seed)
    return [(i + rng.random()) / n * duration for i in range(n)]


def undisturbed(start, tiny, folder, stage):
    script, flags = commands(tiny, folder, stage)
    begin = time.monotonic()
    finish(start(script, *flags))
    return time.monotonic() - begin


def killed_then_continued(start, tiny, tmp_path, stage, n):
    duration = undisturbed(start, tiny, tmp_path / "whole", stage)
    for i, moment in enumerate(moments(n, duration, seed=len(stage))):
        killed = False
        while not killed:
            shutil.rmtree(tmp_path / str(i), ignore_errors=True)
            script, flags = commands(tiny, tmp_path / str(i), stage)
            process = start(script, *flags)
            process.join(moment)
            killed = process.is_alive()
            process.kill()
            process.join()
            moment *= 0.8  # this time it was faster than the moment: an earlier one
        finish(start(script, *flags))
        same(tmp_path / "whole", tmp_path / str(i))


@pytest.mark.parametrize("stage, n", [("rollout", 1), ("ce", 2)])
def test_kill_9_and_the_same_command_give_the_same_files(start, tiny, tmp_path, stage, n):
    killed_then_continued(start, tiny, tmp_path, stage, n)


def test_a_kill_between_the_last_save_and_its_tidying_leaves_nothing_behind(tiny, tmp_path):
    script, flags = commands(tiny, tmp_path / "whole", "ce")
    assert conftest.run_here(script, *flags) == 0
    script, flags = commands(tiny, tmp_path / "killed", "ce")
    with pytest.MonkeyPatch.context() as patch:

        def dies_at_the_end(out, name, *rest, original=teacher.drop_states):
            if name == "final":
                raise KeyboardInterrupt
            original(out, name, *rest)
        patch.setattr("teacher.drop_states", dies_at_the_end)
        assert conftest.run_here(script, *flags) == 1
    assert list((tmp_path / "killed" / "out").glob("step-*/optimizer.pt"))
    assert conftest.run_here(script, *flags) == 0           # already finished, but for this
    same(tmp_path / "whole", tmp_path / "killed")


def test_a_run_whose_last_save_is_deleted_starts_over_to_the_same_files(tiny, tmp_path):
    """What the message about a damaged save advises: older saves have weights, but no longer Adam's state."""
    script, flags = commands(tiny, tmp_path / "whole", "ce")
    assert conftest.run_here(script, *flags) == 0
    script, flags = commands(tiny, tmp_path / "again", "ce")
    assert conftest.run_here(script, *flags) == 0
    assert list((tmp_path / "again" / "out").glob("step-*"))
    shutil.rmtree(tmp_path / "again" / "out" / "final")
    assert conftest.run_here(script, *flags) == 0
    same(tmp_path / "whole", tmp_path / "again")


@long_part
@pytest.mark.parametrize("stage, n", [("rollout", 4), ("ce", 4), ("ppo", 2), ("distill", 4)])
def test_kill_9_at_many_moments_and_the_same_command_give_the_same_files(start, tiny, tmp_path, stage, n):
    killed_then_continued(start, tiny, tmp_path, stage, n)


@long_part
def test_a_killed_rank_or_torchrun_ends_the_job_and_the_same_command_gives_the_same_files(tiny, tmp_path):
    script, flags = commands(tiny, tmp_path / "whole", "ce")
    begin = time.monotonic()
    agent = torchrun(script, *flags, log=tmp_path / "log")
    wait_for((tmp_path / "whole" / "out" / "run.json").exists)
    imported = time.monotonic() - begin
    assert agent.wait(120) == 0, (tmp_path / "log").read_text()[-3000:]
    worked, rng = time.monotonic() - begin - imported, random.Random(2)
    for i, who in enumerate(("rank 1", "torchrun")):
        moment, killed = rng.random(), False
        while not killed:
            shutil.rmtree(tmp_path / str(i), ignore_errors=True)
            script, flags = commands(tiny, tmp_path / str(i), "ce")
            log, out = tmp_path / f"log{i}", tmp_path / str(i) / "out"
            agent = torchrun(script, *flags, log=log)
            wait_for((out / "run.json").exists)
            with contextlib.suppress(subprocess.TimeoutExpired):
                agent.wait(moment * worked)
            ranks = children(agent.pid)
            if agent.poll() is None and len(ranks) == 2:
                os.kill(ranks[1] if who == "rank 1" else agent.pid, signal.SIGKILL)
                begin = time.monotonic()
                killed = agent.wait(60) != 0
            moment *= 0.8                                   # if it was faster than the moment: an earlier one
        # nobody hangs in a collective
        wait_for(lambda: all(map(gone, ranks)), 60 - (time.monotonic() - begin))
        assert who != "rank 1" or "SIGKILL" in log.read_text()
        assert torchrun(script, *flags, log=log).wait(120) == 0, log.read_text()[-3000:]
        same(tmp_path / "whole", tmp_path / str(i))


@long_part
def test_one_of_two_ranks_is_killed_in_a_step(tiny, tmp_path):
    script, flags = commands(tiny, tmp_path, "ce")
    agent = torchrun(script, *flags, "--steps", 10_000, log=tmp_path / "log")
    wait_for(lambda: lines(tmp_path / "out" / "metrics.jsonl") >= 12)
    ranks = children(agent.pid)
    os.kill(ranks[0], signal.SIGKILL)
    begin = time.monotonic()
    assert agent.wait(60) != 0
    wait_for(lambda: all(map(gone, ranks)), 60 - (time.monotonic() - begin))
    assert "SIGKILL" in (tmp_path / "log").read_text()
    assert teacher.newest_save(tmp_path / "out")[0] >= 10


# ---- SIGTERM and Ctrl-C ------------------------------------------------------------------------------------

def stopped(out, process, send, code_of):
    """Send a signal after a few steps; returns the step that was saved, which is the one that was under way
    or done."""
    wait_for(lambda: lines(out / "metrics.jsonl") >= 3)
    begin = time.monotonic()
    send(process.pid)
    done = lines(out / "metrics.jsonl")
    assert code_of(process) == 1 and time.monotonic() - begin < 30
    step, _ = teacher.newest_save(out)
    assert 3 <= step == lines(out / "metrics.jsonl") <= done + 1
    return step


@pytest.mark.parametrize("stage, number", [("ce", signal.SIGTERM), ("distill", signal.SIGINT),
                                           ("ppo", signal.SIGTERM)])
def test_a_signal_saves_within_a_step_and_the_same_command_gives_the_same_files(start, tiny, tmp_path, stage,
                                                                                number):
    def code_of(process):
        process.join(60)
        return process.exitcode
    script, flags = commands(tiny, tmp_path / "whole", stage)
    flags[flags.index("--save-every") + 1] = 10_000         # what is saved is saved because of the signal
    finish(start(script, *flags))
    script, again = commands(tiny, tmp_path / "again", stage)
    again[again.index("--save-every") + 1] = 10_000
    process = start(script, *again)
    step = stopped(tmp_path / "again" / "out", process, lambda pid: os.kill(pid, number), code_of)
    assert f"stopped by {number.name} after step {step}" in process.log.read_text()
    assert "Traceback" not in process.log.read_text()
    finish(start(script, *again))
    same(tmp_path / "whole", tmp_path / "again")            # the save between two others is gone again


@long_part
def test_a_signal_to_torchrun_saves_one_step_on_all_ranks(tiny, tmp_path):
    for name in ("whole", "again"):
        script, flags = commands(tiny, tmp_path / name, "ce")
        flags[flags.index("--save-every") + 1] = 10_000
        agent = torchrun(script, *flags, log=tmp_path / f"{name}.log")
        if name == "again":
            def send(pid):
                ranks.extend(children(pid))
                os.kill(pid, signal.SIGTERM)
            ranks = []
            stopped(tmp_path / name / "out", agent, send,
                    lambda agent: int(bool(wait_for(lambda: all(map(gone, ranks))))))
            # torchrun may sleep for a minute if the signal hits it in Popen.poll
            assert len(ranks) == 2 and agent.wait(150) != 0
            text = (tmp_path / f"{name}.log").read_text()
            assert text.count("stopped by SIGTERM after step") == 1
            agent = torchrun(script, *flags, log=tmp_path / f"{name}.log")
        assert agent.wait(120) == 0, (tmp_path / f"{name}.log").read_text()[-3000:]
    same(tmp_path / "whole", tmp_path / "again")


# ---- full and read-only disks ------------------------------------------------------------------------------

@pytest.fixture
def disk(tmp_path):
    """A file system of 8 MiB of its own; skipped where nothing can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", folder], capture_output=True,
                             text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def one_error(capsys, code, *argv):
    """The exit code, and one line of error between the bars; returns the line."""
    capsys.readouterr()
    assert conftest.run_here(*argv) == code
    printed = capsys.readouterr().err
    errors = [line for line in printed.splitlines() if "error:" in line]
    assert len(errors) == 1 and "Traceback" not in printed
    return errors[0]


def stages(tiny, folder, out):
    model, rollouts, other = tiny
    built = {stage: commands(tiny, folder / stage, stage) for stage in ("rollout", "ce", "ppo", "distill")}
    argv = {stage: [script, *flags[:flags.index("--out")], "--out", out / stage,
                    *flags[flags.index("--out") + 2:]] for stage, (script, flags) in built.items()}
    argv["evaluate"] = ["evaluate.py", "--model", other, "--base", model, "--data",
                        f"x={folder}/rollout/prompts.jsonl:2", "--out", out / "evaluate" / "results.jsonl",
                        "--engine", "hf", "--max-tokens", 20, "--shard-prompts", 1, "--top-p", 1, "--top-k",
                        -1]
    return argv


@pytest.mark.parametrize("stage, room", [("rollout", 24), ("ce", 200), ("ppo", 200), ("distill", 200),
                                         ("evaluate", 40)])
def test_a_full_disk_is_one_line_and_the_same_command_finishes_once_there_is_room(tiny, tmp_path, disk,
                                                                                  capsys, stage, room):
    argv = stages(tiny, tmp_path / "full", disk)[stage]
    (disk / stage).mkdir()
    with open(disk / "filler", "wb") as f:                  # leaves `room` KiB
        f.write(bytes(shutil.disk_usage(disk).free - room * 1024))
    line = one_error(capsys, 1, *argv)
    assert str(disk / stage) in line and ("No space left" in line or "cannot be written" in line
                                          and "MiB free" in line)
    (disk / "filler").unlink()
    assert conftest.run_here(*argv) == 0
    whole = stages(tiny, tmp_path / "full", tmp_path / "out")[stage]
    assert conftest.run_here(*whole) == 0
    same(disk / stage, tmp_path / "out" / stage)


def test_scores_that_do_not_fit_beside_the_rollouts_are_one_line(tiny, disk, tmp_path, capsys):
    shutil.copytree(tiny[1], disk / "rollouts", ignore=shutil.ignore_patterns("scores"))
    (disk / "rollouts" / "scores").mkdir()
    with open(disk / "filler", "wb") as f:
        f.write(bytes(shutil.disk_usage(disk).free))
    argv = ["teacher.py", "--model", tiny[0], "--loss", "ce", "--rollouts", disk / "rollouts", "--out",
            tmp_path / "out", "--steps", 1]
    assert "scores" in one_error(capsys, 1, *argv) and not (tmp_path / "out").exists()
    (disk / "filler").unlink()
    assert conftest.run_here(*argv) == 0


def score_slowly(model, rollouts, seconds):
    save = torch.save
    torch.save = lambda value, path: (save(value, path), time.sleep(seconds))
    teacher.score(model, rollouts)


def test_two_runs_may_score_the_same_policy_at_the_same_time(start, tiny, tmp_path):
    shutil.copytree(tiny[1], tmp_path / "rollouts", ignore=shutil.ignore_patterns("scores"))
    scores, runs = tmp_path / "rollouts" / "scores", []
    for seconds in (4, 0):              # the second writes while the first has half a file
        runs.append(multiprocessing.get_context("forkserver").Process(
            target=score_slowly, args=(tiny[0], tmp_path / "rollouts", seconds)))
        runs[-1].start()
        wait_for(lambda: list(scores.glob("*.partial")))
    for run in runs:
        run.join(60)
    assert [run.exitcode for run in runs] == [0, 0]
    assert len(list(scores.glob("*.pt"))) == 1 and not list(scores.glob("*.partial"))


def test_a_read_only_folder_is_one_line(tiny, tmp_path, disk, capsys):
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    for argv in stages(tiny, tmp_path / "x", disk).values():
        assert "Read-only file system" in one_error(capsys, 1, *argv)
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    assert conftest.run_here(*stages(tiny, tmp_path / "x", disk)["ce"]) == 0


# ---- NaN ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("stage", ["ce", "mse", "distill"])
def test_nan_in_old_log_probs_names_step_and_prompts_and_leaves_the_last_checkpoint(tiny, tmp_path, capsys,
                                                                                    stage):
    script, flags = commands(tiny, tmp_path, "ce" if stage == "mse" else stage)
    if stage == "mse":
        flags[flags.index("ce")] = "mse"
    if stage == "distill":
        # pi_old only in the ratio
        flags[flags.index("--teacher") + 1:flags.index("--teacher") + 2] = [tiny[2], "--denominator", "none"]
    out, step_5 = tmp_path / "out", tmp_path / "out" / "step-0005"
    original = teacher.save_step

    def dies_after(out, name, *rest):
        original(out, name, *rest)
        raise KeyboardInterrupt
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("teacher.save_step", dies_after)
        assert conftest.run_here(script, *flags) == 1
    good = contents(step_5)
    data = teacher.load_rollouts(tmp_path / "rollouts")
    response = int((data["prompt_index"] == 3).nonzero()[0])
    path, = (tmp_path / "rollouts" / "scores").glob(f"{data['meta']['model_fingerprint'][:16]}-*.pt")
    cached = torch.load(path, weights_only=True)
    cached["logp"][data["response_offsets"][response]] = float("nan")
    torch.save(cached, path)
    line = one_error(capsys, 1, script, *flags)
    assert "step 6" in line or "step 7" in line             # whichever batch has prompt 3
    named = json.loads(re.search(r"prompts of the batch: (\[.*?\])", line)[1])
    assert 3 in named and len(named) == 3 and "the last checkpoint is intact" in line
    assert contents(step_5) == good and teacher.newest_save(out)[0] == 5 and not (out / "final").exists()


# ---- files from strangers ----------------------------------------------------------------------------------

class Bomb:
    """Unpickling it runs code."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def loop(path):
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(path.name)


def folder_instead(path):
    path.unlink()
    path.mkdir()


def changed(**new):
    """A change of entries of a .pt file; a function gets the old value. meta_x changes x of the shard's meta,
    None deletes."""
    def change(path):
        value = torch.load(path, weights_only=True)
        for key, to in new.items():
            where, key = (value["meta"], key[5:]) if key.startswith("meta_") else (value, key)
            where[key] = to(where.get(key)) if callable(to) else to
            if to is None:
                del where[key]
        torch.save(value, path)
    return change


def tensor_with(index, to):
    def change(tensor):
        tensor = tensor.clone()
        tensor[index] = to
        return tensor
    return change


def shard_cases(bomb):
    """name -> what is done to shard-00001.pt of the rollouts that teacher.py is given."""
    cases = {f"cut to {i}/10": lambda p, i=i: p.write_bytes(p.read_bytes()[:len(p.read_bytes()) * i // 10])
             for i in range(10)}
    return cases | {
        "version 2": changed(version=2), "no version": changed(version=None),
        "a list": lambda p: torch.save([1, 2], p),
        "a tensor": lambda p: torch.save(torch.zeros(3), p),
        "text": lambda p: p.write_text("not a shard\n" * 100),
        "bomb as plain pickle": lambda p: p.write_bytes(pickle.dumps(Bomb(bomb))),
        "bomb in an archive": lambda p: torch.save({"version": 1, "x": Bomb(bomb)}, p),
        "bomb in meta": changed(meta_x=Bomb(bomb)),
        "bomb in an old format": lambda p: torch.save(Bomb(bomb), p, _use_new_zipfile_serialization=False),
        "old format": lambda p: torch.save(torch.load(p, weights_only=True), p,
                                           _use_new_zipfile_serialization=False),
        "folder": folder_instead, "symlink loop": loop,
        "dangling link": lambda p: (p.unlink(), p.symlink_to("nowhere")),
        "offsets out of order": changed(offsets=lambda t: t[torch.randperm(
            len(t), generator=torch.Generator().manual_seed(1))]),
        "offsets past the end": changed(offsets=tensor_with(-1, 10 ** 9)),
        "offsets from 1": changed(offsets=tensor_with(0, 1)),
        "negative ids": changed(input_ids=tensor_with(4, -5)),
        "ids beyond the vocabulary": changed(input_ids=tensor_with(4, 10 ** 6)),
        "NaN reward": changed(reward=tensor_with(0, float("nan"))),
        "reward 0.5": changed(reward=tensor_with(0, 0.5)),
        "rewards in fp64": changed(reward=lambda t: t.double()),
        "two-dimensional ids": changed(input_ids=lambda t: t[None]),
        "no rewards": changed(reward=None), "rewards cut": changed(reward=lambda t: t[:-1]),
        "reward_think NaN": changed(reward_think=torch.full((8,), float("nan"))),
        "reward_think of another length": changed(reward_think=torch.zeros(3)),
        "prompt length 0": changed(prompt_len=tensor_with(0, 0)),
        "prompt longer than all": changed(prompt_len=tensor_with(0, 10 ** 6)),
        "no responses": changed(prompt_len=torch.zeros(0, dtype=torch.int32)),
        "meta is a list": changed(meta=[]), "another run's shard": changed(meta_seed=99),
        "another temperature": changed(meta_temperature=0.5),
        "missing": lambda p: p.unlink(),
    }


def refused(capsys, folder, bomb, *argv, name="", late=False):
    """Exit code 2, one line, no traceback, nothing changed, no code executed; returns the line.

    late: it shows only when the weights are loaded, after a bar, and log-probs of other policies are kept.
    """
    def snapshot():
        return {p: (p.lstat().st_mtime_ns, p.lstat().st_size) for p in folder.rglob("*")}
    before = snapshot()
    capsys.readouterr()
    code, printed = conftest.run_here(*argv), capsys.readouterr()
    assert code == 2, (name, code, printed.err[-2000:])
    lines = [line for line in printed.err.splitlines() if not late or "error:" in line]
    assert len(lines) == 1 and "error:" in lines[0] and len(lines[0]) < 2000, (name, printed.err)
    assert (late or snapshot() == before) and not bomb.exists(), name
    return lines[0]


def test_malformed_shards_are_refused_by_name(tiny, tmp_path, capsys):
    bomb, cases = tmp_path / "exploded", shard_cases(tmp_path / "exploded")
    for name, damage in cases.items():
        folder = tmp_path / "r"
        shutil.copytree(tiny[1], folder, ignore=shutil.ignore_patterns("scores"))
        damage(folder / "shard-00001.pt")
        line = refused(capsys, tmp_path, bomb, "teacher.py", "--model", tiny[0], "--rollouts", folder,
                       "--out", tmp_path / "out", "--loss", "ce", name=name)
        assert "shard-00001.pt" in line or name in ("missing", "ids beyond the vocabulary"), (name, line)
        shutil.rmtree(folder)
    assert len(cases) > 40

    everything = {"temperature as text": changed(meta_temperature="1"),
                  "no model fingerprint": changed(meta_model_fingerprint=None),
                  "temperature NaN": changed(meta_temperature=float("nan")),
                  "only right": changed(reward=lambda t: t * 0 + 1),
                  "only wrong": changed(reward=lambda t: t * 0),
                  "other tokenizer": changed(meta_tokenizer_fingerprint="0" * 64),
                  "other policy": changed(meta_model_fingerprint="0" * 64)}
    for name, damage in everything.items():                 # to both shards alike
        shutil.copytree(tiny[1], tmp_path / "r", ignore=shutil.ignore_patterns("scores"))
        for path in (tmp_path / "r").glob("shard-*.pt"):
            damage(path)
        refused(capsys, tmp_path, bomb, "teacher.py", "--model", tiny[0], "--rollouts", tmp_path / "r",
                "--out", tmp_path / "out", "--loss", "ce", name=name)
        shutil.rmtree(tmp_path / "r")


def test_malformed_prompts_are_refused_by_name(tiny, tmp_path, capsys):
    row = '{"problem": "1A+1", "answer": "2"}\n'
    cases = {
        "latin-1.jsonl": '{"problem": "1\u00e91", "answer": "2"}\n'.encode("latin-1"),
        "utf-16.jsonl": row.encode("utf-16"), "empty.jsonl": b"", "zeros.jsonl": bytes(5000),
        "line of 100 MB.jsonl": b"x" * 10 ** 8, "half.jsonl": row.encode() + b'{"problem": "1',
        "nested.jsonl": b"[" * 10 ** 5, "number of 9999 digits.jsonl": b'{"problem": "1", "answer": '
        + b"9" * 9999 + b"}\n", "half a surrogate pair.jsonl": b'{"problem": "\\ud800", "answer": "1"}\n',
        "no answer.jsonl": b'{"problem": "1A+1"}\n', "a number.jsonl": b"7\n",
        "chat without content.jsonl": b'{"prompt": [{"role": "user"}], "answer": "1"}\n',
        "object.json": b"{}", "nested.json": b"[" * 10 ** 5, "text.json": b"hello",
        "text.parquet": b"PAR1 not really PAR1",
        "field.csv": b'problem,answer\n"' + b"1" * 200_000 + b'",2\n',
        "prompts.exe": row.encode(),
        "pickle bomb.jsonl": json.dumps({"question_content": "q", "public_test_cases": "[]",
                                         "private_test_cases": __import__("base64").b64encode(
            __import__("zlib").compress(pickle.dumps(Bomb(tmp_path / "exploded")))).decode()}).encode(),
    }
    argv = ["rollout.py", "--model", tiny[0], "--out", tmp_path / "out", "--engine", "hf", "-n", 1,
            "--max-tokens", 4, "--prompts"]
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
        line = refused(capsys, tmp_path, tmp_path / "exploded", *argv, tmp_path / name, name=name)
        assert name in line or "surrogate" in name, (name, line)
        (tmp_path / name).unlink()
    (tmp_path / "folder.jsonl").mkdir()
    loop(tmp_path / "loop.jsonl")
    for name in ("folder.jsonl", "loop.jsonl", "nowhere.jsonl"):
        assert name in refused(capsys, tmp_path, tmp_path / "exploded", *argv, tmp_path / name, name=name)


def test_malformed_checkpoints_are_refused_by_name(tiny, tmp_path, capsys):
    weights = load_file(tiny[0] / "model.safetensors")
    key = "model.layers.0.mlp.gate_proj.weight"

    def rewrite(**new):
        return lambda c: save_file({k: new.get(k, v) for k,
                                    v in weights.items() if new.get(k, v) is not None},
                                   c / "model.safetensors", metadata={"format": "pt"})

    def text(file, content):
        return lambda c: (c / file).write_text(content)

    def config(**new):
        return lambda c: (c / "config.json").write_text(json.dumps(json.loads((c / "config.json").read_text())
                                                                   | new))
    cases = {
        "wrong shape": rewrite(**{key: torch.zeros(3, 5)}), "a weight is missing": rewrite(**{key: None}),
        "no weights": lambda c: (c / "model.safetensors").unlink(),
        "weights cut": lambda c: (c / "model.safetensors").write_bytes(
            (c / "model.safetensors").read_bytes()[:-100]),
        "weights of text": text("model.safetensors", "hello" * 100),
        "weights empty": text("model.safetensors", ""),
        "header of 2^60 bytes": lambda c: (c / "model.safetensors").write_bytes(
            (2 ** 60).to_bytes(8, "little") + bytes(100)),
        "weights are a folder": lambda c: folder_instead(c / "model.safetensors"),
        "weights are a symlink loop": lambda c: loop(c / "model.safetensors"),
        "only pickled weights": lambda c: (
            (c / "model.safetensors").unlink(),
            (c / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))),
        "no config": lambda c: (c / "config.json").unlink(), "config of text": text("config.json", "hello"),
        "config is a list": text("config.json", "[]"),
        "unknown architecture": config(model_type="martian"), "half the width": config(hidden_size=16),
        "config is a folder": lambda c: folder_instead(c / "config.json"),
        "code of its own": lambda c: (
            config(model_type="evil", auto_map={"AutoConfig": "evil.Config",
                                                "AutoModelForCausalLM": "evil.Model"})(c),
            (c / "evil.py").write_text(f"open({str(tmp_path / 'exploded')!r}, 'w')")),
        "tokenizer of text": text("tokenizer.json", "hello"),
        "empty folder": lambda c: [p.unlink() for p in c.iterdir()], "symlink loop": loop,
        "a file": lambda c: (shutil.rmtree(c), c.write_text("hello")),
    }
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"problem": "1A+1", "answer": "2"}\n')
    data = ["--rollouts", tmp_path / "rollouts", "--out", tmp_path / "out"]
    for number, (name, damage) in enumerate(cases.items()):
        bad = tmp_path / "bad"
        shutil.copytree(tiny[1], tmp_path / "rollouts", ignore=shutil.ignore_patterns("scores"))
        shutil.copytree(tiny[0], bad)
        damage(bad)
        stages = [["teacher.py", "--model", bad, *data, "--loss", "ce"],
                  ["distill.py", "--student", tiny[0], "--teacher", bad, *data],
                  ["rollout.py", "--model", bad, "--prompts", prompts, "--out", tmp_path / "out", "--engine",
                   "hf", "--max-tokens", 4], ["evaluate.py", "--model", tiny[0], "--base", bad, "--data",
                                              f"x={prompts}:1", "--out", tmp_path / "out" / "results.jsonl",
                                              "--engine", "hf", "--max-tokens", 4]]
        late = name in ("wrong shape", "a weight is missing",
                        "half the width") or name.startswith(("weights cut", "weights of", "weights empty",
                                                              "header"))
        assert "bad" in refused(capsys, tmp_path, tmp_path / "exploded", *stages[number % 4], name=name,
                                late=late)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        for path in (bad, tmp_path / "rollouts"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_malformed_saves_scores_and_outputs_are_refused_by_name(start, tiny, tmp_path, capsys):
    """Files that our own stages wrote and that something else changed since."""
    script, flags = commands(tiny, tmp_path / "good", "ce")
    with pytest.MonkeyPatch.context() as patch:

        def dies_at_the_end(out, name, *rest, original=teacher.save_step):
            if name == "final":
                raise KeyboardInterrupt
            original(out, name, *rest)
        patch.setattr("teacher.save_step", dies_at_the_end)
        assert conftest.run_here(script, *flags) == 1

    def cut(path):
        path.write_bytes(path.read_bytes()[:-200])

    def bomb_in(path):
        torch.save({"step": 20, "optimizer": Bomb(tmp_path / "exploded")}, path)
    save, bomb = "out/step-0020", tmp_path / "exploded"
    score_file = f"rollouts/scores/{next((tmp_path / 'good/rollouts/scores').glob('*.pt')).name}"
    cases = [(f"{save}/optimizer.pt", damage)
             for damage in (cut, bomb_in, lambda p: torch.save([1], p), folder_instead)]
    cases += [(score_file, damage) for damage in (cut, bomb_in, folder_instead)]
    cases += [("out/run.json", damage) for damage in (
        lambda p: p.write_text("{"), lambda p: p.write_text("[]"), lambda p: p.write_text("{}"),
        lambda p: p.unlink(), cut, folder_instead,
        lambda p: p.write_text(p.read_text().replace('"teacher.py"', '"distill.py"')))]
    folder = tmp_path / "x"
    for i, (file, damage) in enumerate(cases):
        shutil.copytree(tmp_path / "good", folder)
        run = folder / "out" / "run.json"
        run.write_text(run.read_text().replace(str(tmp_path / "good"), str(folder)))
        damage(folder / file)
        line = refused(capsys, tmp_path, bomb,
                       *[str(x).replace(str(tmp_path / "good"), str(folder)) for x in (script, *flags)],
                       name=(file, i))
        assert str(folder / file).rpartition("/")[0] in line, (file, line)
        shutil.rmtree(folder)

    shutil.copytree(tmp_path / "good", folder)
    elsewhere = [str(x).replace(str(tmp_path / "good"), str(folder)) for x in flags]
    (folder / "file").write_text("")
    for out, complaint in ((folder / "file", "not a folder"), (folder / "file" / "below", "not a folder"),
                           (folder / "rollouts", "holds no run.json")):
        assert complaint in refused(capsys, tmp_path, bomb, script, *elsewhere, "--out", out)
    for flag, value in (("--lr", "nan"), ("--steps", 0), ("--kl-coef", -1), ("--logp-temperature", 0),
                        ("--save-every", 0)):
        assert flag in refused(capsys, tmp_path, bomb, script, *elsewhere, flag, value)
    results = folder / "results.jsonl"
    for content in (b"hello\n", b"\xff\n", b"[1]\n", b"{}\n"):
        results.write_bytes(content)
        assert "results.jsonl" in refused(capsys, tmp_path, bomb, "evaluate.py", "--pick", "x", "--model",
                                          tiny[0], "--out", results)
    shutil.rmtree(folder)


@long_part
def test_real_processes_refuse_in_one_line_too(tiny, tmp_path):
    shutil.copytree(tiny[1], tmp_path / "r", ignore=shutil.ignore_patterns("scores"))
    torch.save({"version": 1, "x": Bomb(tmp_path / "exploded")}, tmp_path / "r" / "shard-00001.pt")
    (tmp_path / "latin-1.jsonl").write_bytes('{"problem": "\u00e9", "answer": "2"}\n'.encode("latin-1"))
    shutil.copytree(tiny[0], tmp_path / "bad")
    (tmp_path / "bad" / "config.json").write_text("hello")
    for argv in (["teacher.py", "--model", tiny[0], "--rollouts", tmp_path / "r", "--out", tmp_path / "out",
                  "--loss", "ce"],
                 ["distill.py", "--student", tiny[0], "--teacher", tmp_path / "bad", "--rollouts", tiny[1],
                  "--out", tmp_path / "out"],
                 ["rollout.py", "--model", tmp_path / "bad", "--prompts", tmp_path / "latin-1.jsonl", "--out",
                  tmp_path / "out", "--engine", "hf"],
                 ["evaluate.py", "--model", tmp_path / "bad", "--data", f"x={tmp_path}/latin-1.jsonl",
                  "--out", tmp_path / "out" / "r.jsonl", "--engine", "hf"]):
        done = conftest.run_script(*argv, check=False)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
        assert "error:" in done.stderr
    assert not (tmp_path / "out").exists() and not (tmp_path / "exploded").exists()


def test_nothing_of_a_stranger_is_executed():
    """No eval, no exec of ours, no pickle but the reader that refuses every class; torch.load of data only;
    remote code only by its flag."""
    for script in ("rollout.py", "teacher.py", "distill.py", "evaluate.py"):
        for node in ast.walk(ast.parse((conftest.ROOT / script).read_text())):
            if not isinstance(node, ast.Call):
                continue
            name, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert name not in ("eval", "exec", "compile", "__import__('pickle')", "pickle.load",
                                "pickle.loads", "torch.jit.load", "np.load", "numpy.load"), (script,
                                                                                             node.lineno)
            if name == "torch.load":
                assert given.get("weights_only") == "True", (script, node.lineno)
            if name.endswith(("from_pretrained", "from_config")):
                assert given["trust_remote_code"] == "trust_remote_code"
                assert (not name.startswith("AutoModel") or "config" in name or given["use_safetensors"]
                        == "True")
            if "trust_remote_code" in given:
                assert given["trust_remote_code"] in ("trust_remote_code", "args.trust_remote_code",
                                                      "args['trust_remote_code']"), (script, node.lineno)


# ---- the driver --------------------------------------------------------------------------------------------

def driver(out, *argv, **env):
    return subprocess.Popen(["./run_rounds.sh", *argv], cwd=conftest.ROOT, stdout=open(f"{out}.log", "a"),
                            stderr=subprocess.STDOUT, start_new_session=True,
                            env={**os.environ, "OUT": str(out), "TABLES": f"{out}/tables",
                                 "OMP_NUM_THREADS": "1", "ROUNDS": "1", "PROMPTS_PER_ROUND": "12",
                                 "TEACHER_STEPS": "4", "DISTILL_STEPS": "2", "MSE_STEPS": "11", "K": "2",
                                 "TOY": "--steps 150 --min-ops 1 --max-ops 1 --train 40 --validation 4 "
                                        "--test 6", "VIRTUAL_ENV": sys.prefix,
                                 "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}", **env})


def end(process, out):
    assert process.wait(400) == 0, Path(f"{out}.log").read_text()[-3000:]


@long_part
def test_the_driver_is_killed_anywhere_and_finishes_with_the_same_results(tmp_path):
    out, whole, rng = tmp_path / "run" / "demo", tmp_path / "whole", random.Random(0)

    def announced():
        return Path(f"{out}.log").read_text().count("\n+ ")
    out.parent.mkdir()
    end(driver(out), out)
    stages = announced()
    assert stages >= 12
    out.parent.rename(whole)                                # the same path again: rows of results name it
    out.parent.mkdir()
    for whom in ("all", "the script", "all"):       # each within a quarter of the stages, not of the time
        process, begun = driver(out), announced() + rng.randint(1, stages // 4)
        wait_for(lambda: announced() >= begun, 200)
        time.sleep(rng.uniform(0, 4))
        assert process.poll() is None
        # a stage may outlive the script: the next run waits for it
        (os.killpg if whom == "all" else os.kill)(process.pid, signal.SIGKILL)
        process.wait()
    end(driver(out), out)
    same(whole / "demo", out)


def test_two_drivers_in_one_folder_are_refused_and_sigterm_reaches_the_stage(tmp_path):
    out = tmp_path / "demo"
    first = driver(out, TOY="--steps 100000")
    stage = wait_for(lambda: [c for c in children(first.pid) if "toy.py" in command_line(c)])[0]
    second = driver(out)
    assert second.wait(30) == 2 and Path(f"{out}.log").read_text().count("another run is at work") == 1
    dry = driver(out, DRY_RUN="1")
    assert dry.wait(30) == 0                                # prints commands, whoever is at work
    os.kill(first.pid, signal.SIGTERM)
    assert first.wait(30) == 143
    wait_for(lambda: gone(stage), 30)
    third = driver(out, TOY="--steps 100000")               # the lock went with its owner
    wait_for(lambda: children(third.pid))
    os.killpg(third.pid, signal.SIGKILL)
    third.wait()


@long_part
def test_sigterm_reaches_the_stages_of_seeds_that_run_side_by_side(tmp_path):
    out = tmp_path / "demo"
    process = driver(out, "fig5", SEEDS="0 1", JOBS="2", PROMPTS_TABLES="36", K_TABLES="1")
    worlds = [tmp_path / "demo" / "tables" / "runs" / "toy" / f"seed{seed}" for seed in (0, 1)]
    wait_for(lambda: all(lines(world / "mse" / "metrics.jsonl") for world in worlds), 400)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(60) == 143 and Path(f"{out}.log").read_text().count("run_rounds.sh: stopped") == 1
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)                           # nothing outlives it
    for world in worlds:
        assert "stopped by SIGTERM after step" in Path(f"{world}.log").read_text()
        assert list(world.glob("mse/step-*"))
