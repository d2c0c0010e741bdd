"""
Measure a policy: AVG@K with its standard error, and the reverse KL to the base on the policy's own samples (Sec. 4.1).

    AVG@K = mean over problems of the share of K sampled responses that are right
    KL    = mean over tokens sampled from pi of log pi(a|s) - log pi_base(a|s), in nats per token

    python evaluate.py --model runs/student/final --base M --data hmmt=hmmt.jsonl:32 --out runs/results.jsonl
    python evaluate.py --pick hmmt --model A B C --out runs/results.jsonl    # the most accurate of evaluated checkpoints
    python evaluate.py --movement runs/student   # which tokens a student moved, against its teacher (Fig. 7)
    python evaluate.py --report runs/demo        # runs/demo/report.md and figures/*.png, from what the runs wrote

Samples are ordinary rollout shards beside the results, so an interrupted evaluation continues, and anyone can look at what
a model wrote. One row per (checkpoint, benchmark) says with which settings. Nobody imports this file.
"""
import argparse
import concurrent.futures
import fcntl
import gc
import hashlib
import http.client
import itertools
import json
import math
import os
import re
import statistics
import time
import urllib.request
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm

from rollout import (InputError, check_out, check_weights, checkpoint_fingerprint, count_grading, grading_pool, last_boxed, load_prompts,
                     load_shards, load_tokenizer, one_line, read_json, resolve_checkpoint, run_main, sample_rollouts, tokenizer_fingerprint,
                     write_atomic, write_json, writing)
from rollout import parse_args as parse_rollout_args
from teacher import find_old, load_rollouts, score, setup_ddp


# ---- measuring ----------------------------------------------------------------------------------------------------------

def avg_at_k(correct, k):
    """(AVG@K, its standard error from sampling) for right answers per problem [n] out of k each. Sec. 4.1.

    The problems are fixed, so only the sampling varies: Var = sum_i p_i (1 - p_i) / (k - 1) / n^2 (unbiased in p_i).
    """
    p = correct.double() / k
    if k == 1:                                              # the spread within a problem is unknown: that of one proportion
        return p.mean().item(), math.sqrt(p.mean() * (1 - p.mean()) / len(p))
    se = (p * (1 - p)).sum().div(k - 1).sqrt() / len(p)
    return p.mean().item(), se.item()


def read_results(path):
    """Rows of a results.jsonl, [] if there is none."""
    if not Path(path).exists():
        return []
    try:
        lines = Path(path).read_text().splitlines(keepends=True)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {one_line(error)}") from error
    rows = []
    for i, line in enumerate(lines, start=1):
        try:
            if line.endswith("\n"):                         # else a crash cut it short: append_result removes it
                rows.append(json.loads(line))
                rows[-1]["model"], rows[-1]["benchmark"]    # whatever else it holds, it is a row of ours
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}:{i} is not a row of results: repair or delete the line") from error
    return rows


def append_result(path, row):
    """Add one line to results.jsonl: other processes may append to it too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path), open(path, "a+b") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        f.seek(0)
        f.truncate(f.read().rfind(b"\n") + 1)               # a line that a crash cut short
        f.write((json.dumps(row) + "\n").encode())
        f.flush()
        os.fsync(f.fileno())


def parse_benchmark(text, default_k):
    """NAME=FILE[:K] -> (name, file, K)."""
    match = re.fullmatch(r"([\w.-]+)=(.+?)(?::(\d+))?", text)
    if not match:
        raise InputError(f"--data {text}: write NAME=FILE or NAME=FILE:K, for example hmmt=hmmt.jsonl:32")
    return match[1], match[2], int(match[3] or default_k)


def default_top_k(model):
    """top-k of the checkpoint's generation config: sampling parameters that are not given are the model's (Sec. 4.1)."""
    path = resolve_checkpoint(model) / "generation_config.json"
    return read_json(path, "repair it, or give --top-k").get("top_k") or -1 if path.exists() else -1


# ---- an LLM as judge of answers that the rules call wrong (Sec. 4.1) -----------------------------------------------------

JUDGE_PROMPT = """Problem:
{problem}

Reference answer: {gold}
Given answer: {answer}

