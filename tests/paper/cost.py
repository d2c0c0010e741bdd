"""What a rehearsal took, and what its whole recipe would cost at the measured rates.

    DRY_RUN=1 ./run_rounds.sh table1 | python tests/paper/cost.py runs/rehearsal [--length 20000]

The commands on standard input are those of the real recipe: prompts, responses, steps and batches are
counted from them, every response taken to have --length tokens (paper, Table 10: 12,800 to 24,800 on AIME
2024). Tokens per second are the rehearsal's, of short responses in small batches: on a GPU they are a lower
bound. Start-up, loading, scoring and saving are counted per command, as the rehearsal saw them; longer
rollouts take longer to score.
"""
import argparse
import json
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import distill  # noqa: E402
import evaluate  # noqa: E402
import rollout  # noqa: E402
import teacher  # noqa: E402

STAGES = {"rollout.py": rollout, "teacher.py": teacher, "distill.py": distill, "evaluate.py": evaluate}


def script_of(command):
    """(script, its arguments) of a command line of the driver; (None, []) if it is none of the stages."""
    words = shlex.split(command)
    at = next((i for i, word in enumerate(words) if word in STAGES), None)
    return (None, []) if at is None else (words[at], words[at + 1:])


def worked(folder):
    """{script: [tokens, seconds]} that the finished runs of a folder sampled, trained on or evaluated."""
    done = {name: [0.0, 0.0] for name in STAGES}

    def add(script, tokens, seconds):
        done[script][0] += tokens
        done[script][1] += seconds
    for path in folder.rglob("rollouts.json"):
        summary = json.loads(path.read_text())["summary"]
        tokens = summary["responses"] * summary["mean_length"]
        add("rollout.py", tokens, tokens / (summary["tok_per_s"] or 1))
    for path in folder.rglob("metrics.jsonl"):
        # PPO's value network logs one folder below its run
        run = path.parent if (path.parent / "run.json").exists() else path.parent.parent
        script = json.loads((run / "run.json").read_text())["script"]
        for step in map(json.loads, path.read_text().splitlines()):
            add(script, step["tokens"], step["seconds"])
    for path in folder.rglob("results.jsonl"):
        for row in map(json.loads, path.read_text().splitlines()):
            add("evaluate.py", row["n_problems"] * row["k"] * row["mean_length"], row["seconds"])
    return done


def tokens_of(script, args, responses, length):
    """Tokens that a command of the real recipe samples or trains on; responses: those per prompt."""
    if script == "rollout.py":
        return args.num_prompts * args.num_responses * length
    if script == "evaluate.py":
        if not args.data or args.missing or args.pick:
            return 0
        benchmarks = [evaluate.parse_benchmark(text, args.k) for text in args.data]
        samples = sum(len(rollout.load_prompts(file)) * k for _, file, k in benchmarks)
        return len(args.model) * samples * length
    steps = args.steps + (args.value_steps if getattr(args, "loss", "") == "ppo" else 0)
    return steps * args.batch_prompts * responses * length


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=Path, help="of the rehearsal")
    p.add_argument("--length", type=int, default=20_000, help="tokens of a response in the whole recipe")
    args = p.parse_args()
    took = {name: [0, 0.0] for name in STAGES}                                      # commands, seconds
    for line in (args.folder / "milliseconds.txt").read_text().splitlines():
        milliseconds, _, command = line.partition(" ")
        script, _ = script_of(command)
        if script:
            took[script] = [took[script][0] + 1, took[script][1] + int(milliseconds) / 1000]
    whole = {name: [0, 0] for name in STAGES}                                       # commands, tokens
    responses = 16
    for line in sys.stdin:
        script, argv = script_of(line)
        if script:
            parsed = STAGES[script].parse_args(argv)
            responses = parsed.num_responses if script == "rollout.py" else responses
            whole[script][0] += 1
            whole[script][1] += tokens_of(script, parsed, responses, args.length)
    print(f"\n{'stage':12} {'commands':>8} {'minutes':>8} {'tok/s':>9}   the whole recipe: "
          f"{'commands':>8} {'tokens':>10} {'hours':>9}")
    total = 0.0
    for script, (tokens, seconds) in worked(args.folder / "runs").items():
        commands, wall = took[script]
        rate = tokens / seconds if seconds else 0.0
        idle = max(0.0, wall - seconds) / commands if commands else 0.0     # start-up, loading, saving
        hours = (whole[script][1] / rate if rate else 0.0) / 3600 + whole[script][0] * idle / 3600
        total += hours
        print(f"{script:12} {commands:8} {wall / 60:8.1f} {rate:9,.0f}   {'':18} "
              f"{whole[script][0]:8} {whole[script][1] / 1e9:8.2f} G {hours:9,.1f}")
    print(f"At these rates and {args.length:,} tokens a response the whole recipe takes {total:,.0f} hours "
          f"here. Rates of so short responses in so small batches say little of a GPU;\n"
          f"that every command runs is what was rehearsed.")


if __name__ == "__main__":
    main()
