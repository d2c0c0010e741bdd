"""
Measure a policy: AVG@K with its standard error, and the reverse KL to the base on the policy's own samples (Sec. 4.1).

    AVG@K = mean over problems of the share of K sampled responses that are right
    KL    = mean over tokens sampled from pi of log pi(a|s) - log pi_base(a|s), in nats per token

    python evaluate.py --model runs/student/final --base M --data hmmt=hmmt.jsonl:32 --out runs/results.jsonl
    python evaluate.py --report runs/demo        # runs/demo/report.md and figures/*.png, from what the runs wrote

Samples are ordinary rollout shards beside the results, so an interrupted evaluation continues, and anyone can look at what
a model wrote. One row per (checkpoint, benchmark) says with which settings. Nobody imports this file.
"""
import argparse
import gc
import hashlib
import itertools
import json
import math
import os
import re
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
import transformers

from rollout import (InputError, checkpoint_fingerprint, grading_pool, load_prompts, parse_args as parse_rollout_args,
                     resolve_checkpoint, run_main, sample_rollouts, write_atomic)
from teacher import load_rollouts, score, setup_ddp


# ---- measuring ----------------------------------------------------------------------------------------------------------

def avg_at_k(correct, k):
    """(AVG@K, its standard error from sampling) for right answers per problem [n] out of k each. Sec. 4.1.

    The problems are fixed, so only the sampling varies: Var = sum_i p_i (1 - p_i) / (k - 1) / n^2 (unbiased in p_i).
    """
    p = correct.double() / k
    se = (p * (1 - p)).sum().div(max(k - 1, 1)).sqrt() / len(p)
    return p.mean().item(), se.item()


def read_results(path):
    """Rows of a results.jsonl, [] if there is none."""
    if not Path(path).exists():
        return []
    rows = []
    for i, line in enumerate(Path(path).read_text().splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{i} is not JSON: repair or delete the line") from error
    return rows


def parse_benchmark(text, default_k):
    """NAME=FILE[:K] -> (name, file, K)."""
    match = re.fullmatch(r"([\w.-]+)=(.+?)(?::(\d+))?", text)
    if not match:
        raise InputError(f"--data {text}: write NAME=FILE or NAME=FILE:K, for example hmmt=hmmt.jsonl:32")
    return match[1], match[2], int(match[3] or default_k)


def default_top_k(model):
    """top-k of the checkpoint's generation config: sampling parameters that are not given are the model's (Sec. 4.1)."""
    path = resolve_checkpoint(model) / "generation_config.json"
    return json.loads(path.read_text()).get("top_k") or -1 if path.exists() else -1


def evaluate(model, benchmark, args, pool, rank, world):
    """Sample, grade and score one checkpoint on one benchmark: the row of results.jsonl (None if it is there already)."""
    name, file, k = benchmark
    start, fingerprint = time.time(), checkpoint_fingerprint(model)
    top_k = default_top_k(model) if args.top_k is None else args.top_k
    wanted = {"model": str(model), "model_fingerprint": fingerprint, "base": args.base, "benchmark": name, "k": k,
              "temperature": args.temperature, "top_p": args.top_p, "top_k": top_k, "max_tokens": args.max_tokens, "seed": args.seed}
    if any(all(row.get(key) == value for key, value in wanted.items()) for row in read_results(args.out)):
        return None

    settings = hashlib.sha256(json.dumps([file, wanted], default=str).encode()).hexdigest()[:8]
    folder = args.out.parent / "samples" / name / f"{fingerprint[:16]}-{settings}"
    rollout_args = parse_rollout_args([
        "--model", str(model), "--prompts", file, "--out", str(folder), "--num-prompts", "0", "--n", str(k),
        "--temperature", str(args.temperature), "--top-p", str(args.top_p), "--top-k", str(top_k), "--max-tokens", str(args.max_tokens),
        "--seed", str(args.seed), "--engine", args.engine, "--tensor-parallel", str(args.tensor_parallel),
        "--shard-prompts", str(args.shard_prompts), "--prompt-suffix", args.prompt_suffix, "--workers", str(args.workers),
        *(["--trust-remote-code"] if args.trust_remote_code else [])])
    sample_rollouts(rollout_args, pool, rank, world, int(os.environ.get("LOCAL_RANK", 0)))
    gc.collect()                                            # the engine's model, before ours is loaded
    if world > 1:
        dist.barrier()
    data = load_rollouts(folder)
    options = dict(micro_tokens=args.micro_tokens, trust_remote_code=args.trust_remote_code)
    logp, entropy = score(model, folder, with_entropy=True, **options)
    kl = None
    if args.base:                                           # reverse KL, on samples of the new policy
        kl = 0.0 if checkpoint_fingerprint(args.base) == fingerprint else (logp - score(args.base, folder, **options)).double().mean().item()

    right = data["reward"].view(-1, k).sum(1)               # the K responses of a problem stand together
    avg, se = avg_at_k(right, k)
    think = data["reward_think"].mean().item() if "reward_think" in data else None
    return {**wanted, "n_problems": len(right), "avg_at_k": avg, "se": se, "correct_per_problem": right.int().tolist(),
            "avg_at_k_think": think, "avg_at_k_judge": None, "pass_at_k": (right > 0).double().mean().item(),
            "mean_length": data["response_offsets"].diff().double().mean().item(), "truncated": data["truncated"].double().mean().item(),
            "entropy": entropy.double().mean().item(), "kl": kl, "engine": data["meta"]["engine"],
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__, data["meta"]["engine"]: data["meta"]["engine_version"]},
            "seconds": time.time() - start}


