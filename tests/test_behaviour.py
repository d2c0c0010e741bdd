"""What the stages do to a policy, on a small random model."""
import gc
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import conftest
import distill
import evaluate
import movement
import rollout
import teacher


def run_here(*argv):
    assert conftest.run_here(*argv) == 0


def read_metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


FAST = ["--batch-prompts", 6, "--lr", "3e-3", "--no-checkpointing"]


def test_a_short_distillation_raises_log_probs_where_the_signal_is_positive_and_lowers_others(tiny, tmp_path):
    model, rollouts, other = tiny
    run_here("distill.py", "--student", model, "--teacher", other, "--rollouts", rollouts, "--out",
             tmp_path / "s", "--steps", 8, *FAST)
    old, new, target = (teacher.score(m, rollouts) for m in (model, tmp_path / "s" / "final", other))
    signal = target - old
    adv = signal - signal.mean()
    assert (new - old)[adv > 0].mean() > 0.01 and (new - old)[adv < 0].mean() < -0.01
    metrics = read_metrics(tmp_path / "s")
    assert abs(metrics[0]["ratio_mean"] - 1) < 1e-5
    assert metrics[0]["kl_old_new"] < 1e-6 and metrics[-1]["loss"] < metrics[0]["loss"]
    statistics = json.loads((tmp_path / "s" / "run.json").read_text())["signal"]
    assert abs(statistics["mean"] - signal.double().mean().item()) < 1e-6
    assert sum(statistics["histogram_positive"]) + sum(statistics["histogram_negative"]) == len(signal)


def test_the_live_denominator_starts_as_the_fixed_signal_and_then_parts_from_it(tiny, tmp_path):
    model, rollouts, other = tiny
    for denominator in ("old", "live"):
        run_here("distill.py", "--student", model, "--teacher", other, "--denominator", denominator,
                 "--rollouts", rollouts,
                            "--out", tmp_path / denominator, "--steps", 3, *FAST)
    fixed, live = (read_metrics(tmp_path / d) for d in ("old", "live"))
    assert abs(fixed[0]["loss"] - live[0]["loss"]) < 1e-6
    assert abs(fixed[0]["grad_norm"] - live[0]["grad_norm"]) < 1e-5
    assert abs(fixed[2]["loss"] - live[2]["loss"]) > 1e-4


def test_the_entropy_bonus_raises_entropy_and_the_kl_term_holds_the_student_back(tiny, tmp_path):
    model, rollouts, other = tiny
    last = {}
    for name, extra in (("plain", []), ("entropy", ["--entropy-coef", 1.0]),
                        ("kl", ["--kl-coef", 5.0, "--kl-kind", "exact"]), ("sampled", ["--kl-coef", 5.0])):
        run_here("distill.py", "--student", model, "--teacher", other, "--rollouts", rollouts, "--out",
                 tmp_path / name, "--steps", 6, *FAST, *extra)
        last[name] = read_metrics(tmp_path / name)[-1]
    assert last["entropy"]["entropy"] > last["plain"]["entropy"] + 1e-3
    assert last["kl"]["kl_old_new"] < 0.9 * last["plain"]["kl_old_new"]
    assert last["sampled"]["kl_old_new"] < 0.95 * last["plain"]["kl_old_new"]


def test_the_teachers_fit_the_rewards(tiny, tmp_path):
    model, rollouts, _ = tiny
    for loss in ("ce", "mse"):
        run_here("teacher.py", "--model", model, "--rollouts", rollouts, "--out", tmp_path / loss, "--loss",
                 loss, "--beta", 0.5, "--steps", 12, *FAST)
        first, *_, last = read_metrics(tmp_path / loss)
        assert last["loss"] < first["loss"]
        assert last["prob_pos"] / last["prob_neg"] > first["prob_pos"] / first["prob_neg"]
        if loss == "ce":
            assert last["reward_acc"] > 0.9 and last["reward_pair_acc"] > 0.9
        else:
            assert last["explained_variance"] > first["explained_variance"]


