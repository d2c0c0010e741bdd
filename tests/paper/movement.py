"""
Which tokens a finished run moved (evaluate.py --movement): kept in its run.json, where the report finds it.
"""
import torch

from rollout import InputError, read_json, write_json
from teacher import find_old, load_rollouts, score, setup_ddp


def movement(student, teacher, old):
    """How far the student moved each response token against how far the teacher did (Fig. 7).

    Log-probs [N] -> lists: tokens are binned by |log pi_teacher - log pi_old|, in nats; per bin their number,
    the mean distance of teacher and student, and the share that the student moved the same way.
    """
    far, near = (teacher - old).double(), (student - old).double()
    edges = torch.logspace(-4, 1, 26, dtype=torch.float64)
    where = torch.bucketize(far.abs(), edges)           # 0: less than the first edge, which is noise
    count, same = torch.bincount(where, minlength=len(edges) + 1), far * near > 0
    sums = [torch.zeros(len(edges) + 1, dtype=torch.float64).index_add_(0, where, x)
            for x in (far.abs(), near.abs(), same.double())]
    seen = count > 0
    names = "teacher", "student", "same_direction"
    means = {name: (x / count)[seen].tolist() for name, x in zip(names, sums)}
    farthest = far.abs() >= far.abs().sort().values[-max(1, len(far) // 100)]
    return {"count": count[seen].tolist(), **means,
            "same_direction_farthest": same[farthest].double().mean().item(),
            "ratio": (near.abs().mean() / far.abs().mean()).item()}


def probabilities(run, args, rollouts, options):
    """Of a run of teacher.py: histograms of pi(a|s), or of PPO's values, by kind of response (Fig. 10).

    For SFT, which trains on right responses only, also the mean of both kinds at every saved step (Fig. 9).
    """
    values = run / "value" / "values.pt"
    right = (rollouts["reward"] > 0).repeat_interleave(rollouts["response_offsets"].diff())
    what = "value of a linear critic" if values.exists() else "pi(a|s) of the trained policy"
    tokens = (torch.load(values, weights_only=True) if values.exists() else
              score(run / "final", rollouts, **options).exp())
    moved = {"what": what, **{kind: torch.histc(tokens[mask].float().clamp(0, 1), 25, 0, 1).tolist()
                              for kind, mask in (("positive", right), ("negative", ~right))}}
    if args["loss"] == "sft":
        last = len((run / "metrics.jsonl").read_text().splitlines())
        between = {int(p.name[5:]): p for p in sorted(run.glob("step-????"))}
        saved = {0: args["model"], **between, last: run / "final"}
        probs = {step: score(policy, rollouts, **options).exp() for step, policy in saved.items()}
        moved["path"] = [[step, x[right].mean().item(), x[~right].mean().item()] for step, x in probs.items()]
    return moved


def add_movement(run):
    """Keep in a finished run's run.json which tokens moved: against its teacher, or its probabilities."""
    path = run / "run.json"
    if not (run / "final").is_dir() or not path.is_file():
        raise InputError(f"{run} is no finished run of distill.py or teacher.py: no run.json or no final/")
    info = read_json(path, "give the --out of distill.py or teacher.py")
    args = info["args"]
    if args.get("teacher") in ("none", "old"):
        raise InputError(f"{run} has no teacher checkpoint to compare its student with")
    if "movement" in info:
        return
    options = {"temperature": args["logp_temperature"],
               **{key: args[key] for key in ("micro_tokens", "trust_remote_code")}}
    rollouts = load_rollouts(args["rollouts"])
    if "teacher" in args:
        policies = run / "final", args["teacher"], find_old(rollouts, args["old"])
        moved = movement(*(score(policy, rollouts, **options) for policy in policies))
    else:
        moved = probabilities(run, args, rollouts, options)
    if setup_ddp()[0] == 0:
        write_json(path, info | {"movement": moved})