Do the two answers mean the same? Differences of notation do not matter. End with one word, YES or NO."""


def ask_judge(url, model, question, timeout=120.0, tries=3, wait=2.0):
    """True, False, or None for a reply without a verdict; OSError if an OpenAI-compatible endpoint gives none in `tries`."""
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": question}], "temperature": 0.0}).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', 'none')}"}
    request = urllib.request.Request(url.rstrip("/").removesuffix("/v1") + "/v1/chat/completions", body, headers)
    for attempt in range(1, tries + 1):
        try:
            with urllib.request.urlopen(request, timeout=timeout) as reply:
                text = json.load(reply)["choices"][0]["message"]["content"]
                break
        except (OSError, http.client.HTTPException, ValueError, KeyError, IndexError, TypeError) as error:     # 500, time-out, no JSON
            if attempt == tries:
                raise OSError(f"{url}: {type(error).__name__}: {one_line(error)}") from error
            time.sleep(wait * attempt)
    words = re.findall(r"\b(yes|no)\b", str(text), re.IGNORECASE)
    return words[-1].lower() == "yes" if words else None


def judge(args, problems, responses, indices, wrong, path):
    """(accepted by the judge [N], counts). The boxed answers of the responses in `wrong` [N] are asked, equal ones once.

    Verdicts are kept in `path`, so a second run asks only what is missing. Raises OSError if no question gets an answer.
    """
    kept = read_json(path, "delete it, the judge is asked again") if path.exists() else {}
    keys = {}                                               # position of a wrong response -> (key, question)
    for n in wrong.nonzero()[:, 0].tolist():
        answer, problem = last_boxed(responses[n]), problems[indices[n].item()]
        if answer:
            gold = problem["answer"]
            question = JUDGE_PROMPT.format(problem=problem["prompt"] if isinstance(problem["prompt"], str) else problem["prompt"][-1]["content"],
                                           gold=" or ".join(map(str, gold)) if isinstance(gold, list) else gold, answer=answer[:1000])
            keys[n] = (hashlib.sha256(question.encode()).hexdigest(), question)
    missing, errors = {key: question for key, question in keys.values() if key not in kept}, []

    def answer_one(item):
        try:
            return item[0], ask_judge(args.judge_url, args.judge_model, item[1], args.judge_timeout)
        except OSError as error:
            errors.append(error)
            return item[0], "unanswered"
    with concurrent.futures.ThreadPoolExecutor(16) as threads:
        found = dict(tqdm(threads.map(answer_one, missing.items()), total=len(missing), desc="judge", leave=False))
    if missing and len(errors) == len(missing):
        raise errors[0]
    kept |= {key: verdict for key, verdict in found.items() if verdict != "unanswered"}
    write_json(path, kept)
    verdicts = {n: kept.get(key, "unanswered") for n, (key, _) in keys.items()}
    accepted = torch.tensor([verdicts.get(n) is True for n in range(len(wrong))])
    counts = {"asked": len(verdicts), "yes": sum(v is True for v in verdicts.values()), "unclear": sum(v is None for v in verdicts.values()),
              "unanswered": sum(v == "unanswered" for v in verdicts.values())}
    return accepted, counts


def evaluate(model, benchmark, args, pool, rank, world):
    """Sample, grade and score one checkpoint on one benchmark: the row of results.jsonl (None if it is there already)."""
    name, file, k = benchmark
    start, fingerprint = time.time(), checkpoint_fingerprint(model)
    top_k = default_top_k(model) if args.top_k is None else args.top_k
    wanted = {"model": str(model), "model_fingerprint": fingerprint, "base": args.base, "benchmark": name, "k": k, "top_k": top_k,
              **{key: getattr(args, key) for key in ("temperature", "top_p", "max_tokens", "seed", "prompt_suffix", "judge_model", "task")},
              "problems_sha256": hashlib.sha256(Path(file).read_bytes() if Path(file).is_file() else file.encode()).hexdigest()}
    if any(all(row.get(key, {"task": "math"}.get(key)) == value for key, value in wanted.items()) for row in read_results(args.out)):
        return None

    sampling = {key: value for key, value in wanted.items() if key not in ("model", "base", "judge_model")}   # copies share their samples
    settings = hashlib.sha256(json.dumps([file, sampling], default=str).encode()).hexdigest()[:8]
    folder = args.out.parent / "samples" / name / f"{fingerprint[:16]}-{settings}"
    rollout_args = parse_rollout_args([
        "--model", str(model), "--prompts", file, "--out", str(folder), "--num-prompts", "0", "--n", str(k), "--top-k", str(top_k),
        *(x for key in ("temperature", "top_p", "max_tokens", "seed", "engine", "tensor_parallel", "shard_prompts", "prompt_suffix", "workers", "task", "grade_timeout")
          for x in (f"--{key.replace('_', '-')}", str(getattr(args, key)))),
        *(["--trust-remote-code"] if args.trust_remote_code else []), *(["--unsafe-code"] if args.unsafe_code else [])])
    sample_rollouts(rollout_args, pool, rank, world, int(os.environ.get("LOCAL_RANK", 0)))
    gc.collect()                                            # the engine's model, before ours is loaded
    if world > 1:
        dist.barrier()
    data = load_rollouts(folder)
    options = dict(micro_tokens=args.micro_tokens, trust_remote_code=args.trust_remote_code)
    entropy = kl = None
    if args.temperature > 0:                                # greedy samples have neither
        logp, entropies = score(model, folder, with_entropy=True, **options)
        entropy = entropies.double().mean().item()
        if args.base:                                       # reverse KL, on samples of the new policy
            same = checkpoint_fingerprint(args.base) == fingerprint
            kl = 0.0 if same else (logp - score(args.base, folder, **options)).double().mean().item()
    if rank == 0 and any(grading := {k: v for k, v in count_grading(load_shards(folder)).items() if k != "verified"}.values()):
        print(f"grading {name}: " + ", ".join(f"{k} {v}" for k, v in grading.items()))

    judged = counts = None
    if args.judge_url and rank == 0:
        tokenizer, bounds = load_tokenizer(model, args.trust_remote_code), data["response_offsets"]
        ids = [data["input_ids"][b - (r1 - r0):b] for b, r0, r1 in zip(data["offsets"][1:], bounds, bounds[1:])]
        accepted, counts = judge(args, {p["index"]: p for p in load_prompts(file)}, tokenizer.batch_decode(ids), data["prompt_index"],
                                 (data["reward"] == 0) & ~data["truncated"], folder / f"judge-{re.sub(r'[^A-Za-z0-9.-]+', '_', args.judge_model)}.json")
        judged = (data["reward"].bool() | accepted).double().mean().item()
        print(f"judge {args.judge_model} on {name}: " + ", ".join(f"{key} {value}" for key, value in counts.items()))
    right = data["reward"].view(-1, k).sum(1)               # the K responses of a problem stand together
    avg, se = avg_at_k(right, k)
    think = data["reward_think"].mean().item() if "reward_think" in data else None
    meta = data["meta"]
    return {**wanted, "n_problems": len(right), "avg_at_k": avg, "se": se, "correct_per_problem": right.int().tolist(),
            "avg_at_k_think": think, "avg_at_k_judge": judged, "judge": counts, "pass_at_k": (right > 0).double().mean().item(),
            "mean_length": data["response_offsets"].diff().double().mean().item(),
            "truncated": data["truncated"].double().mean().item(), "entropy": entropy, "kl": kl,
            "engine": meta["engine"], "versions": {"torch": torch.__version__, "transformers": transformers.__version__,
                                                   meta["engine"]: meta["engine_version"]}, "seconds": time.time() - start}


def pick(path, benchmark, models, margin=0.0):
    """The most accurate of `models` by their rows in results.jsonl; the first, unless another leads it by `margin` standard errors."""
    rows = {row["model"]: row for row in read_results(path) if row["benchmark"] == benchmark}
    missing = [model for model in models if model not in rows]
    if missing:
        raise InputError(f"{path} has no row of {', '.join(missing)} on {benchmark}: evaluate it first")
    first, best = rows[models[0]], max((rows[model] for model in models), key=lambda row: row["avg_at_k"])
    clear = best["avg_at_k"] - first["avg_at_k"] > margin * math.hypot(best["se"], first["se"])
    return best["model"] if clear else models[0]


def movement(student, teacher, old):
    """How far the student moved each response token against how far the teacher did (Fig. 7): log-probs [N] -> a dict of lists.

    Tokens are binned by |log pi_teacher - log pi_old|, in nats; per bin their number, the mean distance of teacher and
    student, and the share that the student moved the same way.
    """
    far, near = (teacher - old).double(), (student - old).double()
    edges = torch.logspace(-4, 1, 26, dtype=torch.float64)
    where = torch.bucketize(far.abs(), edges)               # 0: less than the first edge, which is noise of the forward pass
    count = torch.bincount(where, minlength=len(edges) + 1)
    farthest = far.abs() >= far.abs().sort().values[-max(1, len(far) // 100)]
    teacher_mean, student_mean, same = (torch.zeros(len(edges) + 1, dtype=torch.float64).index_add_(0, where, x) / count
                                        for x in (far.abs(), near.abs(), (far * near > 0).double()))
    seen = count > 0
    return {"count": count[seen].tolist(), "teacher": teacher_mean[seen].tolist(), "student": student_mean[seen].tolist(),
            "same_direction": same[seen].tolist(), "same_direction_farthest": (far * near > 0)[farthest].double().mean().item(), "ratio": (near.abs().mean() / far.abs().mean()).item()}


def add_movement(run):
    """Score a finished run of distill.py on its rollouts, and keep the comparison with its teacher in its run.json."""
    path = run / "run.json"
    if not (run / "final").is_dir() or not path.is_file():
        raise InputError(f"{run} is not a finished run of distill.py: it needs run.json and final/")
    info = read_json(path, "give the --out of distill.py")
    args = info["args"]
    if "teacher" not in args or args["teacher"] in ("none", "old"):
        raise InputError(f"{run} has no teacher checkpoint to compare its student with")
    if "movement" in info:
        return
    options = dict(temperature=args["logp_temperature"], micro_tokens=args["micro_tokens"], trust_remote_code=args["trust_remote_code"])
    old = find_old(load_rollouts(args["rollouts"]), args["old"])
    student, teacher, old = (score(policy, args["rollouts"], **options) for policy in (run / "final", args["teacher"], old))
    if setup_ddp()[0] == 0:
        write_json(path, info | {"movement": movement(student, teacher, old)})


# ---- the report: read from run.json, metrics.jsonl and results.jsonl, and nothing else -----------------------------------

COLOURS = {"base": "#444444", "teacher": "#d1603d", "student": "#1f6f8b", "control": "#8a8a8a", "mse": "#7a5195",
           "weak-to-strong": "#3a9d5d"}
NAMES = {"teacher": "teacher: every evaluated checkpoint of its path", "student": "student (ERPD): the teacher's last checkpoint, distilled",
         "control": "control: one stage with the student's KL term, last checkpoints"}


def read_runs(folder, rows, benchmark):
    """All training runs under a folder: {label: {seed: run}}, a run = dict(info, metrics, path: [(step, row), ...]).

    The label is the run's folder without the seed, such as round1/teacher; its path are its evaluated checkpoints by step.
    """
    evaluated = [row for row in rows if row["benchmark"] == benchmark]
    runs = {}
    for file in sorted(Path(folder).rglob("run.json")):
        where = file.parent.relative_to(folder).as_posix()
        seed = re.match(r"seed(\w+)/", where)
        metrics_file = file.parent / "metrics.jsonl"
        metrics = [json.loads(line) for line in metrics_file.read_text().splitlines()] if metrics_file.exists() else []
        path = []
        for row in evaluated:
            parent, _, name = row["model"].rpartition("/")
            if f"/{parent}".endswith(f"/{where}"):          # rows name checkpoints relative to where evaluate.py was run
                path.append((int(name[5:]) if name.startswith("step-") else metrics[-1]["step"] if metrics else 0, row))
        runs.setdefault(where[seed.end():] if seed else where, {})[seed[1] if seed else "0"] = {
            "info": json.loads(file.read_text()), "metrics": metrics, "path": sorted(path, key=lambda pair: pair[0])}
    return runs


def role(label):
    """Which colour and name a run has in tables and figures: read off the folder it is in."""
    first, last = label.split("/")[0], label.split("/")[-1]
    if first == "mse":
        return "mse" if last == "teacher" else "weak-to-strong"
    if last.startswith("student-"):                         # one of several, of which the driver picks one
        return "candidate"
    return "control" if first.startswith("control") else last if last in COLOURS else "teacher"


def last_rows(seeds):
    """{seed: row of the last evaluated checkpoint} of a run."""
    return {seed: run["path"][-1][1] for seed, run in seeds.items() if run["path"]}


def rows_by_step(seeds):
    """{step: rows of all seeds}, for the steps that every seed has evaluated."""
    paths = [dict(run["path"]) for run in seeds.values()]
    return {step: [path[step] for path in paths] for step in sorted(set.intersection(*map(set, paths)))}


def table_rows(seeds):
    """rows_by_step for a table: runs that share no step, as with --max-kl, give one line of their last, with steps such as '7/9'."""
    last = [run["path"][-1] for run in seeds.values() if run["path"]]
    return rows_by_step(seeds) or ({"/".join(str(step) for step, _ in last): [row for _, row in last]} if last else {})


def mean_se(values):
    """(mean, standard error over seeds, None for one seed)."""
    values = list(values)
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def accuracy_and_se(rows):
    """Mean AVG@K over seeds and its standard error: over seeds where there are several, else from sampling."""
    mean, se = mean_se(row["avg_at_k"] for row in rows)
    return mean, rows[0]["se"] if se is None else se


def cell(values, digits=3):
    """'mean ± standard error over seeds' as table text."""
    values = [v for v in values if v is not None]
    if not values:
        return "-"
    mean, se = mean_se(values)
    return f"{mean:.{digits}f}" + (f" ± {se:.{digits}f}" if se is not None else "")


ROW_HEADER = ["AVG@K", "sampling s.e.", "KL to base (nats/token)", "pass@K", "entropy (nats)", "length (tokens)"]


def row_cells(rows):
    """The columns of ROW_HEADER over the rows of several seeds."""
    sampling = math.sqrt(sum(r["se"] ** 2 for r in rows)) / len(rows)
    return [cell(r["avg_at_k"] for r in rows), f"{sampling:.3f}", cell((r["kl"] for r in rows), 4), cell(r["pass_at_k"] for r in rows),
            cell(r["entropy"] for r in rows), cell((r["mean_length"] for r in rows), 1)]


def markdown_table(header, lines):
    return "\n".join(["| " + " | ".join(header) + " |", "|" + " --- |" * len(header),
                      *("| " + " | ".join(map(str, line)) + " |" for line in lines)]) + "\n"


def figure_kl(plt, runs, base_row, path):
    """Accuracy against reverse KL (Fig. 6), mean over seeds: whole paths of teachers and control, students as stars."""
    figure, axes = plt.subplots(figsize=(8, 5))
    axes.plot(0, base_row["avg_at_k"], "s", color=COLOURS["base"], markersize=8, label="base")
    starts, shown = {"0": (0.0, base_row["avg_at_k"])}, set()       # where each round's paths begin, by role and round
    for label in sorted(runs, key=lambda s: (re.sub(r"\D", "", s), role(s) != "teacher")):
        kind, number, by_step = role(label), re.sub(r"\D", "", label) or "1", rows_by_step(runs[label])
        if kind not in NAMES or not by_step:
            continue
        points = [(statistics.fmean(math.nan if r["kl"] is None else r["kl"] for r in rows), *accuracy_and_se(rows))
                  for rows in by_step.values()]
        parent = ("control" if kind == "control" else "student") + str(int(number) - 1)
        kl, accuracy, se = zip(*points)
        style = dict(color=COLOURS[kind], label=None if kind in shown else NAMES[kind], capsize=2)
        shown.add(kind)
        if kind == "student":
            axes.errorbar(kl[-1], accuracy[-1], yerr=se[-1], fmt="*", markersize=14, zorder=3, **style)
        else:
            start = starts.get(parent, starts["0"])
            axes.errorbar((start[0], *kl), (start[1], *accuracy), yerr=(0.0, *se), fmt="o-" if kind == "teacher" else "^--",
                          markersize=4, linewidth=1.2, alpha=0.85, **style)
        starts[kind + number] = (kl[-1], accuracy[-1])
        axes.annotate(f"round {number}" if kind == "student" else number, (kl[-1], accuracy[-1]), textcoords="offset points",
                      xytext=(8, 6), color=COLOURS[kind], fontsize=9)
    axes.set(xlabel="reverse KL to the base (nats per token, on the policy's own samples)",
             ylabel=f"AVG@{base_row['k']} on {base_row['benchmark']}", title="Left and above is better; numbers are rounds")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncol=2, frameon=False)    # off the points
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def figure_dynamics(plt, seeds, base_row, path, title):
    """Accuracy, probability of tokens of right and wrong responses, and entropy over the steps of a run (Fig. 4, 5)."""
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.4))
    points = [(0, base_row["avg_at_k"], base_row["se"])] + [(step, *accuracy_and_se(rows)) for step, rows in rows_by_step(seeds).items()]
    step, accuracy, se = zip(*points)
    panels[0].errorbar(step, accuracy, yerr=se, fmt="o-", color=COLOURS["teacher"], capsize=2, label="teacher")
    panels[0].axhline(base_row["avg_at_k"], color=COLOURS["base"], linestyle=":", label="base")
    panels[0].set(title="accuracy", ylabel=f"AVG@{base_row['k']} on {base_row['benchmark']}")
    for axes, key, name, colour in ((panels[1], "prob_pos", "right responses", "#2f7d4f"), (panels[1], "prob_neg", "wrong responses", "#b03a48"),
                                    (panels[2], "entropy", "entropy", COLOURS["student"])):
        curves = list(zip(*([math.nan if m[key] is None else m[key] for m in run["metrics"]] for run in seeds.values())))
        steps = range(1, len(curves) + 1)
        axes.plot(steps, [statistics.fmean(values) for values in curves], color=colour, label=name)
        axes.fill_between(steps, [min(v) for v in curves], [max(v) for v in curves], color=colour, alpha=0.2, linewidth=0)
    panels[1].set(title="mean probability of a sampled token", ylabel="probability")
    panels[2].set(title="entropy on the rollouts", ylabel="nats per token")
    for axes in panels:
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def rounds_table(runs, base_row):
    """Base, then teacher, student and control of each round at their last evaluated step, over seeds."""
    lines = [["base", "-", *row_cells([base_row])]]
    chosen = [label for label in runs if role(label) in NAMES and last_rows(runs[label])]
    for label in sorted(chosen, key=lambda s: (re.sub(r"\D", "", s), list(NAMES).index(role(s)))):
        steps = sorted({run["path"][-1][0] for run in runs[label].values() if run["path"]})
        lines.append([label, "/".join(map(str, steps)), *row_cells(list(last_rows(runs[label]).values()))])
    return markdown_table(["checkpoint", "steps", *ROW_HEADER], lines)


def findings(runs, base_row):
    """What the rows say about the questions that a reader brings, in sentences with numbers: nothing is rounded up."""
    rounds = sorted({re.match(r"round(\d+)/student$", label)[1] for label in runs if re.match(r"round\d+/student$", label)}, key=int)
    lines = []
    for number in rounds:
        teacher, student = runs.get(f"round{number}/teacher", {}), last_rows(runs[f"round{number}/student"])
        last = last_rows(teacher)
        both = [seed for seed in student if seed in last]
        if not both:
            continue
        lower = sum(student[s]["kl"] < last[s]["kl"] for s in both)
        gain, gain_se = mean_se(student[s]["avg_at_k"] - last[s]["avg_at_k"] for s in both)
        best = [max((row for _, row in teacher[s]["path"]), key=lambda row: row["avg_at_k"]) for s in both]
        ahead, ahead_se = mean_se(student[s]["avg_at_k"] - row["avg_at_k"] for s, row in zip(both, best))
        lines.append(f"* Round {number}: the student's KL is below its teacher's in {lower} of {len(both)} seeds "
                     f"({cell((student[s]['kl'] for s in both), 4)} against {cell((last[s]['kl'] for s in both), 4)}). Its accuracy is "
                     f"{100 * gain:+.1f}{f' ± {100 * gain_se:.1f}' if gain_se is not None else ''} points from the teacher's last checkpoint and "
                     f"{100 * ahead:+.1f}{f' ± {100 * ahead_se:.1f}' if ahead_se is not None else ''} from the best checkpoint of the teacher's path "
                     f"(picked on this benchmark, so it flatters the teacher), whose KL is {cell((row['kl'] for row in best), 4)}.")
    if rounds:
        student = last_rows(runs[f"round{rounds[-1]}/student"])
        lines.append(f"* After {rounds[-1]} rounds the student is {100 * statistics.fmean(r['avg_at_k'] - base_row['avg_at_k'] for r in student.values()):+.1f} "
                     f"points from the base, at a KL of {cell((r['kl'] for r in student.values()), 4)}.")
        control = last_rows(runs.get(f"control{rounds[-1]}/teacher", {}))
        if control:
            lines.append(f"* The control, one stage per round and no distillation, is "
                         f"{100 * statistics.fmean(r['avg_at_k'] - base_row['avg_at_k'] for r in control.values()):+.1f} points from the base, "
                         f"at a KL of {cell((r['kl'] for r in control.values()), 4)}.")
    return "\n".join(lines) + "\n"


PAPER_TABLE1 = {"ce": ("72.9", "76.7"), "sapo": ("69.9", "76.2"), "grpo": ("69.0", "73.6"), "ppo": ("68.1", "73.9"), "mse": ("36.4", "37.1")}


def best_steps(seeds):
    """{seed: (step, row)} of the most accurate checkpoint of each run's path, the earliest of equals."""
    return {seed: max(run["path"], key=lambda pair: (pair[1]["avg_at_k"], -pair[0])) for seed, run in seeds.items() if run["path"]}


