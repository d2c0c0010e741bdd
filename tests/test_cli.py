"""The command lines as a user meets them: help, exit codes, what is refused, and the driver from end to
end."""
import ast
import importlib
import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import torch

import conftest
import evaluate

SCRIPTS = ["rollout.py", "teacher.py", "distill.py", "evaluate.py"]


@pytest.mark.parametrize("script", [*SCRIPTS, "tests/toy.py"])
def test_help_exits_zero(script):
    done = conftest.run_script(script, "--help")
    assert "--out" in done.stdout and len(done.stdout.splitlines()) < 120


def imports(script):
    tree = ast.parse((conftest.ROOT / script).read_text())
    names = [n.module for n in ast.walk(tree)
             if isinstance(n, ast.ImportFrom)] + [a.name for n in ast.walk(tree) if isinstance(n, ast.Import)
                                                  for a in n.names]
    return {name for name in names if f"{name}.py" in SCRIPTS}


def test_imports_follow_the_pipeline():
    assert imports("rollout.py") == set() and imports("teacher.py") == {"rollout"}
    assert imports("distill.py") == imports("evaluate.py") == {"rollout", "teacher"}


def test_vllm_is_imported_only_inside_functions():
    top = [n for n in ast.parse((conftest.ROOT / "rollout.py").read_text()).body
           if isinstance(n, (ast.Import, ast.ImportFrom))]
    assert not any("vllm" in (getattr(n, "module", "") or "") or any("vllm" in a.name for a in n.names)
                   for n in top)


def test_top_level_holds_only_what_the_layout_allows():
    tracked = subprocess.run(["git", "ls-files"], cwd=conftest.ROOT, capture_output=True,
                             text=True).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout")
    top = {path.split("/")[0] for path in tracked if not path.startswith(".")}
    assert top <= {"README.md", "requirements.txt", "run_rounds.sh", "tests", "LICENSE", *SCRIPTS}


def snapshot(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*")}


def refused(capsys, folder, *argv):
    """Exit code 2, one line on stderr, no file changed; returns the line."""
    before = snapshot(folder)
    capsys.readouterr()
    assert conftest.run_here(*argv) == 2
    printed = capsys.readouterr().err
    assert len(printed.splitlines()) == 1 and "error:" in printed
    assert snapshot(folder) == before
    return printed


def test_bad_input_is_one_line_and_exit_code_2(tiny, tmp_path, capsys):
    model, rollouts, other = tiny
    sample = ["--max-tokens", 8, "-n", 2, "--engine", "hf"]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"problem": "1A+1", "answer": "2"}\n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "unanswered.jsonl").write_text('{"problem": "1A+1"}\n')
    out = ["--out", tmp_path / "out"]
    assert "nowhere.jsonl does not exist" in refused(capsys, tmp_path, "rollout.py", "--model", model,
                                                     "--prompts", tmp_path / "nowhere.jsonl", *out, *sample)
    assert "holds no prompts" in refused(capsys, tmp_path, "rollout.py", "--model", model, "--prompts",
                                         tmp_path / "empty.jsonl", *out, *sample)
    assert "unanswered.jsonl:1 has no answer" in refused(capsys, tmp_path, "rollout.py", "--model", model,
                                                         "--prompts", tmp_path / "unanswered.jsonl", *out,
                                                         *sample)
    assert "does not exist" in refused(capsys, tmp_path, "rollout.py", "--model", tmp_path / "no-model",
                                       "--prompts", prompts, *out, *sample)
    assert "holds no shard" in refused(capsys, tmp_path, "teacher.py", "--model", model, "--rollouts",
                                       tmp_path, *out, "--loss", "ce")
    assert "does not exist" in refused(capsys, tmp_path, "teacher.py", "--model", tmp_path / "no-model",
                                       "--rollouts", rollouts, *out, "--loss", "ce")
    assert "does not exist" in refused(capsys, tmp_path, "distill.py", "--student", model, "--teacher",
                                       tmp_path / "none-here", "--rollouts", rollouts, *out)
    assert "does not exist" in refused(capsys, tmp_path, "evaluate.py", "--model", model, "--data",
                                       f"x={tmp_path}/nowhere.jsonl", "--out", tmp_path / "r.jsonl")
    for more in ([], ["--denominator", "live"]):            # live is the student, which is pi_old here
        assert "same policy" in refused(capsys, tmp_path, "distill.py", "--student", model, "--teacher",
                                        model, "--rollouts", rollouts, *out, *more)


