"""
The paper's claims, with a verdict from the data by a rule that was fixed before the data.

A claim of paper.json has a premise and tests. Each is a number that has to lie above or below a margin: the
sum of a metric over some checkpoints less that over others. RULE says what follows from it. Words: see
runs.py. The values of a test are [S, N]: seeds x problems, or x 1 for what is not an accuracy.
"""
import itertools
import math
import statistics
from collections import Counter

import torch

from reads import PAPER
from runs import benchmarks_for, lead, mean_se, number, t_quantile

RULE = """
A claim of the paper has *tests*, each with a margin that was fixed before the runs: differences of
accuracy, in points; ratios of KL, entropy, length, probability and distance, written ×; shares. Where
something is to be better, it has to be so by more than 1 point: the paper builds on differences from 0.7
points on, and for less nobody needs a second stage. Where there is to be no gain, it has to be below 2
points: the paper calls +1.2 a failure (Table 3) and +2.5 a steady rise (Table 2). Other margins stand with
their claim and its reason.

**holds**: each test's whole 95 % interval lies on its side of the margin. **does not hold**: one test's
lies on the other side, at the level 0.025/k for a claim of k tests. **premise absent here**: what the claim
starts from is not so on the selection benchmark, by the mean over seeds. **not run here**: a run is
missing. **undecided**: all else, and all where there is one seed of everything.

Intervals are Student's t. Their variance is that over seeds, the larger of the test's own and the one
pooled over all tests of that kind (per checkpoint compared; of logarithms for ratios), plus that over
problems, less what both count. All seeds count, n of them. A model with one seed is shown beside models
with more and does not decide, but in claim 24, which compares models. Where a rival's best point at an equal
KL or time is looked for, nine tenths of the problems pick it and the other tenth measures it, ten times; its
path is linear between neighbours in KL. `RUN@best` is picked on other problems where there are validation
problems; on the paper's benchmarks it is picked on one that also counts, as in the paper.
"""
RATIOS = ("kl", "entropy", "length", "train_entropy", "prob_pos", "prob_neg", "moved", "far_moved",
          "far_focus")
ACCURACIES = {"ahead": "accuracy at equal KL",
              "ahead_of_last": "accuracy at equal KL, on the line to the last checkpoint",
              "ahead_in_time": "accuracy after equal hours of the paper", "accuracy": "accuracy",
              "gain_per_doubling": "gain per doubling of the length"}
NOISE = ["model", "prompts x responses", "benchmark", "problems x samples", "seeds",
         "AVG@K of a checkpoint: s.e. from sampling", "s.e. over seeds (median)"]


# ---- the number of a test ----------------------------------------------------------------------------------

def value_of_test(model_runs, seed, test, over):
    """The number of a test in one seed [N]; None if a run is missing. Rivals in `if_run` may be."""
    plus, minus, metric = test["plus"], test["minus"], test["metric"]
    if metric.startswith("ahead"):
        rivals = test["minus"] + [label for label in test.get("if_run", []) if label in model_runs["runs"]]
        cost = "paper_hours" if metric == "ahead_in_time" else "kl"
        ahead = lead(model_runs, seed, plus[0], rivals, over, cost, last=metric == "ahead_of_last")
        return None if ahead is None else ahead[0]
    of = "accuracy" if metric in ACCURACIES else metric
    values = [number(model_runs, seed, of, name, over, each=True) for name in plus + minus]
    if None in [value if value is None else 0 for value in values]:
        return None
    values = torch.stack([torch.as_tensor(value, dtype=torch.float64).reshape(-1) for value in values])
    values = values.log() if metric in RATIOS else values
    first, second = values[:len(plus)], values[len(plus):]
    value = first.sum(0) - second.sum(0)
    return value if value.isfinite().all() else None


def values_of_test(model_runs, test, where, premise=False):
    """[S, N] of the seeds that have a test's runs, None if none has.

    Accuracies are read on the benchmarks of the first table or figure of `where` that all were measured,
    those of a premise on the selection benchmark.
    """
    sets = [[model_runs["selection"]]] if premise else [benchmarks_for(name, model_runs) for name in where]
    over = next((names for names in sets if set(names) <= set(model_runs["base"])), None)
    values = [value_of_test(model_runs, seed, test, over) for seed in model_runs["seeds"]] if over else []
    values = [value for value in values if value is not None]
    return torch.stack(values) if values else None


# ---- how sure it is ----------------------------------------------------------------------------------------

