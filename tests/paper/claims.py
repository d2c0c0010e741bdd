"""
The paper's claims, with a verdict from the data: bootstrap over seeds and problems.

A claim of paper.json names tests; each is a number that should be above 0: the sum of a metric over some
checkpoints less that over others. Words: see runs.py. D is the number of draws; the first is the data.
"""
import itertools
import math
import statistics

import torch

from runs import benchmarks_for, measured, number

DRAWS = 1000


def accuracy_within(points, kl):
    """The highest accuracy on a path of (KL, accuracy), straight between its points, within a KL, or None."""
    found = [a for k, a in points if k <= kl]
    for (k0, a0), (k1, a1) in itertools.pairwise(points):
        if min(k0, k1) <= kl < max(k0, k1):
            found.append(a0 + (a1 - a0) * (kl - k0) / (k1 - k0))
    return max(found, default=None)


def ahead(model_runs, seed, student, rivals, over, drawn, last_only):
    """The student's accuracy minus the best of the rivals' paths from the base within its KL, per draw."""
    def point(name):
        return [number(model_runs, seed, metric, name, over, drawn) for metric in ("kl", "accuracy")]
    (kl, mine), paths = point(student), []
    for label in rivals:
        run = model_runs["runs"].get(label, {}).get(seed)
        steps = measured(run, over)[-1 if last_only else 0:] if run else []
        paths.append([point(name) for name in ("base", *(f"{label}@{step}" for step in steps))])
    if kl is None or mine is None or any(len(path) < 2 or any(k is None for k, _ in path) for path in paths):
        return None
    best = []
    for d in range(len(mine)):
        reached = [accuracy_within([(k, a[d].item()) for k, a in path], kl) for path in paths]
        best.append(max(a for a in reached if a is not None))                   # the base is within any KL
    return mine - torch.tensor(best, dtype=torch.float64)


def value_of_test(model_runs, seed, test, over, drawn):
    """What a test of a claim says should be above 0, for one seed, per draw [D]; None if a run is missing."""
    plus, minus, metric = test["plus"], test["minus"], test["metric"]
    if metric in ("ahead", "ahead_of_last"):
        return ahead(model_runs, seed, plus[0], minus, over, drawn, metric == "ahead_of_last")
    of = "accuracy" if metric in ("spread", "gain_with_length") else metric
    values = [number(model_runs, seed, of, name, over, drawn) for name in plus + minus]
    if any(value is None or isinstance(value, float) and math.isnan(value) for value in values):
        return None
    values = torch.stack([torch.as_tensor(value, dtype=torch.float64).expand(DRAWS) for value in values])
    first, second = values[:len(plus)], values[len(plus):]
    if metric == "spread":
        return first.amax(0) - first.amin(0) - second.amax(0) + second.amin(0)
    return first.sum(0) - second.sum(0) - test.get("above", 0.0)


def bootstrap(per_seed, generator):
    """(mean, low, high): the 95 % interval of the mean over seeds of per_seed [S, D].

    Problems are drawn already, seeds are here, with the factor sqrt(S / (S - 1)) that S draws lack.
    """
    n, centre = len(per_seed), per_seed.mean(0)
    values = centre
    if n > 1:
        picked = torch.randint(n, per_seed.shape, generator=generator)
        values = (per_seed.gather(0, picked).mean(0) - centre) * math.sqrt(n / (n - 1)) + centre
    low, high = values[1:].quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    if n == 1 and low == high:                              # one seed, and no problems: no noise is known
        low, high = -math.inf, math.inf
    return centre[0].item(), low, high


def verdict(low, high):
    """What its interval says of a test, whose number should be above 0."""
    return "holds" if low > 0 else "does not hold" if high < 0 else "undecided"


def draw_problems(model_runs, generator):
    """{benchmark: how often each problem is drawn [D, n]}, the first row each once."""
    drawn = {}
    for b in model_runs["scored"]:
        n = model_runs["base"][b]["n_problems"]
        picks = torch.randint(n, (DRAWS, n), generator=generator)
        ones = torch.ones(DRAWS, n, dtype=torch.float64)
        drawn[b] = torch.zeros_like(ones).scatter_add_(1, picks, ones) / n
        drawn[b][0] = 1 / n
    return drawn


def decide_test(test, where, models):
    """[(test, model, seeds, mean, low, high)] of the models that have the runs of a test.

    Accuracies are read on the benchmarks of the first table or figure of `where` that all were measured.
    """
    lines, slopes, generator = [], [], torch.Generator().manual_seed(0)
    for model_runs in models:
        sets = [benchmarks_for(name, model_runs) for name in where]
        over = next((names for names in sets if set(names) <= set(model_runs["scored"])), None)
        if not over:
            continue
        drawn = draw_problems(model_runs, generator)
        values = [value_of_test(model_runs, seed, test, over, drawn) for seed in model_runs["seeds"]]
        values = [value for value in values if value is not None]
        if values and test["metric"] == "gain_with_length":
            length = model_runs["base"][over[0]]["mean_length"]
            slopes.append((math.log(length), torch.stack(values)))
        elif values:
            lines.append((test, model_runs["name"], len(values), *bootstrap(torch.stack(values), generator)))
    if len(slopes) > 1:                                     # accuracy per log length: least squares
        middle, n = statistics.fmean(length for length, _ in slopes), min(len(gains) for _, gains in slopes)
        slope = sum((length - middle) * gains[:n] for length, gains in slopes)
        slope = slope / sum((length - middle) ** 2 for length, _ in slopes)
        lines.append((test, "over " + ", ".join(m["name"] for m in models), n, *bootstrap(slope, generator)))
    return lines


def decide(claim, models):
    """(verdict, lines of decide_test): holds where all tests hold, in every model that has their runs."""
    decided = [decide_test(test, claim["where"], models) for test in claim["tests"]]
    lines = list(itertools.chain(*decided))
    verdicts = {verdict(low, high) for *_, low, high in lines}
    if not all(decided):
        return "not run here", lines
    return next((v for v in ("does not hold", "undecided") if v in verdicts), "holds"), lines


def claim_text(claim, answer, lines):
    """One claim as text: its verdict, and every test with its number and interval."""
    text = [f"* **Claim {claim['number']}: {claim['text']}: {answer}.**"]
    for test, where, seeds, mean, low, high in lines:
        what = f"{test['metric'].replace('_', ' ')}: {' + '.join(test['plus'])}"
        what += f" minus {' + '.join(test['minus'])}" if test["minus"] else ""
        what += f" minus {test['above']:g}" if "above" in test else ""
        text.append(f"  * {what} = {mean:+.4f}, 95 % from {low:+.4f} to {high:+.4f} "
                    f"({where}, {seeds} seed{'s' * (seeds > 1)}): {verdict(low, high)}")
    return "\n".join(text) + "\n"