def losses_section(plt, validation, test, base_row, path):
    """Teacher losses on the same rollouts: each run's best checkpoint on validation, and what it is worth on test (Table 1)."""
    lines, on_test = [["base", "-", "-", "0", f"{base_row['avg_at_k']:.3f}", "-", "68.5", "72.5"]], {}
    for loss in [name for name in PAPER_TABLE1 if name in validation]:
        best = {seed: (step, row) for seed, (step, row) in best_steps(validation[loss]).items() if step in dict(test[loss][seed]["path"])}
        if not best:                                        # not evaluated yet
            continue
        chosen = {seed: dict(test[loss][seed]["path"])[step] for seed, (step, _) in best.items()}
        on_test[loss] = {seed: row["avg_at_k"] for seed, row in chosen.items()}
        lines.append([loss.upper(), cell(row["avg_at_k"] for _, row in best.values()), ", ".join(str(step) for step, _ in best.values()),
                      cell((row["kl"] for _, row in best.values()), 4), cell(on_test[loss].values()),
                      cell(row["avg_at_k"] for row in last_rows(test[loss]).values()), *PAPER_TABLE1[loss]])
    order = sorted(on_test, key=lambda loss: -statistics.fmean(on_test[loss].values()))
    gaps = []
    for better, worse in itertools.pairwise(order):
        mean, se = mean_se(on_test[better][seed] - on_test[worse][seed] for seed in on_test[better] if seed in on_test[worse])
        gaps.append(f"{better.upper()} over {worse.upper()} {100 * mean:+.1f}" + (f" ± {100 * se:.1f}" if se is not None else ""))

    figure, panels = plt.subplots(1, 2, figsize=(11, 4))
    for colour, loss in zip(("#1f6f8b", "#d1603d", "#3a9d5d", "#7a5195", "#8a8a8a"), on_test):
        by_step = rows_by_step({seed: test[loss][seed] for seed in on_test[loss]})
        accuracy, se = zip(*[accuracy_and_se(rows) for rows in by_step.values()])
        kl = [statistics.fmean(row["kl"] for row in rows) for rows in by_step.values()]
        for axes, x in ((panels[0], list(by_step)), (panels[1], kl)):
            axes.errorbar(x, accuracy, yerr=se, fmt="o-", markersize=3, linewidth=1.2, capsize=2, color=colour, label=loss.upper())
    for axes, label in zip(panels, ("optimizer step", "reverse KL to the base (nats per token, log scale)")):
        axes.axhline(base_row["avg_at_k"], color=COLOURS["base"], linestyle=":", label="base")
        axes.set(xlabel=label, ylabel=f"AVG@{base_row['k']} on {base_row['benchmark']}")
        axes.grid(alpha=0.25)
    panels[1].set_xscale("log")
    panels[1].legend(fontsize=8, loc="lower left")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return ["## Teacher losses on the same rollouts (Table 1)\n",
            "The checkpoint is picked on validation, one per seed; validation accuracy is therefore a maximum and flatters, test is not. The last "
            "two columns are **the paper's** averages over five benchmarks with its own models, for the order only.\n",
            markdown_table(["loss", "best validation AVG@K", "at step (by seed)", "KL there (nats/token)", "test AVG@K there", "test AVG@K, last step",
                            "paper: Qwen3-4B", "paper: NBG4-3B"], lines),
            f"Order on test: {' > '.join(loss.upper() for loss in order)} (points, ± standard error over seeds: {', '.join(gaps)}). The paper's order: "
            + "; ".join(" > ".join(loss.upper() for loss in sorted(PAPER_TABLE1, key=lambda loss: -float(PAPER_TABLE1[loss][i]))) + f" ({name})"
                        for i, name in enumerate(("Qwen3-4B", "NBG4-3B"))) + ".\n", f"![losses](figures/{path.name})\n"]


