"""Recipes of the paper's tables and figures, and the report on them: commands, verdicts, completeness."""
import json
import os
import re
import shlex
import subprocess
import sys
from collections import Counter

import pytest
import torch

import conftest
import distill
import evaluate
import report
import rollout
import teacher
from claims import DRAWS, bootstrap, verdict
from reads import PAPER
from runs import checkpoint, number, read_model, seconds_until

QWEN, NBG = "Qwen/Qwen3-4B-Thinking-2507", "Nanbeige/Nanbeige4-3B-Thinking-2511"
NANO, ACE = "nvidia/Llama-3.1-Nemotron-Nano-4B-v1.1", "nvidia/AceReason-Nemotron-1.1-7B"
JUST = "hbx/JustRL-Nemotron-1.5B"
SMALL35, LARGE35 = "Qwen/Qwen3.5-9B", "Qwen/Qwen3.5-27B"
# K of Sec. 4.1
FILES = {"aime24": 32, "aime25": 32, "hmmt_feb25": 32, "hmmt_nov25": 32, "hmmt_feb26": 32, "beyond_aime": 16,
         "imo": 4}
BENCHMARKS = " ".join(f"{name}={name}.jsonl:{k}" for name, k in FILES.items())
# What each table and figure of the paper reports, its columns; HMMT Feb 25 where none are named (Sec. 4.1).
READS = {"table1": "aime24 aime25 hmmt_feb25 beyond_aime hmmt_nov25",
         "table2": "aime25 hmmt_feb25 hmmt_nov25", "table6": "aime25 hmmt_nov25",
         "table8": "aime24 aime25 hmmt_feb25 beyond_aime", "table9": "hmmt_feb25 hmmt_nov25",
         "table10": "aime24 aime25 hmmt_feb25",
         "table11": "hmmt_nov25 hmmt_feb25 hmmt_feb26", "table12": "aime24 aime25 hmmt_feb25"}


def command_lines(name, **env):
    """The lines that a recipe prints."""
    kept = {key: value for key, value in os.environ.items()
            if key not in ("MODEL", "MODELS", "PROMPTS", "BENCHMARKS", "SEEDS", "REHEARSE", "TABLES",
                           "JUDGE_URL", "JUDGE_MODEL")}
    done = subprocess.run(["./run_rounds.sh", name], cwd=conftest.ROOT, capture_output=True, text=True,
                          timeout=60, env={**kept, "DRY_RUN": "1", **env})
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if re.match(r"(python|torchrun) ", line)]


def dry_run(name, **env):
    """Commands that a recipe prints, each {script, option: value, ...}; a RUN is its path below seedN/."""
    commands = []
    for line in command_lines(name, **env):
        words = shlex.split(line)
        at = next(i for i, word in enumerate(words) if word.endswith(".py"))
        command = {"launch": " ".join(words[:at]), "script": words[at]}
        for word in words[at + 1:]:
            if word.startswith("-"):
                key = command[word.lstrip("-")] = []                 # the last one counts, as for argparse
            else:
                key.append(word)
        command = {key: " ".join(value) if isinstance(value, list) else value
                   for key, value in command.items()}
        commands.append({key: re.sub(r"\S*/seed\d+/", lambda m: "code/" if "-code/" in m[0] else "", value)
                         for key, value in command.items()})
    return commands


def real(name, model):
    return dry_run(name, MODEL=model, PROMPTS="polaris.jsonl", BENCHMARKS=BENCHMARKS, NPROC="8")


def runs(commands, script):
    return {command["out"]: command for command in commands if command["script"] == script}


# Typed from the paper: steps and beta of Sec. 4.1, 4.3, 4.5 and the tables themselves.
TEACHERS = {"ppo": "ppo", "grpo": "grpo", "sapo": "sapo 120", "ce": "ce 0.001", "mse": "mse 70",
            "ce-5e2": "ce 0.05", "ce-1e2": "ce 0.01", "ce-kl": "ce 0.001", "ce-kl-5": "ce 0.001",
            "unlearned-ce-1e3": "ce 0.001", "unlearned-ce-1e2": "ce 0.01", "unlearned-a": "mse 10",
            "unlearned-b": "mse 10", "unlearned-c": "mse 10"}
STUDENTS = {"sapo-student": 32, "ce-student": 16, "mse-min0": 16, "sapo-kl-high": 32, "sapo-kl-middle": 32,
            "sapo-kl-low": 32, "entropy1": 10,
            "batch2/student": 10, "batch3/student": 10, "batch4/student": 10, "batch5/student": 10,
            "batch6/student": 10, "entropy2/student": 10, "entropy3/student": 10}