def kind_and_weight(test):
    """(what its variance over seeds is pooled with, of how many checkpoints it has the variance).

    The base has no seed; a checkpoint that counts twice has four times the variance.
    """
    metric, counts = test["metric"], Counter(test["plus"])
    counts.subtract(test["minus"])
    weight = sum(n * n for name, n in counts.items() if name != "base")
    return "accuracy" if metric in ACCURACIES else metric, 2 if metric.startswith("ahead") else weight


def pool(models):
    """{kind: (variance over seeds per checkpoint, degrees of freedom)}, from all tests of all claims."""
    squares, df, seen = Counter(), Counter(), []
    for claim, model_runs in itertools.product(PAPER["claims"], models):
        for test in claim["tests"]:
            values, (kind, weight) = values_of_test(model_runs, test, claim["where"]), kind_and_weight(test)
            same = model_runs["name"], test["metric"], test["plus"], test["minus"]
            if values is not None and len(values) > 1 and same not in seen:     # a number may have two bounds
                seen.append(same)
                squares[kind] += (len(values) - 1) * values.mean(1).var().item() / weight
                df[kind] += len(values) - 1
    return {kind: (squares[kind] / df[kind], df[kind]) for kind in df}


def standard_error(values, seeds):
    """Of the mean of values [..., S, N], had other seeds and problems been drawn.

    seeds: the pooled variance over seeds.
    """
    S, N = values.shape[-2:]
    problems = values.mean(-2).var(-1) / N if N > 1 else torch.tensor(0.0)
    if S > 1:
        seeds = values.mean(-1).var(-1).clamp(min=seeds)
        both = (values - values.mean(-1, keepdim=True)).var(-2).mean(-1) / N / S    # sampling is in either
        problems = (problems - both).clamp(min=0)
    return (seeds / S + problems).sqrt()


def side(distance, se, df, k=1):
    """What a test says whose number lies this far on the right side of its margin, as one of k tests."""
    if not df:                                              # one seed everywhere: its variance is not known
        return "undecided"
    low, high = distance - t_quantile(df) * se, distance + t_quantile(df, 1 - 0.025 / k) * se
    return "holds" if low > 0 else "does not hold" if high < 0 else "undecided"


def noise_lines(model_runs):
    """How much data a model's numbers rest on, and its standard errors: a line per benchmark."""
    lines = []
    for b in model_runs["scored"]:
        paths = [[run["rows"].get(b) for run in by_seed.values()] for by_seed in model_runs["runs"].values()]
        last = [[path[max(path)] for path in by_seed if path] for by_seed in paths]
        sampling = [row["se"] for rows in last for row in rows]
        over = [mean_se(row["avg_at_k"] for row in rows)[1] for rows in last if len(rows) > 1]
        base = model_runs["base"][b]
        medians = [f"{statistics.median(errors):.4f}" if errors else "-" for errors in (sampling, over)]
        lines.append([model_runs["name"], model_runs["rollouts"], b, f"{base['n_problems']} x {base['k']}",
                      len(model_runs["seeds"]), *medians])
    return lines


# ---- verdicts ----------------------------------------------------------------------------------------------

def lines_of_test(test, where, models, pools):
    """[dict(test, model, n, mean, se, df)] of the models that have the runs of a test."""
    lines, lengths, (kind, weight) = [], [], kind_and_weight(test)
    variance, df = pools.get(kind, (0.0, 0))
    for model_runs in models:
        values = values_of_test(model_runs, test, where)
        if values is None:
            continue
        se, mean, n = standard_error(values, variance * weight).item(), values.mean().item(), len(values)
        lines.append(dict(test=test, model=model_runs["name"], n=n, mean=mean, se=se, df=df))
        if test["metric"] == "gain_per_doubling":
            length = number(model_runs, None, "length", "base", benchmarks_for(where[0], model_runs))
            lengths.append(math.log2(length))
    if test["metric"] != "gain_per_doubling":
        return lines
    if len(lines) < 2:
        return []
    middle = statistics.fmean(lengths)                      # least squares over the models' lengths
    shares = [(x - middle) / sum((other - middle) ** 2 for other in lengths) for x in lengths]
    mean = sum(a * x["mean"] for a, x in zip(shares, lines))
    se = math.hypot(*(a * x["se"] for a, x in zip(shares, lines)))
    return [dict(test=test, model=", ".join(x["model"] for x in lines), mean=mean, se=se, df=df,
                 n="+".join(str(x["n"]) for x in lines))]