def test_checkpoints_load_without_our_code_and_an_interrupted_run_continues_exactly(tiny, tmp_path):
    model, rollouts, _ = tiny
    command = ["teacher.py", "--model", model, "--rollouts", rollouts, "--loss", "ce", "--beta", 0.5,
               "--steps", 5, "--save-every", 2, *FAST]
    run_here(*command, "--out", tmp_path / "whole")
    # what a kill -9 in step 5 leaves behind: step 4 complete with its optimizer, one line of metrics too
    # many, no final
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
    assert not (again / "final").exists() and [p.parent.name
                                               for p in again.glob("*/optimizer.pt")] == ["step-0004"]
    run_here(*command, "--out", again)
    metrics = [read_metrics(tmp_path / d) for d in ("whole", "again")]
    assert [[(m["step"], m["loss"], m["grad_norm"]) for m in run]
            for run in metrics][0] == [(m["step"], m["loss"], m["grad_norm"]) for m in metrics[1]]
    for name in ("step-0002", "step-0004", "final"):
        ours = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / name, dtype="auto")
        theirs = AutoModelForCausalLM.from_pretrained(again / name, dtype="auto")
        assert ours.dtype == torch.float32
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
        assert AutoTokenizer.from_pretrained(tmp_path / "whole" / name).chat_template


def test_ppo_learns_values_first_and_then_a_policy_from_stored_advantages(tiny, tmp_path):
    model, rollouts, _ = tiny
    run_here("teacher.py", "--model", model, "--rollouts", rollouts, "--out", tmp_path / "p", "--loss", "ppo",
             "--value-steps", 40, "--value-lr", "1e-2", "--steps", 12, *FAST)
    values = read_metrics(tmp_path / "p" / "value")
    data, flat = teacher.load_rollouts(rollouts), torch.load(tmp_path / "p" / "value" / "values.pt",
                                                             weights_only=True)
    reward = data["reward"].repeat_interleave(data["response_offsets"].diff())
    at_mean = (reward - data["reward"].mean()).square().mean().item()  # the network starts as the mean reward
    assert len(values) == 40 and values[0]["loss"] == pytest.approx(at_mean, rel=1e-5)
    assert values[-1]["loss"] < 0.5 * values[0]["loss"]
    assert read_metrics(tmp_path / "p")[0]["explained_variance"] > 0.5
    assert flat[reward > 0].mean() > flat[reward == 0].mean() + 0.3
    assert not (tmp_path / "p" / "value" / "state.pt").exists()                     # the network is not kept
    adv = teacher.ppo_advantages(data, torch.ones_like(data["truncated"]), flat)
    assert adv.double().mean().abs() < 1e-6 and abs(adv.double().std(correction=0) - 1) < 1e-5
    policy = read_metrics(tmp_path / "p")
    assert policy[-1]["loss"] < policy[0]["loss"] and policy[0]["ratio_mean"] == pytest.approx(1, abs=1e-5)
    old, new = (teacher.score(m, rollouts) for m in (model, tmp_path / "p" / "final"))
    assert (new - old)[adv > 0].mean() > (new - old)[adv < 0].mean() + 0.01


def test_a_value_network_that_was_interrupted_starts_again_and_is_the_same(tiny, tmp_path, monkeypatch):
    model, rollouts, _ = tiny
    command = ["teacher.py", "--model", model, "--rollouts", rollouts, "--loss", "ppo", "--value-steps", 4,
               "--value-lr", "1e-2", "--steps", 1, *FAST]
    run_here(*command, "--out", tmp_path / "whole")
    teacher.score(model, rollouts)                                                  # cached: not what dies

    def dies(*_, **__):
        raise KeyboardInterrupt
    monkeypatch.setattr(teacher, "per_token", dies)                                 # before the values exist
    assert conftest.run_here(*command, "--out", tmp_path / "again") == 1
    monkeypatch.undo()
    run_here(*command, "--out", tmp_path / "again")
    values = [torch.load(tmp_path / d / "value" / "values.pt", weights_only=True) for d in ("whole", "again")]
    losses = [[(m["step"], m["loss"]) for m in read_metrics(tmp_path / d / "value")]
              for d in ("whole", "again")]
    assert torch.equal(*values) and losses[0] == losses[1] and len(losses[0]) == 4