def path_points(run, rows):
    """[(KL, accuracy), ...] of a run's path in the order of training, from the checkpoint that it started at."""
    args = run["info"]["args"]
    start = [row for row in rows if row["model"] == args.get("model", args.get("student"))]
    return [(row["kl"], row["avg_at_k"]) for row in start[:1] + [row for _, row in run["path"]]]


def accuracy_within(points, kl):
    """The highest accuracy on a path, straight between its points, at a KL of at most `kl`; None if all of it is beyond."""
    found = [a for k, a in points if k <= kl]
    for (k0, a0), (k1, a1) in itertools.pairwise(points):
        if min(k0, k1) <= kl < max(k0, k1):
            found.append(a0 + (a1 - a0) * (kl - k0) / (k1 - k0))
    return max(found, default=None)


def least_kl(points, accuracy):
    """The smallest KL on a path, straight between its points, at which it has that accuracy; None if it never does."""
    found = [k for k, a in points if a >= accuracy]
    for (k0, a0), (k1, a1) in itertools.pairwise(points):
        if min(a0, a1) < accuracy <= max(a0, a1):
            found.append(k0 + (k1 - k0) * (accuracy - a0) / (a1 - a0))
    return min(found, default=None)


def matched(seeds, rivals, rows):
    """Students against the paths of rival runs, seed by seed: (points of accuracy at the same KL, KL ratios at the same accuracy).

    The rival may stop anywhere on any of its paths. inf: it is never that accurate. None: it is nowhere within that KL, or
    needs none, as for a student that is no better than the base.
    """
    gains, ratios = [], []
    for seed, row in last_rows(seeds).items():
        paths = [path_points(rival[seed], rows) for rival in rivals if seed in rival]
        best = max((a for a in (accuracy_within(points, row["kl"]) for points in paths) if a is not None), default=None)
        gains.append(None if best is None else 100 * (row["avg_at_k"] - best))
        needed = min((kl for kl in (least_kl(points, row["avg_at_k"]) for points in paths) if kl is not None), default=math.inf)
        ratios.append(math.inf if needed == math.inf else row["kl"] / needed if needed > 0 else None)
    return gains, ratios


