"""SAPO and GRPO against TRL's own trainer code. Runs where TRL is installed (pip install trl); .ci/run
installs it."""
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import teacher

pytest.importorskip("trl")
from trl import GRPOTrainer  # noqa: E402


def trl_loss(loss_type, logp, old_logp, mask, adv):
    """GRPOTrainer._compute_loss, unchanged, on log-probs that are given: only what surrounds the loss is a
    stand-in."""
    trainer = mock.MagicMock(
        loss_type=loss_type, beta=0.0, epsilon_low=0.2, epsilon_high=0.28, top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token", use_vllm=False, aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1, max_completion_length=logp.shape[1],
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(delta=None, sapo_temperature_pos=1.0, sapo_temperature_neg=1.05,
                             steps_per_generation=1),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x))
    trainer._get_per_token_logps_and_entropies.return_value = (logp, torch.zeros_like(logp), None)
    ids = torch.zeros(logp.shape, dtype=torch.long)
    return GRPOTrainer._compute_loss(trainer, None, {
        "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids, "completion_mask": mask,
        "advantages": adv,
        "old_per_token_logps": old_logp, "num_items_in_batch": mask.sum()})


def random_batch(seed, rows=6, width=15):
    generator = torch.Generator().manual_seed(seed)
    old_logp = -torch.rand(rows, width, generator=generator, dtype=torch.float64) * 3
    # ratios from about 0.05 to 20
    logp = old_logp + torch.randn(rows, width, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, width + 1, (rows,), generator=generator)
    mask = (torch.arange(width) < lengths[:, None]).double()
    reward = (torch.arange(rows) % 3 == 0).double()
    return logp.requires_grad_(), old_logp, mask, teacher.group_advantages(reward, torch.arange(rows) // 3)


def same(ours, theirs, logp):
    a, b = (torch.autograd.grad(loss, logp, retain_graph=True)[0] for loss in (ours, theirs))
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)
    assert a.abs().max() > 1e-3
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_sapo_is_trls_with_responses_averaged(seed):
    logp, old_logp, mask, adv = random_batch(seed)
    same(teacher.sapo_loss(logp, old_logp, mask, adv) / len(mask),
         trl_loss("sapo", logp, old_logp, mask, adv), logp)


@pytest.mark.parametrize("seed", range(5))
def test_grpo_over_the_number_of_tokens_is_trls_token_mean(seed):
    logp, old_logp, mask, adv = random_batch(seed)
    for loss_type in ("dapo", "bnpo"):  # one process and one micro-batch: the two are the same
        same(teacher.grpo_loss(logp, old_logp, mask, adv) / mask.sum(),
             trl_loss(loss_type, logp, old_logp, mask, adv), logp)


@pytest.mark.parametrize("seed", range(5))
def test_grpo_with_the_advantage_over_the_length_is_trls_sequence_mean(seed):
    logp, old_logp, mask, adv = random_batch(seed)
    per_token = adv[:, None] / mask.sum(1, keepdim=True) * mask
    same(teacher.grpo_loss(logp, old_logp, mask, per_token) / len(mask),
         trl_loss("grpo", logp, old_logp, mask, adv), logp)


def test_token_mean_differs_from_dr_grpo_by_the_share_of_real_tokens():
    logp, old_logp, mask, adv = random_batch(0)
    share = mask.mean()  # TRL's dr_grpo divides by all positions, padding included
    same(teacher.grpo_loss(logp, old_logp, mask, adv) / mask.sum() * share,
         trl_loss("dr_grpo", logp, old_logp, mask, adv), logp)


def test_the_group_advantage_is_trls_up_to_the_constant_beside_the_std():
    reward = torch.tensor([1.0, 0, 0, 0, 1, 1, 0, 1], dtype=torch.float64)
    ours = teacher.group_advantages(reward, torch.arange(8) // 4)
    groups = reward.view(2, 4)
    # TRL: + 1e-4, ours: + 1e-6
    theirs = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()
    factor = ((groups.std(1, keepdim=True) + 1e-4) / (groups.std(1, keepdim=True) + 1e-6)).expand(2,
                                                                                                  4).flatten()
    torch.testing.assert_close(ours, theirs * factor)