MODELS = {"table1": [QWEN, NBG], "table2": [QWEN], "table3": [QWEN], "table4": [NBG], "table5": [NBG],
          "table6": [QWEN], "table7": [QWEN], "table8": [QWEN], "table9": [QWEN],
          "table10": [NANO, ACE, JUST, QWEN, NBG], "table11": [SMALL35, LARGE35], "table12": [QWEN, NBG],
          "fig4": [QWEN, NBG], "fig5": [QWEN], "fig6": [QWEN], "fig7": [QWEN], "fig8": [NBG], "fig9": [QWEN],
          "fig10": [QWEN]}


@pytest.mark.parametrize("name, model", [(name, model) for name, models in MODELS.items()
                                         for model in dict.fromkeys([*models, QWEN])])
def test_every_recipe_prints_the_papers_settings_for_every_model_of_its_table(name, model):
    commands = real(name, model)
    temperature = "1.0" if "Qwen3.5" in model else "0.6"
    length = "192000" if "Qwen3.5" in model else {QWEN: "81920", NBG: "65536"}.get(model, "32768")
    assert all(c["launch"] == "torchrun --standalone --nproc-per-node 8"
               for c in commands if "pick" not in c and "report" not in c)
    for c in runs(commands, "rollout.py").values():
        online, code = c["out"].startswith("online"), c["out"].startswith("code")
        assert (c["n"], c["temperature"], c["max-tokens"]) == ("16", temperature, "32768")
        assert c["num-prompts"] == ("32" if online else "1000")
        assert c["prompts"] == ("areal-boba-2-rl-code.jsonl" if code else "polaris.jsonl")
        assert ("task" in c) == code
        assert c["out"] != "rollouts" or c["model"] == model
    for out, c in runs(commands, "teacher.py").items():
        wanted = TEACHERS.get(out, "").split()
        assert c["batch-prompts"] in ("32", "64", "256")
        assert c.get("beta", "0.001") in ("0.001", "0.01", "0.05")
        rates = {"unlearned-a": "2e-6", "unlearned-b": "2e-6", "unlearned-c": "5e-6", "unlearned-5e6": "5e-6",
                 "unlearned-1e5": "1e-5"}
        assert c["lr"] == rates.get(out.removeprefix("code/"), "1e-6")
        assert c["steps"] == "1" or wanted[1:] != ["120"] or c["steps"] == "120"
        if wanted:
            assert c["loss"] == wanted[0]
            assert not wanted[1:] or c["beta" if wanted[0] == "ce" else "steps"] == wanted[1]
    for out, c in runs(commands, "distill.py").items():
        assert c["lr"] == "1e-6" and c["batch-prompts"] in ("32", "64")
        assert c["steps"] == str(STUDENTS.get(out, c["steps"])) and c["steps"] in ("10", "16", "32")
    # a 4B model does not fit 80 GB without
    assert all("shard" in c for c in commands if c["script"] in ("teacher.py", "distill.py"))
    measured = [c for c in commands if c["script"] == "evaluate.py" and "model" in c and "pick" not in c]
    for c in measured:
        assert c["temperature"] == temperature and c["max-tokens"] == length and c["base"] == model
        code, wanted = c.get("task") == "code", READS.get(name, "hmmt_feb25").split()
        if name == "table11" and model != SMALL35:
            wanted = [*wanted, "imo"]
        data = {"0.95": " ".join(f"{b}={b}.jsonl:{k}" for b, k in FILES.items() if b in wanted),
                "1": "kl=hmmt_feb25.jsonl:4"}
        if code:
            data = {"0.95": "livecodebench=test6.jsonl:32", "1": "kl=test6.jsonl:4"}
        assert c["data"] == data[c["top-p"]] and ("ask-for-box" in c) != code
        # 54 GB of weights: one GPU has no room for a cache
        assert ("tensor-parallel" in c and "shard" in c) == ("27B" in model)
    assert {c["model"] for c in measured} and commands[-1]["tables"] == name


def test_an_on_policy_run_keeps_the_weights_that_any_recipe_measures():
    parts = [conftest.ROOT / "tests" / "paper" / f"{part}.sh" for part in ("commands", "recipes")]
    text = "".join(part.read_text() for part in parts)
    kept = set(re.search(r'ONLINE_KEPT="(.*?)"', text)[1].split())
    calls = re.findall(r"^  onpolicy \S+ \S+ ([\d ]+?)(?: +#.*)?$", text, re.M)
    # one recipe must not remove what another evaluates
    assert len(calls) == 5 and {step for call in calls for step in call.split()} <= kept


