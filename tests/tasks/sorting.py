"""A task of one's own, as a file: numbers in, the same numbers in rising order out.

    python rollout.py --task tests/tasks/sorting.py --prompts numbers.jsonl ...   # {"numbers": [3, 1, 2]}

`grade` runs in worker processes that are killed at the time limit, one response at a time. None says that an
answer cannot be graded against. The order counts, and so does every number: the rules of math would not do.
"""
import re


def read_row(row):
    """(prompt, answer) of a row of the prompt file; the answer may be anything that JSON can hold."""
    numbers = ", ".join(map(str, row["numbers"]))
    return f"Sort in rising order: {numbers}. End with \\boxed{{...}}.", sorted(row["numbers"])


def grade(responses, answers):
    """1.0 where the last box holds exactly the numbers of the answer, in its order, else 0.0."""
    boxes = [re.findall(r"\\boxed\{([^{}]*)\}", response) for response in responses]
    return [float(bool(box) and box[-1].replace(" ", "").split(",") == list(map(str, answer)))
            for box, answer in zip(boxes, answers)]
