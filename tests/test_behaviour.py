"""What the stages do to a policy, on a small random model."""
import json

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import conftest
import teacher


def run_here(*argv):
    assert conftest.run_here(*argv) == 0


FAST = ["--batch-prompts", 6, "--lr", "3e-3", "--no-checkpointing"]


def test_a_short_distillation_raises_log_probs_where_the_signal_is_positive_and_lowers_them_elsewhere(tiny, tmp_path):
    model, rollouts, other = tiny
    run_here("distill.py", "--student", model, "--teacher", other, "--rollouts", rollouts, "--out", tmp_path / "s", "--steps", 8, *FAST)
    old, new, target = (teacher.score(m, rollouts) for m in (model, tmp_path / "s" / "final", other))
    signal = target - old
    adv = signal - signal.mean()
    assert (new - old)[adv > 0].mean() > 0.01 and (new - old)[adv < 0].mean() < -0.01
    metrics = [json.loads(line) for line in (tmp_path / "s" / "metrics.jsonl").read_text().splitlines()]
    assert abs(metrics[0]["ratio_mean"] - 1) < 1e-5 and metrics[0]["kl_old_new"] < 1e-6 and metrics[-1]["loss"] < metrics[0]["loss"]
    statistics = json.loads((tmp_path / "s" / "run.json").read_text())["signal"]
    assert abs(statistics["mean"] - signal.double().mean().item()) < 1e-6
    assert sum(statistics["histogram_positive"]) + sum(statistics["histogram_negative"]) == len(signal)


def test_the_live_denominator_starts_as_the_fixed_signal_and_then_parts_from_it(tiny, tmp_path):
    model, rollouts, other = tiny
    for denominator in ("old", "live"):
        run_here("distill.py", "--student", model, "--teacher", other, "--denominator", denominator, "--rollouts", rollouts,
                            "--out", tmp_path / denominator, "--steps", 3, *FAST)
    fixed, live = ([json.loads(line) for line in (tmp_path / d / "metrics.jsonl").read_text().splitlines()] for d in ("old", "live"))
    assert abs(fixed[0]["loss"] - live[0]["loss"]) < 1e-6 and abs(fixed[0]["grad_norm"] - live[0]["grad_norm"]) < 1e-5
    assert abs(fixed[2]["loss"] - live[2]["loss"]) > 1e-4


def test_the_entropy_bonus_raises_entropy_and_the_kl_term_holds_the_student_back(tiny, tmp_path):
    model, rollouts, other = tiny
    last = {}
    for name, extra in (("plain", []), ("entropy", ["--entropy-coef", 1.0]), ("kl", ["--kl-coef", 5.0, "--kl-kind", "exact"]),
                        ("sampled", ["--kl-coef", 5.0])):
        run_here("distill.py", "--student", model, "--teacher", other, "--rollouts", rollouts, "--out", tmp_path / name, "--steps", 6, *FAST, *extra)
        last[name] = json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["entropy"]["entropy"] > last["plain"]["entropy"] + 1e-3
    assert last["kl"]["kl_old_new"] < 0.9 * last["plain"]["kl_old_new"] and last["sampled"]["kl_old_new"] < 0.95 * last["plain"]["kl_old_new"]


def test_the_teachers_fit_the_rewards(tiny, tmp_path):
    model, rollouts, _ = tiny
    for loss in ("ce", "mse"):
        run_here("teacher.py", "--model", model, "--rollouts", rollouts, "--out", tmp_path / loss, "--loss", loss, "--beta", 0.5, "--steps", 12, *FAST)
        first, *_, last = [json.loads(line) for line in (tmp_path / loss / "metrics.jsonl").read_text().splitlines()]
        assert last["loss"] < first["loss"]
        assert last["prob_pos"] / last["prob_neg"] > first["prob_pos"] / first["prob_neg"]
        if loss == "ce":
            assert last["reward_acc"] > 0.9 and last["reward_pair_acc"] > 0.9
        else:
            assert last["explained_variance"] > first["explained_variance"]


def test_checkpoints_load_without_our_code_and_an_interrupted_run_continues_exactly(tiny, tmp_path):
    model, rollouts, _ = tiny
    command = ["teacher.py", "--model", model, "--rollouts", rollouts, "--loss", "ce", "--beta", 0.5, "--steps", 5, "--save-every", 2, *FAST]
    run_here(*command, "--out", tmp_path / "whole")
    # what a kill -9 in step 5 leaves behind: step 4 complete with its optimizer, one line of metrics too many, no final
    again, original = tmp_path / "again", teacher.save_step

    def dies_at_the_end(out, name, *state):
        if name == "final":
            raise KeyboardInterrupt
        original(out, name, *state)
    teacher.save_step = dies_at_the_end
    try:
        assert conftest.run_here(*command, "--out", again) == 1
    finally:
        teacher.save_step = original
    assert not (again / "final").exists() and [p.parent.name for p in again.glob("*/optimizer.pt")] == ["step-0004"]
    run_here(*command, "--out", again)
    metrics = [[json.loads(line) for line in (tmp_path / d / "metrics.jsonl").read_text().splitlines()] for d in ("whole", "again")]
    assert [[(m["step"], m["loss"], m["grad_norm"]) for m in run] for run in metrics][0] == [(m["step"], m["loss"], m["grad_norm"]) for m in metrics[1]]
    for name in ("step-0002", "step-0004", "final"):
        ours = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / name, dtype="auto")
        theirs = AutoModelForCausalLM.from_pretrained(again / name, dtype="auto")
        assert ours.dtype == torch.float32
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
        assert AutoTokenizer.from_pretrained(tmp_path / "whole" / name).chat_template