def test_rollouts_of_another_tokenizer_or_of_an_unknown_policy_are_refused(tiny, tmp_path, capsys):
    model, _, other = tiny
    rollouts = conftest.make_rollouts(tmp_path / "rollouts", model)
    foreign = conftest.make_model(tmp_path / "foreign")
    vocabulary = json.loads((foreign / "tokenizer.json").read_text())
    vocabulary["model"]["vocab"] = {("so  " if t == "so " else t): i for t,
                                    i in vocabulary["model"]["vocab"].items()}
    (foreign / "tokenizer.json").write_text(json.dumps(vocabulary))
    out = ["--out", tmp_path / "out"]
    assert "another tokenizer" in refused(capsys, tmp_path, "teacher.py", "--model", foreign, "--rollouts",
                                          rollouts, *out, "--loss", "ce")
    assert "another tokenizer" in refused(capsys, tmp_path, "distill.py", "--student", model, "--teacher",
                                          foreign, "--rollouts", rollouts, *out)
    assert "not the policy that wrote the rollouts" in refused(
        capsys, tmp_path, "teacher.py", "--model", other, "--rollouts", rollouts, "--old", other, *out,
        "--loss", "ce")
    moved = conftest.make_rollouts(tmp_path / "moved", conftest.make_model(tmp_path / "gone"))
    (tmp_path / "gone" / "model.safetensors").unlink()
    assert "--old" in refused(capsys, tmp_path, "teacher.py", "--model", model, "--rollouts", moved, *out,
                              "--loss", "ce")
    assert conftest.run_here("teacher.py", "--model", model, "--rollouts", moved, "--old", model, *out,
                             "--loss", "ce", "--steps", 1) == 0


def test_exit_codes_of_real_processes_and_the_one_line_under_torchrun(tiny, tmp_path):
    command = ["teacher.py", "--model", tiny[0], "--rollouts", tmp_path / "nowhere", "--out",
               tmp_path / "out", "--loss", "ce"]
    alone, two = conftest.run_script(*command, check=False), conftest.run_script(*command, check=False,
                                                                                 nproc=2)
    assert alone.returncode == 2
    assert alone.stderr.splitlines() == [f"teacher.py: error: {tmp_path}/nowhere holds no shard-*.pt: "
                                         "give the --out folder of rollout.py"]
    assert two.returncode == 1 and two.stderr.count("holds no shard-*.pt") == 1
    assert conftest.run_script("teacher.py", "--no-such-flag", check=False).returncode == 2


def test_a_finished_command_touches_nothing_and_other_settings_are_refused(tiny, tmp_path, capsys):
    model, rollouts, _ = tiny
    command = ["teacher.py", "--model", model, "--rollouts", rollouts, "--out", tmp_path / "out", "--loss",
               "ce", "--steps", 2]
    assert conftest.run_here(*command) == 0
    before = snapshot(tmp_path)
    capsys.readouterr()
    assert conftest.run_here(*command) == 0 and "already finished" in capsys.readouterr().out
    assert conftest.run_here(*command, "--checkpointing", "--micro-tokens", 99) == 0    # as advice on memory
    assert conftest.run_here(*command, "--no-checkpointing") == 0
    assert snapshot(tmp_path) == before
    assert "--lr 1e-06, now 0.1" in refused(capsys, tmp_path, *command, "--lr", 0.1)


