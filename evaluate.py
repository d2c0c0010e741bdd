"""
Measure a policy: AVG@K with its standard error, and the reverse KL to the base on the policy's own samples.

    AVG@K = mean over problems of the share of K sampled responses that are right                   Sec. 4.1
    KL    = mean over tokens sampled from pi of log pi(a|s) - log pi_base(a|s), in nats per token

    python evaluate.py --model runs/student/final --base M --data hmmt=hmmt.jsonl:32 --out runs/results.jsonl
    python evaluate.py --pick hmmt --model A B C --out runs/results.jsonl       # the most accurate of these
    python evaluate.py --missing --model A B --data hmmt=hmmt.jsonl --out runs/results.jsonl   # without a row
    python evaluate.py --report runs/demo          # runs/demo/report.md and figures, from what the runs wrote
    python evaluate.py --report runs/tables/all --tables table1 fig6   # of the paper, with its claims decided
    python evaluate.py --movement runs/student    # which tokens a student moved, against its teacher (Fig. 7)

Samples are ordinary rollout shards beside the results, so an interrupted evaluation continues, and anyone can
look at what a model wrote. One row per (checkpoint, benchmark) says with which settings. The report comes
from tests/paper/report.py. No stage imports this file.
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
import sys
import time
import urllib.request
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm

from rollout import (InputError, Parser, RunError, checkpoint_fingerprint, count_grading, grading_pool,
                     input_errors, last_boxed, load_prompts, load_task, load_tokenizer, read_json,
                     resolve_checkpoint, run_main, sample_rollouts, sampling_flags, tokenizer_fingerprint,
                     write_json)
from rollout import parse_args as parse_rollout_args
from teacher import load_rollouts, response_ids, score, setup_ddp


# ---- measuring ---------------------------------------------------------------------------------------------

def avg_at_k(correct, k):
    """(AVG@K, its standard error from sampling) for right answers per problem [n] out of k each. Sec. 4.1.

    The problems are fixed, so only the sampling varies: Var = sum_i p_i (1 - p_i) / (k - 1) / n^2 (unbiased).
    """
    p = correct.double() / k
    if k == 1:                                              # the spread within a problem is unknown
        return p.mean().item(), math.sqrt(p.mean() * (1 - p.mean()) / len(p))
    return p.mean().item(), ((p * (1 - p)).sum().div(k - 1).sqrt() / len(p)).item()


def entropy_and_kl(model, base, rollouts, args):
    """(mean entropy, reverse KL to the base) over the tokens of samples of `model`, in nats per token; or
    None."""
    if args.temperature == 0:                               # greedy samples have neither
        return None, None
    options = dict(micro_tokens=args.micro_tokens, trust_remote_code=args.trust_remote_code, shard=args.shard)
    logp, entropy = score(model, rollouts, with_entropy=True, **options)
    kl = None
    if base and checkpoint_fingerprint(base) == rollouts["meta"]["model_fingerprint"]:
        kl = 0.0
    elif base:
        kl = (logp - score(base, rollouts, **options)).double().mean().item()
    return entropy.double().mean().item(), kl


def evaluate(model, benchmark, args, pool, rank, world):
    """Sample, grade and score one checkpoint on (name, file, K): a row, or None if it is there already."""
    (name, file, k), start, fingerprint = benchmark, time.time(), checkpoint_fingerprint(model)
    top_k = default_top_k(model) if args.top_k is None else args.top_k
    same = ("temperature", "top_p", "max_tokens", "seed", "prompt_suffix", "judge_model", "task")
    wanted = {"model": str(model), "model_fingerprint": fingerprint, "base": args.base, "benchmark": name,
              "k": k, "top_k": top_k, **{key: getattr(args, key) for key in same},
              "problems_sha256": problems_hash(file, args.num_problems)}
    if has_row(args.out, wanted):
        return None
    sampling = {key: wanted[key] for key in wanted if key not in ("model", "base", "judge_model")}
    settings = hashlib.sha256(json.dumps([file, sampling], default=str).encode()).hexdigest()[:8]
    folder = args.out.parent / "samples" / name / f"{fingerprint[:16]}-{settings}"      # copies share theirs
    rollout_args = parse_rollout_args(["--model", str(model), "--prompts", file, "--out", str(folder)])
    shared = vars(rollout_args).keys() & vars(args).keys() - {"model", "out"}
    rollout_args.__dict__ |= {key: getattr(args, key) for key in shared}
    rollout_args.__dict__ |= dict(num_prompts=args.num_problems, num_responses=k, top_k=top_k)
    sample_rollouts(rollout_args, pool, rank, world, int(os.environ.get("LOCAL_RANK", 0)))
    gc.collect()                                            # the engine's model, before ours is loaded
    if world > 1:
        dist.barrier()
    rollouts = load_rollouts(folder)
    entropy, kl = entropy_and_kl(model, args.base, rollouts, args)
    if rank > 0:
        return {}
    grading = {key: n for key, n in count_grading(rollouts["shards"]).items() if n and key != "verified"}
    if grading:
        print(f"grading {name}: " + ", ".join(f"{key} {n}" for key, n in grading.items()))
    judged, counts = judge_samples(args, model, name, file, rollouts) if args.judge_url else (None, None)
    right, meta = rollouts["reward"].view(-1, k).sum(1), rollouts["meta"]  # K responses of a problem in a row
    avg, se = avg_at_k(right, k)
    think = rollouts["reward_think"].mean().item() if "reward_think" in rollouts else None
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    versions[meta["engine"]] = meta["engine_version"]
    return {**wanted, "n_problems": len(right), "avg_at_k": avg, "se": se,
            "correct_per_problem": right.int().tolist(), "avg_at_k_think": think, "avg_at_k_judge": judged,
            "judge": counts, "pass_at_k": (right > 0).double().mean().item(),
            "mean_length": rollouts["response_offsets"].diff().double().mean().item(),
            "truncated": rollouts["truncated"].double().mean().item(), "entropy": entropy, "kl": kl,
            "engine": meta["engine"], "versions": versions, "seconds": time.time() - start}


def pick(path, benchmark, models, margin=0.0, nearest_kl=None):
    """The most accurate of `models` by their rows; the first, unless another leads by `margin` standard
    errors.

    nearest_kl: instead the one whose KL is nearest this share of the last one's (Table 2: a teacher at half
    the KL).
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


