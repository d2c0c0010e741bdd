"""
Measure a policy: AVG@K, and the reverse KL to the base on the policy's own samples (Sec. 4.1).

    AVG@K = mean over problems of the share of K sampled responses that are right
    KL    = mean over tokens sampled from pi of log pi(a|s) - log pi_base(a|s), in nats per token

    python evaluate.py --model runs/student/final --base M --data hmmt=hmmt.jsonl:32 --out runs/results.jsonl
    python evaluate.py --pick hmmt --model A B C --out runs/results.jsonl    # the most accurate of these
    python evaluate.py --report runs/demo        # runs/demo/report.md and figures, from what the runs wrote
    python evaluate.py --show runs/student       # the signal of a right and a wrong response, token by token

Samples are ordinary rollout shards beside the results, so an interrupted evaluation continues, and anyone can
look at what a model wrote. One row per (checkpoint, benchmark) says with which settings.
"""
import argparse
import fcntl
import hashlib
import importlib
import itertools
import json
import math
import os
import re
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import transformers

from rollout import (InputError, Parser, checkpoint_fingerprint, grading_pool, input_errors, load_prompts,
                     load_task, load_tokenizer, read_json, resolve_checkpoint, run_main, sample_rollouts,
                     sampling_flags, tokenizer_fingerprint)
from rollout import parse_args as parse_rollout_args
from teacher import load_rollouts, score, setup_ddp

SAMPLED_WITH = ("temperature", "top_p", "max_tokens", "seed", "prompt_suffix", "task")


# ---- measuring ---------------------------------------------------------------------------------------------

def avg_at_k(correct, k):
    """(AVG@K, its standard error from sampling) for right answers per problem [n] out of k each. Sec. 4.1.

    The problems are fixed, only sampling varies: Var = sum_i p_i (1 - p_i) / (k - 1) / n^2, unbiased in p_i.
    """
    p = correct.double() / k
    if k == 1:                              # the spread within a problem is unknown: of one proportion
        return p.mean().item(), math.sqrt(p.mean() * (1 - p.mean()) / len(p))
    return p.mean().item(), ((p * (1 - p)).sum().div(k - 1).sqrt() / len(p)).item()


def sample(model, file, wanted, args, pool, world):
    """Folder of K graded responses to each problem of a file; those of equal settings are shared."""
    settings = {key: value for key, value in wanted.items() if key not in ("model", "base", "judge_model")}
    digest = hashlib.sha256(json.dumps([file, settings], default=str).encode()).hexdigest()[:8]
    name = f"{wanted['model_fingerprint'][:16]}-{digest}"
    folder = args.out.parent / "samples" / wanted["benchmark"] / name
    options = parse_rollout_args(["--model", str(model), "--prompts", file, "--out", str(folder)])
    shared = vars(options).keys() & vars(args).keys() - {"model", "out"}
    vars(options).update({key: getattr(args, key) for key in shared}, top_k=wanted["top_k"],
                         num_prompts=args.num_problems, num_responses=wanted["k"])
    sample_rollouts(options, pool)
    if world > 1:
        dist.barrier()
    return folder


def entropy_and_kl(model, data, args):
    """(entropy, mean of log pi - log pi_base) over the tokens of its samples; greedy ones have neither."""
    options = dict(micro_tokens=args.micro_tokens, trust_remote_code=args.trust_remote_code, shard=args.shard)
    if args.temperature == 0:
        return None, None
    logp, entropies = score(model, data, with_entropy=True, **options)
    if not args.base:
        return entropies.double().mean().item(), None
    same = checkpoint_fingerprint(args.base) == checkpoint_fingerprint(model)
    kl = 0.0 if same else (logp - score(args.base, data, **options)).double().mean().item()
    return entropies.double().mean().item(), kl


def evaluate(model, benchmark, args, pool, rank, world):
    """Sample, grade and score one checkpoint on one benchmark: its row, None if results.jsonl has it."""
    (name, file, k), start = benchmark, time.time()
    top_k = default_top_k(model) if args.top_k is None else args.top_k
    wanted = {"model": str(model), "model_fingerprint": checkpoint_fingerprint(model), "base": args.base,
              "benchmark": name, "k": k, "top_k": top_k, **{key: getattr(args, key) for key in SAMPLED_WITH},
              "judge_model": args.judge_model, "problems_sha256": problems_hash(file, args.num_problems)}
    if any(all(row.get(key) == value for key, value in wanted.items()) for row in read_results(args.out)):
        return None
    folder = sample(model, file, wanted, args, pool, world)
    data = load_rollouts(folder)
    entropy, kl = entropy_and_kl(model, data, args)
    judged = counts = None
    if rank == 0:                                           # the others need not read the shards again
        trouble = {what: n for what, n in data["grading"].items() if what != "verified"}
        if any(trouble.values()):
            print(f"grading {name}: " + ", ".join(f"{what} {n}" for what, n in trouble.items()))
        if args.judge_url:
            judged, counts = paper("judge").judge_samples(args, model, file, data, folder)
    right = data["reward"].view(-1, k).sum(1)               # the K responses of a problem stand together
    (avg, se), meta = avg_at_k(right, k), data["meta"]
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {**wanted, "n_problems": len(right), "avg_at_k": avg, "se": se,
            "correct_per_problem": right.int().tolist(), "pass_at_k": (right > 0).double().mean().item(),
            "avg_at_k_think": data["reward_think"].mean().item() if "reward_think" in data else None,
            "avg_at_k_judge": judged, "judge": counts,
            "mean_length": data["response_offsets"].diff().double().mean().item(),
            "truncated": data["truncated"].double().mean().item(), "entropy": entropy, "kl": kl,
            "engine": meta["engine"], "versions": versions | {meta["engine"]: meta["engine_version"]},
            "seconds": time.time() - start}


