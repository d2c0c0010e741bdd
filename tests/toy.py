"""The demonstration world: a task with verifiable answers and a small language model that half masters it.

    python tests/toy.py --out runs/demo --base tests/base    # the base that is committed, with new prompt
    files python tests/toy.py --out runs/demo                      # a base trained here: about two minutes on
    two cores

writes OUT/base (an ordinary Hugging Face checkpoint) and OUT/prompts/{train,validation,test}.jsonl.
Everything downstream treats them like any other model and any other problem file. Training takes other turns
on another processor, so one base is committed, in tests/base: results can be compared only from the same
policy.

The task: chains of labelled operations modulo 10, read from left to right. `2A+5B-9C@3` means 2 + 5 = 7, then
7 - 9 = 8, then 8 @ 3 = 8 + 2 * 3 = 4, so the answer is 4. The model learns from demonstrations by a solver
that is unreliable in the ways that make the world a test of the method:

  * each written step is wrong with probability 0.05, and the error propagates;
  * six demonstrations in ten use the wrong rule for `@` (2a + b) throughout, so the habit of the majority
    is wrong
    and sampling at a low temperature does not repair it;
  * three styles: fast, careful (each step is computed again after `?`, and once more after `!` if the two
    differ)
    and skipping (two operations in one step), between which training can shift weight;
  * zero to three words before each step, which carry no information: most of the entropy of a response, and
    so most
    of the KL that training can waste, has nothing to do with the answer.
"""
import argparse
import json
import os
import random
import shutil
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

# 16 words: up to 4 bits each
WORDS = "and but first good hence here next now ok right so then thus um well yes".split()
BOXED, PAD, USER, ASSISTANT, EOS = "\\boxed{", "<pad>", "<user>", "<assistant>", "<eos>"
CHAT_TEMPLATE = ("{% for m in messages %}{{ '<user>' if m.role == 'user' else '<assistant>' }}{{ m.content }}"
                 "{% if m.role == 'assistant' %}<eos>{% endif %}{% endfor %}"
                 "{% if add_generation_prompt %}<assistant>{% endif %}")


def apply(op, a, b, wrong_rule=False):
    """One operation modulo 10; `@` is a + 2b, or 2a + b by the wrong rule that most demonstrations follow."""
    value = {"+": a + b, "-": a - b, "@": 2 * a + b if wrong_rule else a + 2 * b}[op]
    return value % 10


def draw_problem(rng, min_ops, max_ops):
    """(start digit, [(operation, digit), ...])"""
    n = rng.randint(min_ops, max_ops)
    ops = [("@" if rng.random() < 0.2 else rng.choice("+-"), rng.randrange(10)) for _ in range(n)]
    return rng.randrange(10), ops


def problem_text(start, ops):
    return str(start) + "".join(f"{chr(65 + i)}{op}{b}" for i, (op, b) in enumerate(ops))


def true_answer(start, ops):
    for op, b in ops:
        start = apply(op, start, b)
    return start


def demonstrate(rng, start, ops, error_rate=0.05, opening=0):
    """A solution as the unreliable solver writes it, the final answer in a box; it opens with `opening`
    random words."""
    wrong_rule = rng.random() < 0.6
    style = rng.choices(["fast", "careful", "skipping"], weights=[55, 25, 20])[0]

    def compute(a, chunk):                                  # a noisy evaluation of one or two operations
        for op, b in chunk:
            a = apply(op, a, b, wrong_rule)
        return (a + rng.randrange(1, 10)) % 10 if rng.random() < error_rate else a

    out = [word + " " for word in rng.choices(WORDS, k=opening)]
    value, i, width = start, 0, 2 if style == "skipping" else 1
    while i < len(ops):
        chunk = ops[i:i + width]
        labels = "".join(chr(65 + i + j) for j in range(len(chunk)))
        out += [word + " " for word in rng.choices(WORDS, k=rng.randint(0, 3))]
        result = compute(value, chunk)
        out.append(f"{labels}={result}" if len(chunk) == 2
                   else f"{labels}{value}{chunk[0][0]}{chunk[0][1]}={result}")
        if style == "careful":
            again = compute(value, chunk)
            out.append(f"?{again}")
            if again != result:
                result = compute(value, chunk)
                out.append(f"!{result}")
        value, i = result, i + width
    return "".join(out) + f"{BOXED}{value}}}"