def ratio_cell(ratios):
    """KL ratios of several seeds as table text; those without a number are counted."""
    numbers = [ratio for ratio in ratios if ratio is not None and ratio < math.inf]
    never, free = sum(ratio == math.inf for ratio in ratios), sum(ratio is None for ratio in ratios)
    return "; ".join([cell(numbers, 2)] * bool(numbers) + [f"rival never as accurate in {never} of {len(ratios)}"] * bool(never)
                     + [f"no better than the start in {free} of {len(ratios)}"] * bool(free))


def kl_section(plt, runs, rows, base_row, path):
    """Accuracy against KL (Fig. 6): every student against its teacher's whole path and against single-stage controls."""
    def part(label):
        return label.rpartition("/")[0]
    students = sorted(label for label in runs if label.split("/")[-1].startswith(("student", "ensemble")) and last_rows(runs[label]))
    lines = []
    for label in students:
        line = [label, cell(row["avg_at_k"] for row in last_rows(runs[label]).values()), cell((row["kl"] for row in last_rows(runs[label]).values()), 4),
                cell(row["entropy"] for row in last_rows(runs[label]).values())]
        for kind in ("teacher", "control"):
            rivals = [runs[rival] for rival in runs if rival.split("/")[-1].startswith(kind) and part(rival) in ("", part(label))]
            gains, ratios = matched(runs[label], rivals, rows)
            line += [cell(gains, 1), ratio_cell(ratios)]
        lines.append(line)
    paths = sorted(label for label in runs if label.split("/")[-1].startswith(("teacher", "control")) and rows_by_step(runs[label]))
    path_lines = [[label, step, *row_cells(at_step)] for label in paths for step, at_step in table_rows(runs[label]).items()]

    figure, axes = plt.subplots(figsize=(9, 5.5))
    axes.plot(0, base_row["avg_at_k"], "s", color=COLOURS["base"], label="base")
    for label in paths:
        starts = [path_points(run, rows)[0] for run in runs[label].values()]
        points = [tuple(map(statistics.fmean, zip(*starts)))] + [
            (statistics.fmean(row["kl"] for row in at), accuracy_and_se(at)[0]) for at in rows_by_step(runs[label]).values()]
        axes.plot(*zip(*points), "o-" if "teacher" in label else "^--", markersize=4, linewidth=1.2, alpha=0.8, label=f"{label} (path)",
                  color={"teacher": "#d1603d", "control": "#8a8a8a"}[label.split("/")[-1][:7]] if not part(label) else None)
    for label, marker in zip(students, itertools.cycle("*PXDvhd<>8p")):
        last = last_rows(runs[label]).values()
        (kl, kl_se), (accuracy, accuracy_se) = mean_se(row["kl"] for row in last), mean_se(row["avg_at_k"] for row in last)
        axes.errorbar(kl, accuracy, xerr=kl_se, yerr=accuracy_se, fmt=marker, markersize=10, capsize=2, label=label)
    axes.set(xlabel="reverse KL to the base (nats per token, on the policy's own samples)", ylabel=f"AVG@{base_row['k']} on {base_row['benchmark']}")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
    return ["## Accuracy against KL (Fig. 6)\n",
            "Each student against the whole path of the CE teacher and against the single-stage controls of the same round (in `second/`, also those "
            "of the first), which may stop wherever they please, straight between their evaluated checkpoints. *Points at equal KL*: the "
            "student's accuracy minus the rival's best within the student's KL; above 0 favours distillation. *KL ratio*: the student's KL over the "
            "rival's at equal accuracy; below 1 favours distillation. The rival's best of several points flatters the rival by a little noise; "
            "comparing with a teacher's last checkpoint alone would flatter distillation.\n",
            markdown_table(["student", "AVG@K", "KL (nats/token)", "entropy", "teacher's path: points at equal KL", "KL ratio at equal accuracy",
                            "controls: points at equal KL", "KL ratio at equal accuracy"], lines),
            f"![accuracy against KL](figures/{path.name})\n", "The paths:\n", markdown_table(["run", "step", *ROW_HEADER], path_lines)]


