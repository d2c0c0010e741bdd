"""
Reports on finished runs: tables and figures beside the paper's, its claims, the rounds of a demonstration.

    python evaluate.py --report runs/tables/all --tables table1 fig6     # what they show is in paper.json
    python evaluate.py --report runs/demo                                # the same; "reports" there

Reading runs and naming checkpoints: runs.py, which explains `model_runs` and `over`. What Fig. 7, 9 and 10
draw is put into the runs by movement.py. evaluate.py starts this file and is not imported.
"""
import itertools
import math
import re
import statistics

from matplotlib.figure import Figure

from claims import NOISE, RULE, claim_row, claim_text, decide, noise_lines, pool
from reads import PAPER, SPECS
from rollout import InputError, write_atomic
from runs import (TRAINING, benchmarks_for, checkpoint, lead, mean_se, measured, over_seeds,
                  read_model, t_quantile)

DIGITS = {"kl": 4, "hours": 4, "length": 1}
COLUMNS = {"accuracy": "AVG@K", "kl": "KL (nats/token)", "entropy": "entropy (nats)",
           "length": "length (tokens)", "hours": "hours so far"}
AXES = {"accuracy": "AVG@K", "pass": "pass@K", "kl": "reverse KL to the base (nats per token)",
        "prob_pos": "mean probability, right responses", "prob_neg": "mean probability, wrong responses",
        "train_entropy": "entropy on the rollouts (nats per token)",
        "explained_variance": "explained variance of the reward",
        "separation": "mean probability: right minus wrong responses"}
PALETTE = {"base": "#444444", "right": "#2f7d4f", "wrong": "#b03a48", "teacher": "#d1603d",
           "student": "#1f6f8b", "control": "#8a8a8a", "ce": "#1f77b4", "ce-1e2": "#e0a030", "mse": "#7a5195",
           "ce-1e2-live": "#b03a48", "ce-5e2": "#59a14f", "ce-kl": "#8a8a8a", "ce-kl-5": "#76b7b2",
           "ce-kl-exact": "#6b3d2e", "sapo": "#d6409f", "ppo": "#9c755f", "online": "#3a9d5d",
           "offline": "#d6409f", "unlearned-a": "#76b7b2", "unlearned-b": "#b07aa1", "unlearned-c": "#e15759"}


# ---- tables ------------------------------------------------------------------------------------------------

def markdown_table(header, lines):
    """Lines of cells under a header, as markdown."""
    lines = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def cell(values, digits=3, count=False):
    """'mean ± standard error over seeds' as table text, with their number if it is asked for."""
    if not values:
        return "-"
    mean, se = mean_se(values)
    text = f"{mean:.{digits}f}" + (f" ± {se:.{digits}f}" if se is not None else "")
    return text + (f" ({len(values)})" if count else "")


def cells(model_runs, name, columns, count=False):
    """The cells of one checkpoint; columns: (metric, benchmarks, key of the accuracy)."""
    texts = []
    for metric, over, key in columns:
        values = over_seeds(model_runs, metric, name, over, key=key)
        if metric == "sampling" and values:                 # of the mean over seeds
            values = [math.hypot(*values) / len(values)]
        texts.append(cell(values, DIGITS.get(metric.partition("@")[0], 3), count and name != "base"))
    return texts


def our_columns(name, model_runs):
    """[(header, metric, benchmarks, key)] of a table: benchmarks, their mean, the other metrics."""
    spec, over, own = SPECS[name], benchmarks_for(name, model_runs), model_runs["own"]
    found = [checkpoint(model_runs, seed, row) for seed in model_runs["seeds"] for _, row, *_ in spec["rows"]]
    rows = [rows[b] for _, _, rows in filter(None, found) for b in over if b in rows]
    judged = spec.get("judge") and rows and all(row.get("avg_at_k_judge") is not None for row in rows)
    key, columns = "avg_at_k_judge" if judged else "avg_at_k", []
    for metric in spec["metrics"]:
        kind, _, on = metric.partition("@")
        if kind == "accuracy":
            label = COLUMNS[kind] + (" with the judge" if judged else "")
            columns += [(f"{label}, {b}", metric, [b], key) for b in dict.fromkeys([*over, *own])]
            columns += [(f"{label}, mean", metric, over, key)] if len(over) > 1 else []
        else:
            header = COLUMNS[kind] + (f", {on}" if on in model_runs["scored"] else "")
            columns.append((header, metric, over, "avg_at_k"))
    return columns


