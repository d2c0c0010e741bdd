"""Problem files for the first experiment on a pretrained model: name the largest of three two-digit numbers.

A task that SmolLM2-135M-Instruct can do now and then and has not mastered, with prompts and responses so
short that a CPU is enough: two examples as earlier turns of the chat, 77 tokens in all, answers of 8 tokens.
Measured on that model (4-bit weights), 40 problems x 4 samples: AVG@4 .26 and pass@4 .55 at temperature 1,
.34 and .55 at 0.6. Other tasks that were tried, two examples, temperature 1, 32 problems x 4: the larger of
two numbers .49 (pass@4 .72, but guessing gives .5), the middle of three .29 (.53), plus one .20 (.47), last
digit .18 (.41), counting letters .10 (.31), the next of a sequence .04 (.09), sums below 60 .01 (.03).

    python tests/small.py --out runs/small/prompts          # train.jsonl, validation.jsonl, test.jsonl
"""
import argparse
import json
import random
from pathlib import Path

EXAMPLES = ((12, 85, 40), (77, 31, 19))


def problem(numbers):
    """A row of a problem file: a chat whose last turn asks about `numbers`, and the largest of them."""
    chat = [{"role": "system", "content": "Largest"}]  # a system turn of our own: the template's is longer
    for example in EXAMPLES:
        chat += [{"role": "user", "content": " ".join(map(str, example))},
                 {"role": "assistant", "content": f"\\boxed{{{max(example)}}}"}]
    return {"prompt": [*chat, {"role": "user", "content": " ".join(map(str, numbers))}],
            "answer": str(max(numbers))}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True, help="folder of the three files")
    p.add_argument("--train", type=int, default=1000)
    p.add_argument("--validation", type=int, default=100)
    p.add_argument("--test", type=int, default=200)
    args = p.parse_args()
    draw, seen = random.Random(0), {frozenset(example) for example in EXAMPLES}
    args.out.mkdir(parents=True, exist_ok=True)
    # in this order, more training problems leave the others as they are
    for name in ("test", "validation", "train"):
        rows = []
        while len(rows) < getattr(args, name):
            numbers = draw.sample(range(10, 100), 3)
            if frozenset(numbers) not in seen:  # no problem stands twice, in whatever order its numbers are
                seen.add(frozenset(numbers))
                rows.append(problem(numbers))
        (args.out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