# ---- an LLM as judge of answers that the rules call wrong (Sec. 4.1) ---------------------------------------

JUDGE_PROMPT = """Problem:
{problem}

Reference answer: {gold}
Given answer: {answer}

Do the two answers mean the same? Differences of notation do not matter. End with one word, YES or NO."""


def ask_judge(url, model, question, timeout=120.0, tries=3, wait=2.0):
    """True, False, or None for a reply without a verdict; OSError if the endpoint gives none in `tries`."""
    body = {"model": model, "messages": [{"role": "user", "content": question}], "temperature": 0.0}
    key = os.environ.get("OPENAI_API_KEY", "none")
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    url = url.rstrip("/").removesuffix("/v1") + "/v1/chat/completions"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    for attempt in range(1, tries + 1):
        try:
            with urllib.request.urlopen(request, timeout=timeout) as reply:
                text = json.load(reply)["choices"][0]["message"]["content"]
                break
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
            if attempt == tries:
                raise OSError(f"{url}: {type(error).__name__}: {str(error).splitlines()[:1]}") from error
            time.sleep(wait * attempt)
    words = re.findall(r"\b(yes|no)\b", str(text), re.IGNORECASE)
    return words[-1].lower() == "yes" if words else None


def judge(args, problems, responses, indices, wrong, path):
    """(accepted by the judge [N], counts). The boxed answers of the responses in `wrong` [N] are asked, equal
    ones once. Verdicts are kept in `path`; RunError if no question gets an answer."""
    kept = read_json(path, "delete it, the judge is asked again") if path.exists() else {}
    keys = {}                                               # position of a wrong response -> (key, question)
    for n in wrong.nonzero()[:, 0].tolist():
        answer, problem = last_boxed(responses[n]), problems[indices[n].item()]
        if answer:
            gold, text = problem["answer"], problem["prompt"]
            question = JUDGE_PROMPT.format(
                problem=text if isinstance(text, str) else text[-1]["content"], answer=answer[:1000],
                gold=" or ".join(map(str, gold)) if isinstance(gold, list) else gold)
            keys[n] = (hashlib.sha256(question.encode()).hexdigest(), question)
    missing, errors = {key: question for key, question in keys.values() if key not in kept}, []

    def answer_one(item):
        try:
            return item[0], ask_judge(args.judge_url, args.judge_model, item[1], args.judge_timeout)
        except OSError as error:
            errors.append(error)
            return item[0], "unanswered"
    with concurrent.futures.ThreadPoolExecutor(16) as threads:
        asked = threads.map(answer_one, missing.items())
        found = dict(tqdm(asked, total=len(missing), desc="judge", leave=False))
    if missing and len(errors) == len(missing):
        raise RunError(f"the judge answers nothing: {errors[0]}") from errors[0]
    kept |= {key: verdict for key, verdict in found.items() if verdict != "unanswered"}
    write_json(path, kept)
    verdicts = {n: kept.get(key, "unanswered") for n, (key, _) in keys.items()}
    accepted = torch.tensor([verdicts.get(n) is True for n in range(len(wrong))])
    names = {"yes": True, "unclear": None, "unanswered": "unanswered"}
    said = list(verdicts.values())
    return accepted, {"asked": len(said), **{name: sum(v is x for v in said) for name, x in names.items()}}