def paper_columns(name, model_runs):
    """[(header, model, position)] of the paper's numbers: of this model, or of all if it is not the paper's.

    Its benchmarks one by one only where this model was measured on them.
    """
    spec, shown = SPECS[name], []
    given = (row[2] for row in spec["rows"] if len(row) > 2)
    models = list(dict.fromkeys(itertools.chain(*given)))
    mine = max((model for model in models if model in model_runs["name"]), key=len, default=None)
    for model in [mine] if mine else models:
        by_model = (labels for suffix, labels in spec.get("columns_of", {}).items() if model.endswith(suffix))
        labels = next(by_model, spec["columns"])
        alone = [i for i, label in enumerate(labels) if label not in spec.get("benchmarks", [])]
        if set(labels) & set(model_runs["scored"]) or not alone:
            alone = range(len(labels))
        shown += [(f"paper, {model}: {labels[i]}", model, i) for i in alone]
    return shown


def paper_table(name, models):
    """A table of the paper as markdown: ours, and the paper's to the right; one per model, but none for a
    model that, for other tables, has run less than half of the rows that another one has."""
    text = []
    for model_runs in models:
        ours, theirs = our_columns(name, model_runs), paper_columns(name, model_runs)
        lines, measured_rows = [], 0
        for label, row, *given in SPECS[name]["rows"]:
            mine = cells(model_runs, row, [column[1:] for column in ours], count=True)
            given = given[0] if given else {}
            measured_rows += row != "base" and set(mine) != {"-"}
            paper = [given[model][i] if i < len(given.get(model, [])) else "" for _, model, i in theirs]
            lines.append([label, *mine, *paper])
        header = ["", *(header for header, *_ in ours + theirs)]
        text.append((measured_rows, f"{model_runs['name']}:\n\n" + markdown_table(header, lines)))
    most = max((rows for rows, _ in text), default=0)
    return ["\n".join(table for rows, table in text if rows and 2 * rows >= most)]


def settings_table(models):
    """The flags of every run, from the run.json of its first seed in the first model that has it."""
    lines = {}
    for label, by_seed in itertools.chain(*(model_runs["runs"].items() for model_runs in models)):
        run = next(iter(by_seed.values()))
        args = run["info"]["args"]
        policies = ["model"] if "loss" in args else ["student", "teacher", "denominator"]
        start, *signal = (re.sub(r".*/seed\w+/|.*/(?=base$)", "", str(args[key])) for key in policies)
        shown = ["lr", "batch_prompts"] + (["loss"] if "loss" in args else ["positive_signal"])
        shown += {"ce": ["beta", "ref"], "mse": ["negative_weight"]}.get(args.get("loss"), [])
        shown += ["kl_coef", "kl_kind"] if args["kl_coef"] else []
        shown += ["entropy_coef"] if args.get("entropy_coef") else []
        flags = " ".join(f"--{key.replace('_', '-')} {args[key]}" for key in shown)
        lines.setdefault(label, [label, start, " / ".join(signal) or "-", flags, len(run["metrics"])])
    return markdown_table(["run", "starts from", "teacher / denominator", "flags", "steps"], lines.values())


# ---- figures -----------------------------------------------------------------------------------------------

def style(name, label=None):
    """Colour, line and legend of a run: that of the longest name in PALETTE it starts with."""
    names = [known for known in PALETTE if name.startswith(known)]
    return dict(color=PALETTE[max(names, key=len)] if names else "#000000", label=label or name,
                linestyle="--" if "student" in name or "live" in name else "-")


def runs_of(named, model_runs):
    """[(label, name in the legend)] of the runs of a panel: labels, or {name: pattern of labels}."""
    named = named if isinstance(named, dict) else {label: re.escape(label) for label in named}
    return [(label, name) for name, pattern in named.items()
            for label in model_runs["runs"] if re.fullmatch(pattern, label)]


def movements(model_runs, label):
    """What movement.py wrote into the run.json of each seed."""
    by_seed = sorted(model_runs["runs"].get(label, {}).items())
    return [run["info"]["movement"] for _, run in by_seed if "movement" in run["info"]]