def test_one_step_at_a_time_with_the_optimizer_carried_over_is_the_same_as_two_steps(tiny, tmp_path):
    """On-policy mode (Table 3): Adam's moments and step count go from run to run. All prompts in each batch,
    one order."""
    model, rollouts, _ = tiny
    # MSE needs no pi_old: the data stays valid
    common = ["teacher.py", "--rollouts", rollouts, "--loss", "mse", *FAST]
    run_here(*common, "--model", model, "--out", tmp_path / "two", "--steps", 2)
    run_here(*common, "--model", model, "--out", tmp_path / "first", "--steps", 1)
    second = [*common, "--model", tmp_path / "first" / "final", "--steps", 1]
    run_here(*second, "--out", tmp_path / "second", "--optimizer-from", tmp_path / "first")
    run_here(*second, "--out", tmp_path / "cold")
    two, carried, cold = (teacher.load_lm(tmp_path / d / "final", torch.float32).state_dict()
                          for d in ("two", "second", "cold"))
    assert all((two[key] - carried[key]).abs().max() < 1e-6 for key in two)
    assert any((two[key] - cold[key]).abs().max() > 1e-4 for key in two)


def test_recovery_from_an_unlearned_checkpoint_by_ce_and_by_sft(tiny, tmp_path):
    """Table 8, 9: with --ref start every R(y) begins at 0, so the loss at log 2; with --ref old it begins at
    the gap to pi_old."""
    model, rollouts, other = tiny
    for ref in ("start", "old"):
        run_here("teacher.py", "--model", other, "--rollouts", rollouts, "--out", tmp_path / ref, "--loss",
                 "ce", "--beta", 0.5, "--ref", ref, "--steps", 8, *FAST)
    start, old = (read_metrics(tmp_path / ref) for ref in ("start", "old"))
    assert start[0]["loss"] == pytest.approx(0.6931, abs=1e-4) and abs(old[0]["loss"] - 0.6931) > 0.01
    # to pi_old in both
    assert start[0]["kl_old_new"] == pytest.approx(old[0]["kl_old_new"]) and start[0]["kl_old_new"] > 0.01
    assert start[-1]["reward_pair_acc"] > 0.9
    run_here("teacher.py", "--model", other, "--rollouts", rollouts, "--out", tmp_path / "sft", "--loss",
             "sft", "--steps", 8, *FAST)
    sft = read_metrics(tmp_path / "sft")
    assert sft[-1]["loss"] < sft[0]["loss"]
    assert sft[-1]["prob_pos"] > sft[0]["prob_pos"] and sft[0]["prob_neg"] is None


def test_a_loss_that_is_not_finite_stops_before_any_weight_changes(tiny, tmp_path, monkeypatch, capsys):
    model, rollouts, _ = tiny
    honest, calls = teacher.ce_loss, []

    def breaks_in_step_4(*args):
        calls.append(1)
        return honest(*args) * (float("nan") if len(calls) == 4 else 1)
    monkeypatch.setattr(teacher, "ce_loss", breaks_in_step_4)
    assert conftest.run_here("teacher.py", "--model", model, "--rollouts", rollouts, "--out", tmp_path / "n",
                             "--loss", "ce", "--steps", 6, "--save-every", 3, "--batch-prompts", 2, "--lr",
                             "1e-3") == 1
    error = capsys.readouterr().err
    assert "step 4: loss nan" in error and "prompts of the batch: [" in error
    assert len(read_metrics(tmp_path / "n")) == 3
    kept = teacher.load_lm(tmp_path / "n" / "step-0003", torch.float32)
    assert all(p.isfinite().all() for p in kept.parameters()) and not (tmp_path / "n" / "final").exists()


def test_max_kl_ends_with_the_last_policy_inside_the_budget(tiny, tmp_path, capsys):
    model, rollouts, other = tiny
    command = ["distill.py", "--student", model, "--teacher", other, "--rollouts", rollouts, "--steps", 12,
               "--save-every", 2, *FAST]
    run_here(*command, "--out", tmp_path / "free")
    run_here(*command, "--out", tmp_path / "wide", "--max-kl", 100)
    run_here(*command, "--out", tmp_path / "tight", "--max-kl", 0.045)
    kls = [m["kl_new_old"] for m in read_metrics(tmp_path / "tight")]
    wide = [m["kl_new_old"] for m in read_metrics(tmp_path / "wide")]
    assert 0 < len(kls) < 12 and len(wide) == 12
    assert kls == wide[:len(kls)] and max(kls) <= 0.045 < wide[len(kls)]
    policy = teacher.Policy(teacher.load_policy(tmp_path / "tight" / "final"),
                            old_lm=teacher.load_policy(model))
    data = teacher.load_rollouts(rollouts)
    measured = distill.kl_to_old(policy, data, torch.arange(len(data["reward"])), 4096)
    assert measured == pytest.approx(kls[-1], rel=1e-4)     # all prompts fit into the batch that is measured
    weights = [teacher.load_lm(tmp_path / d / "final", torch.float32).state_dict() for d in ("free", "wide")]
    # measuring changes nothing
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    capsys.readouterr()
    assert conftest.run_here(*command, "--student", other, "--teacher", model, "--denominator", other,
                             "--out", tmp_path / "beyond", "--max-kl", 0.001) == 2
    assert "beyond --max-kl" in capsys.readouterr().err
    run_here(*command, "--out", tmp_path / "none", "--max-kl", 1e-9)  # not even one step fits
    assert read_metrics(tmp_path / "none") == []
    assert not torch.load(tmp_path / "none" / "final" / "optimizer.pt", weights_only=True)["optimizer"]
    start, final = (teacher.load_lm(p, torch.float32).state_dict()
                    for p in (model, tmp_path / "none" / "final"))
    assert all(torch.equal(start[key], final[key]) for key in start)


