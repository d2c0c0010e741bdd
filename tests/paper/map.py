"""
The map: when does distillation beat a single stage? report.md and figures/map.png from the runs of map.sh.

    python tests/paper/map.py runs/map

Compared are not arms but what each side reaches with all of its arms within a KL: a checkpoint of an arm,
or the point where an arm's path crosses that KL (runs.reached: picked by accuracy on other problems than
those that measure it, so that neither side gains from picking among many).
"""
import itertools
import math
import statistics
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from claims import standard_error  # noqa: E402
from report import markdown_table, write_report  # noqa: E402
from runs import measured, point, reached, read_model, t_quantile  # noqa: E402

BUDGETS = (0.005, 0.01, 0.02, math.inf)                     # nats per token; the last: wherever it is best
KINDS = ("none", "sampled", "exact")
COLOURS = ("#76b7b2", "#1f6f8b", "#444444", "#d1603d")
PROTOCOL = """
One stage is CE training on a fixed batch of 8 responses a prompt; two stages distil its last checkpoint
without a KL term (learning rate 3e-4) back into the policy that wrote the batch. Each side has three arms:
no KL term, the sampled and the exact one. Each arm had four tries with seed 0, 100 prompts and the small
model: learning rates 3e-5, 1e-4, 3e-4 and 1e-3 without a KL term, else weights 0.3, 1, 3 and 10 at 3e-4.
The best checkpoint on 200 validation problems chose the try, for both sizes and all numbers of prompts; the
other seeds were run after that, with the chosen tries and nothing else. Steps of 16 prompts: 64 for one
stage, measured at 4, 8, 16, 32 and 64; 32 for two, measured at 4, 8, 16 and 32. Accuracy (AVG@4) and pass@4
on 300 test problems, as in the paper at temperature 0.6 and top-p 0.95, KL on top-p 1 samples.

A *lead* is two stages less one stage: what each reaches within the KL, picked on nine tenths of the test
problems and measured on the other, ten times; a path is linear between neighbours in KL. ± is the standard
error as in the claims: over seeds, the larger of the cell's own spread and that of all cells together, and
over problems. **Bold**: 0 is outside the 95 % interval (t, with the degrees of freedom of all cells).
"""


def paths_of(model_runs, seed, stage):
    """{arm: [(KL, scores)]} from the base on, of one side; arms that this seed has measured to their end."""
    paths = {}
    for label, by_seed in model_runs["runs"].items():
        run = by_seed.get(seed) if label.startswith(stage) else None
        steps = measured(run, ["test", "kl"]) if run else []
        if steps and steps[-1] == run["metrics"][-1]["step"]:
            names = "base", *(f"{label}@{step}" for step in steps)
            paths[label] = [point(model_runs, seed, name, ["test"]) for name in names]
    return paths


def reach(paths, kl):
    """[2, n]: accuracy and pass@K of what one side reaches within a KL, problem by problem."""
    return reached(paths.values(), kl)


def read_cells(folder):
    """{(size, prompts): {seed: {stage: paths}}} of the deciding seeds that have all six arms."""
    cells = {}
    for file in sorted(folder.glob("*-*/results.jsonl")):
        size, prompts = file.parent.name.split("-")
        model_runs = read_model(file.parent)
        for seed in model_runs["seeds"]:
            sides = {stage: paths_of(model_runs, seed, stage) for stage in ("one", "two")}
            if all(len({name.split("-")[1] for name in paths}) == len(KINDS) for paths in sides.values()):
                cells.setdefault((size, int(prompts)), {})[seed] = sides
    return dict(sorted(cells.items(), key=lambda cell: (cell[0][0] != "small", cell[0][1])))


def leads(cells):
    """{(size, prompts, KL): (lead [2], its standard error [2], degrees of freedom)}, in points."""
    found = {}
    for kl in BUDGETS:
        values = {cell: torch.stack([reach(s["two"], kl) - reach(s["one"], kl) for s in seeds.values()])
                  for cell, seeds in cells.items()}             # [seeds, 2, n]
        df = sum(len(x) - 1 for x in values.values())
        pooled = sum(((x.mean(-1) - x.mean((0, -1))) ** 2).sum(0) for x in values.values()) / max(df, 1)
        for cell, x in values.items():
            error = standard_error(x.transpose(0, 1), pooled)
            found[*cell, kl] = 100 * x.mean((0, -1)), 100 * error, df
    return found


