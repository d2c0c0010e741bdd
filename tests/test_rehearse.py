"""Recipes of real models, run from their first command to their report: the same commands with only sizes
changed.

The models are tiny and random, of the architectures of the paper's, and are found under their hub names in a
hub cache made here; the problem files are made here too. Nothing else differs from what a user of the paper's
models runs with REHEARSE=1. One recipe by default, those of .ci/run with ERPD_ALL_FAULTS=1, and with
ERPD_REHEARSE_ALL=1 all 12 tables and 7 figures.
"""
import http.server
import json
import os
import re
import subprocess
import sys
import threading

import pytest

import conftest
import test_models
import test_tables
from test_tables import ACE, JUST, LARGE35, NANO, NBG, QWEN, SMALL35

ARCHITECTURES = {QWEN: "qwen3", NBG: "llama", NANO: "llama", ACE: "qwen2", JUST: "qwen2", SMALL35: "qwen3_5",
                 LARGE35: "qwen3_5"}
SOME = ["table1", "table2", "table3", "table8", "table11",
        "fig8"] if os.environ.get("ERPD_ALL_FAULTS") else ["fig9"]
SETS = ["aime24", "aime25", "hmmt_feb25", "hmmt_nov25", "hmmt_feb26", "beyond_aime", "imo"]


def make_hub(folder):
    """A hub cache, as huggingface_hub lays it out, with a tiny model under each of the paper's names."""
    for name, architecture in ARCHITECTURES.items():
        repository = folder / "hub" / f"models--{name.replace('/', '--')}"
        test_models.make_checkpoint(repository / "snapshots" / "0", architecture)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0")
    return folder


def make_problems(folder):
    """Environment that names problem files of every benchmark, math and code."""
    folder.mkdir(parents=True)
    rows = [json.dumps({"problem": f"{i}A+{i % 7}", "answer": str((i + i % 7) % 10)}) + "\n"
            for i in range(40)]
    for name in ("train", *SETS):
        (folder / f"{name}.jsonl").write_text("".join(rows))
    code = [{"prompt": f"print({i})", "input_output": json.dumps({"inputs": [""], "outputs": [str(i)]})}
            for i in range(8)]
    (folder / "code.jsonl").write_text("".join(json.dumps(row) + "\n" for row in code))
    return {"PROMPTS": f"{folder}/train.jsonl",
            "BENCHMARKS": " ".join(f"{name}={folder}/{name}.jsonl:32" for name in SETS),
            "CODE_PROMPTS": f"{folder}/code.jsonl",
            "CODE_BENCHMARKS": f"livecodebench={folder}/code.jsonl:32"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """(folder of the rehearsals, environment to run them in)."""
    folder = tmp_path_factory.mktemp("rehearsal")
    kept = {k: v for k, v in os.environ.items()
            if k not in ("MODEL", "MODELS", "SEEDS", "JOBS", "OUT", "LENGTH", "JUDGE_URL")}
    return folder, {**kept, **make_problems(folder / "problems"), "HF_HOME": str(make_hub(folder / "hf")),
                    "HF_HUB_OFFLINE": "1", "REHEARSE": "1", "NPROC": "2", "OMP_NUM_THREADS": "1",
                    "TABLES": str(folder / "rehearsal"), "VIRTUAL_ENV": sys.prefix,
                    "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"}


def rehearse(name, env, timeout=1500, **changes):
    return subprocess.run(["./run_rounds.sh", name], cwd=conftest.ROOT, capture_output=True, text=True,
                          timeout=timeout, env={**env, **changes})


@pytest.mark.parametrize("name", list(test_tables.MODELS) if os.environ.get("ERPD_REHEARSE_ALL") else SOME)
def test_a_recipe_runs_from_its_first_command_to_its_report(place, name):
    folder, env = place
    done = rehearse(name, env)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report = (folder / "rehearsal" / name / "report.md").read_text()
    assert report.startswith("**REHEARSAL of ") and "Its numbers mean nothing" in report.splitlines()[0]
    for model in test_tables.MODELS[name]:
        assert model.split("/")[1] in report
    if name.startswith("table"):
        table = report.split(f"## Table {name[5:]}. ")[1].split("\n## ")[0]
        rows = [line for line in table.splitlines() if line.startswith("| ")
                and not line.startswith(("| ---", "|  |"))]
        assert rows and (name == "table11" or not any("| - |" in line for line in rows)), "\n".join(rows)
    assert re.search(r"the whole recipe takes [\d,]+ hours", done.stdout) and "rollout.py" in done.stdout
    lines = (folder / "rehearsal" / "milliseconds.txt").read_text().splitlines()
    seconds = sum(int(line.split()[0]) for line in lines) / 1000
    conftest.MEASURED.append(f"rehearsal up to and with {name}: {seconds / 60:.1f} minutes of commands; "
                             + done.stdout.strip().splitlines()[-2])
    again = rehearse(name, env)
    assert again.returncode == 0 and not re.search(r"^\+ .*(rollout|teacher|distill)\.py", again.stdout, re.M)


def test_what_is_wrong_with_the_settings_shows_in_the_rehearsal(place, tmp_path):
    _, env = place
    env = {**env, "TABLES": str(tmp_path / "t")}
    done = rehearse("table5", env, MODEL="nobody/nothing")
    assert done.returncode != 0
    assert "nobody/nothing does not exist, neither as a folder nor on the hub" in done.stderr
    done = rehearse("table5", env, BENCHMARKS="hmmt_feb25=nowhere.jsonl:32")
    assert done.returncode != 0 and "nowhere.jsonl does not exist" in done.stderr
    done = rehearse("table5", env, BENCHMARKS="aime24=nowhere.jsonl:32")
    assert done.returncode != 0
    assert "table5 reads hmmt_feb25, and BENCHMARKS names none of them" in done.stderr
    done = rehearse("table5", env, JUDGE_URL="http://127.0.0.1:9", JUDGE_MODEL="judge")
    assert done.returncode != 0 and "the judge answers nothing" in done.stderr
    assert not list(tmp_path.rglob("shard-*.pt"))                   # all before anything was sampled


class Judge(http.server.BaseHTTPRequestHandler):
    """Says YES to everything."""

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        body = json.dumps({"choices": [{"message": {"content": "YES"}}]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.mark.skipif(not os.environ.get("ERPD_ALL_FAULTS"), reason="ERPD_ALL_FAULTS=1 runs the long part")
def test_a_judge_reaches_the_report_of_the_table_that_the_paper_judged(place, tmp_path):
    _, env = place
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    done = rehearse("table11", {**env, "TABLES": str(tmp_path / "t")}, MODEL=LARGE35, NPROC="1",
                    JUDGE_URL=f"http://127.0.0.1:{server.server_address[1]}", JUDGE_MODEL="judge")
    server.shutdown()
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report = (tmp_path / "t" / "table11" / "report.md").read_text()
    assert "AVG@K with the judge, imo" in report and "| paper, Qwen3.5-27B: imo |" in report
