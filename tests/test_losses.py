"""Each loss against numbers worked out by hand, with the equation it comes from, and against what must hold
of it."""
import math

import pytest
import torch

import distill
import teacher


def t(*rows):
    return torch.tensor(rows, dtype=torch.float64)


MASK = t([1, 1, 0], [1, 0, 0])                              # a response of two tokens and one of one token
OLD = t([-1.0, -0.5, 9.0], [-2.0, 9.0, 9.0])                # 9: padding that must never be looked at
LOGP = t([-0.8, -0.9, -7.0], [-1.5, -7.0, -7.0])            # log-ratios 0.2, -0.4 | 0.5
REWARD = torch.tensor([1.0, 0.0], dtype=torch.float64)


def test_ce_is_binary_cross_entropy_of_the_summed_log_ratio():     # Eq. 2, 3
    beta = 0.5
    by_hand = -math.log(sigmoid(beta * (0.2 - 0.4))) - math.log(1 - sigmoid(beta * 0.5))
    assert teacher.ce_loss(LOGP, OLD, MASK, REWARD, beta).item() == pytest.approx(by_hand)
    by_hand_mean = -math.log(sigmoid(beta * -0.1)) - math.log(1 - sigmoid(beta * 0.5))
    assert teacher.ce_loss(LOGP, OLD, MASK, REWARD, beta, "mean").item() == pytest.approx(by_hand_mean)


def test_ce_gradient_pushes_every_token_of_a_response_alike():      # dL/dlogp = beta (sigmoid(R) - label)
    logp = LOGP.clone().requires_grad_()
    teacher.ce_loss(logp, OLD, MASK, REWARD, 0.5).backward()
    positive = 0.5 * (torch.sigmoid(t(0.5 * -0.2)[0]).item() - 1)
    negative = 0.5 * torch.sigmoid(t(0.5 * 0.5)[0]).item()
    torch.testing.assert_close(logp.grad, t([positive, positive, 0], [negative, 0, 0]))


def test_ce_of_an_unchanged_policy_is_log_2_per_response():
    assert teacher.ce_loss(OLD, OLD, MASK, REWARD, 0.3).item() == pytest.approx(2 * math.log(2))


def test_mse_is_on_probabilities_and_weighs_negatives():           # Eq. 10, Table 9
    by_hand = (math.exp(-0.8) - 1) ** 2 + (math.exp(-0.9) - 1) ** 2 + 0.5 * math.exp(-1.5) ** 2
    assert teacher.mse_loss(LOGP, MASK, REWARD, 0.5).item() == pytest.approx(by_hand)
    logp = LOGP.clone().requires_grad_()
    teacher.mse_loss(logp, MASK, REWARD).backward()                 # 2 (pi - R) pi
    p = LOGP.exp()
    torch.testing.assert_close(logp.grad, 2 * (p - REWARD[:, None]) * p * MASK)


def test_sft_sees_positive_responses_only():
    assert teacher.sft_loss(LOGP, MASK, REWARD).item() == pytest.approx(0.8 + 0.9)


def test_grpo_is_the_clipped_surrogate_summed_over_tokens():       # Eq. 5, clip 0.2 / 0.28
    adv = torch.tensor([1.0, -1.0], dtype=torch.float64)
    by_hand = -(math.exp(0.2) + math.exp(-0.4)) + max(math.exp(0.5), 0.8)
    assert teacher.grpo_loss(LOGP, OLD, MASK, adv).item() == pytest.approx(by_hand)


@pytest.mark.parametrize("r, weight", [(0.1, 0.082), (0.5, 0.470), (1, 1), (2, 1.573), (5, 0.353),
                                       (8, 0.029)])
def test_sapo_gradient_weights(r, weight):                         # 4 p (1 - p) r, p = sigmoid(tau (r - 1))
    logp = torch.tensor([[math.log(r)]], dtype=torch.float64, requires_grad=True)
    teacher.sapo_loss(logp, torch.zeros_like(logp), torch.ones_like(logp), torch.ones(1)).backward()
    assert -logp.grad.item() == pytest.approx(weight, abs=6e-4)


def test_sapo_is_a_mean_over_tokens_and_a_sum_over_responses():
    adv = torch.tensor([2.0, -1.0], dtype=torch.float64)
    f = lambda r, tau: 4 / tau / (1 + math.exp(-tau * (r - 1)))     # noqa: E731
    by_hand = -2 * (f(math.exp(0.2), 1.0) + f(math.exp(-0.4), 1.0)) / 2 + f(math.exp(0.5), 1.05)
    assert teacher.sapo_loss(LOGP, OLD, MASK, adv).item() == pytest.approx(by_hand)


