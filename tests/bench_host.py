"""What one rank holds and waits for besides the model, at the paper's size: 1,008 prompts x 16 responses, 300
million tokens.

    python tests/bench_host.py [--tokens 300] [--ranks 1 2]          # 7 GB in a temporary folder

Makes rollouts of lognormal lengths (up to 32,768 tokens) and cached scores, then takes distill.py's way from
its start to its first batch in 1 and 2 processes: seconds, and memory in GB. private: of this process alone;
shared: pages of memory-mapped files, which the ranks of a machine have in common; peak: the most that was
private at any time.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import conftest  # noqa: E402
import distill  # noqa: E402
import rollout  # noqa: E402
import teacher  # noqa: E402


def make_run(folder, tokens):
    """ROLLOUTS of about `tokens` tokens in 63 shards, and scores of two checkpoints beside them."""
    models = [conftest.make_model(folder / name, seed=i) for i, name in enumerate(("old", "teacher"))]
    generator, prompt = torch.Generator().manual_seed(0), 200
    draw = torch.randn(63 * 256, generator=generator).mul(0.6).exp()
    lengths = (draw * tokens / draw.sum()).clamp(10, 32768 - prompt).long()
    tokenizer = rollout.load_tokenizer(models[0])
    meta = {"model": str(models[0]), "model_fingerprint": rollout.checkpoint_fingerprint(models[0]),
            "shards": 63, "tokenizer_fingerprint": rollout.tokenizer_fingerprint(tokenizer),
            "temperature": 1.0}
    (folder / "rollouts" / "scores").mkdir(parents=True)
    for shard, part in enumerate(lengths.split(256)):
        total = int((part + prompt).sum())
        torch.save({"version": rollout.SHARD_VERSION, "meta": meta, "grading": {},
                    "sampler_logp": torch.full((int(part.sum()),), -0.3),
                    "input_ids": torch.randint(4, 48, (total,), dtype=torch.int32, generator=generator),
                    "offsets": torch.cat([torch.zeros(1, dtype=torch.int64), (part + prompt).cumsum(0)]),
                    "prompt_len": torch.full((256,), prompt, dtype=torch.int32),
                    "prompt_index": torch.arange(256) // 16 + 16 * shard,
                    "reward": (torch.arange(256) % 2).float(), "truncated": part == 32768 - prompt},
                   folder / "rollouts" / f"shard-{shard:05d}.pt")
    fingerprint = teacher.load_rollouts(folder / "rollouts")["fingerprint"]
    for model in models:
        scored = rollout.checkpoint_fingerprint(model)
        logp = torch.randn(int(lengths.sum()), generator=generator).mul(0.2).sub(0.5)
        torch.save({"version": 1, "checkpoint": scored, "rollouts": fingerprint, "temperature": 1.0,
                    "logp": logp, "entropy": logp},
                   folder / "rollouts" / "scores" / f"{scored[:16]}-{fingerprint[:16]}-T1.pt")


def memory():
    """(private, shared) GB of this process now."""
    fields = dict(line.split(":") for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    rss, private = (int(fields[name].split()[0]) / 1e6 for name in ("Rss", "Anonymous"))
    return private, rss - private


class Peak(threading.Thread):
    """The most private memory since the last look."""

    def __init__(self):
        super().__init__(daemon=True)
        self.most = 0.0

    def run(self):
        while True:
            self.most = max(self.most, memory()[0])
            time.sleep(0.1)


def measure(folder):
    """One rank: a line of JSON for each stage."""
    rank, world, device = teacher.setup_ddp()
    peak = Peak()
    peak.start()
    start = begin = time.time()

    def stage(name):
        nonlocal start
        private, shared = memory()
        print(json.dumps({"ranks": world, "rank": rank, "stage": name,
                          "seconds": round(time.time() - start, 1), "private": round(private, 2),
                          "shared": round(shared, 2), "peak": round(max(peak.most, private), 2)}), flush=True)
        start, peak.most = time.time(), 0.0

    rollouts = teacher.load_rollouts(folder / "rollouts")
    teacher.check_tokenizer(folder / "old", rollouts)
    stage("rollouts: load, check, fingerprint")
    old_logp, teacher_logp = (teacher.score(folder / name, rollouts) for name in ("old", "teacher"))
    stage("two scores from the cache")
    usable = torch.ones_like(rollouts["truncated"])
    signal = (rollouts, usable, teacher_logp, old_logp)
    mean, std = distill.whitening(values for values, _ in distill.signal_of_responses(*signal))
    stage("signal: mean and std")
    if rank == 0:
        distill.signal_statistics(distill.signal_of_responses(*signal), mean, std,
                                  int(rollouts["response_offsets"][-1]))
        stage("signal: statistics (rank 0)")
    lengths = rollouts["offsets"].diff()
    batch = next(teacher.step_batches(rollouts, usable, 64, 0))
    shares = teacher.micro_batches(lengths[batch], 32768, world)
    stage("a step's batch, dealt to the ranks")
    for micro in shares[rank]:
        teacher.pad_responses(rollouts, batch[micro], device, old_logp, teacher_logp, old_logp)
    stage("padding of all its micro-batches")
    print(json.dumps({"ranks": world, "rank": rank, "stage": "in all",
                      "seconds": round(time.time() - begin, 1)}), flush=True)
    if world > 1:
        torch.distributed.barrier()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tokens", type=float, default=300, help="response tokens, in millions")
    p.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    p.add_argument("--folder", type=Path, help=argparse.SUPPRESS)                   # of the ranks
    args = p.parse_args()
    if args.folder:
        return measure(args.folder)
    with tempfile.TemporaryDirectory() as folder:
        make_run(Path(folder), args.tokens * 1e6)
        for ranks in args.ranks:
            launch = ["torchrun", "--standalone", "--nproc-per-node",
                      str(ranks)] if ranks > 1 else [sys.executable]
            subprocess.run([*launch, __file__, "--folder", folder], check=True,
                           env={**os.environ, "OMP_NUM_THREADS": "1"})


if __name__ == "__main__":
    main()