def lead_text(mean, se, df):
    """'+1.2 ± 0.5', bold where it is not 0."""
    text = f"{mean:+.1f} ± {se:.1f}" if df else f"{mean:+.1f}"
    return f"**{text}**" if df and abs(mean) > t_quantile(df) * se else text


def draw(found, path):
    """The lead over the number of prompts: a row per size, accuracy and pass@K, a line per KL."""
    sizes = list(dict.fromkeys(size for size, *_ in found))
    figure = Figure(figsize=(9.6, 3.4 * len(sizes) + 0.4))
    for size, row in zip(sizes, figure.subplots(len(sizes), 2, squeeze=False, sharey="col")):
        for i, (axes, what) in enumerate(zip(row, ("AVG@4", "pass@4"))):
            for j, (kl, colour) in enumerate(zip(BUDGETS, COLOURS)):
                points = [(n * 1.06 ** (j - 1.5), mean[i].item(), se[i].item())
                          for (of, n, at), (mean, se, _) in found.items() if (of, at) == (size, kl)]
                x, y, se = zip(*points)
                label = f"KL within {kl:g}" if kl < math.inf else "at any KL"
                axes.errorbar(x, y, se, marker="o", markersize=4, capsize=2, color=colour, label=label)
            axes.axhline(0, color="#444444", linestyle=":")
            axes.set(xscale="log", xlabel="prompts (x 8 responses)", title=f"{size} model: {what}",
                     ylabel="two stages less one stage (points)")
            ticks = sorted({n for _, n, _ in found})
            axes.set_xticks(ticks, map(str, ticks))
            axes.minorticks_off()
            axes.grid(alpha=0.25)
    axes.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def tables(cells, found):
    """(leads at each KL, what every arm reaches within 0.01) as markdown."""
    names = [f"KL {kl:g}" if kl < math.inf else "any KL" for kl in BUDGETS]
    header = ["model", "prompts", "seeds", *(f"{what}, {n}" for what in ("AVG@4", "pass@4") for n in names)]
    lines, arms = [], []
    for (size, prompts), seeds in cells.items():
        leads_of = [(i, *found[size, prompts, kl]) for i in (0, 1) for kl in BUDGETS]
        lines.append([size, prompts, len(seeds),
                      *(lead_text(mean[i], se[i], df) for i, mean, se, df in leads_of)])
        line = [size, prompts]
        for stage, kind in itertools.product(("one", "two"), KINDS):
            best = []
            for sides in seeds.values():
                paths = {name: path for name, path in sides[stage].items() if name.split("-")[1] == kind}
                best.append(reach(paths, 0.01).mean(-1).tolist())
            accuracy, passes = (statistics.fmean(values) for values in zip(*best))
            line.append(f"{accuracy:.3f}, {passes:.3f}")
        arms.append(line)
    columns = [f"{stage}, {kind}" for stage in ("one", "two") for kind in KINDS]
    return markdown_table(header, lines), markdown_table(["model", "prompts", *columns], arms)


def whole_paths(cells):
    """Every measured checkpoint, means over seeds, as markdown."""
    lines = []
    for (size, prompts), seeds in cells.items():
        sides = next(iter(seeds.values()))
        for stage, name in ((stage, name) for stage, arms in sides.items() for name in arms):
            by_seed = [s[stage][name] for s in seeds.values() if name in s[stage]]
            texts = []
            for points in zip(*by_seed):
                kl = statistics.fmean(point[0] for point in points)
                accuracy, passes = torch.stack([point[1] for point in points]).mean((0, 2)).tolist()
                texts.append(f"{accuracy:.3f} {passes:.3f} ({kl:.4f})")
            lines.append([size, prompts, name, " → ".join(texts)])
    return markdown_table(["model", "prompts", "arm", "base, 4, 8, 16, 32, 64: AVG@4 pass@4 (KL)"], lines)


def main():
    folder = Path(sys.argv[1])
    cells = read_cells(folder)
    found = leads(cells)
    draw(found, folder / "figures" / "map.png")
    lead_table, arm_table = tables(cells, found)
    text = ["# When does distillation beat a single stage? (demonstration world)", PROTOCOL,
            "## The lead of two stages at equal KL, in points\n", lead_table,
            "![the lead of two stages](figures/map.png)\n",
            "## What each arm reaches within a KL of 0.01: AVG@4, pass@4\n", arm_table,
            "## Whole paths\n", "Means over seeds.\n", whole_paths(cells)]
    write_report(folder, text, [lead_table])


if __name__ == "__main__":
    main()