def torchrun_parses(words):
    """Whether torchrun's own parser takes a command line: it looks at the script's options too."""
    from torch.distributed.run import get_args_parser
    try:
        found = get_args_parser().parse_args(words)
    except SystemExit:
        return False
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    return found.training_script == words[at] and found.training_script_args == words[at + 1:]


@pytest.mark.parametrize("name", MODELS)
def test_torchrun_and_the_script_itself_parse_every_command_of_a_recipe(name):
    # what this test is there to find
    assert not torchrun_parses(["--nproc-per-node", "2", "rollout.py", "--n", "8"])
    parsers = {"rollout.py": rollout, "teacher.py": teacher, "distill.py": distill, "evaluate.py": evaluate}
    lines = [line for rehearse in ("", "1") for line in command_lines(
        name, REHEARSE=rehearse, PROMPTS="p.jsonl", NPROC="8", JUDGE_URL="http://localhost/v1",
        JUDGE_MODEL="judge")]
    for line in lines:
        words = shlex.split(line)
        at = next(i for i, word in enumerate(words) if word.endswith(".py"))
        assert words[0] == "python" or torchrun_parses(words[1:]), line
        parsers[words[at]].parse_args(words[at + 1:])
    assert any(line.startswith("torchrun") for line in lines)


@pytest.mark.parametrize("script", ["rollout", "teacher", "distill", "evaluate"])
def test_torchrun_leaves_every_option_of_a_script_alone(script):
    text = subprocess.run([sys.executable, f"{script}.py", "--help"], cwd=conftest.ROOT, capture_output=True,
                          text=True).stdout
    options = sorted(set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", text.split("options:")[1])))
    assert len(options) > 20
    for option in options:
        assert torchrun_parses(["--standalone", "--nproc-per-node", "2", f"{script}.py", option, "1"]), option


def test_a_rehearsal_runs_the_same_commands_with_only_sizes_changed():
    sizes = {"num-prompts", "n", "max-tokens", "shard-prompts", "rehearse", "steps", "save-every",
             "value-steps", "num-problems", "data"}
    for name, models in MODELS.items():
        whole, small = (dry_run(name, MODEL=models[0], PROMPTS="p.jsonl", NPROC="2", TABLES="runs/tables",
                                REHEARSE=flag) for flag in ("", "1"))
        online = re.compile(r"online\S*?/(update|rollouts)")
        whole, small = ([c for c in commands
                         if not any(online.match(c.get(key, "")) for key in ("out", "model"))]
                        for commands in (whole, small))
        assert len(whole) == len(small)
        for a, b in zip(whole, small):
            same = [key for key in a if key not in sizes and "step-" not in a[key]]
            assert {key: a[key] for key in same} == {key: b.get(key) for key in same}
            assert all(int(b[key]) <= int(a.get(key, 10 ** 9))
                       for key in ("num-prompts", "n", "max-tokens", "steps") if key in b)


def test_models_of_a_table_come_in_turn_and_model_narrows_them():
    for name, models in MODELS.items():
        commands = dry_run(name, PROMPTS="polaris.jsonl", BENCHMARKS=BENCHMARKS, NPROC="8")
        assert list(dict.fromkeys(c["base"] for c in commands if "base" in c)) == models, name
    assert {c["base"] for c in dry_run("table10", MODELS=f"{ACE} {JUST}") if "base" in c} == {ACE, JUST}


def test_rows_differ_in_what_the_paper_says():
    table5 = runs(real("table5", NBG), "distill.py")
    assert [table5[f"sapo-kl-{x}"]["kl-coef"] for x in ("high", "middle", "low")] == ["0.2", "0.05", "0.001"]
    assert "kl-coef" not in table5["sapo-student"]
    table7 = runs(real("table7", QWEN), "distill.py")
    signals = {c["teacher"].removeprefix("mse/step-").replace("mse/final", "0070") + "/"
               + c["denominator"].removeprefix("mse/step-") for c in table7.values()}
    assert signals == {"0070/0010", "0070/0020", "0070/0030", "0060/0010", "0050/0010", "0040/0010",
                       "old/0050", "0010/old", "0010/none", "none/0050", "0070/old"}
    table6 = runs(real("table6", QWEN), "distill.py")
    assert {c["entropy-coef"] for out, c in table6.items() if out.startswith("entropy")} == {"0.5"}
    assert len([o for o in table6 if o.startswith("entropy")]) == 3
    table12 = runs(real("table12", NBG), "distill.py")
    masks = Counter(c.get("positive-signal", "all") for c in table12.values())
    assert masks == {"all": 1, "max0": 1, "min0": 1}
    table2 = runs(real("table2", QWEN), "distill.py")
    assert table2["batch4/student"]["denominator"] == "ce-student/step-0010"
    assert table2["batch3/student"]["denominator"] == "old"
    without = runs(real("table2", QWEN), "teacher.py")
    # half the KL: the middle, in a dry run
    assert without["b2/ce"]["model"] == "ce/step-0050" and without["a2/ce"]["model"] == "ce/final"
    assert table2["batch5/student"]["teacher"] == "batch5/mse/final"
    assert table2["batch6/student"]["denominator"] == "batch6/mse/step-0010"
    table8 = real("table8", QWEN)
    assert runs(table8, "teacher.py")["unlearned-ce-1e3"]["ref"] == "start"
    assert runs(table8, "teacher.py")["unlearned-ce-1e3"]["model"] == "mse/step-0010"
    pairs = {out: (c["student"].split("/")[0], c["teacher"]) for out, c in runs(table8, "distill.py").items()
             if out.startswith("ensemble")}
    assert pairs["ensemble-1e3-5e2"] == ("ce-5e2-student", "unlearned-ce-1e3/final")
    assert pairs["ensemble-mse-5e2"] == ("ce-5e2-student", "mse/final")
    assert pairs["ensemble-1e3-1e3"] == ("ce-student-32", "unlearned-ce-1e3/final")
    assert pairs["ensemble-1e2-5e2"] == ("ce-5e2-student", "unlearned-ce-1e2/final")
    table9 = runs(real("table9", QWEN), "teacher.py")
    assert [table9[f"unlearned-{x}"]["negative-weight"] for x in "abc"] == ["0.5", "1", "1"]
    assert table9["unlearned-a-sft"]["model"] == "unlearned-a/final"
    table3 = real("table3", QWEN)
    assert sum(c["out"].startswith("online/update") for c in table3 if c["script"] == "teacher.py") == 50
    assert sum(c["out"].startswith("online-batch4/update") for c in table3
               if c["script"] == "teacher.py") == 60
    assert sum(c["out"].startswith("online/update") for c in real("table4", NBG)
               if c["script"] == "teacher.py") == 100
    fig6 = runs(real("fig6", QWEN), "teacher.py")
    assert fig6["ce-kl"]["kl-coef"] == "2" and "kl-coef" not in fig6["ce"]
    assert runs(real("fig7", QWEN), "distill.py")["ce-1e2-live"]["denominator"] == "live"
    code = runs(real("table11", SMALL35), "distill.py")
    denominators = {c["denominator"] for out, c in code.items() if out.startswith("code")}
    assert denominators == {"code/mse/step-0010", "code/unlearned-5e6/final", "code/unlearned-1e5/final"}
    assert {c["teacher"] for out, c in code.items() if out.startswith("code")} == {"code/mse/final"}


def test_recipes_train_on_finished_runs_and_share_them():
    """Every checkpoint that a command names is made by an earlier one, and a run by one command."""
    seen, stages = {}, ("rollout.py", "teacher.py", "distill.py")
    for name, models in MODELS.items():
        made = {"old", "none", "live", models[0]}
        for c in real(name, models[0]):
            for key in ("model", "student", "teacher", "denominator") if c["script"] in stages else ():
                policy = re.sub(r"/(final|step-\d+)$", "", c.get(key, "old"))
                assert policy in made, f"{name}: {policy} comes before it is made"
            if "rollouts" in c:
                assert c["rollouts"] in made
            if c["script"] in stages:
                made.add(c["out"])
                first = seen.setdefault((models[0], c["out"]), c)
                assert first == c, f"{name} makes {c['out']} in another way"


def test_help_lists_every_recipe_with_the_hours_that_its_commands_take():
    """By Table 4: 7 h for 1,000 prompts x 16, steps of 300 s (teacher), 400 s, 800 + 300 s (on-policy)."""
    done = subprocess.run(["./run_rounds.sh", "help"], cwd=conftest.ROOT, capture_output=True, text=True)
    listed = re.findall(r"^ +((?:table|fig)\d+) +\S.*? (\d+) h ", done.stdout, re.M)
    assert [name for name, _ in listed] == list(MODELS)
    for name, hours in listed:
        seconds = 0
        for model in MODELS[name]:
            commands = {(c["script"], c["out"]): c for c in real(name, model)
                        if c["script"] in ("rollout.py", "teacher.py", "distill.py")}
            for (script, out), c in commands.items():
                online = re.match(r"online\S*/", out)
                steps = int(c.get("steps", 1)) * (300 if script == "teacher.py" else 400)
                seconds += steps if script != "rollout.py" else 800 if online else 7 * 3600
        assert int(hours) == pytest.approx(seconds / 3600, abs=1), name


@pytest.mark.skipif(not os.environ.get("ERPD_ALL_FAULTS"), reason="ERPD_ALL_FAULTS=1 runs the long part")
def test_a_stopped_recipe_says_so_and_goes_on_where_it_was(tmp_path):
    env = {key: value for key, value in os.environ.items()
           if key not in ("MODEL", "MODELS", "PROMPTS", "BENCHMARKS")}
    env |= dict(OUT=str(tmp_path / "demo"), TABLES=str(tmp_path / "tables"), SEEDS="0 1", JOBS="2",
                PROMPTS_TABLES="12", K_TABLES="2",
                TOY="--steps 60 --min-ops 1 --max-ops 1 --train 60 --validation 4 --test 6",
                VIRTUAL_ENV=sys.prefix, PATH=f"{sys.prefix}/bin:{os.environ['PATH']}")

    def run():
        return subprocess.run(["./run_rounds.sh", "fig5"], cwd=conftest.ROOT, capture_output=True, text=True,
                              timeout=600, env=env)
    world = tmp_path / "tables" / "runs" / "toy"
    world.mkdir(parents=True)
    (world / "seed1").write_text("")                        # a file where a folder has to go
    stopped = run()
    assert stopped.returncode != 0 and f"stopped, see {world}/seed1.log" in stopped.stdout
    assert not (tmp_path / "tables" / "fig5" / "report.md").exists()
    (world / "seed1").unlink()
    done = run()
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "tests/toy.py" not in done.stdout
    rows = evaluate.read_results(world / "results.jsonl")
    wanted = {f"{world}/seed{s}/mse/{c}" for s in (0, 1) for c in ("step-0010", "step-0060", "final")}
    assert {row["model"] for row in rows} >= wanted
    assert len({(row["model"], row["benchmark"]) for row in rows}) == len(rows)
    assert "| 7 | MSE unlearns" in (tmp_path / "tables" / "fig5" / "report.md").read_text()
    again = run()
    assert again.returncode == 0
    assert re.findall(r"^\+ python (\S+ \S+)", again.stdout, re.M) == ["evaluate.py --report"]


# ---- verdicts ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shift, spread, expected",
                         [(0.05, 0.01, "holds"), (-0.05, 0.01, "does not hold"), (0.0, 0.03, "undecided")])