def test_rollout_restarts_keep_finished_shards_and_two_processes_write_the_same(tiny, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"problem": f"{i}A+{i}", "answer": str(2 * i % 10)}) + "\n"
                               for i in range(7)))
    command = ["rollout.py", "--model", tiny[0], "--prompts", prompts, "--num-prompts", 0, "-n", 3,
               "--max-tokens", 10, "--engine", "hf", "--shard-prompts", 2, "--temperature", 1]
    # a process of its own: as many threads as each of the two
    conftest.run_script(*command, "--out", tmp_path / "one")
    conftest.run_script(*command, "--out", tmp_path / "two", nproc=2)
    shards = sorted((tmp_path / "one").glob("shard-*.pt"))
    assert len(shards) == 4
    assert json.loads((tmp_path / "one" / "rollouts.json").read_text())["summary"]["responses"] == 21
    shards[2].unlink()
    kept = shards[0].stat().st_mtime_ns
    conftest.run_script(*command, "--out", tmp_path / "one")
    assert shards[0].stat().st_mtime_ns == kept
    for path in shards:
        a, b = (torch.load(folder / path.name, weights_only=True)
                for folder in (tmp_path / "one", tmp_path / "two"))
        assert torch.equal(a["input_ids"], b["input_ids"]) and torch.equal(a["reward"], b["reward"])
    assert "max_tokens = 10, not 11" in refused(capsys, tmp_path / "one", *command, "--out", tmp_path / "one",
                                                "--max-tokens", 11)


# ---- the driver --------------------------------------------------------------------------------------------

def run_driver(*argv, **env):
    return subprocess.run(["./run_rounds.sh", *argv], cwd=conftest.ROOT, capture_output=True, text=True,
                          timeout=600, env={**os.environ, **env})


def test_driver_help_and_unknown_commands():
    assert "./run_rounds.sh test" in run_driver("help").stdout
    assert run_driver("nonsense").returncode == 2


@pytest.mark.parametrize("command, env, counts", [
    ("demo", {}, [3, 5, 3]), ("demo", {"STRATEGY": "auto"}, [3, 5, 3]),
    ("demo", {"STRATEGY": "3"}, [3, 5, 3]),
    ("demo", {"STRATEGY": "2", "UNLEARNED_LR": "1e-3"}, [3, 9, 9]), ("map", {}, None),
    *((name, {}, None) for name in [*(f"table{i}" for i in range(1, 13)),
                                    *(f"fig{i}" for i in range(4, 11))])])
def test_dry_run_prints_every_command_with_flags_that_the_scripts_know(tmp_path, command, env, counts):
    done = run_driver(command, DRY_RUN="1", OUT=str(tmp_path / "demo"), TABLES=str(tmp_path / "tables"),
                      **env)
    commands = [shlex.split(line) for line in done.stdout.splitlines()
                if line.startswith(("python ", "torchrun "))]
    assert done.returncode == 0 and not list(tmp_path.iterdir())
    made = [sum(c[1] == script for c in commands) for script in ("rollout.py", "teacher.py", "distill.py")]
    assert made == counts if counts else min(made[:2]) > 0
    for command in commands:
        if not command[1].startswith("tests/"):
            importlib.import_module(command[1].removesuffix(".py")).parse_args(command[2:])


