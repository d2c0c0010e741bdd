"""Ranks and micro-batches change the speed of a step, never its gradient: both stages, with unequal
lengths."""
import json

import pytest
import torch
from safetensors.torch import load_file

import conftest
import distill
import teacher

COMMON = ["--steps", 3, "--batch-prompts", 3, "--lr", "1e-3", "--save-every", 2, "--no-checkpointing"]


def run(nproc, *argv):
    """One process in this one, which saves its start, or several under torchrun."""
    if nproc == 1:
        assert conftest.run_here(*argv) == 0
    else:
        conftest.run_script(*argv, nproc=nproc)


def weights(folder):
    return load_file(folder / "final" / "model.safetensors")


def largest_gap(a, b):
    return max((x - b[key]).abs().max().item() for key, x in a.items())


@pytest.mark.parametrize("loss", ["ce", "sapo", "mse", "ppo"])
def test_two_ranks_match_one_process_in_the_teacher(tiny, tmp_path, loss):
    model, rollouts, _ = tiny
    for nproc in (1, 2):
        run(nproc, "teacher.py", "--model", model, "--rollouts", rollouts, "--out",
            tmp_path / f"{loss}{nproc}", "--loss", loss, "--beta", 0.5, "--value-steps", 4, "--value-lr",
            "1e-2", "--micro-tokens", 120, *COMMON)
    if loss == "ppo":
        values = [torch.load(tmp_path / f"ppo{n}" / "value" / "values.pt", weights_only=True) for n in (1, 2)]
        # values are at most 1; rounding alone has moved them by 1.1e-5 on some processors
        assert (values[0] - values[1]).abs().max() < 1e-4 and values[0].std() > 0.01
    assert largest_gap(weights(tmp_path / f"{loss}1"), weights(tmp_path / f"{loss}2")) < 1e-5
    files = [tmp_path / f"{loss}{n}" / "metrics.jsonl" for n in (1, 2)]
    first, second = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
    for a, b in zip(first, second, strict=True):
        for key in ("loss", "grad_norm", "kl_old_new", "entropy", "prob_pos", "prob_neg", "tokens"):
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-6), key


def test_two_ranks_match_one_process_in_distillation(tiny, tmp_path):
    model, rollouts, other = tiny
    for nproc in (1, 2):
        run(nproc, "distill.py", "--student", model, "--teacher", other, "--rollouts", rollouts, "--out",
            tmp_path / str(nproc), "--kl-coef", 0.1, "--kl-kind", "exact", "--entropy-coef", 0.01, "--max-kl",
            10, "--micro-tokens", 120, *COMMON)
    assert largest_gap(weights(tmp_path / "1"), weights(tmp_path / "2")) < 1e-5
    first, second = ([json.loads(line) for line in (tmp_path / n / "metrics.jsonl").read_text().splitlines()]
                     for n in "12")
    for a, b in zip(first, second, strict=True):  # Adam does not see a factor on the gradient; these do
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4,
                                          abs=1e-6) and a["grad_norm"] == pytest.approx(b["grad_norm"],
                                                                                        rel=1e-4)
        assert a["kl_new_old"] == pytest.approx(b["kl_new_old"], rel=1e-4) and a["kl_new_old"] > 0


def test_sharded_ranks_match_one_process_and_take_over_its_checkpoints(tmp_path):
    """--shard in both stages, with an odd number of micro-batches, so that one rank has an idle turn."""
    model = conftest.make_model(tmp_path / "model")
    rollouts = conftest.make_rollouts(tmp_path / "rollouts", model, n=3)
    # Adam turns rounding into steps of any size up to lr
    common = ["--rollouts", rollouts, "--micro-tokens", 1, *COMMON, "--lr", "1e-4"]
    for nproc, flags in ((1, ()), (2, ("--shard",))):
        def stage(script, name, *argv):
            run(nproc, script, "--out", tmp_path / f"{name}{nproc}", *argv, *common, *flags)
        stage("teacher.py", "ce", "--model", model, "--loss", "ce", "--beta", 0.5, "--kl-coef", 0.1,
              "--kl-kind", "exact")
        # the other one's weights and Adam state go on here
        stage("teacher.py", "ppo", "--model", tmp_path / "ce1" / "final", "--loss", "ppo", "--value-steps", 3,
              "--value-lr", "1e-2", "--optimizer-from", tmp_path / "ce1", "--old", model)
        stage("distill.py", "student", "--student", model, "--teacher", tmp_path / "ce1" / "final",
              "--max-kl", 0.0002, "--entropy-coef", 0.01)
        torch.save(teacher.score(model, rollouts), tmp_path / f"score{nproc}")
        for cached in (rollouts / "scores").iterdir():
            cached.unlink()
    for name in ("ce", "ppo", "student"):
        assert largest_gap(weights(tmp_path / f"{name}1"), weights(tmp_path / f"{name}2")) < 1e-5
        assert weights(tmp_path / f"{name}1").keys() == weights(tmp_path / f"{name}2").keys()
    assert largest_gap(weights(tmp_path / "ce1"), load_file(model / "model.safetensors")) > 1e-4
    # the third passed the budget
    assert [len((tmp_path / f"student{n}" / "metrics.jsonl").read_text().splitlines()) for n in (1, 2)] == [2,
                                                                                                            2]
    files = [tmp_path / f"ce{n}" / "metrics.jsonl" for n in (1, 2)]
    first, second = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
    for a, b in zip(first, second, strict=True):
        for key in ("loss", "grad_norm", "kl_old_new", "entropy", "prob_pos", "reward_pair_acc"):
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-6), key