def test_bootstrap_decides_what_is_clear_and_leaves_noise_undecided(shift, spread, expected):
    generator = torch.Generator().manual_seed(1)
    problems = torch.randn(4, 150, generator=generator, dtype=torch.float64) * 0.1
    of_seeds = spread * torch.tensor([-1.0, 1.0, -0.5, 0.5])[:, None]
    problems += shift + of_seeds - problems.mean(1, keepdim=True)
    picks = torch.randint(150, (DRAWS, 150), generator=generator)
    picks[0] = torch.arange(150)
    per_seed = problems[:, picks].mean(-1)                                          # (4, DRAWS)
    mean, low, high = bootstrap(per_seed, generator)
    assert mean == pytest.approx(shift, abs=1e-6) and low < mean < high and verdict(low, high) == expected


def test_bootstrap_interval_is_as_wide_as_theory_says():
    generator = torch.Generator().manual_seed(0)
    seeds = torch.randn(5, generator=generator, dtype=torch.float64)
    _, low, high = bootstrap(seeds[:, None].expand(5, 20000).contiguous(), generator)
    # s / sqrt(n), the unbiased s
    assert (high - low) / 2 == pytest.approx(1.96 * seeds.std().item() / 5 ** 0.5, rel=0.1)


# ---- the report --------------------------------------------------------------------------------------------