def pick(path, benchmark, models, margin=0.0, nearest_kl=None):
    """The most accurate of `models` by results.jsonl; the first if none leads by `margin` standard errors.

    nearest_kl: instead the one whose KL is nearest this share of the last one's (Table 2: half the KL).
    """
    rows = {row["model"]: row for row in read_results(path) if row["benchmark"] == benchmark}
    missing = [model for model in models if model not in rows]
    if missing:
        raise InputError(f"{path} has no row of {', '.join(missing)} on {benchmark}: evaluate it first")
    if nearest_kl is not None:
        goal = nearest_kl * rows[models[-1]]["kl"]
        return min(models, key=lambda model: abs(rows[model]["kl"] - goal))
    first, best = rows[models[0]], max((rows[model] for model in models), key=lambda row: row["avg_at_k"])
    clear = best["avg_at_k"] - first["avg_at_k"] > margin * math.hypot(best["se"], first["se"])
    return best["model"] if clear else models[0]


def parse_args(argv=None):
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arg = p.add_argument
    report_flags(arg)
    arg("--pick", metavar="BENCHMARK", help="print the best of --model by the rows in --out")
    arg("--nearest-kl", type=float, metavar="SHARE", help="--pick: the one nearest this share of the last KL")
    arg("--margin", type=float, default=0.0, help="--pick: standard errors that another leads by")
    arg("--missing", action="store_true", help="print those of --model without a row for one of --data")
    # What is measured
    arg("--model", nargs="+", help="checkpoints to evaluate, one after the other")
    arg("--base", help="policy that the KL is measured to; without it there is no KL")
    arg("--data", nargs="+", metavar="NAME=FILE[:K]", help="benchmarks, with K responses per problem")
    arg("--out", type=Path, default=Path("results.jsonl"), help="rows are added; those there are skipped")
    arg("--k", type=int, default=32, help="K where --data names none (Sec. 4.1: 32, Beyond AIME 16, IMO 4)")
    # Sampling
    arg("--temperature", type=float, default=0.6, help="Sec. 4.1: 0.6, and 1.0 for Qwen3.5")
    arg("--top-p", type=float, default=0.95, help="Sec. 4.1; for an unbiased KL --top-p 1 --top-k -1")
    arg("--top-k", type=int, help="default: the checkpoint's generation config, -1 for all tokens")
    arg("--max-tokens", type=int, default=81920, help="Sec. 4.1; NBG4-3B 65,536, Qwen3.5 192,000")
    arg("--num-problems", type=int, default=0, help="a random N of each benchmark by --seed, 0 for all")
    sampling_flags(arg)
    arg("--micro-tokens", type=int, default=32768, help="padded tokens per forward pass when scoring")
    arg("--shard", action="store_true", help="score a model that does not fit one GPU, split over ranks")
    arg("--judge-url", help="OpenAI-compatible judge of answers called wrong; key in OPENAI_API_KEY")
    arg("--judge-model", help="its name there")
    arg("--judge-timeout", type=float, default=120.0, help="seconds per question, three tries")
    args = p.parse_args(argv)
    if bool(args.judge_url) != bool(args.judge_model) or args.judge_url and args.task != "math":
        raise InputError("--judge-url and --judge-model belong together, and to --task math")
    if args.tables and not args.report:
        raise InputError("--tables needs --report FOLDER")
    if not (args.report or args.movement or args.show or args.model and (args.data or args.pick)):
        raise InputError("give --model with --data or --pick, --report RUNDIR, --movement RUN or --show RUN")
    return args


def main():
    args = parse_args()
    if args.report or args.movement or args.show:
        return forward(args)
    if args.pick:
        return print(pick(args.out, args.pick, args.model, args.margin, args.nearest_kl))
    benchmarks = [parse_benchmark(text, args.k) for text in args.data]
    if args.missing:
        return print(" ".join(without_row(args.out, benchmarks, args.model, args.judge_model)))
    check(args, benchmarks)                                 # a wrong path stops before any model is loaded
    rank, world, _ = setup_ddp(args.shard)
    with grading_pool(args.workers) as pool:
        for model, benchmark in itertools.product(args.model, benchmarks):
            row = evaluate(model, benchmark, args, pool, rank, world)
            if rank == 0 and row is None:
                print(f"{model} on {benchmark[0]}: already in {args.out}")
            elif rank == 0:
                append_result(args.out, row)
                parts = ["AVG@{k} {avg_at_k:.3f} ± {se:.3f}", "KL(new,base) {kl:.4f}",
                         "entropy {entropy:.3f}", "with the judge {avg_at_k_judge:.3f}",
                         "pass@{k} {pass_at_k:.3f}", "length {mean_length:.1f}",
                         "truncated {truncated:.3f}", "{seconds:.0f} s"]
                there = [part for part in parts if row[re.findall(r"{(\w+):", part)[0]] is not None]
                print(f"{model} on {benchmark[0]}: " + " | ".join(there).format(**row))
            if world > 1:
                dist.barrier()                              # nobody reads results.jsonl before it has the row


