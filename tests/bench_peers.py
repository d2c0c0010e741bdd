"""One optimizer step end to end against TRL's GRPO trainer: the same model, the same fixed responses, SAPO,
fp32 on a CPU.

    pip install -r tests/requirements.txt && python tests/bench_step.py --peers

The model has the shape of SmolLM2-135M with random weights. Responses have lognormal lengths (mean 512, up to
2,048 tokens) behind prompts of 64. A step is forward, backward, clipping and AdamW over all of them; ours as
teacher.py does it, TRL's by its own training_step with micro-batches of 1 (no padding) and of 4, both with
gradient checkpointing. One thread, a fresh process for each, in turn; tokens per second of process time are
the best of the rounds, memory is the peak of the whole process and what of it came with the step.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
VARIANTS = ["ours", "trl, micro-batch of 1", "trl, micro-batch of 4"]
SHAPE = dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
             num_attention_heads=9, num_key_value_heads=3, head_dim=64, tie_word_embeddings=True,
             max_position_embeddings=8192, pad_token_id=0, bos_token_id=1, eos_token_id=2)
PROMPT, TAUS = 64, dict(tau_pos=1.0, tau_neg=1.05)


def make_responses(n):
    """(ids of prompt and response, advantage) of n fixed responses."""
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(n, generator=generator).mul(0.7).exp()
    lengths = (draw / draw.mean() * 512).clamp(16, 2048).long()
    return [(torch.randint(3, SHAPE["vocab_size"], (PROMPT + int(length),), generator=generator),
             1.0 if i % 2 else -1.0) for i, length in enumerate(lengths)]


def ours(lm):
    """A function that takes one step: the lines of teacher.py from the micro-batches to `optimizer.step()`,
    for SAPO on one process."""
    import teacher
    lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy, optimizer = teacher.Policy(lm), torch.optim.AdamW(lm.parameters(), lr=1e-6, weight_decay=0.0)

    def step(responses):
        lengths, adv = torch.tensor([len(ids) for ids, _ in responses]), torch.tensor([a for _,
                                                                                       a in responses])
        for micro in teacher.micro_batches(lengths, 2048 + PROMPT)[0]:
            input_ids = torch.nn.utils.rnn.pad_sequence([responses[i][0] for i in micro], batch_first=True)
            position = torch.arange(input_ids.shape[1] - 1)
            mask = ((position >= PROMPT - 1) & (position < lengths[micro][:, None] - 1)).float()
            logp, _, _ = policy(input_ids, mask)
            (teacher.sapo_loss(logp, logp.detach(), mask, adv[micro], **TAUS) / len(responses)).backward()
        norm = teacher.clip_gradients(lm, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm
    return step


def trls(lm, n, size):
    """The same with training_step of an ordinary GRPOTrainer, whose generation is replaced by the fixed
    responses."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    import toy
    accumulation = -(-n // size)
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(output_dir=folder, loss_type="sapo", beta=0.0, per_device_train_batch_size=size,
                            num_generations=size if size > 1 else 2, generation_batch_size=max(2, size),
                            gradient_accumulation_steps=accumulation, learning_rate=1e-6, use_cpu=True,
                            bf16=False, gradient_checkpointing=True, report_to=[],
                            sapo_temperature_pos=TAUS["tau_pos"], sapo_temperature_neg=TAUS["tau_neg"])
        trainer = GRPOTrainer(model=lm, reward_funcs=lambda completions, **_: [0.0] * len(completions),
                              args=config, train_dataset=Dataset.from_list([{"prompt": "1"}] * 8),
                              processing_class=toy.build_tokenizer())
    # as trainer.train() would
    lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trainer._prepare_inputs = lambda inputs: inputs
    trainer.current_gradient_accumulation_steps = accumulation
    trainer.create_optimizer()
    lm.train()

    def step(responses):
        for start in range(0, n, size):
            part = responses[start:start + size]
            completions = torch.nn.utils.rnn.pad_sequence([ids[PROMPT:] for ids, _ in part], batch_first=True)
            lengths = torch.tensor([len(ids) - PROMPT for ids, _ in part])
            trainer.training_step(lm, {
                "prompt_ids": torch.stack([ids[:PROMPT] for ids, _ in part]),
                "prompt_mask": torch.ones(len(part), PROMPT, dtype=torch.long),
                "completion_ids": completions,
                "completion_mask": (torch.arange(completions.shape[1]) < lengths[:, None]).long(),
                "advantages": torch.tensor([a for _, a in part]), "num_items_in_batch": lengths.sum()}, None)
        norm = torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0).item()
        trainer.optimizer.step()
        trainer.optimizer.zero_grad(set_to_none=True)
        return norm
    return step


def status(field):
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines()
                    if line.startswith(field)).split()[1]) / 1e6


def one(variant, n):
    """A line of JSON: tokens per process second and memory in GB of one step."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    lm, responses = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)), make_responses(n)
    step = ours(lm) if variant == VARIANTS[0] else trls(lm, n, int(variant[-1]))
    step([(ids[:PROMPT + 16], a) for ids, a in responses])  # imports, allocator, Adam's state
    before, start = status("VmRSS"), time.process_time()
    Path("/proc/self/clear_refs").write_text("5")           # the high-water mark starts anew
    norm = step(responses)
    seconds, tokens = time.process_time() - start, sum(len(ids) - PROMPT for ids, _ in responses)
    print(json.dumps({"variant": variant, "tokens": tokens, "tok_per_process_s": tokens / seconds,
                      "peak_gb": status("VmHWM"), "step_gb": status("VmHWM") - before, "grad_norm": norm}))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--responses", type=int, default=4)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--variant", help=argparse.SUPPRESS)                             # of a child process
    args = p.parse_args()
    if args.variant:
        return one(args.variant, args.responses)
    found = {variant: [] for variant in VARIANTS}
    for _ in range(args.rounds):
        for variant in VARIANTS:
            done = subprocess.run([sys.executable, __file__, "--variant", variant, "--responses",
                                   str(args.responses)], check=True,
                                  capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            found[variant].append(json.loads(done.stdout.splitlines()[-1]))
            print(json.dumps(found[variant][-1]), flush=True)
    best = max(r["tok_per_process_s"] for r in found["ours"])
    print("\n| | tokens per process second | ours is faster by | peak memory of the process, GB | "
          "of it for the step |\n| --- | --- | --- | --- | --- |")
    for variant, rows in found.items():
        rate, peak, step = max(r["tok_per_process_s"]
                               for r in rows), min(r["peak_gb"] for r in rows), min(r["step_gb"]
                                                                                    for r in rows)
        print(f"| {variant} | {rate:.1f} | {best / rate:.2f}x | {peak:.2f} | {step:.2f} |")


if __name__ == "__main__":
    main()