def alive_parameters():
    """Numbers in all parameters that exist now, shared storage counted once."""
    seen = {}
    for thing in gc.get_objects():
        if type(thing) is torch.nn.Parameter:
            seen[thing.untyped_storage().data_ptr()] = thing.numel()
    return sum(seen.values())


@pytest.mark.parametrize("extra, models", [([], 1), (["--denominator", "live"], 1), (["--kl-coef", 1.0], 1),
                                           (["--kl-coef", 1.0, "--kl-kind", "exact"], 2),
                                           (["--max-kl", 1.0], 2)])
def test_only_one_set_of_weights_is_alive_while_the_student_trains(tiny, tmp_path, monkeypatch, extra,
                                                                   models):
    model, rollouts, other = tiny
    gc.collect()
    before, counts, loss = alive_parameters(), [], distill.distill_loss

    def counting(*args):
        counts.append(alive_parameters() - before)
        return loss(*args)
    monkeypatch.setattr(distill, "distill_loss", counting)
    run_here("distill.py", "--student", model, "--teacher", other, "--rollouts", rollouts, "--out",
             tmp_path / "s", "--steps", 2, *FAST, *extra)
    one = sum(p.numel() for p in teacher.load_policy(model).parameters())
    assert counts and set(counts) == {models * one}


def test_a_second_run_reads_the_scores_of_the_first(tiny, tmp_path, monkeypatch):
    model, rollouts, other = tiny
    command = ["distill.py", "--student", model, "--teacher", other, "--rollouts", rollouts, "--steps", 1,
               *FAST]
    run_here(*command, "--out", tmp_path / "first")

    def scores_again(*_, **__):
        raise AssertionError("scored a second time")
    monkeypatch.setattr(teacher, "per_token", scores_again)
    run_here(*command, "--out", tmp_path / "second", "--clip", 0.1)


def test_the_mask_of_table_12_comes_before_whitening_and_shard_boundaries_change_nothing(tiny, tmp_path):
    model, _, other = tiny
    signals = []
    for shard_prompts in (1, 4, 6):
        folder = conftest.make_rollouts(tmp_path / f"r{shard_prompts}", model, shard_prompts=6)
        if shard_prompts < 6:                               # the same responses, cut elsewhere
            folder = resharded(folder, tmp_path / f"cut{shard_prompts}", shard_prompts)
        run_here("distill.py", "--student", model, "--teacher", other, "--rollouts", folder,
                 "--positive-signal", "min0", "--out", tmp_path / f"s{shard_prompts}", "--steps", 1, *FAST)
        data = teacher.load_rollouts(folder)
        usable = torch.ones_like(data["truncated"])
        signals.append(list(distill.signal_of_responses(data, usable, teacher.score(other, data),
                                                        teacher.score(model, data), "min0")))
    assert all(torch.equal(a, b) for cut in signals for (a, _), (b, _) in zip(cut, signals[0], strict=True))
    mean, std = distill.whitening(values for values, _ in signals[0])
    raw = torch.cat([values for values, _ in signals[0]])
    positive = torch.cat([torch.full(values.shape, kind) for values, kind in signals[0]])
    white = distill.standardize(raw, mean, std, torch.ones_like(raw))
    # whitening moved the zero
    assert (raw[positive] <= 0).all() and (raw[~positive] > 0).any() and (white[positive] > 0).any()
    assert abs(white.double().mean()) < 1e-6 and abs(white.double().std(correction=0) - 1) < 1e-5
    assert torch.equal(white, distill.whiten(raw, torch.ones_like(raw)))
    assert mean == pytest.approx(raw.double().mean().item(),
                                 abs=1e-12) and std == pytest.approx(raw.double().std(correction=0).item(),
                                                                     abs=1e-12)
    metrics = [json.loads((tmp_path / f"s{n}" / "metrics.jsonl").read_text()) for n in (1, 4, 6)]
    assert all((m["signal_mean"], m["signal_std"]) == (mean, std) for m in metrics)
    finals = [teacher.load_lm(tmp_path / f"s{n}" / "final", torch.float32).state_dict() for n in (1, 4, 6)]
    assert all(torch.equal(finals[0][key], final[key]) for final in finals for key in final)


