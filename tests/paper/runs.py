"""
Finished runs, read: what one model's folder holds, and one number of one checkpoint of it.

Read are run.json, metrics.jsonl, results.jsonl and rollouts.json, and nothing else. `model_runs` is what
read_model returns. A checkpoint is named as in paper.json: RUN (its last step), RUN@STEP, RUN@best on the
selection benchmark, RUN@start (what it was trained from), RUN@measured (the last one with a row), or base.
`over`: the benchmarks whose mean is the accuracy.
"""
import functools
import itertools
import json
import math
import re
import statistics

import torch

from reads import PAPER, benchmarks_of
from rollout import input_errors, read_json

ROW_FIELDS = {"kl": "kl", "entropy": "entropy", "length": "mean_length", "pass": "pass_at_k"}
PAPER_STEP = {"teacher.py": 300 / 32, "distill.py": 400 / 32}   # Table 4: seconds per prompt of a step,
PAPER_ROLLOUTS = 7 * 3600 / 1000                        # and of rollouts; on-policy 800 s for 32, the same
TRAINING = ("prob_pos", "prob_neg", "explained_variance", "train_entropy")          # of metrics.jsonl


# ---- runs: read once ---------------------------------------------------------------------------------------

def read_lines(path):
    """The objects of a .jsonl file, [] if there is none; without a last line that a crash cut short."""
    with input_errors(f"{path} cannot be read", "repair or delete the line"):
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]


def read_runs(folder, rows):
    """{label: {seed: run}}, a run = dict(info, metrics, rows: {benchmark: {step: row}}).

    The label is the run's path below seedN. On-policy, every step is a run of its own, updateN: together they
    are one.
    """
    runs = {}
    for file in sorted(folder.rglob("run.json")):
        where = file.parent.relative_to(folder).as_posix()
        seed, label, update = re.fullmatch(r"(?:seed(\w+)/)?(.+?)(?:/update(\d+))?", where).groups()
        metrics = read_lines(file.parent / "metrics.jsonl")
        last = metrics[-1]["step"] if metrics else 0
        new = {"info": read_json(file, "delete that run"), "metrics": [], "rows": {}}
        run = runs.setdefault(label, {}).setdefault(seed or "0", new)
        run["metrics"] += [m | {"step": int(update)} for m in metrics] if update else metrics
        for row in rows:
            parent, _, name = row["model"].rpartition("/")
            if f"/{parent}".endswith(f"/{where}"):      # rows name checkpoints from where they were measured
                step = int(update) if update else int(name[5:]) if name.startswith("step-") else last
                run["rows"].setdefault(row["benchmark"], {})[step] = row
    return runs


def read_model(folder):
    """What one model's folder holds: name, runs, seeds, base {benchmark: row}, rollouts (how many).

    scored: benchmarks that are accuracies; own: those that the paper does not have; kl: the one that KL
    is read from; selection: the one of RUN@best; seconds and prompts: {rollouts' path: seconds that they
    took, how many prompts}.
    """
    rows, rollouts, rehearsal = read_lines(folder / "results.jsonl"), "-", False
    seconds, prompts = {}, {}
    benchmarks = list(dict.fromkeys(row["benchmark"] for row in rows))
    base = {row["benchmark"]: row for row in rows if row["model"] == row["base"]}
    scored = [b for b in benchmarks if b in base and b != "kl" and (b != "validation" or len(base) == 1)]
    known = {PAPER["selection"], *(b for spec in PAPER["tables"].values() for b in itertools.chain(
        spec.get("benchmarks", []), *spec.get("benchmarks_of", {}).values()))}
    for file in folder.glob("seed*/**/rollouts.json"):
        kept, path = json.loads(file.read_text()), file.parent.relative_to(folder).as_posix()
        made, rehearsal = kept["summary"], rehearsal or bool(kept.get("meta", {}).get("rehearsal"))
        prompts[path] = made["prompts"]
        if re.fullmatch("[^/]+/rollouts", path):
            rollouts = f"{made['prompts']:,} x {made['responses'] // made['prompts']}"
        if made["tok_per_s"]:
            seconds[path] = made["responses"] * made["mean_length"] / made["tok_per_s"]
    runs, first = read_runs(folder, rows), scored[0] if scored else None
    return {"name": folder.name, "runs": runs, "base": base, "rollouts": rollouts, "seconds": seconds,
            "prompts": prompts, "seeds": sorted({seed for by_seed in runs.values() for seed in by_seed}),
            "rehearsal": rehearsal, "scored": scored, "own": [b for b in scored if b not in known],
            "kl": "kl" if "kl" in benchmarks else first,
            "selection": next((b for b in ("validation", PAPER["selection"]) if b in benchmarks), first)}


def benchmarks_for(name, model_runs):
    """The benchmarks of a table or figure: the paper's, or the model's if it has only its own."""
    paper, own = benchmarks_of(name, model_runs["name"]), model_runs["own"]
    return own if own and not set(paper) & set(model_runs["scored"]) else paper


# ---- numbers of checkpoints --------------------------------------------------------------------------------