def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def fake_run(world, seed, out, steps, every, accuracy, script, rollouts, benchmarks=("validation", "test"),
             **args):
    """A finished run without weights: run.json, metrics.jsonl, and rows of its checkpoints."""
    folder = world / f"seed{seed}" / out
    folder.mkdir(parents=True)
    settings = {"rollouts": f"{world}/seed{seed}/{rollouts}", "lr": 1e-3, "batch_prompts": 4, "kl_coef": 0.0,
                "beta": 0.5, "ref": "old", "negative_weight": 1.0, "positive_signal": "all"}
    info = {"script": script, "args": settings | args}
    if out.startswith("ce-1e2-"):
        far = 2.0 if out.endswith("student") else 0.5
        info["movement"] = {"count": [10, 5], "teacher": [0.01, 2.0], "student": [0.01, far], "ratio": 1.0}
    if out in ("mse", "ppo"):
        info["movement"] = {"what": "pi(a|s)", "positive": [1.0] * 5 + [9.0] * 20, "negative": [3.0] * 25}
    (folder / "run.json").write_text(json.dumps(info))
    metrics = [{"step": i, "seconds": 1.0, "prob_pos": 0.8 - 0.001 * i, "prob_neg": 0.7 - 0.002 * i,
                "entropy": 0.5 - 0.001 * i, "explained_variance": 0.01 * i} for i in range(1, steps + 1)]
    write_rows(folder / "metrics.jsonl", metrics)
    return [fake_row(world, f"{folder}/{name}", accuracy, 0.02, benchmark) for benchmark in benchmarks
            for name in [*(f"step-{i:04d}" for i in range(every, steps, every)), "final"]]