def resharded(folder, out, shard_prompts, n=4):
    """A copy of one-shard rollouts with `shard_prompts` prompts per shard."""
    (whole,) = rollout.load_shards(folder)
    out.mkdir()
    total = len(whole["reward"])
    starts = range(0, total, shard_prompts * n)
    responses = (whole["offsets"].diff() - whole["prompt_len"]).long()
    for number, a in enumerate(starts):
        b = min(a + shard_prompts * n, total)
        first, last = whole["offsets"][a], whole["offsets"][b]
        part = {key: whole[key][a:b] for key in ("prompt_len", "prompt_index", "reward", "truncated")}
        part |= {"version": 1, "input_ids": whole["input_ids"][first:last],
                 "offsets": whole["offsets"][a:b + 1] - first,
                 "sampler_logp": whole["sampler_logp"][responses[:a].sum():responses[:b].sum()],
                 "meta": whole["meta"] | {"shards": len(starts)}}
        torch.save({key: value.clone() if torch.is_tensor(value) else value for key, value in part.items()},
                   out / f"shard-{number:05d}.pt")
    return out


def test_movement_bins_every_token_by_how_far_the_teacher_went(tiny, tmp_path):
    old, teacher_logp = torch.zeros(6), torch.tensor([0.5, 0.5, -0.5, 3.0, -3.0, 0.0])
    student = torch.tensor([0.1, 0.3, 0.2, 1.5, -1.5, 0.0])
    found = movement.movement(student, teacher_logp, old)
    assert found["count"] == [1, 3, 2] and found["teacher"] == pytest.approx([0, 0.5, 3])
    assert found["student"] == pytest.approx([0, 0.2, 1.5])
    assert found["same_direction"] == pytest.approx([0, 2 / 3,
                                                     1]) and found["ratio"] == pytest.approx(3.6 / 7.5)
    model, rollouts, other = tiny
    run_here("distill.py", "--student", model, "--teacher", other, "--rollouts", rollouts, "--out",
             tmp_path / "s", "--steps", 4, *FAST)
    run_here("evaluate.py", "--movement", tmp_path / "s")
    kept = json.loads((tmp_path / "s" / "run.json").read_text())["movement"]
    assert sum(kept["count"]) == len(teacher.score(model, rollouts)) and kept["ratio"] > 0


def test_sft_keeps_the_probability_of_wrong_responses_it_never_trains_on(tiny, tmp_path):
    model, rollouts, _ = tiny
    run_here("teacher.py", "--model", model, "--rollouts", rollouts, "--out", tmp_path / "t", "--loss", "sft",
             "--steps", 4, "--save-every", 2, *FAST)
    run_here("evaluate.py", "--movement", tmp_path / "t")
    kept = json.loads((tmp_path / "t" / "run.json").read_text())["movement"]
    assert [step for step, *_ in kept["path"]] == [0, 2, 4]
    data = teacher.load_rollouts(rollouts)
    right = (data["reward"] > 0).repeat_interleave(data["response_offsets"].diff())
    for checkpoint, (_, of_right, of_wrong) in zip((model, tmp_path / "t" / "step-0002",
                                                    tmp_path / "t" / "final"), kept["path"]):
        probs = teacher.score(checkpoint, rollouts).exp()
        assert (of_right, of_wrong) == pytest.approx((probs[right].mean().item(),
                                                      probs[~right].mean().item()))
    assert kept["path"][-1][1] > kept["path"][0][1] and sum(kept["positive"]) == int(right.sum())