def movement_section(plt, runs, path):
    """How far students moved each token, against their teachers (Fig. 7), and the raw signal by kind of response (Fig. 10)."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4))
    ratios, histograms = [], []
    for label, seeds in runs.items():
        moved = [run["info"]["movement"] for run in seeds.values() if "movement" in run["info"]]
        if moved:
            panels[0].loglog(moved[0]["teacher"], moved[0]["student"], "o-", markersize=3, linewidth=1, label=label)
            ratios.append([label, cell(m["ratio"] for m in moved), cell(m["same_direction_farthest"] for m in moved)])
            histograms.append((label, next(run["info"]["signal"] for run in seeds.values())))
    if not ratios:
        return []
    panels[0].plot((1e-4, 10), (1e-4, 10), ":", color="#444444", label="as far as the teacher")
    panels[0].set(xlabel="|log pi_teacher - log pi_old| (mean of a bin, nats)", ylabel="|log pi_student - log pi_old| (nats)", title="first seed")
    label, signal = histograms[0]
    edges, width = signal["histogram_edges"][:-1], signal["histogram_edges"][1] - signal["histogram_edges"][0]
    for kind, colour in (("positive", "#2f7d4f"), ("negative", "#b03a48")):
        total = sum(signal[f"histogram_{kind}"]) or 1
        panels[1].step([e + width / 2 for e in edges], [count / total for count in signal[f"histogram_{kind}"]], where="mid", color=colour,
                       label=f"{kind} responses")
    panels[1].set(yscale="log", xlabel="signal before whitening (nats; the outer bins hold what lies beyond)", ylabel="share of tokens",
                  title=f"signal of {label}")
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    statistics_of = [[label, *(f"{signal[key]:.4f}" for key in ("mean", "std", "kurtosis", "p1", "p50", "p99", "share_below_zero_on_positives"))]
                     for label, signal in histograms]
    return ["## Which tokens moved (Fig. 7), and the signal (Fig. 10)\n", f"![movement](figures/{path.name})\n",
            "Mean |log pi_student - log pi_old| over mean |log pi_teacher - log pi_old|, and of the 1 % of tokens that the teacher moved farthest "
            "the share that the student moved the same way:\n", markdown_table(["student", "ratio", "same direction, farthest 1 %"], ratios),
            "The signal before whitening, first seed (nats):\n",
            markdown_table(["student", "mean", "std", "kurtosis", "1 %", "50 %", "99 %", "share below 0 on positives"], statistics_of)]


def report(folder, title=""):
    """Write FOLDER/report.md and FOLDER/figures/*.png; print the table of rounds."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows = read_results(folder / "results.jsonl")
    if not rows:
        raise InputError(f"{folder} has no results.jsonl: run evaluate.py --model ... --out {folder}/results.jsonl first")
    benchmarks = list(dict.fromkeys(row["benchmark"] for row in rows))
    benchmark = "test" if "test" in benchmarks else benchmarks[-1]
    base_row = next((r for r in rows if r["benchmark"] == benchmark and r["base"] and r["model"] == r["base"]), None)
    if base_row is None:
        raise InputError(f"{folder}/results.jsonl has no row of the base on {benchmark}: evaluate it with --model B --base B")
    runs = read_runs(folder, rows, benchmark)
    seeds = sorted({seed for by_seed in runs.values() for seed in by_seed})
    (folder / "figures").mkdir(exist_ok=True)

    text = [f"# Extreme Region Policy Distillation: report of {folder.name}{title and f' ({title})'}\n",
            f"Benchmark `{benchmark}`: {base_row['n_problems']} problems x {base_row['k']} samples at temperature "
            f"{base_row['temperature']:g}, top-p {base_row['top_p']:g}; {len(seeds)} seed(s) of rollouts and training "
            f"({', '.join(seeds)}). With several seeds, ± is the standard error over seeds; *sampling s.e.* is the part that comes from "
            "drawing K responses to fixed problems. KL is the reverse KL to the base, on samples of the evaluated policy.\n"]
    if any(label.startswith("round") for label in runs):
        figure_kl(plt, runs, base_row, folder / "figures" / "kl.png")
        text += ["## Rounds\n", rounds_table(runs, base_row), findings(runs, base_row), "![accuracy against KL](figures/kl.png)\n"]
    if "student-1" in runs:
        text += kl_section(plt, runs, [row for row in rows if row["benchmark"] == benchmark], base_row, folder / "figures" / "fig6.png")
    text += movement_section(plt, runs, folder / "figures" / "movement.png")
    if len(set(runs) & set(PAPER_TABLE1)) > 1:
        text += losses_section(plt, read_runs(folder, rows, "validation"), runs, base_row, folder / "figures" / "losses.png")
    summary = "\n".join(line for line in text[1:] if not line.startswith(("#", "!")))
    for label, name, heading in (("round1/teacher", "teacher", "The first teacher: many off-policy steps on one fixed batch (Fig. 4)"),
                                 ("mse/teacher", "mse", "Weak to strong: an MSE teacher and its unlearned checkpoint (Sec. 3.4, Fig. 5)")):
        if label not in runs:
            continue
        figure_dynamics(plt, runs[label], base_row, folder / "figures" / f"{name}.png", heading)
        text += [f"## {heading}\n", f"![{name}](figures/{name}.png)\n"]
    text += ["## Every evaluated checkpoint\n",
             "An earlier teacher checkpoint may do as well as a student: look here before believing the table above.\n",
             markdown_table(["run", "step", *ROW_HEADER], [["base", "-", *row_cells([base_row])]] + [
                 [label, step, *row_cells(at_step)] for label in runs for step, at_step in table_rows(runs[label]).items()])]
    settings = []
    for label, by_seed in runs.items():
        run = next(iter(by_seed.values()))
        args = run["info"]["args"]
        settings.append([label, run["info"]["script"], args.get("loss", "-"), args.get("beta", "-"), args["lr"], args["batch_prompts"], args["kl_coef"],
                         args["kl_kind"] if args["kl_coef"] else "-", len(run["metrics"]), f"{sum(m['seconds'] for m in run['metrics']):.0f}"])
    text += ["## Settings and training time (first seed)\n", markdown_table(
        ["run", "script", "loss", "beta", "lr", "prompts per step", "KL weight", "KL kind", "steps", "seconds"], settings)]
    write_atomic(folder / "report.md", lambda p: p.write_text("\n".join(text)))
    print(f"\n{summary}")
    print(f"report: {folder / 'report.md'}   figures: {folder / 'figures'}")


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arg = p.add_argument
    arg("--report", type=Path, metavar="RUNDIR", help="write RUNDIR/report.md and figures from finished runs, measure nothing")
    arg("--title", default="", help="with --report: what the results are of")
    arg("--movement", nargs="+", type=Path, metavar="RUN", help="runs of distill.py: which tokens moved (Fig. 7), into their run.json")
    arg("--pick", metavar="BENCHMARK", help="print the best of --model by the rows in --out; measure nothing")
    arg("--margin", type=float, default=0.0, help="with --pick: keep the first unless another leads by so many standard errors")
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
    # Grading
    arg("--task", choices=["math", "code"], default="math", help="as in rollout.py")
    arg("--workers", type=int, default=2, help="grading processes")
    arg("--grade-timeout", type=float, default=10.0, help="seconds per answer, or per test of a program (LiveCodeBench: 6)")
    arg("--unsafe-code", action="store_true", help="run programs without isolation, as yourself")
    arg("--judge-url", help="OpenAI-compatible endpoint that is asked about answers the rules call wrong; key in OPENAI_API_KEY (Sec. 4.1)")
    arg("--judge-model", help="its name there")
    arg("--judge-timeout", type=float, default=120.0, help="seconds per question, three tries")
    arg("--trust-remote-code", action="store_true", help="run code that comes with the checkpoint")
    args = p.parse_args(argv)
    if bool(args.judge_url) != bool(args.judge_model) or args.judge_url and args.task == "code":
        raise InputError("--judge-url and --judge-model belong together, and to --task math")
    if not args.report and not args.movement and not (args.model and (args.data or args.pick)):
        raise InputError("give --model and --data, or --model and --pick, --movement RUN, or --report RUNDIR")
    return args


def main():
    args = parse_args()
    if args.report:
        if not args.report.is_dir():
            raise InputError(f"{args.report} is not a folder: give the one that holds results.jsonl")
        return report(args.report, args.title)
    if args.pick:
        return print(pick(args.out, args.pick, args.model, args.margin))
    if args.movement:
        for run in args.movement:
            add_movement(run)
        return None
    benchmarks = [parse_benchmark(text, args.k) for text in args.data]
    for _, file, _ in benchmarks:
        load_prompts(file)                                  # a wrong path stops before any model is loaded
    policies = [*args.model, args.base] if args.base else args.model
    read_results(args.out)
    check_out(args.out.parent)
    for policy in policies:
        checkpoint_fingerprint(policy)
        check_weights(policy, args.trust_remote_code)
    vocabularies = {tokenizer_fingerprint(load_tokenizer(policy, args.trust_remote_code)) for policy in policies}
    if args.base and len(vocabularies) > 1:
        raise InputError("--model and --base have different tokenizers, so there is no KL between them: leave out --base")
    rank, world, _ = setup_ddp()
    with grading_pool(args.workers) as pool:
        for model, benchmark in itertools.product(args.model, benchmarks):
            row = evaluate(model, benchmark, args, pool, rank, world)
            if rank == 0 and row is None:
                print(f"{model} on {benchmark[0]}: already in {args.out}")
            elif rank == 0:
                append_result(args.out, row)
                kl = "" if row["kl"] is None else f" | KL(new,base) {row['kl']:.4f}"
                kl += "" if row["entropy"] is None else f" | entropy {row['entropy']:.3f}"
                kl += "" if row["avg_at_k_judge"] is None else f" | with the judge {row['avg_at_k_judge']:.3f}"
                print(f"{model} on {benchmark[0]}: AVG@{row['k']} {row['avg_at_k']:.3f} ± {row['se']:.3f}{kl} | "
                      f"pass@{row['k']} {row['pass_at_k']:.3f} | length {row['mean_length']:.1f} | "
                      f"truncated {row['truncated']:.3f} | {row['seconds']:.0f} s")
            if world > 1:
                dist.barrier()                              # nobody reads results.jsonl before the row is there


if __name__ == "__main__":
    run_main(main)