# ---- the report: read from run.json, metrics.jsonl and results.jsonl, and nothing else -----------------------------------

COLOURS = {"base": "#444444", "teacher": "#d1603d", "student": "#1f6f8b", "control": "#8a8a8a", "mse": "#7a5195", "weak-to-strong": "#3a9d5d"}


def read_runs(folder, rows, benchmark):
    """All training runs under a folder: {label: {seed: run}}, a run = dict(info, metrics, path: [(step, row), ...]).

    The label is the run's folder without the seed, such as round1/teacher; its path are its evaluated checkpoints by step.
    """
    evaluated = {os.path.realpath(row["model"]): row for row in rows if row["benchmark"] == benchmark}
    runs = {}
    for file in sorted(Path(folder).rglob("run.json")):
        where = file.parent.relative_to(folder).as_posix()
        seed = re.match(r"seed(\w+)/", where)
        info = json.loads(file.read_text())
        metrics_file = file.parent / "metrics.jsonl"
        metrics = [json.loads(line) for line in metrics_file.read_text().splitlines()] if metrics_file.exists() else []
        path = []
        for checkpoint in file.parent.iterdir():
            row = evaluated.get(os.path.realpath(checkpoint))
            if row:
                step = int(checkpoint.name[5:]) if checkpoint.name.startswith("step-") else metrics[-1]["step"]
                path.append((step, row))
        runs.setdefault(where[seed.end():] if seed else where, {})[seed[1] if seed else "0"] = {
            "info": info, "metrics": metrics, "path": sorted(path, key=lambda pair: pair[0])}
    return runs


def role(label):
    """Which colour and name a run has in tables and figures: read off the folder it is in."""
    parts = label.split("/")
    if parts[0] == "mse":
        return "mse" if parts[-1] == "teacher" else "weak-to-strong"
    return "control" if parts[0].startswith("control") else parts[-1] if parts[-1] in COLOURS else "teacher"


def mean_se(values):
    """(mean, standard error over seeds or None for one seed)."""
    values = list(values)
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def cell(values, digits=3):
    """'mean ± standard error over seeds' as table text."""
    values = [v for v in values if v is not None]
    if not values:
        return "-"
    mean, se = mean_se(values)
    return f"{mean:.{digits}f}" + (f" ± {se:.{digits}f}" if se is not None else "")


def path_points(seeds):
    """Mean over seeds of a run's evaluated checkpoints: list of (step, accuracy, se or None, kl), steps that all seeds have."""
    steps = set.intersection(*({step for step, _ in run["path"]} for run in seeds.values())) if seeds else set()
    points = []
    for step in sorted(steps):
        rows = [dict(run["path"])[step] for run in seeds.values()]
        accuracy, se = mean_se(row["avg_at_k"] for row in rows)
        points.append((step, accuracy, se if se is not None else rows[0]["se"], statistics.fmean(row["kl"] or 0.0 for row in rows)))
    return points


