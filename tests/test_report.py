"""Reports on finished runs: verdicts, tables, figures, rounds of a demonstration, the signal of a run."""
import html
import json
import re

import pytest
import torch

import conftest
import report
import rollout
import teacher
from reads import PAPER
from runs import checkpoint, number, read_model, seconds_until
from test_tables import MODELS, READS, dry_run


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
    summary = {"responses": 100, "mean_length": 40.0, "tok_per_s": 100.0}
    for name in MODELS:
        for c in dry_run(name, SEEDS="0"):
            out = c.get("out", "runs/")
            if c["script"] == "evaluate.py" or "/seed" in out or out in made or out.startswith("runs/"):
                continue
            made.add(out)
            for seed in (0, 1):
                if c["script"] == "rollout.py":
                    (world / f"seed{seed}" / out).mkdir(parents=True, exist_ok=True)
                    prompts = 20 if out.startswith("online") else 25   # five steps of 4 prompts
                    write_rows(world / f"seed{seed}" / out / "rollouts.json",
                               [{"summary": summary | {"prompts": prompts}}])
                else:
                    every = int(c.get("save-every", 10))
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
    verdicts = "holds|does not hold|undecided|not run here|premise absent here"
    summary = dict(re.findall(rf"^\| (\d+[a-c]?) \| .* \| ({verdicts}) \| ", text, re.M))
    assert set(summary) == set(numbers)
    assert [n for n in numbers if summary[n] == "not run here"] == ["24"]   # needs models of other lengths
    figures = re.findall(r"\]\((figures/.*?)\)", text)
    assert {re.match(r"figures/(fig\d+)", f)[1] for f in figures} == {f"fig{n}" for n in range(4, 11)}
    assert all((finished / "all" / f).stat().st_size > 5000 for f in figures)
    # 0.75 > 0.4 > 0.2; no better by a point
    assert summary["8a"] == "holds" and summary["1"] == "does not hold"
    assert summary["4"] == "premise absent here"                        # its teachers are equal
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
        for test in claim["premise"] + claim["tests"]:
            for row in test["plus"] + test["minus"] + test.get("if_run", []):
                found = number(model_runs, "0", "accuracy", row, ["test"])
                assert found is not None, f"claim {claim['number']}: {row}"


def test_hours_count_rollouts_teacher_and_own_steps(finished):
    model_runs = read_model(finished / "runs" / "toy")
    # 100 x 40 tokens at 100 a second, then 40 steps of 1 s
    assert seconds_until(model_runs, "0", "sapo", 40) == 40 + 40
    assert seconds_until(model_runs, "0", "sapo-student", 10) == 40 + 120 + 10
    assert seconds_until(model_runs, "0", "online", 10) == 2 * (40 + 5)  # five steps share their rollouts
    # Table 4, whose prices are for 1,000 prompts, and for 32 a step; here 25, and 4
    assert seconds_until(model_runs, "0", "online", 10, paper=True) == pytest.approx(10 * (4 * 25.2 + 37.5))
    assert seconds_until(model_runs, "0", "sapo-student", 10, paper=True) == pytest.approx(
        25 * 25.2 + 120 * 37.5 + 10 * 50)


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
    assert lines["CE, last step"][0] == lines["CE, last step"][5] == "0.625 (1)"
    # of this model, benchmark by benchmark
    assert header[7:] == [f"paper, Qwen3-4B: {c}" for c in (*READS["table1"].split(), "average")]
    assert lines["CE"][7:] == ["87.3", "83.6", "67.6", "55.7", "70.4", "72.9"]
    one_less = [row for row in rows
                if not (row["model"].endswith("seed0/ce/final") and row["benchmark"] == "beyond_aime")]
    lines, _ = table(world, one_less, "table1", tmp_path / "less")
    assert lines["CE, last step"][:7] == [*["0.625 (1)"] * 3, "-", "0.625 (1)", "-", "0.0200 (1)"]
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
    assert lines["base + 25 steps"][0] == "0.250 (1)" and lines["base + 50 steps"][0] == "0.500 (1)"


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


# ---- the rounds of a demonstration -----------------------------------------------------------------------