def fake_row(world, model, accuracy, kl, benchmark):
    right = [round(8 * min(1, max(0, accuracy + 0.1 * (i % 3 - 1)))) for i in range(12)]
    return {"model": model, "base": "base", "benchmark": benchmark, "k": 8, "n_problems": 12,
            "avg_at_k": sum(right) / 96, "se": 0.03, "correct_per_problem": right, "kl": kl, "entropy": 0.6,
            "mean_length": 40.0, "pass_at_k": 1.0}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """runs/toy as the recipes would leave it, made from what they print."""
    folder = tmp_path_factory.mktemp("tables")
    world, rows, made = folder / "runs" / "toy", [], set()
    summary = {"responses": 100, "prompts": 25, "mean_length": 40.0, "tok_per_s": 100.0}
    for name in MODELS:
        for c in dry_run(name, SEEDS="0"):
            out = c.get("out", "runs/")
            if c["script"] == "evaluate.py" or "/seed" in out or out in made or out.startswith("runs/"):
                continue
            made.add(out)
            for seed in (0, 1):
                if c["script"] == "rollout.py":
                    (world / f"seed{seed}" / out).mkdir(parents=True, exist_ok=True)
                    write_rows(world / f"seed{seed}" / out / "rollouts.json", [{"summary": summary}])
                else:
                    every = 10 if c["steps"] not in ("1", "16", "32") else 2 if c["steps"] == "16" else 1
                    every = 1 if c.get("save-every") == "2" else every
                    kept = ("model", "student", "denominator", "loss", "beta", "ref", "teacher")
                    policies = {key: c[key] for key in kept if key in c}
                    policies |= {key: f"{world}/seed{seed}/{c[key]}" for key in ("teacher", "model")
                                 if "/" in c.get(key, "")}
                    accuracy = 0.75 if "student" in out or "min0" in out else 0.2 if out == "mse" else 0.6
                    rows += fake_run(world, seed, out, int(c["steps"]), every, accuracy, c["script"],
                                     c["rollouts"], **policies)
    bases = [fake_row(world, "base", 0.4, 0.0, b) for b in ("validation", "test")]
    write_rows(world / "results.jsonl", bases + rows)
    return folder


def test_the_report_holds_every_table_figure_and_claim(finished, capsys):
    report.report_tables(finished / "all", list(MODELS), finished / "runs", "a test")
    text = (finished / "all" / "report.md").read_text()
    assert all(f"## Table {i}. " in text for i in range(1, 13))
    assert all(f"## Figure {i}. " in text for i in range(4, 11))
    numbers = [claim["number"] for claim in PAPER["claims"]]
    assert {re.sub("[a-c]", "", n) for n in numbers} == {str(n) for n in range(1, 25)}
    assert [n for n in numbers if n[0] == "3"] == ["3a", "3b", "3c"]
    summary = dict(re.findall(r"^\| (\d+[a-c]?) \| .* \| (holds|does not hold|undecided|not run here) \| ",
                              text, re.M))
    assert set(summary) == set(numbers)
    assert [n for n in numbers if summary[n] == "not run here"] == ["24"]   # needs models of other lengths
    figures = re.findall(r"\]\((figures/.*?)\)", text)
    assert {re.match(r"figures/(fig\d+)", f)[1] for f in figures} == {f"fig{n}" for n in range(4, 11)}
    assert all((finished / "all" / f).stat().st_size > 5000 for f in figures)
    assert summary["8"] == "holds" and summary["1"] == "undecided"      # 0.75 > 0.4 > 0.2; equal teachers
    # 32 of 192 seconds; explained variance 0.68
    assert summary["17"] == "holds" and summary["7"] == "does not hold"
    assert "| batch4/student | batch3/student/final | batch4/ce/final / ce-student/step-0010 | " in text
    assert "| toy | 25 x 4 | test | 12 x 8 | 2 | 0.0300 | 0.0000 |" in text
    capsys.readouterr()


