"""The architectures of the paper's models, tiny and random: both stages, batching, and their checkpoints."""
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import conftest
import teacher
import toy

SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
             intermediate_size=64)
LINEAR = dict(linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=16,
              linear_value_head_dim=16)
CONFIGS = {                                                         # Sec. 4.1
    # Qwen3-4B-Thinking-2507
    "qwen3": lambda **k: transformers.Qwen3Config(**SIZES, tie_word_embeddings=True, **k),
    # NBG4-3B, Nemotron-Nano-4B
    "llama": lambda **k: transformers.LlamaConfig(**SIZES, tie_word_embeddings=False, **k),
    # AceReason, JustRL
    "qwen2": lambda **k: transformers.Qwen2Config(**{x: v for x, v in SIZES.items() if x != "head_dim"},
                                                  tie_word_embeddings=False, **k),
    # linear attention in 3 of 4 layers
    "qwen3_5": lambda **k: transformers.Qwen3_5TextConfig(**SIZES | LINEAR | {"num_hidden_layers": 4},
                                                          tie_word_embeddings=False, **k),
}


def make_checkpoint(folder, architecture):
    """A tiny random model of one of the architectures, with the demonstration world's tokenizer."""
    tokenizer = toy.build_tokenizer()
    torch.manual_seed(0)
    config = CONFIGS[architecture](vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id,
                                   bos_token_id=None, pad_token_id=tokenizer.pad_token_id)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0)                                             # far from uniform: a leak would show
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=CONFIGS)
def checkpoint(request, tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp(request.param) / "model", request.param)


def test_a_response_does_not_see_its_neighbours_or_its_padding(checkpoint):
    lm = teacher.load_policy(checkpoint)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(4, 48, (n,), generator=generator) for n in (70, 5, 33, 64)]
    alone = [teacher.token_logps(lm, row[None])[0][0] for row in rows]
    assert alone[0].std() > 0.1
    for batch in ([0, 1, 2, 3], [2, 0], [3, 1]):
        padded = torch.nn.utils.rnn.pad_sequence([rows[i] for i in batch], batch_first=True)
        together, _ = teacher.token_logps(lm, padded)
        for row, i in zip(together, batch):
            assert (row[:len(rows[i]) - 1] - alone[i]).abs().max() < 1e-5
    filled = torch.cat([rows[2], rows[0]])[None]  # what follows a response cannot be seen from it
    assert (teacher.token_logps(lm, filled)[0][0, :len(rows[2]) - 1] - alone[2]).abs().max() < 1e-5


def test_both_stages_and_a_round_trip(checkpoint, tmp_path):
    rollouts = conftest.make_rollouts(tmp_path / "rollouts", checkpoint, n_prompts=3, n=3)
    common = ["--rollouts", rollouts, "--steps", 1, "--lr", "1e-3", "--micro-tokens", 100]
    for kind in ("ce", "ppo"):
        assert conftest.run_here("teacher.py", "--model", checkpoint, "--out", tmp_path / kind, "--loss",
                                 kind, "--beta", 0.5, "--value-steps", 1, *common) == 0
    assert conftest.run_here("distill.py", "--student", checkpoint, "--teacher", tmp_path / "ce" / "final",
                             "--out", tmp_path / "student", *common, "--kl-coef", 0.1, "--kl-kind", "exact",
                             "--offload-activations") == 0
    start, end = (load_file(folder / "model.safetensors")
                  for folder in (checkpoint, tmp_path / "student" / "final"))
    assert start.keys() == end.keys() and any(not torch.equal(start[key], end[key]) for key in start)
    lm = teacher.load_policy(tmp_path / "student" / "final")
    assert type(lm).__name__ == type(teacher.load_policy(checkpoint)).__name__


def test_the_bf16_forward_of_a_gpu(checkpoint, monkeypatch, tmp_path):
    """What runs on a GPU, under the CPU's autocast: fp32 parameters and gradients, log-probs near those of
    fp32, a ratio of 1 at the start."""
    rollouts = conftest.make_rollouts(tmp_path / "rollouts", checkpoint, n_prompts=2, n=2)
    exact = teacher.score(checkpoint, rollouts)
    for cached in (rollouts / "scores").iterdir():
        cached.unlink()
    monkeypatch.setattr(teacher, "forward_dtype", lambda device: torch.bfloat16)
    old_logp = teacher.score(checkpoint, rollouts, micro_tokens=40)
    assert 0 < (old_logp - exact).abs().mean() < 0.05
    data, policy = teacher.load_rollouts(rollouts), teacher.Policy(teacher.load_policy(checkpoint))
    input_ids, mask, old_lp = teacher.pad_responses(data, torch.arange(4), "cpu", old_logp)
    logp, entropy, _ = policy(input_ids, mask)
    assert logp.dtype == entropy.dtype == torch.float32
    assert (((logp - old_lp) * mask).exp() - 1).abs().max() < 0.05  # other batches round otherwise
    ((logp + entropy) * mask).sum().backward()
    assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 and p.grad.isfinite().all()
               for p in policy.parameters())
    assert policy.lm.get_output_embeddings().weight.grad.abs().max() > 0