def test_evaluation_says_how_many_answers_the_grader_refused(tiny, tmp_path, monkeypatch, capsys):
    problems = tmp_path / "p.jsonl"
    problems.write_text(json.dumps({"problem": "1+1", "answer": "2"}) + "\n")
    monkeypatch.setattr(rollout, "last_boxed", lambda text: "9^{9^{9^9}}")  # a random model boxes nothing
    run_here("evaluate.py", "--model", tiny[0], "--data", f"t={problems}:3", "--out", tmp_path / "r.jsonl",
             "--engine", "hf", "--max-tokens", 5)
    assert "refused 1" in capsys.readouterr().out  # each distinct answer is graded once
    assert evaluate.read_results(tmp_path / "r.jsonl")[0]["avg_at_k"] == 0


def test_pick_takes_the_best_on_a_benchmark_and_keeps_the_first_unless_the_lead_is_clear(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps({"model": m, "benchmark": b, "avg_at_k": a, "se": 0.02}) + "\n"
                            for m, b, a in (("A", "val", 0.5), ("B", "val", 0.54), ("C", "val", 0.58),
                                            ("A", "test", 0.9), ("B", "test", 0.1), ("C", "test", 0.1))))
    assert evaluate.pick(path, "val", ["A", "B", "C"]) == "C" and evaluate.pick(path, "test",
                                                                                ["B", "A"]) == "A"
    assert evaluate.pick(path, "val", ["A", "B"], margin=2) == "A" and evaluate.pick(path, "val", ["A", "C"],
                                                                                     margin=2) == "C"
    assert conftest.run_here("evaluate.py", "--pick", "val", "--model", "A", "D", "--out", path) == 2


def test_out_of_memory_names_the_flag_and_a_value(tiny, tmp_path, monkeypatch, capsys):
    """CUDA's error, raised by hand: the message must name what to change."""
    model, rollouts, other = tiny

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")
    for script, role in (("teacher.py", ["--model", model, "--loss", "ce"]),
                         ("distill.py", ["--student", model, "--teacher", other])):
        teacher.score(model, rollouts), teacher.score(other, rollouts)
        with monkeypatch.context() as patch:
            patch.setattr(teacher, "logps_from_hidden", full)
            assert conftest.run_here(script, *role, "--rollouts", rollouts, "--out", tmp_path / script,
                                     "--micro-tokens", 500) == 1
        message = capsys.readouterr().err
        assert f"{script}: error: out of GPU memory: try --micro-tokens 250" in message
        assert "--offload-activations --shard" in message


def test_padding_is_small_and_ranks_are_balanced_at_the_paper_s_lengths():
    """Lognormal lengths, mean 20k, cap 32k, in steps of 32 prompts x 16: under 3 % padding at the default
    --micro-tokens."""
    generator = torch.Generator().manual_seed(0)
    lengths = (9.75 + 0.6 * torch.randn(32 * 64, 16, generator=generator)).exp().clamp(200, 32768).long()
    assert 18000 < lengths.float().mean() < 21000
    waste, balance = [], []
    for step in lengths.flatten().split(512):
        shares = teacher.micro_batches(step, 32768, 8)
        padded = sum(len(micro) * step[micro].max().item() for share in shares for micro in share)
        work = [sum((step[micro] * (1 + step[micro] / 32768)).sum().item() for micro in share)
                for share in shares]
        waste.append(1 - step.sum().item() / padded)
        balance.append(sum(work) / 8 / max(work))
    assert max(waste) < 0.03 and min(balance) >= 0.97


def test_a_flag_that_an_older_run_json_lacks_had_its_default(tiny, tmp_path, capsys):
    command = ["teacher.py", "--model", tiny[0], "--rollouts", tiny[1], "--out", tmp_path / "t", "--loss",
               "ce", "--steps", 1]
    assert conftest.run_here(*command) == 0
    path = tmp_path / "t" / "run.json"
    run = json.loads(path.read_text())
    del run["args"]["negative_weight"]
    path.write_text(json.dumps(run))
    capsys.readouterr()
    assert conftest.run_here(*command) == 0 and "already finished" in capsys.readouterr().out
    assert conftest.run_here(*command, "--negative-weight", 2) == 2
    assert "--negative-weight 1.0, now 2.0" in capsys.readouterr().err
