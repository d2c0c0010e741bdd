"""The report of a folder of runs, and the paper's tables, figures and claims beside what was measured here.

    python evaluate.py --report RUNDIR | --report FOLDER --tables table1 fig6 | --movement RUN

Reads run.json, metrics.jsonl, results.jsonl and rollouts.json, and nothing else; the paper's numbers are in paper.json.
"""
import itertools
import json
import math
import re
import statistics
import sys
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from evaluate import read_results  # noqa: E402
from rollout import InputError, read_json, write_atomic, write_json  # noqa: E402
from teacher import find_old, load_rollouts, score, setup_ddp  # noqa: E402


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
    """Keep in a finished run's run.json which tokens moved: for distill.py the comparison with its teacher (Fig. 7), for teacher.py
    histograms over [0, 1] of pi(a|s) on right and wrong responses, or of PPO's values (Fig. 10), and for SFT, which sees right responses
    only, the mean of both at every saved step (Fig. 9)."""
    path = run / "run.json"
    if not (run / "final").is_dir() or not path.is_file():
        raise InputError(f"{run} is not a finished run of distill.py or teacher.py: it needs run.json and final/")
    info = read_json(path, "give the --out of distill.py or teacher.py")
    args = info["args"]
    if args.get("teacher") in ("none", "old"):
        raise InputError(f"{run} has no teacher checkpoint to compare its student with")
    if "movement" in info:
        return
    options = dict(temperature=args["logp_temperature"], micro_tokens=args["micro_tokens"], trust_remote_code=args["trust_remote_code"])
    rollouts, values = load_rollouts(args["rollouts"]), run / "value" / "values.pt"
    if "teacher" in args:
        student, teacher, old = (score(policy, rollouts, **options) for policy in (run / "final", args["teacher"], find_old(rollouts, args["old"])))
        moved = movement(student, teacher, old)
    else:
        right = (rollouts["reward"] > 0).repeat_interleave(rollouts["response_offsets"].diff())
        tokens = torch.load(values, weights_only=True) if values.exists() else score(run / "final", rollouts, **options).exp()
        moved = {"what": "value of a linear critic" if values.exists() else "pi(a|s) of the trained policy"}
        for kind, mask in (("positive", right), ("negative", ~right)):
            moved[kind] = torch.histc(tokens[mask].float().clamp(0, 1), 25, 0, 1).tolist()
        if args["loss"] == "sft":
            last = len((run / "metrics.jsonl").read_text().splitlines())
            saved = {0: args["model"], **{int(p.name[5:]): p for p in sorted(run.glob("step-????"))}, last: run / "final"}
            probs = {step: score(policy, rollouts, **options).exp() for step, policy in saved.items()}
            moved["path"] = [[step, x[right].mean().item(), x[~right].mean().item()] for step, x in probs.items()]
    if setup_ddp()[0] == 0:
        write_json(path, info | {"movement": moved})


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
        label, update = where[seed.end():] if seed else where, re.search(r"/update(\d+)$", where)
        info, by_seed = json.loads(file.read_text()), runs.setdefault(re.sub(r"/update\d+$", "", label), {})
        if update:                                          # on-policy: every step is a run, and together they are one
            run = by_seed.setdefault(seed[1] if seed else "0", {"info": info, "metrics": [], "path": []})
            run["metrics"] += [m | {"step": int(update[1])} for m in metrics]
            run["path"] += [(int(update[1]), row) for _, row in path]
        else:
            by_seed[seed[1] if seed else "0"] = {"info": info, "metrics": metrics, "path": sorted(path, key=lambda pair: pair[0])}
    return runs


def seeds_of(runs):
    """The seeds that any of the runs of read_runs has, sorted."""
    return sorted({seed for by_seed in runs.values() for seed in by_seed})


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