def draw_movement(axes, panel, model_runs, over):
    """How far the student moved the tokens that the teacher moved this far (Fig. 7b), first seed."""
    drawn = [(label, moved[0]) for label in panel["runs"] if (moved := movements(model_runs, label))]
    for label, moved in drawn:
        marker = "s" if "live" in label else "o"
        axes.loglog(moved["teacher"], moved["student"], marker=marker, markersize=3, **style(label))
    axes.plot((1e-4, 10), (1e-4, 10), ":", color=PALETTE["base"], label="as far as the teacher")
    axes.set(xlabel="|log teacher - log old| (mean of a bin, nats)", ylabel="|log student - log old| (nats)",
             title="first seed, final step")
    return bool(drawn)


def draw_histogram(axes, panel, model_runs, over):
    """Probabilities, or values, of tokens of right and wrong responses (Fig. 10), all seeds together."""
    label, = panel["runs"]
    moved = movements(model_runs, label)
    for response, name in (("positive", "right"), ("negative", "wrong")):
        counts = [sum(bins) for bins in zip(*(m[response] for m in moved))]
        centres = [(i + 0.5) / len(counts) for i in range(len(counts))]
        shares = [count / sum(counts) for count in counts]
        axes.step(centres, shares, where="mid", **style(name, f"{name} responses"))
    axes.set(yscale="log", xlabel=moved[0]["what"] if moved else "", ylabel="share of tokens", title=label)
    return bool(moved)


def common_steps(runs, seeds, over):
    """Steps that all of these seeds were measured at."""
    return sorted(set.intersection(*(set(measured(runs[seed], over)) for seed in seeds)))


def path_points(model_runs, label, panel, over):
    """[(x, mean, standard error)] of one quantity of a run over steps or KL, from where it started."""
    y, runs = panel["y"], model_runs["runs"][label]
    steps = {seed: measured(run, over) for seed, run in runs.items()}
    most = max(map(len, steps.values()))
    seeds = [seed for seed in runs if len(steps[seed]) >= most / 2]     # not those measured at their end only
    names = {step: f"{label}@{step}" for step in common_steps(runs, seeds, over)}
    names = {0: f"{label}@start"} | names if names else {}
    if y in TRAINING:
        names = {m["step"]: f"{label}@{m['step']}" for m in runs[seeds[0]]["metrics"]}
    if y == "separation":
        steps = [step for moved in movements(model_runs, label) for step, *_ in moved.get("path", [])]
        names = {step: f"{label}@{step}" for step in steps}
    points = []
    for x, name in names.items():
        values = over_seeds(model_runs, y, name, over, seeds)
        if values:
            mean, se = mean_se(values)
            sampling = over_seeds(model_runs, "sampling", name, over, seeds) if y == "accuracy" else []
            if panel.get("x") == "kl":
                x = statistics.fmean(over_seeds(model_runs, "kl", name, over, seeds))
            points.append((x, mean, (sampling or [0.0])[0] if se is None else se))
    return points


def draw_paths(axes, panel, model_runs, over):
    """One quantity of runs over steps or KL: checkpoints with error bars, or training steps with a band."""
    over_kl, shown = panel.get("x") == "kl", set()
    for label, name in runs_of(panel["runs"], model_runs):
        points = path_points(model_runs, label, panel, over)
        if not points:
            continue
        (x, y, se), look = zip(*points), style(name, f"_{name}" if name in shown else name)     # _: no legend
        marker, size = ("*", 9) if look["linestyle"] == "--" else ("o", 4)
        if panel["y"] in TRAINING:
            axes.plot(x, y, **look)
            low, high = ([mean + sign * e for mean, e in zip(y, se)] for sign in (-1, 1))
            axes.fill_between(x, low, high, color=look["color"], alpha=0.2, linewidth=0)
        else:
            axes.errorbar(x, y, se, capsize=2, marker=marker, markersize=size, **look)
        if over_kl and name != label:                       # of several rounds: which one
            axes.annotate(re.sub(r"\D", "", label), (x[-1], y[-1]), xytext=(5, 4), textcoords="offset points",
                          color=look["color"])
        shown.add(name)
    axes.set(xlabel=AXES["kl"] if over_kl else "optimizer step", ylabel=AXES[panel["y"]])
    axes.set_title(panel.get("title", ""))
    if not over_kl:
        axes.xaxis.get_major_locator().set_params(integer=True)
    if panel["y"] == "accuracy" and (base := over_seeds(model_runs, "accuracy", "base", over)):
        axes.axhline(base[0], color=PALETTE["base"], linestyle=":", label="base")
    return bool(shown)