def margin(test):
    """(the number that a test's has to pass, +1 above it or -1 below it), in the units of its values."""
    sign, bound = (1, test["above"]) if "above" in test else (-1, test["below"])
    if test["metric"] in RATIOS:
        bound = math.log(bound)
    return (bound / 100 if test["metric"] in ACCURACIES else bound), sign


def premises(claim, models):
    """[(test, its mean in each model that decides, whether all lie on its side)] of a claim's premise."""
    found = []
    for test in claim["premise"]:
        values = [values_of_test(model_runs, test, claim["where"], premise=True) for model_runs in models]
        values = [x for x in values if x is not None]
        means = [x.mean().item() for x in values if len(x) > 1 or all(len(y) == 1 for y in values)]
        bound, sign = margin(test)
        found.append((test, means, bool(means) and all((mean - bound) * sign > 0 for mean in means)))
    return found


def decide(claim, models, pools):
    """(verdict, premises, lines of all tests, each with its own verdict)."""
    by_test = [lines_of_test(test, claim["where"], models, pools) for test in claim["tests"]]
    deciding = [line for lines, test in zip(by_test, claim["tests"]) if not test.get("extra")
                for line in lines if line["n"] != 1 or all(other["n"] == 1 for other in lines)]
    for line in itertools.chain(*by_test):
        bound, sign = margin(line["test"])
        k = len(deciding) if line in deciding else 1
        line |= dict(verdict=side((line["mean"] - bound) * sign, line["se"], line["df"], k),
                     decides=line in deciding)
    premise, lines = premises(claim, models), list(itertools.chain(*by_test))
    needed = [found for found, test in zip(by_test, claim["tests"]) if not test.get("extra")]
    if not all(needed + [means for _, means, _ in premise]):
        answer = "not run here"
    elif not all(holds for *_, holds in premise):
        answer = "premise absent here"
    else:
        verdicts = {line["verdict"] for line in deciding}
        answer = next((v for v in ("does not hold", "undecided") if v in verdicts), "holds")
    return answer, premise, lines


# ---- as text -----------------------------------------------------------------------------------------------

def show(test, value):
    """A number of a test in the units of its claim."""
    if test["metric"] in RATIOS:
        return f"×{math.exp(value):.2f}"
    return f"{100 * value:+.1f}" if test["metric"] in ACCURACIES else f"{value:.3f}"


def interval(line):
    """'+3.1 [+1.2, +5.0], above 1, n = 3' of a line."""
    test, half = line["test"], t_quantile(line["df"]) * line["se"] if line["df"] else math.inf
    low, high = (show(test, line["mean"] + x) if half < math.inf else "?" for x in (-half, half))
    return f"{show(test, line['mean'])} [{low}, {high}], {bound_of(test)}, n = {line['n']}"


def bound_of(test):
    return f"above {test['above']:g}" if "above" in test else f"below {test['below']:g}"


def what_of(test):
    """'accuracy: a against b' of a test."""
    what = f"{ACCURACIES.get(test['metric'], test['metric'].replace('_', ' '))}: {' + '.join(test['plus'])}"
    rivals = test["minus"] + test.get("if_run", [])
    return what + (f" against {' + '.join(rivals)}" if rivals else "")


def claim_row(claim, answer, premise, lines):
    """Cells of a claim in the table of all claims."""
    return [claim["number"], claim["text"], answer,
            "; ".join(interval(line) + ("" if line["decides"] else " (shown)") for line in lines)]


def claim_text(claim, answer, premise, lines):
    """One claim as text: its verdict, its premise, and every test with its number and interval."""
    text = [f"* **Claim {claim['number']}: {claim['text']}: {answer}.** {claim.get('why', '')}".rstrip()]
    for test, means, holds in premise:
        found = ", ".join(show(test, mean) for mean in means) or "-"
        state = "present" if holds else "absent" if means else "not run here"
        text.append(f"  * premise, {what_of(test)} = {found}, {bound_of(test)}: {state}")
    for line in lines:
        extra = f" ({line['test']['extra']})" if "extra" in line["test"] else ""
        shown = "" if line["decides"] else "; shown, does not decide"
        text.append(f"  * {what_of(line['test'])}{extra} = {interval(line)} ({line['model']}): "
                    f"{line['verdict']}{shown}")
    return "\n".join(text) + "\n"