# ---- machinery: nothing below is about the method ----------------------------------------------------------

def paper(module):
    """A module of tests/paper, which holds what is about the paper and imports nothing of this file."""
    sys.path.insert(0, str(Path(__file__).parent / "tests" / "paper"))
    return importlib.import_module(module)


def report_flags(arg):
    """Flags of what is forwarded."""
    arg("--report", type=Path, metavar="RUNDIR", help="write RUNDIR/report.md and figures from finished runs")
    arg("--tables", nargs="+", metavar="NAME", help="with --report: of the paper, table1 to fig10")
    arg("--runs", type=Path, default=Path("runs/tables/runs"), help="with --tables: of MODEL/seedN/RUN")
    arg("--models", nargs="+", metavar="MODEL", help="with --tables: only these folders of --runs")
    arg("--title", default="", help="with --report: what the results are of")
    arg("--movement", nargs="+", type=Path, metavar="RUN", help="which tokens moved (Fig. 7), into run.json")
    arg("--show", type=Path, metavar="RUN", help="the signal of a run of distill.py: RUN/signal.html")


def forward(args):
    """--report, --tables, --movement and --show."""
    if args.tables:
        paper("report").report_tables(args.report, args.tables, args.runs, args.title, args.models)
    elif args.report:
        paper("report").report(args.report, args.title)
    elif args.show:
        paper("show").show(args.show)
    for run in args.movement or []:
        paper("movement").add_movement(run)


def check(args, benchmarks):
    """InputError for what would stop the evaluation later."""
    task = load_task(args.task, args.unsafe_code)
    for _, file, _ in benchmarks:
        load_prompts(file, read_row=task and task.read_row)
    read_results(args.out)
    vocabularies = set()
    for policy in [*args.model, args.base] if args.base else args.model:
        checkpoint_fingerprint(policy)
        vocabularies.add(tokenizer_fingerprint(load_tokenizer(policy, args.trust_remote_code)))
    if args.base and len(vocabularies) > 1:
        raise InputError("--model and --base have different tokenizers, so there is no KL: leave out --base")
    if args.judge_url and os.environ.get("RANK", "0") == "0":
        paper("judge").check_judge(args)


def parse_benchmark(text, default_k):
    """NAME=FILE[:K] -> (name, file, K)."""
    match = re.fullmatch(r"([\w.-]+)=(.+?)(?::(\d+))?", text)
    if not match:
        raise InputError(f"--data {text}: write NAME=FILE or NAME=FILE:K, for example hmmt=hmmt.jsonl:32")
    return match[1], match[2], int(match[3] or default_k)


def problems_hash(file, num_problems=0):
    """Hash of what a row was measured on: the problem file, and how many of its problems if not all."""
    content = Path(file).read_bytes() if Path(file).is_file() else file.encode()
    content += f"{num_problems} problems".encode() if num_problems else b""
    return hashlib.sha256(content).hexdigest()


def default_top_k(model):
    """top-k of the checkpoint's generation config: what is not given is the model's (Sec. 4.1)."""
    path = resolve_checkpoint(model) / "generation_config.json"
    return read_json(path, "repair it, or give --top-k").get("top_k") or -1 if path.exists() else -1


def read_results(path):
    """Rows of a results.jsonl, [] if there is none; without a last line that a crash cut short."""
    path, rows = Path(path), []
    with input_errors(f"{path} cannot be read", "repair it"):
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    for i, line in enumerate(lines, start=1):
        with input_errors(f"{path}:{i} is not a row of results", "repair or delete the line"):
            if line.endswith("\n"):                         # else append_result removes it
                rows.append(json.loads(line))
                rows[-1]["model"], rows[-1]["benchmark"]    # whatever else it holds, it is a row of ours
    return rows


def append_result(path, row):
    """Add one line to results.jsonl: other processes may append to it too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        f.seek(0)
        f.truncate(f.read().rfind(b"\n") + 1)               # a line that a crash cut short
        f.write((json.dumps(row) + "\n").encode())
        f.flush()
        os.fsync(f.fileno())


def without_row(path, benchmarks, models, judge_model=None):
    """Those of `models` without a row for one of the benchmarks (or without one of this judge)."""
    rows = [row for row in read_results(path) if judge_model in (None, row.get("judge_model"))]
    there = {(row["model"], row["benchmark"]) for row in rows}
    names = [name for name, *_ in benchmarks]
    return [model for model in dict.fromkeys(models) if any((model, name) not in there for name in names)]


if __name__ == "__main__":
    run_main(main)