def draw_chains(axes, panel, model_runs, over):
    """Accuracy of checkpoints that follow one another (Fig. 8)."""
    named = set()
    for label, chain in panel["chains"].items():
        values = [over_seeds(model_runs, "accuracy", name, over) for name in chain]
        if not all(values):
            continue
        later, (means, se) = bool(named), zip(*map(mean_se, values))
        x = [i + 0.06 * later for i in range(len(chain))]    # right of the first, and named above it
        axes.errorbar(x, means, yerr=[e or 0.0 for e in se], marker="o", capsize=2, **style(label))
        for i, name in enumerate(chain):
            if name not in named:                           # chains share their first checkpoints
                axes.annotate(name.split("/")[0], (x[i], means[i]), xytext=(6, 8 if later else -12),
                              textcoords="offset points", fontsize=7)
        named |= set(chain)
        axes.set_xticks(range(len(chain)))
    axes.set(xlabel="phase", ylabel=AXES["accuracy"])
    axes.margins(0.12)
    return bool(named)


def draw_figure(panels, model_runs, over, path):
    """Save a figure; False, and no figure, if no run has what its panels show."""
    high, wide = (2, 2) if len(panels) == 4 else (1, len(panels))       # four in a row are too small to read
    figure = Figure(figsize=(4.8 * wide if wide > 1 else 8, 3.6 * high + 0.4))
    kinds, drawn = {"movement": draw_movement, "histogram": draw_histogram, "chains": draw_chains}, []
    for axes, panel in zip(figure.subplots(high, wide, squeeze=False).flat, panels):
        drawn.append(kinds.get(panel.get("kind"), draw_paths)(axes, panel, model_runs, over))
        axes.grid(alpha=0.25)
        if drawn[-1]:
            axes.legend(fontsize=7)
    if any(drawn):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.tight_layout()
        figure.savefig(path, dpi=100)
    return any(drawn)


def paper_figure(name, models, folder):
    """FOLDER/figures/NAME-MODEL.png for every model that has the runs; the markdown that shows them."""
    text = []
    for model_runs in models:
        file, over = f"figures/{name}-{model_runs['name']}.png", benchmarks_for(name, model_runs)
        if draw_figure(SPECS[name]["panels"], model_runs, over, folder / file):
            text.append(f"![{SPECS[name]['title']}, {model_runs['name']}]({file})\n")
    return text


# ---- reports -----------------------------------------------------------------------------------------------