def measured(run, over):
    """Steps of a run with a row on each of the benchmarks `over`."""
    return sorted(set.intersection(*(set(run["rows"].get(b, {})) for b in over)))


def checkpoint(model_runs, seed, name):
    """(run, step, rows by benchmark) of a checkpoint, None if it is not there; the base has no run."""
    label, _, which = name.partition("@")
    run = model_runs["runs"].get(label, {}).get(seed)
    if label == "base":
        return None, 0, model_runs["base"]
    if run is None or not run["metrics"]:
        return None
    steps, args = [m["step"] for m in run["metrics"]], run["info"]["args"]
    step = steps[-1]
    if which == "start":
        start = args.get("model") or args["student"]
        parent = re.search(r"/seed\w+?/(.+?)(?:/update(\d+))?/(?:final|step-(\d+))$", start)
        at = parent and (parent[2] or parent[3])
        return checkpoint(model_runs, seed, parent[1] + (f"@{int(at)}" if at else "") if parent else "base")
    if which == "best":                                     # the earliest of equals
        rows = run["rows"].get(model_runs["selection"], {})
        step = min(rows, key=lambda step: (-rows[step]["avg_at_k"], step), default=step)
    elif which == "measured":
        step = max(run["rows"].get(model_runs["kl"], [step]))
    elif which:
        step = int(which)
        if model_runs["rehearsal"] and step not in steps:   # of three: the recipes name step 1 or 2
            step = 1 if step < 40 else 2
    return run, step, {b: path[step] for b, path in run["rows"].items() if step in path}


def per_problem(rows, over):
    """AVG@K and pass@K problem by problem [2, N], with their means over the benchmarks `over`.

    None if one was not measured.
    """
    if not over or any(b not in rows for b in over):
        return None
    right = [torch.tensor(rows[b]["correct_per_problem"], dtype=torch.float64) for b in over]
    scores = [torch.stack([x / rows[b]["k"], (x > 0).double()]) for x, b in zip(right, over)]
    mean_size = sum(map(len, right)) / len(right)           # benchmarks count the same, whatever their size
    return torch.cat([x * (mean_size / x.shape[1]) for x in scores], dim=1)


def seconds_until(model_runs, seed, label, step, paper=False):
    """Seconds that a checkpoint took: rollouts, teacher, own steps; without evaluation and start-up.

    paper: at the price per prompt of its Table 4, on its hardware, in place of this machine's.
    """
    run = model_runs["runs"][label][seed]
    args, sets = run["info"]["args"], rf"seed{seed}/{re.escape(label)}/rollouts(\d+)"
    if paper:
        own = step * args["batch_prompts"] * PAPER_STEP[run["info"]["script"]]
        rollouts = {path: n * PAPER_ROLLOUTS for path, n in model_runs["prompts"].items()}
    else:
        own = sum(m["seconds"] for m in run["metrics"] if m["step"] <= step)
        rollouts = model_runs["seconds"]
    teacher = re.search(rf"/seed{seed}/(.+)/[^/]+$", args.get("teacher", ""))
    if teacher and (source := model_runs["runs"].get(teacher[1], {}).get(seed)):
        return own + seconds_until(model_runs, seed, teacher[1], source["metrics"][-1]["step"], paper)
    online = {int(found[1]): seconds for path, seconds in rollouts.items()
              if (found := re.fullmatch(sets, path))}
    if online:                                              # one set per step
        return own + sum(seconds for number, seconds in online.items() if number <= step)
    first = re.search(r"(seed\w+/.+)$", args["rollouts"])
    return own + rollouts.get(first and first[1], 0.0)


def moved_ratio(moved, least=0.0):
    """How far the student moved the tokens that its teacher moved by `least` nats, as a share of that."""
    bins = [bin for bin in zip(moved["count"], moved["teacher"], moved["student"]) if bin[1] >= least]
    return sum(n * s for n, _, s in bins) / sum(n * t for n, t, _ in bins) if bins else math.nan


