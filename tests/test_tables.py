"""Recipes of the paper's tables and figures: the commands that they print, and what is shared and goes on."""
import os
import re
import shlex
import subprocess
import sys
from collections import Counter

import pytest

import conftest
import distill
import evaluate
import rollout
import teacher

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
                       "old/0050", "0010/old", "0010/none", "none/0050", "0070/old", "old/none"}
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


def test_the_demonstration_is_in_the_papers_regime_and_changes_one_thing_at_a_time():
    commands = [*dry_run("table2", SEEDS="0"), *dry_run("fig6", SEEDS="0"), *dry_run("fig8", SEEDS="0")]
    for c in commands:
        if c["script"] == "rollout.py":
            assert (c["temperature"], c["n"], c.get("top-p", "1")) == ("0.6", "8", "1")
        if c["script"] == "evaluate.py" and "data" in c and "pick" not in c:
            name, k = re.fullmatch(r"(\w+)=.*:(\d)", c["data"]).groups()
            assert c["temperature"] == "0.6"
            wanted = {"test": ("0.95", "4"), "kl": ("1", "1"), "validation": ("0.95", "2")}
            assert (c["top-p"], k) == wanted[name]
    teachers, students = runs(commands, "teacher.py"), runs(commands, "distill.py")
    betas = [float(teachers[run]["beta"]) for run in ("ce", "ce-1e2", "ce-5e2")]
    assert [beta / betas[0] for beta in betas] == [1, 10, 50]                       # the paper's ladder
    assert "kl-kind" not in teachers["ce-kl"] and teachers["ce-kl-exact"]["kl-kind"] == "exact"
    term = {(teachers[run]["kl-coef"], teachers[run]["kl-kind"]) for run in ("ce-same", "a2/ce", "b2/ce")}
    assert term == {(students[run]["kl-coef"], students[run]["kl-kind"])
                    for run in ("ce-student", "batch2/student", "batch3/student")}  # claim 12
    online = next(c for c in teachers.values() if c["out"].startswith("online/"))
    prompts = next(c for c in commands if c.get("out", "").startswith("online/rollouts"))["num-prompts"]
    assert int(prompts) == int(online["steps"]) * int(online["batch-prompts"])      # each prompt is used once


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