def write_report(folder, text, shown):
    """FOLDER/report.md; what is shown of it is printed."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "report.md", lambda p: p.write_text("\n".join(text)))
    print("\n".join(shown))
    print(f"report: {folder / 'report.md'}   figures: {folder / 'figures'}")


HOW_TO_READ = f"""
Columns that start with *paper* and captions that say so hold the paper's numbers, of its own models and
benchmarks: compare order and direction, not values. Everything else was measured here; ± is the standard
error over seeds, their number in brackets. KL is the reverse KL to the base, on the policy's own samples.
`RUN@best` is the checkpoint that is best on the selection benchmark, `validation` on the demonstration world
and `{PAPER['selection']}` elsewhere (Sec. 4.1). A benchmark that a checkpoint was not measured on is -, and
so is the mean. Probabilities, entropy on the rollouts and explained variance are means of 5 steps.
"""


def report_tables(folder, names, runs, title="", models=None):
    """FOLDER/report.md: tables and figures of the paper, ours beside its own, and its claims decided.

    models: folders of `runs`, all by default. Runs are shared: beside a table's stand those others needed.
    """
    folders = [path.parent for path in sorted(runs.glob("*/results.jsonl"))]
    models = [read_model(path) for path in folders if not models or path.name in models]
    models = [model_runs for model_runs in models if model_runs["base"]]
    if not models:
        raise InputError(f"{runs} has no MODEL/results.jsonl with a row of its base: ./run_rounds.sh help")
    if unknown := set(names) - set(SPECS):
        raise InputError(f"--tables {' '.join(unknown)}: the paper has {' '.join(SPECS)}")
    pools, noise = pool(models), [line for model_runs in models for line in noise_lines(model_runs)]
    claims = [(claim, *decide(claim, models, pools)) for claim in PAPER["claims"]
              if set(claim["where"]) & set(names)]
    rehearsed = ", ".join(model_runs["name"] for model_runs in models if model_runs["rehearsal"])
    text = [f"# Tables and figures of arXiv 2605.25582{title and f' ({title})'}", HOW_TO_READ,
            markdown_table(NOISE, noise), "## Claims\n", RULE,
            markdown_table(["claim", "", "verdict", "decided by"], [claim_row(*claim) for claim in claims])]
    if rehearsed:
        text.insert(0, f"**REHEARSAL of {rehearsed}: a few prompts, tokens and steps, with made-up rewards. "
                       "Its numbers mean nothing.**\n")
    shown = text[-3:]
    for name in names:
        spec, kind = SPECS[name], "Table" if name in PAPER["tables"] else "Figure"
        text += [f"## {kind} {re.sub('[a-z]+', '', name)}. {spec['title']}\n", f"Paper: {spec['paper']}.\n"]
        text += paper_table(name, models) if kind == "Table" else paper_figure(name, models, folder)
        text += [claim_text(*decided) for decided in claims if name in decided[0]["where"]]
    if "table11" in names and not any(model_runs["name"].endswith("-code") for model_runs in models):
        text.append("The code half of Table 11 was not run here.\n")
    text += ["## Settings\n", "Names of runs hold the paper's numbers; these are the flags that were used, "
             "here in the first seed.\n", settings_table(models)]
    write_report(folder, text, shown if len(names) > 3 else text[text.index(shown[0]):-3])


def points(values):
    """Differences of accuracies over seeds, in points."""
    mean, se = mean_se(values)
    return f"{100 * mean:+.1f}" + (f" ± {100 * se:.1f}" if se is not None else "")


def winner(leads):
    """Who is ahead, if 0 is outside the 95 % interval over seeds (Student's t); one seed settles nothing."""
    mean, se = mean_se(leads)
    if se is None or abs(mean) < t_quantile(len(leads) - 1) * se:
        return "not separated"
    return "distillation wins" if mean > 0 else "the single stage wins"


def findings(model_runs, over):
    """Who wins: a sentence for each round and rival, and what all rounds reach."""
    found = [re.fullmatch(r"round(\d+)/student", label) for label in model_runs["runs"]]
    base, k = model_runs["base"][over[0]]["avg_at_k"], model_runs["base"][over[0]]["k"]
    rounds, lines = sorted(int(match[1]) for match in found if match), []
    for n in rounds:
        rivals = {"the best point of its teacher's whole path": [f"round{n}/teacher"],
                  "the best single stage, every control's path and the first teacher's": [
                      "round1/teacher", *(f"control{i}/teacher" for i in rounds if i <= n)]}
        for what, labels in rivals.items():
            leads = [lead(model_runs, seed, f"round{n}/student@measured", labels, over)
                     for seed in model_runs["seeds"]]
            if leads := [each.mean(1).tolist() for each in leads if each is not None]:
                accuracy, passes = zip(*leads)
                lines.append(f"* Round {n}, within its KL, the student less {what}: {points(accuracy)} "
                             f"points of accuracy ({winner(accuracy)}) and {points(passes)} of pass@{k} "
                             f"({winner(passes)}), {len(leads)} seed{'s' * (len(leads) > 1)}.")
    whole = {f"{name}{n}/{stage}@measured": what for n in rounds[-1:] for name, stage, what in (
        ("round", "student", f"After {n} round{'s' * (n > 1)} the student"),
        ("control", "teacher", "The control, one stage per round and no distillation,"))}
    for name, what in whole.items():
        if values := over_seeds(model_runs, "accuracy", name, over):
            gains = [value - base for value in values]
            kl = cell(over_seeds(model_runs, "kl", name, over), 4)
            lines.append(f"* {what} is {points(gains)} points from the base, at a KL of {kl}.")
    return "\n".join(lines) + "\n"


def evaluated(model_runs, label, over):
    """[(steps, checkpoint)] that all seeds were measured at; if none, as with --max-kl, their last."""
    runs = model_runs["runs"][label]
    if common := common_steps(runs, runs, over):
        return [(step, f"{label}@{step}") for step in common]
    last = [str(steps[-1]) for run in runs.values() if (steps := measured(run, over))]
    return [("/".join(last), f"{label}@measured")] if last else []


def rounds_and_checkpoints(spec, model_runs, over):
    """(table of the rounds, table of all evaluated checkpoints) of a demonstration: base first."""
    columns = [(metric, over, "avg_at_k") for metric in spec["metrics"]]
    lines = [["base", "-", *cells(model_runs, "base", columns)]]
    labels, rounds = [label for label, _ in runs_of(spec["rounds"], model_runs)], []
    for label in sorted(labels, key=lambda label: int(re.sub(r"\D", "", label))):
        last = {path[-1] for run in model_runs["runs"][label].values() if (path := measured(run, over))}
        if last:
            steps = "/".join(map(str, sorted(last)))
            rounds.append([label, steps, *cells(model_runs, f"{label}@measured", columns)])
    every = [[label, step, *cells(model_runs, name, columns)]
             for label in model_runs["runs"] for step, name in evaluated(model_runs, label, over)]
    return (markdown_table(["checkpoint", "steps", *spec["columns"]], lines + rounds),
            markdown_table(["run", "step", *spec["columns"]], lines + every))


def training_table(model_runs, settings):
    """Settings {header: name in run.json}, steps and seconds of every run, in its first seed."""
    lines = []
    for label, by_seed in model_runs["runs"].items():
        run = next(iter(by_seed.values()))
        args = run["info"]["args"] | ({} if run["info"]["args"]["kl_coef"] else {"kl_kind": "-"})
        lines.append([label, run["info"]["script"], *(args.get(key, "-") for key in settings.values()),
                      len(run["metrics"]), f"{sum(m['seconds'] for m in run['metrics']):.0f}"])
    return markdown_table(["run", "script", *settings, "steps", "seconds"], lines)


def report(folder, title=""):
    """FOLDER/report.md of the demonstration, or of an experiment in the same layout: rounds, checkpoints."""
    spec, model_runs = PAPER["reports"]["demo"], read_model(folder)
    if not model_runs["scored"]:
        raise InputError(f"{folder}/results.jsonl has no row of the base: evaluate it, --model B --base B")
    benchmark = spec["benchmark"] if spec["benchmark"] in model_runs["scored"] else model_runs["scored"][-1]
    kl = model_runs["kl"] if "kl" in model_runs["base"] else benchmark
    model_runs |= {"scored": [benchmark], "own": [benchmark], "selection": benchmark, "kl": kl}
    seeds, base = model_runs["seeds"], model_runs["base"][benchmark]
    rounds, every = rounds_and_checkpoints(spec, model_runs, [benchmark])
    text = [f"# Extreme Region Policy Distillation: report of {folder.name}{title and f' ({title})'}\n",
            f"Benchmark `{benchmark}`: {base['n_problems']} problems x {base['k']} samples at temperature "
            f"{base['temperature']:g}, top-p {base['top_p']:g}; {len(seeds)} seed(s) of rollouts and "
            f"training ({', '.join(seeds)}). With several seeds, ± is the standard error over seeds; "
            "*sampling s.e.* is the part that comes from drawing K responses to fixed problems. KL is the "
            "reverse KL to the base, on samples of the evaluated policy"
            f"{' of their own, at top-p 1' if kl == 'kl' else ''}.\n"]
    if runs_of(spec["rounds"], model_runs):
        text += ["## Rounds\n", rounds, findings(model_runs, [benchmark])]
    shown = [line for line in text[1:] if not line.startswith("#")]
    for name, figure in spec["figures"].items():
        file = f"figures/{name}.png"
        if draw_figure(figure["panels"], model_runs, [benchmark], folder / file):
            text += [f"## {figure['title']}\n"] if name != "kl" else []
            text += [f"![{figure['title']}]({file})\n"]
    text += ["## Every evaluated checkpoint\n",
             "An earlier teacher checkpoint may do as well as a student: look here before believing the "
             "table above.\n", every, "## Settings and training time (first seed)\n",
             training_table(model_runs, spec["settings"])]
    write_report(folder, text, ["", *shown])