def test_group_advantages_use_bessels_correction_and_a_group_of_one_gets_nothing():
    reward, prompt = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0]), torch.tensor([7, 7, 7, 2, 2, 5])
    std = math.sqrt((4 / 9 + 1 / 9 + 1 / 9) / 2)
    wanted = torch.tensor([2 / 3, -1 / 3, -1 / 3, 0, 0, 0]) / torch.tensor([std, std, std, 1, 1, 1])
    torch.testing.assert_close(teacher.group_advantages(reward, prompt), wanted, rtol=1e-5, atol=1e-5)


def test_gae_equals_its_definition_for_each_response():
    """A_t = sum over k of lambda^k delta_(t+k), delta_t = r_t + V_(t+1) - V_t, lambda from the length of the
    response."""
    generator = torch.Generator().manual_seed(0)
    values, mask = torch.randn(3, 60, generator=generator,
                               dtype=torch.float64), torch.zeros(3, 60, dtype=torch.float64)
    spans, reward = [(4, 54), (0, 60), (7, 17)], torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    for row, (a, b) in enumerate(spans):
        mask[row, a:b] = 1
    adv = teacher.gae_advantages(values, reward, mask)
    for row, (a, b) in enumerate(spans):
        lam = max(0.0, 1 - 1 / (0.05 * (b - a)))
        v = [*values[row, a:b].tolist(), 0.0]
        delta = [(reward[row].item() if t == b - a - 1 else 0.0) + v[t + 1] - v[t] for t in range(b - a)]
        for t in range(b - a):
            assert adv[row, a + t].item() == pytest.approx(sum(lam ** k * delta[t + k]
                                                               for k in range(b - a - t)))
    assert (adv[mask == 0] == 0).all()


def test_gae_of_a_response_of_one_token_is_the_reward_minus_its_value():
    values, mask = torch.tensor([[7.0, 0.3, 7.0]]), torch.tensor([[0.0, 1.0, 0.0]])
    torch.testing.assert_close(teacher.gae_advantages(values, torch.tensor([1.0]), mask),
                               torch.tensor([[0.0, 0.7, 0.0]]))


def test_groups_that_are_all_right_or_all_wrong_push_nothing():
    adv = teacher.group_advantages(torch.tensor([1.0, 1, 1, 0, 0, 0]), torch.tensor([0, 0, 0, 1, 1, 1]))
    assert (adv == 0).all()
    for loss in (teacher.sapo_loss, teacher.grpo_loss):
        logp = torch.full((6, 2), -1.0, requires_grad=True)
        loss(logp, torch.full((6, 2), -1.5), torch.ones(6, 2), adv).backward()
        assert (logp.grad == 0).all()


# ---- every loss again, re-derived from the papers' formulas one token at a time ----------------------------

def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


def derived_ce(rows, beta, mean):  # d/dlogp: beta (sigmoid(R) - label), the same for every token
    for tokens, reward in rows:
        implicit = beta * sum(t["logp"] - t["old"] for t in tokens) / (len(tokens) if mean else 1)
        p = sigmoid(implicit)
        yield -math.log(p) if reward else -math.log(1 - p), [beta * (p - reward) / (len(tokens) if mean
                                                                                    else 1)] * len(tokens)


def derived_mse(rows, w):                                   # d/dlogp: 2 (pi - R) pi
    for tokens, reward in rows:
        weight, pi = 1.0 if reward else w, [math.exp(t["logp"]) for t in tokens]
        yield sum(weight * (p - reward) ** 2 for p in pi), [2 * weight * (p - reward) * p for p in pi]


def derived_sft(rows):
    for tokens, reward in rows:
        yield -sum(t["logp"] for t in tokens) * reward, [-reward] * len(tokens)


def derived_sapo(rows):  # f = 4/tau sigmoid(tau (r - 1)); d/dlogp: 4 p (1 - p) r
    for tokens, _ in rows:
        value, slopes = 0.0, []
        for t in tokens:
            tau, r = 1.0 if t["adv"] > 0 else 1.05, math.exp(t["logp"] - t["old"])
            p = sigmoid(tau * (r - 1))
            value -= 4 / tau * p * t["adv"] / len(tokens)
            slopes.append(-4 * p * (1 - p) * r * t["adv"] / len(tokens))
        yield value, slopes


