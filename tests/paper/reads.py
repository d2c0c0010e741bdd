"""Which of the given benchmarks a table or figure of the paper reads: reads.py TABLE MODEL NAME=FILE:K ...

Prints those that paper.json names for it, and those that are not the paper's at all. Plain Python: the
recipes ask it in a dry run too, before anything is installed.
"""
import json
import sys
from pathlib import Path

PAPER = json.loads((Path(__file__).parent / "paper.json").read_text())
SPECS = PAPER["tables"] | PAPER["figures"]


def benchmarks_of(name, model):
    """Names of the benchmarks that the paper gives for a table or figure and a model.

    HMMT Feb 25 where it names none (Sec. 4.1).
    """
    by_model = SPECS[name].get("benchmarks_of", {}).items()
    named = (names for suffix, names in by_model if model.endswith(suffix))
    return next(named, SPECS[name].get("benchmarks", [PAPER["selection"]]))


def main():
    table, model, *given = sys.argv[1:]
    wanted = benchmarks_of(table, model)
    known = {PAPER["selection"]}.union(*(spec.get("benchmarks", []) for spec in PAPER["tables"].values()))
    chosen = [text for text in given if text.split("=")[0] in wanted or text.split("=")[0] not in known]
    if not chosen:
        sys.exit(f"run_rounds.sh: {table} reads {' '.join(wanted)}, and BENCHMARKS names none of them")
    print(*chosen)


if __name__ == "__main__":
    main()