def markdown_table(header, lines):
    return "\n".join(["| " + " | ".join(header) + " |", "|" + " --- |" * len(header),
                      *("| " + " | ".join(map(str, line)) + " |" for line in lines)]) + "\n"


def row_cells(rows):
    """Columns that every results table shares, over the rows of several seeds."""
    return [cell(r["avg_at_k"] for r in rows), f"{math.sqrt(sum(r['se'] ** 2 for r in rows)) / len(rows):.3f}", cell((r["kl"] for r in rows), 4),
            cell((r["pass_at_k"] for r in rows), 3), cell((r["entropy"] for r in rows), 3), cell((r["mean_length"] for r in rows), 1)]


ROW_HEADER = ["AVG@K", "sampling s.e.", "KL to base (nats/token)", "pass@K", "entropy (nats)", "length (tokens)"]


def figure_kl(plt, runs, base_row, path):
    """Accuracy against reverse KL (Fig. 6): whole paths of teachers and control, students as stars. Left and above is better."""
    figure, axes = plt.subplots(figsize=(7.2, 4.8))
    axes.plot(0, base_row["avg_at_k"], "s", color=COLOURS["base"], markersize=8, label="base")
    shown = set()
    for label, seeds in runs.items():
        kind, points = role(label), path_points(seeds)
        if not points or kind == "mse" or label.startswith("mse/"):
            continue
        _, accuracy, se, kl = zip(*points)
        name = {"teacher": "teacher, every evaluated checkpoint", "student": "student (ERPD)", "control": "single stage, no distillation"}.get(kind, kind)
        style = dict(color=COLOURS[kind], label=None if kind in shown else name)
        shown.add(kind)
        if kind == "student":
            axes.errorbar(kl[-1], accuracy[-1], yerr=se[-1], fmt="*", markersize=15, zorder=3, capsize=2, **style)
        else:
            axes.errorbar(kl, accuracy, yerr=se, fmt="o-" if kind == "teacher" else "^--", markersize=4, linewidth=1.2, capsize=2, **style)
        number = re.search(r"\d+", label)
        if number:
            axes.annotate(number[0], (kl[-1], accuracy[-1]), textcoords="offset points", xytext=(7, 5), color=COLOURS[kind], fontsize=9)
    axes.set(xlabel="reverse KL to the base (nats per token, on own samples)", ylabel=f"{base_row['benchmark']} AVG@{base_row['k']}",
             title="Accuracy against KL; the number is the round, left and above is better")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def figure_dynamics(plt, seeds, base_row, path, title):
    """Accuracy, probability of positive and negative tokens, and entropy over the steps of one run (Fig. 4, Fig. 5)."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.4))
    points = path_points(seeds)
    if points:
        step, accuracy, se, _ = zip(*points)
        left.errorbar((0, *step), (base_row["avg_at_k"], *accuracy), yerr=(base_row["se"], *se), fmt="o-", color=COLOURS["teacher"], capsize=2)
    left.axhline(base_row["avg_at_k"], color=COLOURS["base"], linestyle=":", label="base")
    left.set(ylabel=f"{base_row['benchmark']} AVG@{base_row['k']}", title="accuracy")
    left.legend(fontsize=8)
    for axes, names, heading in ((middle, (("prob_pos", "right responses", "#2f7d4f"), ("prob_neg", "wrong responses", "#b03a48")), "mean probability of a token"),
                                 (right, (("entropy", "entropy", COLOURS["student"]),), "entropy (nats per token)")):
        for key, name, colour in names:
            curves = [[m[key] for m in run["metrics"]] for run in seeds.values()]
            mean = [statistics.fmean(values) for values in zip(*curves)]
            steps = range(1, len(mean) + 1)
            axes.plot(steps, mean, color=colour, label=name)
            if len(curves) > 1:
                axes.fill_between(steps, [min(v) for v in zip(*curves)], [max(v) for v in zip(*curves)], color=colour, alpha=0.2, linewidth=0)
        axes.set(title=heading)
        axes.legend(fontsize=8)
    for axes in (left, middle, right):
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
    figure.suptitle(title, y=1.04)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def rounds_section(runs, base_row):
    """Table of the rounds: base, then teacher, student and control of each round at their last step, over seeds."""
    lines = [["base", "-", *row_cells([base_row])]]
    order = {"teacher": 0, "student": 1, "control": 2}
    chosen = [label for label in runs if role(label) in order and not label.startswith("mse/")]
    for label in sorted(chosen, key=lambda s: (re.sub(r"\D", "", s) or "0", order[role(s)])):
        rows = [run["path"][-1][1] for run in runs[label].values() if run["path"]]
        if rows:
            steps = {run["path"][-1][0] for run in runs[label].values() if run["path"]}
            lines.append([label, "/".join(map(str, sorted(steps))), *row_cells(rows)])
    return markdown_table(["checkpoint", "steps", *ROW_HEADER], lines)


def report(folder):
    """Write FOLDER/report.md and FOLDER/figures/*.png; print the table of rounds."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows = read_results(folder / "results.jsonl")
    if not rows:
        raise InputError(f"{folder} has no results.jsonl: run evaluate.py --model ... --out {folder}/results.jsonl first")
    benchmarks = list(dict.fromkeys(row["benchmark"] for row in rows))
    benchmark = "test" if "test" in benchmarks else benchmarks[-1]
    base_row = next((r for r in rows if r["benchmark"] == benchmark and r["base"] and os.path.realpath(r["model"]) == os.path.realpath(r["base"])), None)
    if base_row is None:
        raise InputError(f"{folder}/results.jsonl has no row of the base itself on {benchmark}: evaluate it with --model B --base B")
    runs = read_runs(folder, rows, benchmark)
    seeds = sorted({seed for by_seed in runs.values() for seed in by_seed})
    figures = folder / "figures"
    figures.mkdir(exist_ok=True)

    table = rounds_section(runs, base_row)
    text = [f"# Extreme Region Policy Distillation: report of {folder.name}\n",
            f"Benchmark `{benchmark}`: {base_row['n_problems']} problems x {base_row['k']} samples at temperature {base_row['temperature']:g}, top-p "
            f"{base_row['top_p']:g}; {len(seeds)} seed(s) of rollouts and training ({', '.join(seeds)}). Where there are several seeds, ± is the standard "
            "error over seeds; `sampling s.e.` is the part that comes from drawing K responses to fixed problems. KL is the reverse KL to the base, on "
            "samples of the evaluated policy.\n",
            "## Rounds: teacher, student, and the control without distillation\n", table, "![accuracy against KL](figures/kl.png)\n"]
    figure_kl(plt, runs, base_row, figures / "kl.png")
    teacher = next((label for label in runs if role(label) == "teacher"), None)
    if teacher:
        figure_dynamics(plt, runs[teacher], base_row, figures / "teacher.png", f"{teacher}: extensive off-policy steps on one fixed batch")
        text += ["## The first teacher, step by step (Fig. 4)\n", "![teacher dynamics](figures/teacher.png)\n"]
    weak = [label for label in runs if label.startswith("mse/")]
    if "mse/teacher" in runs:
        figure_dynamics(plt, runs["mse/teacher"], base_row, figures / "mse.png", "MSE teacher: unlearning, and what follows (Eq. 10)")
        lines = [["base", "-", *row_cells([base_row])]]
        for label in weak:
            for step in sorted(set.intersection(*({s for s, _ in run["path"]} for run in runs[label].values()))):
                lines.append([label, step, *row_cells([dict(run["path"])[step] for run in runs[label].values()])])
        text += ["## Weak to strong: an MSE teacher and its unlearned checkpoint (Sec. 3.4, Fig. 5)\n", markdown_table(["checkpoint", "step", *ROW_HEADER], lines),
                 "![MSE dynamics](figures/mse.png)\n"]
    lines = [[label, step, *row_cells([dict(run["path"])[step] for run in runs[label].values()])]
             for label in runs if label not in weak for step, *_ in path_points(runs[label])]
    text += ["## Every evaluated checkpoint\n", "An earlier teacher checkpoint may do as well as a student: look here before believing the table above.\n",
             markdown_table(["run", "step", *ROW_HEADER], lines)]
    lines = [[label, info["script"], info["args"].get("loss", "-"), info["args"].get("beta", "-"), info["args"]["lr"], info["args"]["batch_prompts"],
              info["args"]["kl_coef"], info["args"].get("entropy_coef", "-"), run["metrics"][-1]["step"] if run["metrics"] else 0,
              f"{sum(m['seconds'] for m in run['metrics']):.0f}"]
             for label, by_seed in runs.items() for run in list(by_seed.values())[:1] for info in [run["info"]]]
    text += ["## Settings and training time (first seed)\n",
             markdown_table(["run", "script", "loss", "beta", "lr", "prompts/step", "KL weight", "entropy weight", "steps", "seconds"], lines)]
    write_atomic(folder / "report.md", lambda p: p.write_text("\n".join(text)))
    print(f"\n{benchmark} ({base_row['n_problems']} problems x {base_row['k']} samples, {len(seeds)} seed(s))\n\n{table}\nreport: {folder / 'report.md'}, figures: {figures}")


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arg = p.add_argument
    arg("--report", type=Path, metavar="RUNDIR", help="write RUNDIR/report.md and figures from finished runs, measure nothing")
    # What is measured
    arg("--model", nargs="+", help="checkpoints to evaluate, one after the other")
    arg("--base", help="policy that the KL is measured to; without it there is no KL")
    arg("--data", nargs="+", metavar="NAME=FILE[:K]", help="benchmarks, with K responses per problem")
    arg("--out", type=Path, default=Path("results.jsonl"), help="rows are appended; those that exist are skipped")
    arg("--k", type=int, default=32, help="K where --data names none (Sec. 4.1: 32, 16 for Beyond AIME, 4 for IMO Answer Bench)")
    # Sampling
    arg("--temperature", type=float, default=0.6, help="Sec. 4.1: 0.6, and 1.0 for Qwen3.5")
    arg("--top-p", type=float, default=0.95, help="Sec. 4.1; below 1 the KL is biased, so measure it with --top-p 1 --top-k -1")
    arg("--top-k", type=int, help="default: the checkpoint's generation config, -1 for all tokens")
    arg("--max-tokens", type=int, default=81920, help="Sec. 4.1: 81,920 Qwen3-4B, 65,536 NBG4-3B, 192,000 Qwen3.5")
    arg("--prompt-suffix", default="", help="text added to every problem, such as an instruction to box the answer")
    arg("--seed", type=int, default=0)
    # Engine
    arg("--engine", choices=["auto", "vllm", "hf"], default="auto", help="auto: vLLM on a GPU, else transformers")
    arg("--tensor-parallel", type=int, default=1, help="GPUs per vLLM engine")
    arg("--shard-prompts", type=int, default=16, help="problems per shard of samples; with --engine hf also the batch, times K")
    arg("--micro-tokens", type=int, default=32768, help="padded tokens per forward pass when scoring")
    arg("--workers", type=int, default=2, help="grading processes")
    arg("--trust-remote-code", action="store_true", help="run code that comes with the checkpoint")
    args = p.parse_args(argv)
    if not args.report and not (args.model and args.data):
        p.error("give --report RUNDIR, or --model and --data")
    return args


def main():
    args = parse_args()
    if args.report:
        if not args.report.is_dir():
            raise InputError(f"{args.report} is not a folder: give the one that holds results.jsonl")
        return report(args.report)
    benchmarks = [parse_benchmark(text, args.k) for text in args.data]
    for _, file, _ in benchmarks:
        load_prompts(file)                                  # a wrong path stops before any model is loaded
    for model in [*args.model, *([args.base] if args.base else [])]:
        resolve_checkpoint(model)
    rank, world, _ = setup_ddp()
    with grading_pool(args.workers) as pool:
        for model, benchmark in itertools.product(args.model, benchmarks):
            row = evaluate(model, benchmark, args, pool, rank, world)
            if rank == 0 and row is None:
                print(f"{model} on {benchmark[0]}: already in {args.out}")
            elif rank == 0:
                rows = [*read_results(args.out), row]
                write_atomic(args.out, lambda p: p.write_text("".join(json.dumps(r) + "\n" for r in rows)))
                kl = "" if row["kl"] is None else f" | KL(new,base) {row['kl']:.4f}"
                print(f"{model} on {benchmark[0]}: AVG@{row['k']} {row['avg_at_k']:.3f} ± {row['se']:.3f}{kl} | "
                      f"pass@{row['k']} {row['pass_at_k']:.3f} | entropy {row['entropy']:.3f} | length {row['mean_length']:.1f} | "
                      f"truncated {row['truncated']:.3f} | {row['seconds']:.0f} s")
            if world > 1:
                dist.barrier()                              # nobody reads results.jsonl before the row is there


if __name__ == "__main__":
    run_main(main)