def test_every_checkpoint_that_the_paper_file_names_is_made_by_a_recipe(finished):
    model_runs = read_model(finished / "runs" / "toy")
    for name, table in PAPER["tables"].items():
        for label, row, *numbers in table["rows"]:
            for model, given in (numbers[0] if numbers else {}).items():
                columns = next((c for suffix, c in table.get("columns_of", {}).items()
                                if model.endswith(suffix)), table["columns"])
                assert len(given) == len(columns), f"{name}: {label}"
            assert number(model_runs, "0", "accuracy", row, ["test"]) is not None, f"{name}: {row}"
    for claim in PAPER["claims"]:
        for test in claim["tests"]:
            for row in test["plus"] + test["minus"]:
                found = number(model_runs, "0", "accuracy", row, ["test"])
                assert found is not None, f"claim {claim['number']}: {row}"


def test_hours_count_rollouts_teacher_and_own_steps(finished):
    model_runs = read_model(finished / "runs" / "toy")
    # 100 x 40 tokens at 100 a second, then 40 steps of 1 s
    assert seconds_until(model_runs, "0", "sapo", 40) == 40 + 40
    assert seconds_until(model_runs, "0", "sapo-student", 10) == 40 + 120 + 10
    assert seconds_until(model_runs, "0", "online", 10) == 2 * (40 + 1)  # one update for five steps


def test_unknown_names_are_refused(finished, capsys):
    ask = ["evaluate.py", "--report", finished / "x", "--tables", "table13", "--runs", finished / "runs"]
    assert conftest.run_here(*ask) == 2
    assert "table13" in capsys.readouterr().err


# ---- the report on the paper's models: a column per benchmark, and none in place of another ----------------

@pytest.fixture()
def qwen(tmp_path):
    """runs/Qwen3-4B-Thinking-2507 with some of Table 1, and on-policy runs as Tables 3 and 4 leave them."""
    world, five = tmp_path / "runs" / "Qwen3-4B-Thinking-2507", READS["table1"].split()
    world.mkdir(parents=True)
    rows = [fake_row(world, "base", 0.4, 0.0, b) for b in (*five, "kl")]
    for out, script, accuracy in (("ce", "teacher.py", 0.6), ("grpo", "teacher.py", 0.5),
                                  ("ce-student", "distill.py", 0.7)):
        rows += fake_run(world, 0, out, 20, 10, accuracy, script, "rollouts", (*five, "kl"), loss="ce",
                         model="base", student="base", teacher=f"{world}/seed0/ce/final",
                         denominator="old")
    rows += fake_run(world, 0, "b2/ce", 20, 10, 0.6, "teacher.py", "b2/rollouts", ("kl",), loss="ce",
                     model=f"{world}/seed0/ce/step-0010")
    for step in range(1, 101):  # 100 steps, as Table 4 makes; those that are measured differ in accuracy
        found = fake_run(world, 0, f"online/update{step:03d}", 1, 1, step / 100, "teacher.py",
                         f"online/rollouts{step:03d}", ["hmmt_feb25"], loss="grpo", model="base")
        rows += found if step in (10, 25, 50, 70, 100) else []
    return world, rows


def table(world, rows, name, folder):
    """Lines of a table of the report as lists of cells, {label: cells}, and its header."""
    write_rows(world / "results.jsonl", rows)
    report.report_tables(folder, [name], world.parent)
    text = (folder / "report.md").read_text().split(f"## Table {name[5:]}. ")[1].split("\n## ")[0]
    lines = [[cell.strip() for cell in line.strip("| ").split(" | ")]
             for line in text.splitlines() if line.startswith("|")]
    return {line[0]: line[1:] for line in lines[1:]}, lines[0]