def report(folder, title=""):
    """Write FOLDER/report.md and FOLDER/figures/*.png; print the table of rounds."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: give the one that holds results.jsonl")
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
    seeds = seeds_of(runs)
    (folder / "figures").mkdir(exist_ok=True)

    text = [f"# Extreme Region Policy Distillation: report of {folder.name}{title and f' ({title})'}\n",
            f"Benchmark `{benchmark}`: {base_row['n_problems']} problems x {base_row['k']} samples at temperature "
            f"{base_row['temperature']:g}, top-p {base_row['top_p']:g}; {len(seeds)} seed(s) of rollouts and training "
            f"({', '.join(seeds)}). With several seeds, ± is the standard error over seeds; *sampling s.e.* is the part that comes from "
            "drawing K responses to fixed problems. KL is the reverse KL to the base, on samples of the evaluated policy.\n"]
    if any(label.startswith("round") for label in runs):
        figure_kl(plt, runs, base_row, folder / "figures" / "kl.png")
        text += ["## Rounds\n", rounds_table(runs, base_row), findings(runs, base_row), "![accuracy against KL](figures/kl.png)\n"]
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


# ---- the paper's tables, figures and claims (tests/paper.json), from runs/MODEL/seedN ------------------------------------

PAPER = Path(__file__).parent / "paper.json"


def read_world(folder):
    """All runs of one model: dict(name, rollouts: 'prompts x responses', scored: benchmarks, kl: the one that KL is read from,
    seconds: {rollouts' path: seconds}, selection: benchmark of @best, base: {benchmark: row}, runs: {benchmark: read_runs},
    rehearsal: whether its rollouts were sampled with --rehearse)."""
    rows, paper = read_results(folder / "results.jsonl"), json.loads(PAPER.read_text())
    benchmarks = list(dict.fromkeys(row["benchmark"] for row in rows))
    base = {row["benchmark"]: row for row in rows if row["model"] == row["base"]}
    scored = [b for b in benchmarks if b in base and b != "kl" and (b != "validation" or len(base) == 1)]
    known = {b for table in paper["tables"].values() for names in (table.get("benchmarks", []), *table.get("benchmarks_of", {}).values()) for b in names}
    seconds, rollouts, rehearsal = {}, "-", False
    for file in folder.glob("seed*/**/rollouts.json"):
        kept = json.loads(file.read_text())
        made, rehearsal = kept["summary"], rehearsal or bool(kept.get("meta", {}).get("rehearsal"))
        if file.parent.name == "rollouts" and file.parent.parent.parent == folder:
            rollouts = f"{made['prompts']:,} x {made['responses'] // made['prompts']}"
        if made["tok_per_s"]:
            seconds[file.parent.relative_to(folder).as_posix()] = made["responses"] * made["mean_length"] / made["tok_per_s"]
    selection = next((b for b in ("validation", paper["selection"]) if b in benchmarks), scored[0] if scored else None)
    return {"name": folder.name, "rollouts": rollouts, "scored": scored, "kl": "kl" if "kl" in benchmarks else scored[0] if scored else None,
            "own": [b for b in scored if b not in known | {paper["selection"]}], "seconds": seconds, "rehearsal": rehearsal,
            "selection": selection, "base": base, "runs": {b: read_runs(folder, rows, b) for b in benchmarks}}


def benchmarks_of(spec, world):
    """The benchmarks whose mean a table, figure or claim reads: those of the paper, measured or not; where a model was measured on
    benchmarks of its own only, as the demonstration world is, those."""
    paper = next((names for model, names in spec.get("benchmarks_of", {}).items() if world["name"].endswith(model)),
                 spec.get("benchmarks", [json.loads(PAPER.read_text())["selection"]]))
    return world["own"] if world["own"] and not set(paper) & set(world["scored"]) else paper


def world_seeds(world):
    return seeds_of(next(iter(world["runs"].values())))


def find_run(world, seed, label):
    return next(iter(world["runs"].values())).get(label, {}).get(seed)


def paths_of(world, seed, label):
    """{benchmark: {step: row}} of a run."""
    return {b: dict(runs[label][seed]["path"]) for b, runs in world["runs"].items()}


def measured_steps(world, seed, label, over):
    """Steps of a run with a row on each of the benchmarks `over`."""
    paths = paths_of(world, seed, label)
    return sorted(set.intersection(*(set(paths.get(b, {})) for b in over)))


def checkpoint(world, seed, name):
    """(run, step, rows by benchmark) of RUN, RUN@STEP, RUN@best, RUN@start or base, as paper.json names them; None: not there."""
    label, _, which = name.partition("@")
    if label == "base":
        return None, 0, world["base"]
    run = find_run(world, seed, label)
    if run is None or not run["metrics"]:
        return None
    steps, paths = [m["step"] for m in run["metrics"]], paths_of(world, seed, label)
    step = steps[-1]
    if which == "start":
        parent = re.search(r"/seed\w+?/(.+)/(final|step-(\d+))$", run["info"]["args"]["model"])
        return checkpoint(world, seed, parent[1] + (f"@{int(parent[3])}" if parent[3] else "")) if parent else checkpoint(world, seed, "base")
    if which == "best":                                     # the earliest of equals
        step = max(paths.get(world["selection"], {}).items(), key=lambda pair: (pair[1]["avg_at_k"], -pair[0]), default=(step, None))[0]
    elif which:
        step = int(which)
        if world["rehearsal"] and step not in steps:        # of three: the recipes name step 1 or 2
            step = 1 if step < 40 else 2
    return run, step, {b: path[step] for b, path in paths.items() if step in path}


def seconds_until(world, seed, label, step):
    """Seconds that a checkpoint took: its rollouts, its teacher, and its own steps; evaluation and start-up are not counted."""
    run = find_run(world, seed, label)
    own = sum(m["seconds"] for m in run["metrics"] if m["step"] <= step)
    teacher = re.search(rf"/seed{seed}/(.+)/[^/]+$", run["info"]["args"].get("teacher", ""))
    if teacher and (source := find_run(world, seed, teacher[1])):
        return own + seconds_until(world, seed, teacher[1], source["metrics"][-1]["step"])
    online = {int(found[1]): seconds for path, seconds in world["seconds"].items()                  # on-policy: one set per step
              if (found := re.fullmatch(rf"seed{seed}/{re.escape(label)}/rollouts(\d+)", path))}
    if online:
        return own + sum(seconds for number, seconds in online.items() if number <= step)
    first = re.search(r"(seed\w+/.+)$", run["info"]["args"]["rollouts"])
    return own + world["seconds"].get(first and first[1], 0.0)


def accuracy(rows, over, drawn=None, key="avg_at_k"):
    """AVG@K, the mean over the benchmarks `over`, None if one was not measured; with `drawn` {benchmark: weights of the problems
    [D, n]} one value per draw [D]. key: avg_at_k_judge where the paper used a judge."""
    if not over or any(b not in rows for b in over):
        return None
    if drawn is None:
        return statistics.fmean(rows[b][key] for b in over)
    scores = [torch.tensor(rows[b]["correct_per_problem"], dtype=torch.float64) / rows[b]["k"] for b in over]
    return sum(drawn[b] @ score for b, score in zip(over, scores)) / len(over)


def number(world, seed, metric, name, over, drawn=None, key="avg_at_k"):
    """One number of one checkpoint; None where it was not measured. Only accuracies depend on `drawn`; `over`: their benchmarks.

    METRIC@BENCHMARK is read on that benchmark (on its own where the world has only benchmarks of its own).
    """
    found = checkpoint(world, seed, name)
    if found is None:
        return None
    run, step, rows = found
    label, (metric, _, on) = name.partition("@")[0], metric.partition("@")
    at = [m for m in (run["metrics"] if run else []) if step - 5 < m["step"] <= step]                 # 5 steps: less noise
    if metric == "accuracy":
        return accuracy(rows, over, drawn, key)
    if metric in ("kl", "entropy", "length"):
        row = rows.get(world["kl"] if metric == "kl" else on if on in world["scored"] else world["own"][0] if world["own"] else over[0])
        return row and row[{"length": "mean_length"}.get(metric, metric)]
    if metric == "separation":                              # of SFT, from evaluate.py --movement
        path = run["info"].get("movement", {}).get("path", []) if run else []
        return next((right - wrong for saved, right, wrong in path if saved == step), None)
    if metric in ("prob_pos", "prob_neg", "explained_variance", "train_entropy"):
        values = [m[metric.removeprefix("train_")] for m in at]
        return statistics.fmean(values) if values and None not in values else None
    if metric in ("far_ratio", "far_over_near"):            # tokens that the teacher moved by at least 1 nat, and by less than 0.1
        moved = run["info"].get("movement")
        if not moved:
            return None
        def ratio(low, high):
            bins = [(n, t, s) for n, t, s in zip(moved["count"], moved["teacher"], moved["student"]) if low <= t < high]
            return sum(n * s for n, _, s in bins) / sum(n * t for n, t, _ in bins) if bins else math.nan
        return ratio(1, math.inf) - (ratio(0, 0.1) if metric == "far_over_near" else 0)
    if run is None:                                         # the base took no time
        return None
    total = seconds_until(world, seed, label, step)
    if metric == "hours":
        return total / 3600
    if metric == "rest_of_time":
        return 1 - sum(m["seconds"] for m in run["metrics"] if m["step"] <= step) / total
    if metric == "gain_per_hour":
        mine = accuracy(rows, over, drawn)
        return None if mine is None else (mine - accuracy(world["base"], over, drawn)) * 3600 / total
    raise ValueError(f"paper.json asks for '{metric}', which evaluate.py does not know")


def accuracy_within(points, kl):
    """The highest accuracy on a path, straight between its points, at a KL of at most `kl`; None if all of it is beyond."""
    found = [a for k, a in points if k <= kl]
    for (k0, a0), (k1, a1) in itertools.pairwise(points):
        if min(k0, k1) <= kl < max(k0, k1):
            found.append(a0 + (a1 - a0) * (kl - k0) / (k1 - k0))
    return max(found, default=None)


def ahead(world, seed, student, rivals, over, drawn, last_only):
    """The student's accuracy minus the best that a rival's path has within the student's KL, per draw [D]; rivals start at the base."""
    kl, mine = number(world, seed, "kl", student, over), number(world, seed, "accuracy", student, over, drawn)
    paths = []
    for label in rivals:
        steps = measured_steps(world, seed, label, over)[-1 if last_only else 0:] if find_run(world, seed, label) else []
        names = ["base", *(f"{label}@{step}" for step in steps)]
        paths.append([(number(world, seed, "kl", name, over), number(world, seed, "accuracy", name, over, drawn)) for name in names])
    if kl is None or mine is None or not all(len(path) > 1 and all(k is not None for k, _ in path) for path in paths):
        return None
    best = []
    for d in range(len(mine)):
        reached = [accuracy_within([(k, a[d].item()) for k, a in path], kl) for path in paths]
        best.append(max(a for a in reached if a is not None))                       # the base is within any KL
    return mine - torch.tensor(best, dtype=torch.float64)


def test_value(world, seed, test, over, drawn):
    """What a test of a claim says should be above 0, for one seed, per draw [D]; None if a run is missing."""
    plus, minus, metric = test["plus"], test["minus"], test["metric"]
    draws = len(next(iter(drawn.values())))
    if metric in ("ahead", "ahead_of_last"):
        return ahead(world, seed, plus[0], minus, over, drawn, metric == "ahead_of_last")
    of = "accuracy" if metric in ("spread", "gain_with_length") else metric
    values = [number(world, seed, of, name, over, drawn) for name in plus + minus]
    if any(value is None or isinstance(value, float) and math.isnan(value) for value in values):
        return None
    values = torch.stack([torch.as_tensor(value, dtype=torch.float64).expand(draws) for value in values])
    first, second = values[:len(plus)], values[len(plus):]
    if metric == "spread":
        return first.amax(0) - first.amin(0) - second.amax(0) + second.amin(0)
    return first.sum(0) - second.sum(0) - test.get("above", 0.0)


DRAWS = 1000


def bootstrap(per_seed, generator):
    """(mean, low, high): the 95 % interval of the mean over seeds. per_seed [S, D]: each seed's value in each draw of the problems,
    of which the first draw is the problems as they are. Seeds are drawn too, with the factor sqrt(S / (S - 1)) that S draws of S
    values lack; one seed tells nothing about seeds."""
    n = len(per_seed)
    centre, values = per_seed.mean(0), per_seed
    if n > 1:
        picked = torch.randint(n, per_seed.shape, generator=generator)
        values = (per_seed.gather(0, picked).mean(0) - centre) * math.sqrt(n / (n - 1)) + centre
    else:
        values = centre
    low, high = values[1:].quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    if n == 1 and low == high:                              # one seed of a number that does not depend on the problems: no noise is known
        low, high = -math.inf, math.inf
    return centre[0].item(), low, high


def verdict(low, high):
    return "holds" if low > 0 else "does not hold" if high < 0 else "undecided"


def draw_problems(world, generator):
    """{benchmark: how often each problem is drawn [D, n]}, the first row each once."""
    drawn = {}
    for b in world["scored"]:
        n = world["base"][b]["n_problems"]
        picks = torch.randint(n, (DRAWS, n), generator=generator)
        drawn[b] = torch.zeros(DRAWS, n, dtype=torch.float64).scatter_add_(1, picks, torch.ones(DRAWS, n, dtype=torch.float64)) / n
        drawn[b][0] = 1 / n
    return drawn


def decide(claim, worlds, paper):
    """(verdict, [(test, where, number of seeds, mean, low, high)]): holds where all tests hold, in every model that has their runs.

    Accuracies are read on the benchmarks of the first of the claim's tables or figures that a model was measured on completely.
    """
    lines = []
    for test in claim["tests"]:
        generator, slopes = torch.Generator().manual_seed(0), []
        for world in worlds:
            sets = [benchmarks_of(paper["tables"].get(name) or paper["figures"][name], world) for name in claim["where"]]
            over = next((names for names in sets if set(names) <= set(world["scored"])), None)
            if not over:
                continue
            drawn = draw_problems(world, generator)
            per_seed = [value for seed in world_seeds(world) if (value := test_value(world, seed, test, over, drawn)) is not None]
            if per_seed and test["metric"] == "gain_with_length":
                slopes.append((world["base"][over[0]]["mean_length"], torch.stack(per_seed)))
            elif per_seed:
                lines.append((test, world["name"], len(per_seed), *bootstrap(torch.stack(per_seed), generator)))
        if len(slopes) > 1:                                 # accuracy gained per unit of log length, least squares over models
            slopes = [(math.log(length), gains) for length, gains in slopes]
            middle, seeds = statistics.fmean(length for length, _ in slopes), min(len(gains) for _, gains in slopes)
            slope = sum((length - middle) * gains[:seeds] for length, gains in slopes) / sum((length - middle) ** 2 for length, _ in slopes)
            lines.append((test, "over " + ", ".join(world["name"] for world in worlds), seeds, *bootstrap(slope, generator)))
    verdicts = [verdict(low, high) for *_, low, high in lines]
    if not lines or len({id(test) for test, *_ in lines}) < len(claim["tests"]):
        return "not run here", lines
    return "does not hold" if "does not hold" in verdicts else "undecided" if "undecided" in verdicts else "holds", lines


def claim_text(claim, decided):
    """One claim as text: its verdict, and every test with its number and interval."""
    answer, lines = decided
    text = [f"* **Claim {claim['number']}: {claim['text']}: {answer}.**"]
    for test, where, seeds, mean, low, high in lines:
        what = f"{test['metric'].replace('_', ' ')}: {' + '.join(test['plus'])}"
        what += f" minus {' + '.join(test['minus'])}" if test["minus"] else ""
        what += f" minus {test['above']:g}" if "above" in test else ""
        text.append(f"  * {what} = {mean:+.4f}, 95 % from {low:+.4f} to {high:+.4f} "
                    f"({where}, {seeds} seed{'s' * (seeds > 1)}): {verdict(low, high)}")
    return "\n".join(text) + "\n"


def noise_lines(world):
    """How much data a model's numbers rest on, and the standard errors that it gives, one line per benchmark."""
    lines = []
    for b in world["scored"]:
        last = [list(last_rows(by_seed).values()) for by_seed in world["runs"][b].values()]
        sampling = [row["se"] for rows in last for row in rows]
        over = [se for rows in last if rows and (se := mean_se(row["avg_at_k"] for row in rows)[1]) is not None]
        base = world["base"][b]
        lines.append([world["name"], world["rollouts"], b, f"{base['n_problems']} x {base['k']}", len(world_seeds(world)),
                      *(f"{statistics.median(se):.4f}" if se else "-" for se in (sampling, over))])
    return lines


def over_seeds(world, metric, name, over, seeds=None, key="avg_at_k"):
    """The values of a checkpoint over the seeds (all of them by default) that have it; the base has one."""
    seeds = seeds or world_seeds(world)
    values = [number(world, seed, metric, name, over, key=key) for seed in (seeds[:1] if name == "base" else seeds)]
    return [value for value in values if value is not None]


COLUMNS = {"accuracy": "AVG@K", "kl": "KL (nats/token)", "entropy": "entropy (nats)", "length": "length (tokens)", "hours": "hours so far"}
DIGITS = {"kl": 4, "hours": 4, "length": 1}


def our_columns(spec, world):
    """[(header, metric, benchmarks, key)] of a table: a column per benchmark and their mean, then the other metrics."""
    over = benchmarks_of(spec, world)
    names = [name for _, name, *_ in spec["rows"]]
    rows = [found[2][b] for seed in world_seeds(world) for name in names if (found := checkpoint(world, seed, name)) for b in over if b in found[2]]
    judged = spec.get("judge") and rows and all(row.get("avg_at_k_judge") is not None for row in rows)
    columns = []
    for metric in spec["metrics"]:
        kind, _, on = metric.partition("@")
        if kind == "accuracy":
            sets = [[b] for b in [*over, *(b for b in world["own"] if b not in over)]] + ([over] if len(over) > 1 else [])
            label = COLUMNS[kind] + (" with the judge" if judged else "")
            columns += [(f"{label}, {names[0] if len(names) == 1 else 'mean'}", metric, names, "avg_at_k_judge" if judged else "avg_at_k") for names in sets]
        else:
            columns.append((COLUMNS[kind] + (f", {on}" if on in world["scored"] else ""), metric, over, "avg_at_k"))
    return columns


def paper_columns(spec, world):
    """[(header, model, position)] of the paper's numbers: those of this model; for a model that is not the paper's, of all models.
    Its benchmarks one by one only where this model was measured on them."""
    models = list(dict.fromkeys(model for _, _, *numbers in spec["rows"] for model in (numbers[0] if numbers else {})))
    mine = max((model for model in models if model in world["name"]), key=len, default=None)
    shown = []
    for model in [mine] if mine else models:
        labels = next((labels for suffix, labels in spec.get("columns_of", {}).items() if model.endswith(suffix)), spec["columns"])
        alone = [i for i, label in enumerate(labels) if label not in spec.get("benchmarks", [])] or list(range(len(labels)))
        shown += [(f"paper, {model}: {labels[i]}", model, i) for i in (range(len(labels)) if set(labels) & set(world["scored"]) else alone)]
    return shown


def paper_table(spec, worlds):
    """A table of the paper as markdown, one per model: what the runs gave, and the paper's numbers to the right."""
    text = []
    for world in worlds:
        ours, theirs = our_columns(spec, world), paper_columns(spec, world)
        lines, found = [], False
        for label, name, *numbers in spec["rows"]:
            cells = [cell(over_seeds(world, metric, name, over, key=key), DIGITS.get(metric.partition("@")[0], 3)) for _, metric, over, key in ours]
            found |= name != "base" and any(text != "-" for text in cells)
            given = numbers[0] if numbers else {}
            lines.append([label, *cells, *(given[model][i] if model in given and i < len(given[model]) else "" for _, model, i in theirs)])
        if found:
            text.append(f"{world['name']}:\n\n" + markdown_table(["", *(header for header, *_ in ours), *(header for header, *_ in theirs)], lines))
    return "\n".join(text)


METHODS = {"base": "#444444", "ce": "#1f77b4", "ce-1e2": "#e0a030", "ce-1e2-live": "#b03a48", "ce-kl": "#8a8a8a",
           "ce-kl-5": "#bab0ac", "sapo": "#d6409f", "ppo": "#9c755f", "mse": "#7a5195", "online": "#3a9d5d", "offline": "#d6409f",
           "unlearned-a": "#76b7b2", "unlearned-b": "#b07aa1", "unlearned-c": "#e15759"}
AXES = {"accuracy": "AVG@K", "kl": "reverse KL to the base (nats per token)", "prob_pos": "mean probability, right responses",
        "prob_neg": "mean probability, wrong responses", "train_entropy": "entropy on the rollouts (nats per token)",
        "explained_variance": "explained variance of the reward", "separation": "mean probability: right minus wrong responses"}


def settings_table(worlds):
    """The flags of every run, from the run.json of its first seed in the first model that has it."""
    lines = {}
    for world in worlds:
        for label, by_seed in next(iter(world["runs"].values())).items():
            run = next(iter(by_seed.values()))
            args = run["info"]["args"]
            policies = ["model"] if "loss" in args else ["student", "teacher", "denominator"]
            start, *signal = (re.sub(r".*/seed\w+/|.*/(?=base$)", "", str(args[key])) for key in policies)
            shown = ["lr", "batch_prompts"] + (["loss"] if "loss" in args else ["positive_signal"])
            shown += {"ce": ["beta", "ref"], "mse": ["negative_weight"]}.get(args.get("loss"), [])
            shown += (["kl_coef", "kl_kind"] if args["kl_coef"] else []) + (["entropy_coef"] if args.get("entropy_coef") else [])
            flags = " ".join(f"--{key.replace('_', '-')} {args[key]}" for key in shown)
            lines.setdefault(label, [label, start, " / ".join(signal) or "-", flags, len(run["metrics"])])
    return markdown_table(["run", "starts from", "teacher / denominator", "flags", "steps"], lines.values())


def method_style(label):
    """Colour and line of a run. The colour is that of the longest name in METHODS that the run's name starts with, in every figure."""
    names = [name for name in METHODS if label.startswith(name)]
    return dict(color=METHODS[max(names, key=len)] if names else "#000000", label=label,
                linestyle="--" if "student" in label or "live" in label else "-")


def movements(world, label):
    """What evaluate.py --movement wrote into the run.json of each seed."""
    runs = [run for seed in world_seeds(world) if (run := find_run(world, seed, label))]
    return [run["info"]["movement"] for run in runs if "movement" in run["info"]]


def draw_movement(axes, panel, world, over):
    """How far the student's log-probs moved for tokens that the teacher moved this far (Fig. 7b), first seed."""
    drawn = [(label, moved[0]) for label in panel["runs"] if (moved := movements(world, label))]
    for label, moved in drawn:
        axes.loglog(moved["teacher"], moved["student"], marker="s" if "live" in label else "o", markersize=3, **method_style(label))
    axes.plot((1e-4, 10), (1e-4, 10), ":", color=METHODS["base"], label="as far as the teacher")
    axes.set(xlabel="|log teacher - log old| (mean of a bin, nats)", ylabel="|log student - log old| (nats)",
             title="first seed, final step")
    return bool(drawn)


def draw_histogram(axes, panel, world, over):
    """Probabilities, or values, of tokens of right and wrong responses (Fig. 10), all seeds together."""
    label, = panel["runs"]
    moved = movements(world, label)
    for response, name, colour in (("positive", "right responses", "#2f7d4f"), ("negative", "wrong responses", "#b03a48")):
        counts = [sum(bins) for bins in zip(*(m[response] for m in moved))]
        centres = [(i + 0.5) / len(counts) for i in range(len(counts))]
        axes.step(centres, [count / sum(counts) for count in counts], where="mid", label=name, color=colour)
    axes.set(yscale="log", xlabel=moved[0]["what"] if moved else "", ylabel="share of tokens", title=label)
    return bool(moved)


def draw_paths(axes, panel, world, over):
    """One quantity of several runs over their steps or the KL: evaluated checkpoints with error bars, or all training steps with a band."""
    drawn, training, over_kl = False, panel["y"] not in ("accuracy", "kl", "separation"), panel.get("x") == "kl"
    for label in panel["runs"]:
        runs = {seed: run for seed in world_seeds(world) if (run := find_run(world, seed, label))}
        if not runs:
            continue
        measured = {seed: measured_steps(world, seed, label, over) for seed in runs}
        most = max(map(len, measured.values()))
        runs = {seed: run for seed, run in runs.items() if len(measured[seed]) >= most / 2}         # not those of which only the end is known
        steps = [m["step"] for m in next(iter(runs.values()))["metrics"]] if training else [0, *sorted(set.intersection(*(set(measured[s]) for s in runs)))]
        names = {step: f"{label}@{step}" if step else "base" for step in steps}
        if panel["y"] == "separation":
            names = {step: f"{label}@{step}" for moved in movements(world, label) for step, *_ in moved.get("path", [])}
        points = [(statistics.fmean(over_seeds(world, "kl", name, over, list(runs))) if over_kl and step else step, *mean_se(values))
                  for step, name in names.items() if (values := over_seeds(world, panel["y"], name, over, list(runs)))]
        if not points:
            continue
        x, y, se = zip(*((x, mean, se or 0.0) for x, mean, se in points))
        style, drawn = method_style(label), True
        if training:
            axes.plot(x, y, **style)
            low, high = zip(*((mean - e, mean + e) for mean, e in zip(y, se)))
            axes.fill_between(x, low, high, color=style["color"], alpha=0.2, linewidth=0)
        else:
            student = style["linestyle"] == "--"
            axes.errorbar(x, y, yerr=se, marker="*" if student else "o", markersize=9 if student else 4, capsize=2, **style)
    axes.set(xlabel=AXES["kl"] if over_kl else "optimizer step", ylabel=AXES[panel["y"]])
    if not over_kl:
        axes.xaxis.get_major_locator().set_params(integer=True)
    if panel["y"] == "accuracy" and drawn:
        axes.axhline(accuracy(world["base"], over), color=METHODS["base"], linestyle=":", label="base")
    return drawn


def draw_chains(axes, panel, world, over):
    """Accuracy of checkpoints that follow one another (Fig. 8)."""
    drawn, named = False, set()
    for label, chain in panel["chains"].items():
        values = [over_seeds(world, "accuracy", name, over) for name in chain]
        if not all(values):
            continue
        means, drawn = [mean_se(v) for v in values], True
        later = bool(named)                                 # drawn a little to the right, named above instead of below
        x = [i + 0.06 * later for i in range(len(chain))]
        axes.errorbar(x, [m for m, _ in means], yerr=[se or 0.0 for _, se in means], marker="o", capsize=2,
                      **method_style(label) | {"linestyle": "-"})
        for i, name in enumerate(chain):
            if name not in named:                           # chains share their first checkpoints
                axes.annotate(name.split("/")[0], (x[i], means[i][0]), xytext=(6, 8 if later else -12), textcoords="offset points", fontsize=7)
        named |= set(chain)
        axes.set_xticks(range(len(chain)))
    axes.set(xlabel="phase", ylabel=AXES["accuracy"])
    axes.margins(0.12)
    return drawn


def draw_panel(axes, panel, world, over):
    """One panel of a figure of the paper; False if no run has what it shows."""
    draw = {"movement": draw_movement, "histogram": draw_histogram, "chains": draw_chains}.get(panel.get("kind"), draw_paths)
    drawn = draw(axes, panel, world, over)
    axes.grid(alpha=0.25)
    if drawn:
        axes.legend(fontsize=7)
    return drawn


def paper_figure(plt, name, spec, worlds, folder):
    """FOLDER/NAME-MODEL.png for every model that has the runs; returns the markdown that shows them."""
    text, count = [], len(spec["panels"])
    high, wide = (2, 2) if count == 4 else (1, count)       # four in a row are too small to read
    for world in worlds:
        figure, panels = plt.subplots(high, wide, figsize=(4.8 * wide if wide > 1 else 8, 3.6 * high + 0.4), squeeze=False)
        over = benchmarks_of(spec, world)
        if any([draw_panel(axes, panel, world, over) for axes, panel in zip(panels.flat, spec["panels"])]):
            figure.tight_layout()
            figure.savefig(folder / f"{name}-{world['name']}.png", dpi=100)
            text.append(f"![{spec['title']}, {world['name']}](figures/{name}-{world['name']}.png)\n")
        plt.close(figure)
    return text


def report_tables(folder, names, runs, title="", models=None):
    """Write FOLDER/report.md: tables and figures of the paper, ours beside the paper's, and its claims with a verdict from the data.

    models: folders of `runs`, all by default. Runs are shared: beside those of a table stand what others needed of other models.
    """
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    paper = json.loads(PAPER.read_text())
    paths = [path.parent for path in sorted(Path(runs).glob("*/results.jsonl")) if not models or path.parent.name in models]
    worlds = [world for path in paths if (world := read_world(path))["base"]]
    if not worlds:
        raise InputError(f"{runs} has no MODEL/results.jsonl with a row of its base: ./run_rounds.sh tableN makes them")
    if unknown := set(names) - set(paper["tables"]) - set(paper["figures"]):
        raise InputError(f"--tables {' '.join(unknown)}: the paper has {' '.join([*paper['tables'], *paper['figures']])}")
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    claims = [claim for claim in paper["claims"] if set(claim["where"]) & set(names)]
    decided = {claim["number"]: decide(claim, worlds, paper) for claim in tqdm(claims, desc="claims", leave=False)}
    noise, summary = [line for world in worlds for line in noise_lines(world)], []
    for claim in claims:
        answer, tests = decided[claim["number"]]
        numbers = "; ".join(f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]" for *_, mean, low, high in tests)
        summary.append([claim["number"], claim["text"], answer, numbers])
    rehearsed = [world["name"] for world in worlds if world["rehearsal"]]
    first = f"**REHEARSAL of {', '.join(rehearsed)}: a few prompts, tokens and steps, with made-up rewards. Its numbers mean nothing.**\n\n" if rehearsed else ""
    text = [f"{first}# Tables and figures of arXiv 2605.25582{title and f' ({title})'}\n",
            "Columns that start with *paper* and captions that say so hold the paper's numbers, of its own models and benchmarks: "
            "compare order and direction, not values. Everything else was measured here; ± is the standard error over seeds. KL is the "
            "reverse KL to the base, on the policy's own samples.\n",
            "A claim **holds** where each of its tests lies above 0 with its whole 95 % interval, **does not hold** where one lies below "
            f"0 with all of it, and is **undecided** otherwise: {DRAWS} bootstrap draws of seeds and problems. KL, entropy, length, time "
            "and probabilities vary over seeds only; two or three seeds make a rough interval. `RUN@best` is the checkpoint that is best on the "
            f"selection benchmark, `validation` on the demonstration world and `{paper['selection']}` elsewhere (Sec. 4.1). A benchmark that a checkpoint "
            "was not measured on is -, and so is the mean. Probabilities, entropy on the rollouts and explained variance are means of 5 steps.\n",
            markdown_table(["model", "prompts x responses", "benchmark", "problems x samples", "seeds", "AVG@K of a checkpoint: s.e. from sampling",
                            "s.e. over seeds (median)"], noise),
            "## Claims\n", markdown_table(["claim", "", "verdict", "decided by"], summary)]
    for name in names:
        spec = paper["tables"].get(name) or paper["figures"][name]
        text.append(f"## {'Table' if name in paper['tables'] else 'Figure'} {re.sub(r'[a-z]+', '', name)}. {spec['title']}\n")
        text.append(f"Paper: {spec['paper']}.\n")
        text += [paper_table(spec, worlds)] if name in paper["tables"] else paper_figure(plt, name, spec, worlds, folder / "figures")
        text += [claim_text(claim, decided[claim["number"]]) for claim in claims if name in claim["where"]]
    if "table11" in names and not any(world["name"].endswith("-code") for world in worlds):
        text.append("The code half of Table 11 was not run here.\n")
    text += ["## Settings\n", "Names of runs hold the paper's numbers; these are the flags that were used, here in the first seed.\n", settings_table(worlds)]
    write_atomic(folder / "report.md", lambda p: p.write_text("\n".join(text)))
    print("\n".join(text[4:6] if len(names) > 3 else text[4:-3]))
    print(f"report: {folder / 'report.md'}   figures: {folder / 'figures'}")