def judge_samples(args, model, name, file, rollouts):
    """(AVG@K with what the judge accepts, counts): the wrong responses that were not cut off are asked
    about."""
    tokenizer, bounds = load_tokenizer(model, args.trust_remote_code), rollouts["response_offsets"]
    ids = [response_ids(rollouts, i)[-int(n):] for i, n in enumerate(bounds.diff())]
    problems = {p["index"]: p for p in load_prompts(file)}
    path = rollouts["folder"] / f"judge-{re.sub(r'[^A-Za-z0-9.-]+', '_', args.judge_model)}.json"
    wrong = (rollouts["reward"] == 0) & ~rollouts["truncated"]
    texts, indices = tokenizer.batch_decode(ids), rollouts["prompt_index"]
    accepted, counts = judge(args, problems, texts, indices, wrong, path)
    print(f"judge {args.judge_model} on {name}: " + ", ".join(f"{key} {n}" for key, n in counts.items()))
    return (rollouts["reward"].bool() | accepted).double().mean().item(), counts


def parse_args(argv=None):
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arg = p.add_argument
    # Instead of measuring
    arg("--report", type=Path, metavar="RUNDIR", help="write RUNDIR/report.md and figures from finished runs")
    arg("--tables", nargs="+", metavar="NAME", help="with --report: table1 to table12, fig4 to fig10")
    arg("--runs", type=Path, default=Path("runs/tables/runs"), help="with --tables: MODEL/seedN/RUN in it")
    arg("--models", nargs="+", metavar="MODEL", help="with --tables: only these folders of --runs")
    arg("--title", default="", help="with --report: what the results are of")
    arg("--movement", nargs="+", type=Path, metavar="RUN", help="which tokens a student moved (Fig. 7)")
    arg("--pick", metavar="BENCHMARK", help="print the best of --model by the rows in --out")
    arg("--nearest-kl", type=float, metavar="SHARE", help="with --pick: nearest this share of the last KL")
    arg("--margin", type=float, default=0.0, help="with --pick: standard errors by which the first is beaten")
    arg("--missing", action="store_true", help="print those of --model that lack a row in --out")
    # What is measured
    arg("--model", nargs="+", help="checkpoints to evaluate, one after the other")
    arg("--base", help="policy that the KL is measured to; without it there is no KL")
    arg("--data", nargs="+", metavar="NAME=FILE[:K]", help="benchmarks, with K responses per problem")
    arg("--out", type=Path, default=Path("results.jsonl"), help="rows are appended; none is made twice")
    arg("--k", type=int, default=32, help="K where --data names none (Sec. 4.1: 32; Beyond AIME 16, IMO 4)")
    arg("--num-problems", type=int, default=0, help="a random N of each benchmark by --seed, 0: all")
    # Sampling
    arg("--temperature", type=float, default=0.6, help="Sec. 4.1: 0.6, and 1.0 for Qwen3.5")
    arg("--top-p", type=float, default=0.95, help="Sec. 4.1; it biases the KL, so measure that with 1")
    arg("--top-k", type=int, help="default: the checkpoint's generation config, -1 for all tokens")
    arg("--max-tokens", type=int, default=81920, help="Sec. 4.1: Qwen3-4B; NBG4-3B 65,536, Qwen3.5 192,000")
    sampling_flags(arg)
    arg("--micro-tokens", type=int, default=32768, help="padded tokens per forward pass when scoring")
    arg("--shard", action="store_true", help="score a model that does not fit one GPU, as in teacher.py")
    arg("--judge-url", help="OpenAI-compatible endpoint, asked about wrong answers; key in OPENAI_API_KEY")
    arg("--judge-model", help="its name there")
    arg("--judge-timeout", type=float, default=120.0, help="seconds per question, three tries")
    args = p.parse_args(argv)
    if bool(args.judge_url) != bool(args.judge_model) or args.judge_url and args.task != "math":
        raise InputError("--judge-url and --judge-model belong together, and to --task math")
    if args.tables and not args.report:
        raise InputError("--tables needs --report FOLDER")
    if not args.report and not args.movement and not (args.model and (args.data or args.pick)):
        raise InputError("give --model and --data, or --model and --pick, --movement RUN, or --report RUNDIR")
    return args