def test_a_benchmark_without_a_row_is_a_dash_and_so_is_the_mean(qwen, tmp_path, capsys):
    world, rows = qwen
    lines, header = table(world, rows, "table1", tmp_path / "whole")
    assert header[:7] == ["AVG@K, aime24", "AVG@K, aime25", "AVG@K, hmmt_feb25", "AVG@K, beyond_aime",
                          "AVG@K, hmmt_nov25", "AVG@K, mean", "KL (nats/token)"]
    assert "-" not in lines["CE, last step"]
    assert lines["CE, last step"][0] == lines["CE, last step"][5] == "0.625"
    # of this model, benchmark by benchmark
    assert header[7:] == [f"paper, Qwen3-4B: {c}" for c in (*READS["table1"].split(), "average")]
    assert lines["CE"][7:] == ["87.3", "83.6", "67.6", "55.7", "70.4", "72.9"]
    one_less = [row for row in rows
                if not (row["model"].endswith("seed0/ce/final") and row["benchmark"] == "beyond_aime")]
    lines, _ = table(world, one_less, "table1", tmp_path / "less")
    assert lines["CE, last step"][:7] == ["0.625", "0.625", "0.625", "-", "0.625", "-", "0.0200"]
    assert lines["PPO"][:7] == ["-"] * 7
    none = [row for row in rows if row["benchmark"] != "beyond_aime"]  # never measured: a column all the same
    lines, header = table(world, none, "table1", tmp_path / "none")
    assert header[3] == "AVG@K, beyond_aime"
    assert lines["CE, last step"][3] == lines["CE, last step"][5] == lines["base"][5] == "-"
    columns = [header for header, *_ in report.our_columns("table5", read_model(world))]
    assert columns == ["AVG@K, hmmt_feb25", "KL (nats/token)"]  # HMMT Feb 25, although five were measured


def test_table_3_reads_its_own_steps_beside_the_longer_run_of_table_4(qwen, tmp_path, capsys):
    world, rows = qwen
    lines, _ = table(world, rows, "table3", tmp_path / "three")
    kept = read_model(world)
    found = [number(kept, "0", "accuracy", f"online@{k}", ["hmmt_feb25"]) for k in (25, 50)]
    assert found == pytest.approx([0.25, 0.5], abs=0.01)
    assert lines["base + 25 steps"][0] == "0.250" and lines["base + 50 steps"][0] == "0.500"


def test_best_start_and_length_name_their_benchmark(qwen):
    world, rows = qwen
    for row in rows:
        row["mean_length"] = 30.0 if row["benchmark"] == "aime24" else 40.0
        if row["model"].endswith("seed0/ce/step-0010") and row["benchmark"] == "hmmt_feb25":
            row["avg_at_k"] = 0.9                                   # better there, and nowhere else
    write_rows(world / "results.jsonl", rows)
    kept = read_model(world)
    assert kept["selection"] == "hmmt_feb25" and checkpoint(kept, "0", "ce@best")[1] == 10
    assert checkpoint(kept, "0", "b2/ce@start")[1] == 10 and checkpoint(kept, "0", "ce@start")[1] == 0
    assert number(kept, "0", "length@aime24", "ce", ["hmmt_feb25"]) == 30
    assert number(kept, "0", "length@hmmt_feb25", "ce", ["aime24"]) == 40


def test_what_lacks_a_row_is_told_by_benchmark_and_half_the_kl_is_found(qwen, tmp_path, capsys):
    world, rows = qwen
    for step, kl in ((5, 0.001), (10, 0.009), (15, 0.012)):
        rows.append(fake_row(world, f"seed0/ce/step-{step:04d}", 0.5, kl, "kl"))
    out = tmp_path / "results.jsonl"
    write_rows(out, rows)
    ce, student, online = (f"{world}/seed0/{x}/final" for x in ("ce", "ce-student", "online/update025"))
    ask = ["evaluate.py", "--missing", "--out", out, "--model", ce, online, student, "new", "--data"]
    assert conftest.run_here(*ask, "hmmt_feb25=x.jsonl:32") == 0
    assert capsys.readouterr().out.split() == ["new"]
    assert conftest.run_here(*ask, "hmmt_feb25=x.jsonl:32", "aime24=y.jsonl:32") == 0
    assert capsys.readouterr().out.split() == [online, "new"]
    assert conftest.run_here(*ask, "hmmt_feb25=x.jsonl:32", "--judge-url", "u", "--judge-model", "m") == 0
    assert len(capsys.readouterr().out.split()) == 4
    models = [*(f"seed0/ce/step-{step:04d}" for step in (5, 10, 15)), ce]  # the last one's is 0.02
    ask = ["evaluate.py", "--pick", "kl", "--nearest-kl", 0.5, "--out", out, "--model", *models]
    assert conftest.run_here(*ask) == 0
    assert capsys.readouterr().out.split() == ["seed0/ce/step-0010"]