@pytest.mark.skipif(not os.environ.get("ERPD_ALL_FAULTS"), reason="ERPD_ALL_FAULTS=1 runs the long part")
def test_the_driver_end_to_end_at_a_tiny_size_and_again_without_a_stage(tmp_path):
    env = dict(OUT=str(tmp_path / "demo"), ROUNDS="2",
               TOY="--steps 150 --min-ops 1 --max-ops 1 --train 60 --validation 6 --test 8",
               PROMPTS_PER_ROUND="12", TEACHER_STEPS="18", MSE_STEPS="12", K="4", VIRTUAL_ENV=sys.prefix,
               PATH=f"{sys.prefix}/bin:{os.environ['PATH']}")
    done = run_driver(**env)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    demo = tmp_path / "demo"
    rows = [json.loads(line) for line in (demo / "results.jsonl").read_text().splitlines()]
    assert {row["benchmark"] for row in rows} == {"validation", "test", "kl"}
    paths = {os.path.relpath(row["model"], demo) for row in rows}
    assert {"base", "seed0/round1/teacher/step-0016", "seed0/round2/student/final",
            "seed0/control2/teacher/final", "seed0/mse/student/final"} <= paths
    for row in rows:
        assert 0 <= row["avg_at_k"] <= 1
        assert sum(row["correct_per_problem"]) == round(row["avg_at_k"] * row["k"] * row["n_problems"])
        assert (row["kl"] == 0) == (row["model"] == row["base"])
    text = (demo / "report.md").read_text()
    assert "round2/student" in text and "control2/teacher" in text
    for figure in re.findall(r"\]\((figures/.*?)\)", text):
        assert (demo / figure).stat().st_size > 5000
    before = snapshot(demo)
    again = run_driver(**env)
    assert again.returncode == 0 and "+ python" not in again.stdout and snapshot(demo) == before

    # strategy auto: a teacher after one step is no better than the policy, so the round goes to strategy 2
    # and picks among its students
    auto = run_driver(**env | dict(SEEDS="1", STRATEGY="auto", ROUNDS="1", TEACHER_STEPS="1", MSE_STEPS="31"))
    assert auto.returncode == 0, auto.stdout[-3000:] + auto.stderr[-3000:]
    assert "round 1 of seed 1: strategy 2" in auto.stdout
    accuracy = {os.path.relpath(row["model"], demo): row["avg_at_k"]
                for row in evaluate.read_results(demo / "results.jsonl")
                if row["benchmark"] == "validation"}
    candidates = [f"seed1/round1/student-un{step}" for step in (10, 20, 30)]
    picked = json.loads((demo / "seed1/round1/student/run.json").read_text())["args"]["out"]
    best = max(candidates, key=lambda path: accuracy[f"{path}/final"])
    assert os.path.relpath(picked, demo) == best and "student-un10" in (demo / "report.md").read_text()


# ---- the README ------------------------------------------------------------------------------------------

SMALL = {"rollout.py": ["--num-prompts", 4, "-n", 4, "--max-tokens", 16, "--engine", "hf", "--rehearse"],
         "teacher.py": ["--steps", 1, "--batch-prompts", 4], "distill.py": ["--steps", 1],
         "evaluate.py": ["--max-tokens", 16, "--engine", "hf"]}


def test_the_readmes_commands_for_a_model_of_ones_own_run_as_written_with_smaller_sizes(tmp_path):
    block, = re.findall(r"\n    M=.*?\n\n", (conftest.ROOT / "README.md").read_text(), re.DOTALL)
    lines = block.replace("\\\n", " ").strip().splitlines()
    name, run = re.match(r'M=(\S+); RUN="(.*)"', lines[0]).groups()
    assert run == "torchrun --standalone --nproc-per-node 8" and len(lines) == 5
    model, problems = conftest.make_model(tmp_path / "model"), tmp_path / "problems.jsonl"
    rows = [{"problem": f"{i}A+{i}", "answer": str(2 * i)} for i in range(4)]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for line in lines[1:]:
        line = line.replace("$M", str(model)).replace("runs/", f"{tmp_path}/runs/")
        line = re.sub(r"POLARIS-Project/\S+", str(problems), line)
        line = re.sub(r"(hmmt_feb25)=\S+", rf"\1={problems}:2", line)
        launcher, script, *flags = shlex.split(line)
        assert launcher == "$RUN" and script in SMALL
        conftest.run_script(script, *flags, *SMALL[script], nproc=2)
    row, = evaluate.read_results(tmp_path / "runs" / "results.jsonl")
    assert row["benchmark"] == "hmmt_feb25" and row["k"] == 2 and row["kl"] is not None and "Qwen3-4B" in name
