"""The map: what either side reaches within a KL, its lead over the other, and the report of made-up runs."""
import json
import math
import sys

import pytest
import torch

import map as lead_map
from runs import t_quantile, within

ARMS = [f"{stage}-{kind}-2" for stage in ("one", "two") for kind in lead_map.KINDS]


def test_what_a_path_reaches_within_a_kl_is_linear_between_checkpoints():
    path = [(0.0, torch.tensor([0.4, 0.9])), (0.01, torch.tensor([0.6, 0.8])),
            (0.03, torch.tensor([0.5, 0.7]))]
    assert torch.stack(within(path, 0.005)).tolist() == [pytest.approx([0.4, 0.9]),
                                                         pytest.approx([0.5, 0.85])]
    assert torch.stack(within(path, 0.02))[:, 0].tolist() == pytest.approx([0.4, 0.6, 0.55])
    assert len(within(path, math.inf)) == 3
    back = [*path, (0.005, torch.tensor([0.7, 0.7]))]       # a path may come back: neighbours are those in KL
    assert max(x[0].item() for x in within(back, 0.006)) == pytest.approx(0.7)
    assert torch.stack(within(back, 0.004))[:, 0].tolist() == pytest.approx([0.4, 0.64])


def paths(generator, accuracy, arms=3, n=300, k=4):
    """A side whose arms all have this accuracy at KL 0.004 and 0.008, with sampling noise only."""
    def scores(p):
        right = (torch.rand(n, k, generator=generator) < p).double().sum(1)
        return torch.stack([right / k, (right > 0).double()])
    return {f"arm{i}": [(0.0, scores(0.5)), (0.004, scores(accuracy)), (0.008, scores(accuracy))]
            for i in range(arms)}


@pytest.mark.parametrize("accuracy", [0.6, 0.65])
def test_picking_among_many_arms_gives_no_lead_and_a_true_lead_is_seen(accuracy):
    generator = torch.Generator().manual_seed(0)
    leads = torch.stack([lead_map.reach(paths(generator, accuracy, arms=8), 0.01)
                         - lead_map.reach(paths(generator, 0.6, arms=1), 0.01) for _ in range(60)])
    assert leads[:, 0].mean() == pytest.approx(accuracy - 0.6, abs=0.006)       # s.e. 0.0025
    # picked on the problems that measure, the best of 16 noisy points would be 0.02 above the truth
    biased = [max(x[0].mean().item() for path in paths(generator, 0.6, arms=8).values()
                  for x in within(path, 1))
              for _ in range(20)]
    assert sum(biased) / 20 > 0.61


@pytest.mark.parametrize("df, expected", [(2, 4.303), (16, 2.120), (200, 1.972)])
def test_quantiles_of_students_t(df, expected):
    assert t_quantile(df) == pytest.approx(expected, abs=2e-3)


def write_run(folder, name, points, rows, generator):
    run = folder / name
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"script": "x", "args": {}}))
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": s}) + "\n"
                                               for s in range(1, points[-1][0] + 1)))
    for step, kl, accuracy in points:
        model = f"{run}/final" if step == points[-1][0] else f"{run}/step-{step:04d}"
        rows += rows_of(model, kl, accuracy, generator)


def rows_of(model, kl, accuracy, generator):
    right = (torch.rand(100, 4, generator=generator) < accuracy).sum(1).tolist()
    row = {"model": model, "base": "base", "k": 4, "n_problems": 100, "correct_per_problem": right, "kl": kl}
    return [row | {"benchmark": "test"}, row | {"benchmark": "kl"}]


def test_the_report_has_a_cell_per_world_and_number_of_prompts_and_leaves_out_unfinished_seeds(
        tmp_path, monkeypatch, capsys):
    generator = torch.Generator().manual_seed(0)
    for cell, gain in (("small-30", 0.3), ("large-100", 0.0)):
        rows = rows_of("base", 0.0, 0.4, generator)
        for seed in (1, 2, 3):
            for arm in ARMS[:-1] if (cell, seed) == ("large-100", 3) else ARMS:
                better = gain if arm.startswith("two") else 0.0
                write_run(tmp_path / cell, f"seed{seed}/{arm}", [(4, 0.002, 0.5 + better), (8, 0.03, 0.5)],
                          rows, generator)
        (tmp_path / cell / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(sys, "argv", ["map.py", str(tmp_path)])
    lead_map.main()
    text = (tmp_path / "report.md").read_text()
    lines = [line.strip("| ").split(" | ") for line in text.splitlines()
             if line.startswith("| small | 30 | 3 ")
             or line.startswith("| large | 100 | 2 ")]
    small, large = lines
    assert small[3].startswith("**+2") or small[3].startswith("**+3")  # at KL 0.005: about +30 points
    assert "**" not in large[3] and abs(float(large[3].split(" ")[0])) < 8
    assert (tmp_path / "figures" / "map.png").stat().st_size > 10000
    assert "two stages" in text and capsys.readouterr().out.count("| small | 30 |") == 1