def derived_clip(rows, low, high):  # the gradient of r A, 0 once r has left the interval on A's side
    for tokens, _ in rows:
        value, slopes = 0.0, []
        for t in tokens:
            r, a = math.exp(t["logp"] - t["old"]), t["adv"]
            stopped = r > 1 + high if a > 0 else r < 1 - low
            value -= (1 + high if a > 0 else 1 - low) * a if stopped else r * a
            slopes.append(0.0 if stopped else -r * a)
        yield value, slopes


@pytest.mark.parametrize("name", ["ce sum", "ce mean", "mse", "sft", "sapo", "grpo", "ppo", "distill"])
def test_losses_equal_their_formulas_on_random_ragged_batches(name):
    generator = torch.Generator().manual_seed(1)
    lengths = [1, 7, 3, 12, 2]
    mask = (torch.arange(12) < torch.tensor(lengths)[:, None]).double()
    old = -2 * torch.rand(5, 12, generator=generator, dtype=torch.float64)
    logp = (old + torch.randn(5, 12, generator=generator, dtype=torch.float64)).requires_grad_()
    reward = torch.tensor([1.0, 0, 0, 1, 1], dtype=torch.float64)
    per_token = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    adv = per_token if name in ("ppo", "distill") else teacher.group_advantages(reward,
                                                                                torch.tensor([0, 0, 0, 1, 1]))
    by_token = adv if adv.dim() == 2 else adv[:, None].expand(5, 12)
    rows = [([{"logp": logp[i, t].item(), "old": old[i, t].item(), "adv": by_token[i, t].item()}
              for t in range(n)], reward[i].item())
            for i, n in enumerate(lengths)]
    loss, derived = {
        "ce sum": lambda: (teacher.ce_loss(logp, old, mask, reward, 0.3), derived_ce(rows, 0.3, False)),
        "ce mean": lambda: (teacher.ce_loss(logp, old, mask, reward, 0.3, "mean"),
                            derived_ce(rows, 0.3, True)),
        "mse": lambda: (teacher.mse_loss(logp, mask, reward, 0.5), derived_mse(rows, 0.5)),
        "sft": lambda: (teacher.sft_loss(logp, mask, reward), derived_sft(rows)),
        "sapo": lambda: (teacher.sapo_loss(logp, old, mask, adv), derived_sapo(rows)),
        "grpo": lambda: (teacher.grpo_loss(logp, old, mask, adv), derived_clip(rows, 0.2, 0.28)),
        "ppo": lambda: (teacher.grpo_loss(logp, old, mask, adv), derived_clip(rows, 0.2, 0.28)),
        "distill": lambda: (distill.distill_loss(logp, torch.zeros_like(old), old, adv, mask, 0.2),
                            derived_clip(rows, 0.2, 0.2))}[name]()
    values, slopes = zip(*derived)
    assert loss.item() == pytest.approx(sum(values), abs=1e-10)
    loss.backward()
    for i, n in enumerate(lengths):
        assert logp.grad[i, :n].tolist() == pytest.approx(slopes[i], abs=1e-10)
    assert (logp.grad[mask == 0] == 0).all()


LOSSES = {
    "ce": lambda x: teacher.ce_loss(x, OLD, MASK, REWARD, 0.5),
    "mse": lambda x: teacher.mse_loss(x, MASK, REWARD),
    "ce mean": lambda x: teacher.ce_loss(x, OLD, MASK, REWARD, 0.5, "mean"),
    "sapo": lambda x: teacher.sapo_loss(x, OLD, MASK, 2 * REWARD - 1),
    "grpo": lambda x: teacher.grpo_loss(x, OLD, MASK, 2 * REWARD - 1),
    "ppo": lambda x: teacher.grpo_loss(x, OLD, MASK, t([0.4, -1.0, 3.0], [-0.2, 3.0, 3.0])),
    "sft": lambda x: teacher.sft_loss(x, MASK, REWARD),
    "distill": lambda x: distill.distill_loss(x, -x, OLD, LOGP, MASK, kl_coef=0.3, entropy_coef=0.1),
}


