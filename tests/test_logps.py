"""Chunked log-probs equal dense ones, in value and gradient, whatever the chunk, the batching and the
padding."""
import pytest
import torch
from transformers import AutoModelForCausalLM

import teacher


def dense(hidden, weight, targets, temperature):
    """The definition, with all logits in memory."""
    logp = ((hidden @ weight.T) / temperature).log_softmax(-1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def random_head(n, d=7, v=23, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(v, d, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, v, (n,), generator=generator)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("vocab_tile", [1, 4, 23, 64])
@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_chunked_logps_and_entropy_equal_dense_in_value_and_gradient(chunk, vocab_tile, temperature,
                                                                     monkeypatch):
    monkeypatch.setattr(teacher, "VOCAB_TILE", vocab_tile)
    hidden, weight, targets = random_head(11)
    cotangents = torch.randn(2, 11, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    results = []
    for function in (dense, lambda *a: teacher.logps_from_hidden(*a, chunk=chunk)):
        logp, entropy = function(hidden, weight, targets, temperature)
        grads = torch.autograd.grad((logp * cotangents[0] + entropy * cotangents[1]).sum(), (hidden, weight))
        results.append((logp, entropy, *grads))
    for ours, wanted in zip(*results):
        torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-10)


def test_gradients_pass_a_finite_difference_check(monkeypatch):
    monkeypatch.setattr(teacher, "VOCAB_TILE", 5)
    hidden, weight, targets = random_head(4, d=3, v=9)
    assert torch.autograd.gradcheck(lambda h, w: teacher.logps_from_hidden(h, w, targets, 0.7, 3),
                                    (hidden, weight))


def test_fp32_hidden_states_give_fp32_accuracy_and_large_logits_stay_finite():
    hidden, weight, targets = random_head(50, d=16, v=3000, dtype=torch.float32)
    exact, _ = dense(hidden.double(), weight.double(), targets, 0.6)
    logp, entropy = teacher.logps_from_hidden(hidden, weight, targets, 0.6, 16)
    assert logp.dtype == torch.float32 and (logp - exact).abs().max() < 2e-5
    logp, entropy = teacher.logps_from_hidden(hidden * 1e4, weight, targets, 0.6, 16)
    assert logp.isfinite().all() and entropy.isfinite().all()


def test_without_entropy_the_second_value_is_none():
    assert teacher.logps_from_hidden(*random_head(3), with_entropy=False)[1] is None


def test_the_logits_of_all_tokens_never_exist_at_once(monkeypatch):
    """Largest tile product that forward and backward ask for: chunk x VOCAB_TILE, not tokens x vocabulary."""
    sizes, original = [], teacher.product

    def watched(*args):
        z = original(*args)
        sizes.append(z.numel())
        return z
    monkeypatch.setattr(teacher, "product", watched)
    monkeypatch.setattr(teacher, "VOCAB_TILE", 8)
    hidden, weight, targets = random_head(64, d=3)
    logp, entropy = teacher.logps_from_hidden(hidden, weight, targets, chunk=4)
    (logp.sum() + entropy.sum()).backward()
    assert max(sizes) == 4 * 8                              # logits: the other products are at most 8 x 3


def test_token_logps_scores_the_next_token_and_ignores_padding_and_neighbours(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny[0], dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(4, 48, (length,), generator=generator) for length in (5, 9, 14)]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    logp, entropy = teacher.token_logps(model, padded, temperature=0.8, chunk=4)
    assert logp.shape == entropy.shape == (3, 13)
    for i, row in enumerate(rows):
        wanted = (model(row[None]).logits[0, :-1] / 0.8).log_softmax(-1)
        torch.testing.assert_close(logp[i, :len(row) - 1], wanted.gather(1, row[1:, None])[:, 0], rtol=1e-5,
                                   atol=1e-5)
        torch.testing.assert_close(entropy[i, :len(row) - 1], -(wanted.exp() * wanted).sum(-1), rtol=1e-5,
                                   atol=1e-5)
        alone, _ = teacher.token_logps(model, row[None], temperature=0.8)
        torch.testing.assert_close(logp[i, :len(row) - 1], alone[0], rtol=1e-5, atol=1e-5)


def test_a_mask_computes_only_its_positions(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny[0], dtype=torch.float32)
    input_ids = torch.randint(4, 48, (2, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(2, 7).index_fill_(1, torch.tensor([2, 3, 5]), 1.0)
    everywhere, _ = teacher.token_logps(model, input_ids)
    masked, _ = teacher.token_logps(model, input_ids, mask=mask)
    torch.testing.assert_close(masked, everywhere * mask)


def test_exact_kl_equals_its_definition_and_has_its_gradient():
    hidden, weight, _ = random_head(6)
    old_hidden, old_weight, _ = random_head(6, seed=1)

    def by_definition(h, w):
        logp, logq = ((a @ b.T / 0.7).log_softmax(-1) for a, b in ((h, w), (old_hidden, old_weight)))
        return (logp.exp() * (logp - logq)).sum(-1)

    def ours(h, w):
        return teacher.exact_kl_from_hidden(h, w, old_hidden, old_weight, 0.7)
    torch.testing.assert_close(ours(hidden, weight), by_definition(hidden, weight))
    for a, b in zip(*(torch.autograd.grad(f(hidden, weight).sum(), (hidden, weight))
                      for f in (ours, by_definition))):
        torch.testing.assert_close(a, b)


def test_scoring_gives_the_log_probs_of_training_so_that_the_first_ratio_is_one(tiny):
    model, rollouts, _ = tiny
    data = teacher.load_rollouts(rollouts)
    old_logp = teacher.score(model, rollouts, micro_tokens=64)      # other micro-batches than below
    policy = teacher.Policy(teacher.load_policy(model))
    input_ids, mask, old_lp = teacher.pad_responses(data, torch.arange(len(data["reward"])), "cpu", old_logp)
    logp, _, _ = policy(input_ids, mask)
    assert (teacher.log_ratio(logp, old_lp, mask).exp() - 1).abs().max() < 1e-5


def test_scores_are_computed_once_and_a_changed_checkpoint_is_scored_again(tmp_path, monkeypatch):
    import conftest
    model = conftest.make_model(tmp_path / "model")
    rollouts = conftest.make_rollouts(tmp_path / "rollouts", model)
    first = teacher.score(model, rollouts)
    loads = []
    original = teacher.load_policy
    monkeypatch.setattr(teacher, "load_policy", lambda *a, **k: loads.append(a) or original(*a, **k))
    assert torch.equal(teacher.score(model, rollouts), first) and not loads
    conftest.make_model(model, seed=5)
    assert not torch.equal(teacher.score(model, rollouts), first) and len(loads) == 1


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_bf16_is_at_least_as_close_to_float64_as_dense_bf16_logits(temperature):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=generator).bfloat16().requires_grad_()
                      for n in (128, 5000))
    targets, cotangents = torch.randint(5000, (128,), generator=generator), torch.randn(2, 128,
                                                                                        generator=generator)

    def gradients(logp, entropy, inputs):
        return torch.autograd.grad((logp * cotangents[0]).sum() + (entropy * cotangents[1]).sum(), inputs)

    def rounded(h, w):  # logits come out of the product in bf16, the rest is fp32
        logp = ((h @ w.T).float() / temperature).log_softmax(-1)
        return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    truth = dense(*wide, targets, temperature)
    truth = (*truth, *gradients(*truth, wide))
    errors = []
    for logp, entropy in (teacher.logps_from_hidden(hidden, weight, targets, temperature, 32),
                          rounded(hidden, weight)):
        found = (logp, entropy, *gradients(logp, entropy, (hidden, weight)))
        errors.append([((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, truth)])
    assert all(ours <= 1.05 * theirs for ours, theirs in zip(*errors)), errors