def test_sharding_needs_several_processes(tiny, tmp_path):
    assert conftest.run_here("teacher.py", "--model", tiny[0], "--rollouts", tiny[1], "--out", tmp_path / "t",
                             "--loss", "ce", "--shard") == 2


LOSSES = {
    "ce": lambda lp, old, mask, r, a, n_tok, n: teacher.ce_loss(lp, old, mask, r, 0.5) / n,
    "ce mean": lambda lp, old, mask, r, a, n_tok, n: teacher.ce_loss(lp, old, mask, r, 0.5, "mean") / n,
    "sapo": lambda lp, old, mask, r, a, n_tok, n: teacher.sapo_loss(lp, old, mask, a[:, 0]) / n,
    "grpo": lambda lp, old, mask, r, a, n_tok, n: teacher.grpo_loss(lp, old, mask, a[:, 0]) / n_tok,
    # any per-token advantage
    "ppo": lambda lp, old, mask, r, a, n_tok, n: teacher.grpo_loss(lp, old, mask, a + old) / n_tok,
    "mse": lambda lp, old, mask, r, a, n_tok, n: teacher.mse_loss(lp, mask, r) / n_tok,
    "sft": lambda lp, old, mask, r, a, n_tok, n: teacher.sft_loss(lp, mask, r) / n_tok,
    "distill": lambda lp, old, mask, r, a, n_tok,
    n: distill.distill_loss(lp, lp, old, a - old, mask, kl_coef=0.1, entropy_coef=0.1) / n_tok,
}


@pytest.mark.parametrize("loss", LOSSES)
def test_any_split_over_ranks_micro_batches_and_orders_gives_the_same_gradient(tiny, loss):
    """What DDP does with several ranks is written out: each rank's loss times the world, gradients averaged
    over ranks."""
    model, rollouts, other = tiny
    data = teacher.load_rollouts(rollouts)
    old_logp = teacher.score(model, rollouts)
    adv = teacher.group_advantages(data["reward"], data["prompt_index"])
    policy = teacher.Policy(teacher.load_policy(other).double())
    lengths, n_tokens, n = data["offsets"].diff(), len(old_logp), len(adv)
    assert len(lengths.unique()) > 8
    splits = [teacher.micro_batches(lengths, budget, world) for budget,
              world in ((10 ** 6, 1), (200, 1), (60, 1), (200, 2), (60, 3), (90, 4))]
    shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    splits += [[[i[None] for i in shuffled]], [list(shuffled[::2].split(3)), list(shuffled[1::2].split(5))]]
    gradients = []
    for split in splits:
        total = 0
        for rank in split:
            policy.zero_grad()
            for micro in rank:
                input_ids, mask, old_lp = (x if x.dtype == torch.long else x.double()
                                           for x in teacher.pad_responses(data, micro, "cpu", old_logp))
                logp, _, _ = policy(input_ids, mask)
                a = adv[micro, None].double().expand_as(mask)
                (LOSSES[loss](logp, old_lp, mask, data["reward"][micro].double(), a, n_tokens,
                              n) * len(split)).backward()
            total = total + torch.cat([p.grad.flatten() for p in policy.parameters()]) / len(split)
        gradients.append(total)
    assert gradients[0].norm() > 1e-4
    for gradient in gradients[1:]:
        assert (gradient - gradients[0]).norm() < 1e-6 * gradients[0].norm()