def test_the_report_of_a_demonstration_holds_rounds_findings_and_every_checkpoint(tmp_path, capsys):
    demo = tmp_path / "demo"
    rows = [fake_row(demo, f"{demo}/base", 0.4, 0.0, b) for b in ("kl", "test")]
    for seed in (0, 1):
        for out, accuracy in (("round1/teacher", 0.6), ("control1/teacher", 0.5), ("mse/teacher", 0.2)):
            rows += fake_run(demo, seed, out, 20, 10, accuracy, "teacher.py", "round1/rollouts",
                             ("kl", "test"), model=f"{demo}/base")
        rows += fake_run(demo, seed, "round1/student", 10, 10, 0.7, "distill.py", "round1/rollouts",
                         ("kl", "test"), student=f"{demo}/base")
    for row in rows:
        row |= {"base": f"{demo}/base", "temperature": 0.6, "top_p": 0.95}
        student = "/student/" in row["model"]
        row["kl"] = 9.0 if row["benchmark"] == "test" else 0.01 if student else row["kl"]
        row["pass_at_k"] = 0.9 if student else 0.8 if "/teacher/" in row["model"] else 1.0
    write_rows(demo / "results.jsonl", rows)
    assert conftest.run_here("evaluate.py", "--report", demo, "--title", "a test") == 0
    text, printed = (demo / "report.md").read_text(), capsys.readouterr().out
    assert text.startswith("# Extreme Region Policy Distillation: report of demo (a test)\n")
    lines = {line.split(" | ")[0].strip("| "): line for line in text.split("## Every")[0].splitlines()
             if line[:1] == "|"}
    assert list(lines)[2:] == ["base", "round1/teacher", "round1/student", "control1/teacher"]
    assert lines["round1/student"] == ("| round1/student | 10 | 0.708 ± 0.000 | 0.021 | 0.0100 ± 0.0000 | "
                                       "0.900 ± 0.000 | 0.600 ± 0.000 | 40.0 ± 0.0 |")
    # within KL 0.01 the teacher's path, from the base (0.375) to 0.625 at 0.02, reaches its middle
    assert ("the student less the best point of its teacher's whole path: +20.8 ± 0.0 points of accuracy "
            "(distillation wins) and +0.0 ± 0.0 of pass@8 (") in text
    assert "less the best single stage, every control's path and the first teacher's: +20.8 ± 0.0" in text
    assert "* After 1 round the student is +33.3 ± 0.0 points from the base, at a KL of 0.0100" in printed
    assert "| round1/teacher | 10 | 0.625 ± 0.000 |" in text.split("## Every")[1]
    figures = re.findall(r"\((figures/.*?)\)", text)
    assert figures == ["figures/kl.png", "figures/teacher.png", "figures/mse.png"]
    assert all((demo / figure).stat().st_size > 5000 for figure in figures)
    write_rows(demo / "results.jsonl", rows[2:])                                    # nothing to compare with
    assert conftest.run_here("evaluate.py", "--report", demo) == 2
    assert "no row of the base" in capsys.readouterr().err


# ---- the signal of one run -------------------------------------------------------------------------------

def test_the_signal_of_a_right_and_a_wrong_response_stands_under_their_tokens(tiny, tmp_path, capsys):
    model, rollouts, other = tiny
    student = tmp_path / "student"
    assert conftest.run_here("distill.py", "--student", model, "--teacher", other, "--rollouts", rollouts,
                             "--out", student, "--steps", 2, "--batch-prompts", 3, "--lr", 1e-3) == 0
    assert conftest.run_here("evaluate.py", "--show", student) == 0
    page, data = (student / "signal.html").read_text(), teacher.load_rollouts(rollouts)
    assert (student / "signal.png").stat().st_size > 5000
    right, wrong = page.split("<h3>")[1:]
    assert right.startswith("Right response") and wrong.startswith("Wrong response")
    boxes = re.findall(r'title="A_hat ([+-][\d.]+)" style="background:(#\w+);.*?">(.*?)<small>(.*?)</span>',
                       right)
    logps = [[float(x) for x in re.findall(r"-?\d+\.\d+", box[3])] for box in boxes]
    scores = [teacher.score(policy, data) for policy in (model, other, student / "final")]
    bounds, signal = data["response_offsets"], scores[1] - scores[0]
    spans = [slice(bounds[i], bounds[i + 1]) for i in (data["reward"] > 0).nonzero()[:, 0]]
    where, = (s for s in spans if s.stop - s.start == len(boxes)
              and torch.stack([x[s] for x in scores], 1).sub(torch.tensor(logps)).abs().max() < 0.006)
    a_hat = ((signal - signal.mean()) / signal.std(correction=0))[where].tolist()
    assert [float(box[0]) for box in boxes] == pytest.approx(a_hat, abs=0.006)
    for value, shade, *_ in boxes:                          # blue is positive, red negative
        red, blue = int(shade[1:3], 16), int(shade[5:7], 16)
        assert abs(float(value)) < 0.2 or (blue > red) == (float(value) > 0)
    ids = [teacher.response_ids(data, i) for i in range(len(data["reward"]))]
    texts = [html.unescape(box[2]) for box in boxes]
    tokenizer = rollout.load_tokenizer(model)
    assert texts in [[tokenizer.decode([token]).replace("\n", "\\n") for token in x[-len(boxes):]]
                     for x in ids]
    assert "<eos>" not in page and "&lt;eos&gt;" in page                            # text, not HTML
    assert conftest.run_here("evaluate.py", "--show", tmp_path) == 2