def main():
    args = parse_args()
    if args.report or args.movement:
        return paper_report(args)
    if args.pick:
        return print(pick(args.out, args.pick, args.model, args.margin, args.nearest_kl))
    benchmarks = [parse_benchmark(text, args.k) for text in args.data]
    if args.missing:
        return print(" ".join(without_row(args.out, benchmarks, args.model, args.judge_model)))
    rank, world, _ = setup_ddp(args.shard)
    check_inputs(args, benchmarks, rank)
    with grading_pool(args.workers) as pool:
        for model, benchmark in itertools.product(args.model, benchmarks):
            row = evaluate(model, benchmark, args, pool, rank, world)
            if rank == 0 and row is None:
                print(f"{model} on {benchmark[0]}: already in {args.out}")
            elif rank == 0:
                append_result(args.out, row)
                kl = "" if row["kl"] is None else f" | KL(new,base) {row['kl']:.4f}"
                kl += "" if row["entropy"] is None else f" | entropy {row['entropy']:.3f}"
                judged = row["avg_at_k_judge"]
                kl += "" if judged is None else f" | with the judge {judged:.3f}"
                print(f"{model} on {benchmark[0]}: AVG@{row['k']} {row['avg_at_k']:.3f} ± {row['se']:.3f}"
                      f"{kl} | pass@{row['k']} {row['pass_at_k']:.3f} | length {row['mean_length']:.1f}"
                      f" | truncated {row['truncated']:.3f} | {row['seconds']:.0f} s")
            if world > 1:
                dist.barrier()                            # nobody reads results.jsonl before the row is there


# ---- machinery: nothing below is about the method ----------------------------------------------------------

def paper_report(args):
    """--report, --tables and --movement: what compares with the paper is in tests/paper."""
    sys.path.insert(0, str(Path(__file__).parent / "tests" / "paper"))
    import report
    if args.tables:
        report.report_tables(args.report, args.tables, args.runs, args.title, args.models)
    elif args.report:
        report.report(args.report, args.title)
    for run in args.movement or []:
        report.add_movement(run)


def check_inputs(args, benchmarks, rank):
    """Everything that would stop an evaluation stops it here, before any model is loaded."""
    task = load_task(args.task, args.unsafe_code)
    for _, file, _ in benchmarks:
        load_prompts(file, read_row=task and task.read_row)
    read_results(args.out)
    policies = [*args.model, args.base] if args.base else args.model
    for policy in policies:
        checkpoint_fingerprint(policy)
    known = {tokenizer_fingerprint(load_tokenizer(policy, args.trust_remote_code)) for policy in policies}
    if args.base and len(known) > 1:
        raise InputError("--model and --base have different tokenizers: there is no KL; leave out --base")
    if args.judge_url and rank == 0:
        question = JUDGE_PROMPT.format(problem="What is 1 + 1?", gold="2", answer="2")
        try:
            if ask_judge(args.judge_url, args.judge_model, question, args.judge_timeout) is not True:
                print(f"judge {args.judge_model}: does not say YES to 2 = 2; is it the right model?")
        except OSError as error:
            raise RunError(f"the judge answers nothing: {error}") from error


def parse_benchmark(text, default_k):
    """NAME=FILE[:K] -> (name, file, K)."""
    match = re.fullmatch(r"([\w.-]+)=(.+?)(?::(\d+))?", text)
    if not match:
        raise InputError(f"--data {text}: write NAME=FILE or NAME=FILE:K, for example hmmt=hmmt.jsonl:32")
    return match[1], match[2], int(match[3] or default_k)


def problems_hash(file, num_problems=0):
    """Hash of what a row was measured on: the problem file, and how many of its problems if not all."""
    content = Path(file).read_bytes() if Path(file).is_file() else file.encode()
    part = f"{num_problems} problems".encode() if num_problems else b""
    return hashlib.sha256(content + part).hexdigest()


def default_top_k(model):
    """top-k of the checkpoint's generation config: sampling parameters not given are the model's (Sec.
    4.1)."""
    path = resolve_checkpoint(model) / "generation_config.json"
    return read_json(path, "repair it, or give --top-k").get("top_k") or -1 if path.exists() else -1


def read_results(path):
    """Rows of a results.jsonl, [] if there is none."""
    lines, rows = [], []
    if Path(path).exists():
        with input_errors(f"{path} cannot be read"):
            lines = Path(path).read_text().splitlines(keepends=True)
    for i, line in enumerate(lines, start=1):
        if line.endswith("\n"):                          # else a crash cut it short: append_result removes it
            with input_errors(f"{path}:{i} is not a row of results", "repair or delete the line"):
                rows.append(json.loads(line))
                rows[-1]["model"], rows[-1]["benchmark"]    # whatever else it holds, it is a row of ours
    return rows


def has_row(path, wanted):
    """Whether a row has all these settings already."""
    rows = [{"task": "math"} | row for row in read_results(path)]
    return any(all(row.get(key) == value for key, value in wanted.items()) for row in rows)


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
    """Those of `models` that have no row for one of the benchmarks (or none with this judge)."""
    rows = {(row["model"], row["benchmark"]) for row in read_results(path)
            if judge_model in (None, row.get("judge_model"))}
    return [model for model in dict.fromkeys(models)
            if any((model, name) not in rows for name, *_ in benchmarks)]


if __name__ == "__main__":
    run_main(main)
