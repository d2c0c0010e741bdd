"""The vLLM engine for real, on its CPU build where that is installed (.ci/run installs it) or on a GPU."""
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import conftest
import rollout
import teacher

pytest.importorskip("vllm", reason="vLLM is not installed")
SMALL = ["--engine", "vllm", "--max-model-len", 192, "--gpu-memory-utilization", 0.2]
ENV = {"VLLM_CPU_KVCACHE_SPACE": "1"}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demonstration world, made as ./run_rounds.sh makes it: (base, prompts folder)."""
    folder = tmp_path_factory.mktemp("demo")
    conftest.run_script("tests/toy.py", "--out", folder, "--base", conftest.ROOT / "tests" / "base")
    return folder / "base", folder / "prompts"


def first_lines(source, n, target):
    target.write_text("".join(source.read_text().splitlines(keepends=True)[:n]))
    return target


def responses(joined):
    return [joined["input_ids"][a + p:b].tolist() for a, b,
            p in zip(joined["offsets"], joined["offsets"][1:], joined["prompt_len"])]


def test_samples_of_the_demonstration_base_are_graded_and_their_log_probs_are_ours(demo, tmp_path):
    base, prompts = demo
    file = first_lines(prompts / "validation.jsonl", 24, tmp_path / "prompts.jsonl")
    conftest.run_script("rollout.py", "--model", base, "--prompts", file, "--out", tmp_path / "r",
                        "--num-prompts", 0, "-n", 4, "--max-tokens", 128, "--temperature", 0.8,
                        "--shard-prompts", 5, *SMALL, env=ENV)
    joined = conftest.joined(tmp_path / "r")
    assert joined["prompt_index"].tolist() == [i for i in range(24)
                                               for _ in range(4)] and joined["meta"]["engine"] == "vllm"
    tokenizer, answers = rollout.load_tokenizer(base), [row["answer"] for row in rollout.load_prompts(file)]
    texts = tokenizer.batch_decode(responses(joined))
    right = [float(f"\\boxed{{{answers[i]}}}" in text) for i, text in zip(joined["prompt_index"], texts)]
    assert joined["reward"].tolist() == right and 0.2 < joined["reward"].mean() < 0.9
    gap = (teacher.score(base, tmp_path / "r") - joined["sampler_logp"]).abs().max()
    assert gap < (1e-3 if not torch.cuda.is_available() else 0.1)


def test_log_probs_of_a_pretrained_model_are_vllms_own(pretrained, tmp_path):
    """A chat model with its template and a temperature: what vLLM reports of its samples, and what the
    training forward computes."""
    problems = subprocess.run([sys.executable, "tests/small.py", "--out", tmp_path / "p"], cwd=conftest.ROOT,
                              check=True)
    assert problems.returncode == 0
    conftest.run_script("rollout.py", "--model", pretrained, "--prompts", tmp_path / "p" / "test.jsonl",
                        "--out", tmp_path / "r", "--num-prompts", 4, "-n", 2, "--max-tokens", 12,
                        "--temperature", 0.6, "--shard-prompts", 2, *SMALL, env=ENV)
    joined = conftest.joined(tmp_path / "r")
    gap = (teacher.score(pretrained, tmp_path / "r") - joined["sampler_logp"]).abs()
    conftest.MEASURED.append("SmolLM2, vLLM against token_logps at temperature 0.6: "
                             f"mean {gap.mean():.1e}, largest {gap.max():.1e} nats "
                             f"over {len(gap)} tokens; right {joined['reward'].mean():.2f}")
    assert gap.max() < (2e-3 if not torch.cuda.is_available() else 0.3)
    assert joined["truncated"].float().mean() < 0.5                 # it ends its turn by itself


def test_greedy_outputs_agree_with_the_hf_engine(demo, tmp_path):
    base, prompts = demo
    file = first_lines(prompts / "test.jsonl", 64, tmp_path / "prompts.jsonl")
    found = []
    for engine in ("hf", "vllm"):
        conftest.run_script("rollout.py", "--model", base, "--prompts", file, "--out", tmp_path / engine,
                            "--num-prompts", 0, "-n", 1, "--max-tokens", 128, "--temperature", 0, *SMALL,
                            "--engine", engine, env=ENV)
        found.append(responses(conftest.joined(tmp_path / engine)))
    assert sum(a == b for a, b in zip(*found, strict=True)) >= 61   # 95 % of 64: a tie may fall either way


def children(pid):
    """Processes whose parent is `pid`."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):                          # gone meanwhile
            if stat.read_text().rpartition(")")[2].split()[1] == str(pid):
                found.append(int(stat.parent.name))
    return sorted(found)


def test_a_killed_rank_costs_only_its_shards_and_generation_ends_at_every_stop_token(tmp_path):
    """kill -9 in the middle of two ranks, each with its own engine; then the same command."""
    model = conftest.make_model(tmp_path / "model")
    config = json.loads((model / "generation_config.json").read_text())
    config["eos_token_id"] = stops = [config["eos_token_id"], 17]   # chat models often have two
    (model / "generation_config.json").write_text(json.dumps(config))
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "r"
    prompts.write_text("".join(json.dumps({"problem": f"{i % 10}A+{i // 10}", "answer": "1"}) + "\n"
                               for i in range(1500)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               "rollout.py", "--model", model, "--prompts", prompts, "--out", out, "--num-prompts", 0, "-n",
               4, "--max-tokens", 120, "--shard-prompts", 10, *SMALL]
    env = {**os.environ, **ENV, "OMP_NUM_THREADS": "1"}
    with open(tmp_path / "log", "w") as log:
        run = subprocess.Popen(list(map(str, command)), cwd=conftest.ROOT, env=env, stdout=log, stderr=log,
                               start_new_session=True)
        deadline = time.time() + 240
        while time.time() < deadline and run.poll() is None and len(list(out.glob("shard-*.pt"))) < 4:
            time.sleep(0.05)
        victim = children(run.pid)[0]
        engines = children(victim)
        os.kill(victim, signal.SIGKILL)
        assert run.wait(timeout=60) != 0, (tmp_path / "log").read_text()
    kept = {path.name: path.read_bytes() for path in out.glob("shard-*.pt")}
    assert 4 <= len(kept) < 150 and not (out / "rollouts.json").exists()
    deadline = time.time() + 60
    while any(os.path.exists(f"/proc/{pid}") for pid in engines) and time.time() < deadline:
        time.sleep(0.2)
    left = [pid for pid in engines if os.path.exists(f"/proc/{pid}")]
    assert not left, "the engine of the killed rank lives on"
    again = conftest.run_script(*command[6:], nproc=2, env=env)
    joined = conftest.joined(out)
    assert joined["prompt_index"].tolist() == [i for i in range(1500) for _ in range(4)], again.stderr
    assert all((out / name).read_bytes() == data for name, data in kept.items())
    for ids, truncated in zip(responses(joined), joined["truncated"]):
        assert not set(ids[:-1]) & set(stops) and truncated == (ids[-1] not in stops)
        assert len(ids) == 120 or not truncated