@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_has_the_gradient_of_a_finite_difference_and_none_on_padding(name):
    logp = LOGP.clone().requires_grad_()
    LOSSES[name](logp).backward()
    assert (logp.grad[MASK == 0] == 0).all()
    for i, j in MASK.nonzero().tolist():
        step = torch.zeros_like(LOGP)
        step[i, j] = 1e-6
        slope = (LOSSES[name](LOGP + step) - LOSSES[name](LOGP - step)).item() / 2e-6
        assert logp.grad[i, j].item() == pytest.approx(slope, abs=1e-7)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("gap", [-100.0, 100.0])
def test_extreme_log_ratios_and_nan_padding_give_finite_gradients(name, gap):
    logp = torch.where(MASK > 0, OLD + gap, torch.nan).float().requires_grad_()
    loss = LOSSES[name](logp)
    loss.backward()
    assert loss.isfinite() and logp.grad[MASK > 0].isfinite().all()


# ---- the distillation loss and its signal ------------------------------------------------------------------

def test_distillation_at_ratio_one_is_reinforce_with_the_signal():  # Eq. 9 at r = 1
    logp = OLD.clone().requires_grad_()
    adv = t([0.7, -1.2, 5.0], [2.0, 5.0, 5.0])
    distill.distill_loss(logp, torch.zeros_like(logp), OLD, adv, MASK).backward()
    torch.testing.assert_close(logp.grad, -adv * MASK)


@pytest.mark.parametrize("log_ratio, adv, flows",
                         [(0.5, 1.0, False), (0.5, -1.0, True), (-0.5, 1.0, True), (-0.5, -1.0, False)])
def test_clipping_stops_the_gradient_only_where_the_token_has_moved_far_enough(log_ratio, adv, flows):
    logp = t([log_ratio]).requires_grad_()
    distill.distill_loss(logp, t([0.0]), t([0.0]), t([adv]), t([1.0])).backward()
    assert (logp.grad.item() != 0) == flows


def test_the_sampled_kl_term_has_the_gradient_of_the_exact_kl_in_expectation():
    """Enumerate all actions of a small vocabulary, weighted by pi_old: KL(pi || pi_old) and its gradient come
    out exactly."""
    generator = torch.Generator().manual_seed(0)
    logits, old = (torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(2))
    logits.requires_grad_()
    old_logp, logp = old.log_softmax(0), logits.log_softmax(0)
    one = torch.ones(1, dtype=torch.float64)
    expected = sum(old_logp[a].exp() * distill.distill_loss(logp[a].view(1, 1), one.view(1, 1),
                                                            old_logp[a].view(1, 1), 0 * one.view(1, 1),
                                                            one.view(1, 1), kl_coef=1.0) for a in range(5))
    exact = (logp.exp() * (logp - old_logp)).sum()
    assert expected.item() == pytest.approx(exact.item())
    for a, b in zip(torch.autograd.grad(expected, logits, retain_graph=True)[0],
                    torch.autograd.grad(exact, logits)[0]):
        assert a.item() == pytest.approx(b.item())


def test_exact_kl_takes_the_place_of_the_sampled_term_and_entropy_is_a_bonus():
    zero = torch.zeros_like(OLD)
    assert distill.distill_loss(OLD, zero, OLD, zero, MASK, kl_coef=2.0,
                                exact_kl=torch.ones_like(OLD)).item() == pytest.approx(2 * 3)
    assert distill.distill_loss(OLD, torch.ones_like(OLD), OLD, zero, MASK,
                                entropy_coef=0.5).item() == pytest.approx(-0.5 * 3)


def test_whitening_has_zero_mean_unit_variance_and_ignores_padding():
    signal, mask = torch.randn(40, 9, generator=torch.Generator().manual_seed(0)) * 3 + 5, torch.ones(40, 9)
    mask[:, 6:] = 0
    white = distill.whiten(torch.where(mask > 0, signal, 1e6), mask)
    kept = white[mask > 0].double()
    assert abs(kept.mean()) < 1e-6 and abs(kept.var(correction=0) - 1) < 1e-5 and (white[mask == 0]
                                                                                   == 0).all()
    assert torch.equal(white[mask > 0], distill.whiten(signal[mask > 0], torch.ones(240)))


def test_table_12_masks_positives_only():
    signal, positive = torch.tensor([-1.0, 2.0, -3.0, 4.0]), torch.tensor([True, True, False, False])
    denominator = torch.tensor([0.5, -2.0, 7.0, 1.0])
    for keep, expected in (("min0", [-1, 0, -3, 4]), ("max0", [0, 2, -3, 4]), ("all", signal.tolist())):
        assert distill.signal_of(signal + denominator, denominator, positive, keep).tolist() == expected