def number(model_runs, seed, metric, name, over, each=False, key="avg_at_k"):
    """One number of one checkpoint; None where it was not measured. each: accuracies problem by problem.

    METRIC@BENCHMARK is read on that benchmark, on the model's own where it has only those.
    """
    found = checkpoint(model_runs, seed, name)
    if found is None:
        return None
    run, step, rows = found
    (metric, _, on), own = metric.partition("@"), model_runs["own"]
    if metric == "accuracy" and each:
        return None if (scores := per_problem(rows, over)) is None else scores[0]
    if metric == "accuracy":                                # key: avg_at_k_judge where the paper used a judge
        return statistics.fmean(rows[b][key] for b in over) if over and set(over) <= set(rows) else None
    if metric == "sampling":                                # its standard error from drawing K responses
        return math.hypot(*(rows[b]["se"] for b in over)) / len(over) if set(over) <= set(rows) else None
    if metric in ROW_FIELDS:
        on = on if on in model_runs["scored"] else own[0] if own else over[0]
        on = model_runs["kl"] if metric == "kl" else on
        return rows[on][ROW_FIELDS[metric]] if on in rows else None
    if run is None:                                         # the rest are numbers of runs
        return 0.0 if metric == "paper_hours" else None
    moved = run["info"].get("movement", {})                 # evaluate.py --movement
    if metric == "separation":
        return next((right - wrong for saved, right, wrong in moved.get("path", []) if saved == step), None)
    if metric in ("moved", "far_moved", "far_focus"):   # far: of the tokens that the teacher moved by 1 nat
        whole, far = (moved_ratio(moved, least) for least in (0, 1)) if moved else (None, None)
        return far / whole if moved and metric == "far_focus" else whole if metric == "moved" else far
    if metric in TRAINING:                                  # means of 5 steps: less noise
        values = [m[metric.removeprefix("train_")] for m in run["metrics"] if step - 5 < m["step"] <= step]
        return statistics.fmean(values) if values and None not in values else None
    total = seconds_until(model_runs, seed, name.partition("@")[0], step, metric == "paper_hours")
    if metric in ("hours", "paper_hours"):
        return total / 3600
    if metric == "share_of_time":
        return sum(m["seconds"] for m in run["metrics"] if m["step"] <= step) / total
    raise ValueError(f"paper.json asks for '{metric}', which report.py does not know")


def over_seeds(model_runs, metric, name, over, seeds=None, key="avg_at_k"):
    """The values of a checkpoint over the seeds (all of them by default) that have it; the base has one."""
    seeds = (seeds or model_runs["seeds"])[:1 if name == "base" else None]
    values = [number(model_runs, seed, metric, name, over, key=key) for seed in seeds]
    return [value for value in values if value is not None]


def point(model_runs, seed, name, over, cost="kl"):
    """(KL or paper_hours, AVG@K and pass@K [2, N]) of a checkpoint; None where it was not measured."""
    found = checkpoint(model_runs, seed, name)
    scores = found and per_problem(found[2], over)
    spent = found and number(model_runs, seed, cost, name, over)
    return None if scores is None or spent is None else (spent, scores)


def within(path, limit):
    """What a path [(x, scores [M, n])] reaches within a limit of x (KL, hours): points, and where it crosses.

    Linear between neighbours by x, not by step: a KL may fall again, and is not measured exactly.
    """
    path = sorted(path, key=lambda at: at[0])
    points = [scores for x, scores in path if x <= limit]
    for (x0, first), (x1, second) in itertools.pairwise(path):
        if x0 <= limit < x1:
            points.append(first + (second - first) * (limit - x0) / (x1 - x0))
    return points


def reached(paths, limit):
    """What the best of several paths [(x, scores [M, n])] reaches within a limit of x, per problem [M, n].

    The first of the M scores picks the point on nine tenths of the problems, the other tenth measures it, ten
    times: nobody gains from picking among many, and little is lost.
    """
    points = torch.stack(list(itertools.chain(*(within(path, limit) for path in paths))))   # (points, M, n)
    best = torch.empty_like(points[0])
    tenth = torch.randperm(best.shape[1], generator=torch.Generator().manual_seed(0)) % 10
    for i in range(10):
        picked = points[:, 0, tenth != i].mean(-1).argmax()
        best[:, tenth == i] = points[picked][:, tenth == i]
    return best


def lead(model_runs, seed, student, rivals, over, cost="kl", last=False):
    """AVG@K and pass@K [2, N] of a student less what the best of the rivals' paths reaches within its cost.

    rivals: runs, whose paths begin where they were trained from. last: nothing but their last checkpoint, on
    a straight line. cost: kl or paper_hours. None where a run or a measurement is missing.
    """
    runs, paths = [model_runs["runs"].get(label, {}).get(seed) for label in rivals], [["base"]]
    for label, run in zip(rivals, runs):
        steps = measured(run, over)[-1 if last else 0:] if run else []
        if not steps:
            return None
        paths.append([f"{label}@start", *(f"{label}@{step}" for step in steps)])
    mine = point(model_runs, seed, student, over, cost)
    paths = [[point(model_runs, seed, name, over, cost) for name in path] for path in paths]
    if mine is None or None in itertools.chain(*paths):
        return None
    return mine[1] - reached(paths, mine[0])


@functools.cache
def t_quantile(df, p=0.975):
    """Quantile of Student's t by bisection of its distribution function, which torch.special lacks."""
    low, high = 0.0, 700.0
    for _ in range(60):
        middle = (low + high) / 2
        x = torch.linspace(0, middle, 4001, dtype=torch.float64)
        density = torch.exp(torch.lgamma(torch.tensor((df + 1) / 2)) - torch.lgamma(torch.tensor(df / 2))
                            - (df + 1) / 2 * torch.log1p(x * x / df)) / math.sqrt(df * math.pi)
        low, high = (middle, high) if 0.5 + torch.trapezoid(density, x) < p else (low, middle)
    return low


def mean_se(values):
    """(mean, standard error over seeds, None for one seed)."""
    values = list(values)
    se = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), se