def build_tokenizer():
    """One token per character, except for the box, the 16 words and the special tokens."""
    tokens = [PAD, USER, ASSISTANT, EOS, BOXED,
              "}"] + list("0123456789+-@=?!ABCDEFGHIJ") + [w + " " for w in WORDS]
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|[a-z]+ |."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=PAD,
                                   additional_special_tokens=[USER, ASSISTANT], padding_side="left",
                                   chat_template=CHAT_TEMPLATE, clean_up_tokenization_spaces=False)


def build_model(tokenizer, hidden=96, layers=3):
    config = Qwen3Config(vocab_size=len(tokenizer), hidden_size=hidden, num_hidden_layers=layers,
                         num_attention_heads=hidden // 32, num_key_value_heads=1, head_dim=32,
                         intermediate_size=3 * hidden, tie_word_embeddings=True, max_position_embeddings=512,
                         initializer_range=0.05, pad_token_id=tokenizer.pad_token_id,
                         eos_token_id=tokenizer.eos_token_id, bos_token_id=None)
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(pad_token_id=tokenizer.pad_token_id,
                                               eos_token_id=tokenizer.eos_token_id, do_sample=True,
                                               temperature=1.0)
    return model


def pretrain(model, tokenizer, seed, steps, batch_size, min_ops, max_ops, opening=0, lr=3e-3, warmup=50):
    """Next-token prediction on demonstrations, loss on the response only; the schedule counts steps, not
    seconds."""
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer, [torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, 1.0, warmup),
                    torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - warmup))], [warmup])
    model.train()
    for step in (bar := tqdm(range(steps), desc="training the base", mininterval=2)):
        rows = []
        for _ in range(batch_size):
            start, ops = draw_problem(rng, min_ops, max_ops)
            prompt = tokenizer.encode(f"{USER}{problem_text(start, ops)}{ASSISTANT}")
            rows.append((prompt, tokenizer.encode(demonstrate(rng, start, ops, opening=opening) + EOS)))
        length = max(len(p) + len(r) for p, r in rows)
        input_ids = torch.tensor([p + r + [0] * (length - len(p) - len(r)) for p, r in rows])
        labels = torch.tensor([[-100] * len(p) + r + [-100] * (length - len(p) - len(r)) for p, r in rows])
        loss = model(input_ids=input_ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


def write_prompts(folder, seed, sizes, min_ops, max_ops):
    """Disjoint prompt files; problem and answer are strings, as in the public problem sets."""
    rng, seen = random.Random(seed + 1), set()
    folder.mkdir(parents=True, exist_ok=True)
    for name, size in sizes.items():
        rows = []
        while len(rows) < size:
            start, ops = draw_problem(rng, min_ops, max_ops)
            text = problem_text(start, ops)
            if text not in seen:
                seen.add(text)
                rows.append({"problem": text, "answer": str(true_answer(start, ops)),
                             "id": f"{name}-{len(rows)}"})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arg = p.add_argument
    arg("--out", type=Path, required=True, help="OUT/base and OUT/prompts are written")
    arg("--base", type=Path, help="copy this base instead of training one")
    arg("--seed", type=int, default=0)
    arg("--steps", type=int, default=1500, help="pre-training steps")
    arg("--batch-size", type=int, default=32, help="demonstrations per step")
    arg("--hidden", type=int, default=96, help="hidden size, a multiple of 32")
    arg("--layers", type=int, default=3)
    arg("--min-ops", type=int, default=4, help="shortest chain")
    arg("--max-ops", type=int, default=6, help="longest chain, at most 10")
    arg("--opening", type=int, default=0, help="random words that open a response, and tell it apart")
    arg("--train", type=int, default=4000, help="number of training prompts")
    arg("--validation", type=int, default=200)
    arg("--test", type=int, default=300)
    return p.parse_args(argv)


def main():
    args = parse_args()
    if (args.out / "base" / "config.json").exists():
        print(f"{args.out / 'base'} exists: nothing to do")
        return
    sizes = {"train": args.train, "validation": args.validation, "test": args.test}
    write_prompts(args.out / "prompts", args.seed, sizes, args.min_ops, args.max_ops)
    partial = args.out / "base.partial"
    if args.base:
        shutil.copytree(args.base, partial, dirs_exist_ok=True)
    else:
        torch.manual_seed(args.seed)
        tokenizer = build_tokenizer()
        model = build_model(tokenizer, args.hidden, args.layers)
        pretrain(model, tokenizer, args.seed, args.steps, args.batch_size, args.min_ops, args.max_ops,
                 args.opening)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    os.rename(partial, args.out / "base")                   # complete or absent
    print(f"wrote {args.out / 'base'} and {args.out / 'prompts'}")


if __name__ == "__main__":
    main()
