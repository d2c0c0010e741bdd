"""
Stage 2: distil what the teacher learnt back into pi_old, inside a trust region (Sec. 3.2 to 3.4).

    A_hat(s, a) = log pi_teacher(a|s) - log pi_denominator(a|s), whitened              Sec. 3.3, 3.4
    maximize  E[ min(r A_hat, clip(r, 1 - eps, 1 + eps) A_hat) ],  r = pi / pi_old     Eq. 9

The same rollouts, 10 to 32 steps. The signal comes from scores: no teacher in memory. Which one (Fig. 3):

    strategy 1   --teacher T    --denominator old        towards a teacher that is better than pi_old
    strategy 2   --teacher MSE  --denominator UNLEARNED  an MSE run's late over its early checkpoint
    strategy 3   --teacher T    --denominator STUDENT    away from an older, weaker student

1 GPU, or CPU:  python distill.py --student M --teacher runs/teacher/final --denominator old \\
                                  --rollouts runs/rollouts --out runs/student
8 GPUs:         torchrun --standalone --nproc-per-node 8 distill.py ...

Clip and few steps stand for Eq. 7's KL(pi || pi_old) <= eps. --max-kl EPS (ours) makes it real: final is the
last policy inside it, by the KL over the whole vocabulary at the states of a fixed part of the rollouts.

Words and shapes: see teacher.py. Read next: evaluate.py.
"""
import argparse
import copy
import itertools
import math
import time
from collections import Counter

import torch
from tqdm import tqdm

from rollout import (InputError, Parser, check_positive, checkpoint_fingerprint, one_writer, run_main,
                     write_json)
from teacher import (build, clip_gradients, defer_signals, end_step, idle_turns, kl_term, load_moments,
                     log_ratio, memory_advice, micro_batches, open_rollouts, pad_responses, print_once,
                     reduce_sums, save_step, score, score_options, setup_ddp, shared_flags, start_run,
                     step_batches, stop_if_not_finite, token_sums)


# ---- the signal --------------------------------------------------------------------------------------------

def signal_of(teacher_logp, denom_logp, positive, keep="all"):
    """A_hat before whitening, in nats (Sec. 3.3, 3.4). positive: whether the response is right; there
    keep="min0" and "max0" leave min(signal, 0) and max(signal, 0) only (Table 12)."""
    signal = teacher_logp - denom_logp
    bound = {"all": {}, "min0": {"max": 0}, "max0": {"min": 0}}[keep]
    return torch.where(positive, signal.clamp(**bound), signal) if bound else signal


def signal_of_responses(rollouts, usable, teacher_logp, denom_logp, keep="all"):
    """Yield (signal_of [T], whether it is positive) of each usable response: all at once is too much."""
    bounds, positive = rollouts["response_offsets"], rollouts["reward"] > 0
    for i in usable.nonzero()[:, 0]:
        span = slice(bounds[i], bounds[i + 1])
        yield signal_of(teacher_logp[span], denom_logp[span], positive[i], keep), bool(positive[i])


def whitening(parts):
    """(mean, std) of a signal that comes in flat parts, in fp64: fp32 sums over 10^8 tokens do not hold."""
    count, mean, m2 = 0, 0.0, 0.0                           # m2: sum of squared distances from the mean
    for values in (part.double() for part in parts if len(part)):
        shift, total = values.mean().item() - mean, count + len(values)
        m2 += (values - values.mean()).square().sum().item() + shift ** 2 * count * len(values) / total
        mean, count = mean + shift * len(values) / total, total
    return mean, math.sqrt(m2 / count)


def standardize(signal, mean, std, mask):
    """(signal - mean) / std in fp64, 0 outside the mask, in the signal's own type."""
    return ((signal.double() - mean) / (std + 1e-8)).to(signal.dtype).masked_fill(mask == 0, 0.0)


def whiten(signal, mask):
    """Zero mean and unit variance over response tokens (Sec. 3.3), 0 outside the mask; any shape."""
    return standardize(signal, *whitening([signal[mask.bool()]]), mask)


# ---- the loss ----------------------------------------------------------------------------------------------

def distill_loss(logp, entropy, old_logp, adv, mask, clip=0.2, kl_coef=0.0, entropy_coef=0.0, exact_kl=None):
    """Clipped surrogate of Eq. 9 with the KL and entropy terms of Tables 5 and 6; adv is A_hat, (B, T-1).

    Sum over response tokens; the loop divides. exact_kl takes the place of the KL estimated on old samples.
    """
    d = log_ratio(logp, old_logp, mask)                                 # log r(theta); 0 at the first step
    ratio = d.exp()
    surrogate = torch.minimum(ratio * adv, ratio.clamp(1 - clip, 1 + clip) * adv)   # Eq. 9
    kl = kl_term(d, ratio) if exact_kl is None else exact_kl
    objective = surrogate - kl_coef * kl + entropy_coef * entropy       # Table 5; Table 6b: a bonus
    return -objective.masked_fill(mask == 0, 0.0).sum()


def build_parser():
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arg = p.add_argument
    arg("--student", required=True, help="where training starts: pi_old, or a first student (Table 8)")
    arg("--teacher", required=True, help="numerator of the signal: a checkpoint, 'old' or 'none' (Table 7)")
    arg("--denominator", default="old", help="old (strategy 1), a checkpoint (2, 3), none or live (Fig. 7)")
    arg("--positive-signal", choices=["all", "min0", "max0"], default="all", help="on positives (Table 12)")
    arg("--clip", type=float, default=0.2, help="eps of Eq. 9 (the paper gives none; ours: PPO's)")
    arg("--entropy-coef", type=float, default=0.0, help="weight of the entropy bonus (Table 6b: 0.5)")
    arg("--max-kl", type=float, help="stop before KL(pi || pi_old) passes this, nats per token (ours: Eq. 7)")
    arg("--steps", type=int, default=10, help="10 when iterating rounds (Table 2), 16 or 32 for one")
    arg("--batch-prompts", type=int, default=64, help="prompts per step over all ranks (Sec. 4.1: 32, 64)")
    shared_flags(arg)
    return p


def parse_args(argv=None):
    args = build_parser().parse_args(argv)
    if args.teacher == "none" and args.denominator in ("none", "old") or args.teacher == args.denominator:
        raise InputError(f"--teacher {args.teacher} --denominator {args.denominator} is no signal: name two")
    check_positive(args, "steps", "batch_prompts", "micro_tokens", "lr", "save_every",
                   "clip", "max_grad_norm", "max_kl", "logp_temperature")
    if not (0 <= args.kl_coef < math.inf and math.isfinite(args.entropy_coef)):
        raise InputError("--kl-coef must not be negative, and --entropy-coef a number")
    return args


def main():
    args = parse_args()
    # ---- data and checks: before any model is loaded ----
    rank, world, device = setup_ddp(args.shard)
    roles = args.teacher, args.denominator
    named = [role for role in roles if role not in ("old", "none", "live")]
    rollouts, tokenizer, old, usable = open_rollouts(args, args.student, *named)
    path_of = {"old": old, "live": args.student, "none": None}          # live starts as the student
    paths = [path_of.get(role, role) for role in roles]
    content = [checkpoint_fingerprint(path) for path in paths if path]
    if len(set(content)) < len(content):                                # live: when it starts
        raise InputError("--teacher {} and --denominator {} are the same policy: no signal".format(*roles))
    run, save, metrics = start_run(args, build_parser(), args.student, rollouts)
    if not run:
        return print_once(f"{args.out}: already finished")

    # ---- the signal, from scores that are computed once, and then the one model that trains ----
    old_logp = score(old, rollouts, **score_options(args))
    teacher_logp, denom_logp = (score(path, rollouts, **score_options(args)) if path else
                                torch.zeros(1).expand_as(old_logp) for path in paths)
    signal_args = (rollouts, usable, teacher_logp, denom_logp, args.positive_signal)
    mean, std = whitening(values for values, _ in signal_of_responses(*signal_args))     # of step 0, if live
    one_writer(args.out)
    if rank == 0:
        statistics = signal_statistics(signal_of_responses(*signal_args), mean, std, len(old_logp))
        write_json(args.out / "run.json", run | {"signal": statistics})
    exact = args.kl_coef > 0 and args.kl_kind == "exact"         # two models in memory; --max-kl: and a copy
    lm, policy, model = build(args, save or args.student, old if exact or args.max_kl else None, rollouts)
    optimizer = torch.optim.AdamW(lm.parameters(), lr=args.lr, weight_decay=0.0)
    load_moments(save, lm, optimizer)
    kl_states = next(step_batches(rollouts, usable, args.batch_prompts, args.seed + 1))
    kl_args = (policy, rollouts, kl_states, args.micro_tokens)
    if args.max_kl and not metrics and (kl := kl_to_old(*kl_args)) > args.max_kl:
        raise InputError(f"{args.student} is at KL {kl:.4f} from pi_old, beyond --max-kl {args.max_kl:g}")

    # ---- training loop ----
    done, lengths = len(metrics), rollouts["offsets"].diff()
    batches = itertools.islice(step_batches(rollouts, usable, args.batch_prompts, args.seed), done, None)
    bar = tqdm(total=args.steps, initial=done, desc="distill", disable=rank > 0)
    caught = defer_signals()                                            # a signal waits for the end of a step
    for step in range(done + 1, args.steps + 1):
        start, batch = time.time(), next(batches)
        n_tokens = rollouts["response_offsets"].diff()[batch].sum().item()  # of the whole step, on every rank
        shares, sums = micro_batches(lengths[batch], args.micro_tokens, world), Counter()
        for i, micro in enumerate(shares[rank]):
            model.require_backward_grad_sync = i == len(shares[rank]) - 1       # DDP: one all-reduce per step
            idx = batch[micro]
            input_ids, mask, old_lp, teacher_lp, denom_lp = pad_responses(
                rollouts, idx, device, old_logp, teacher_logp, denom_logp)
            reward = rollouts["reward"][idx].to(device)
            logp, entropy, exact_kl = model(input_ids, mask, exact)
            if args.denominator == "live":
                denom_lp = logp.detach()                                # Fig. 7: follows the student
            a_hat = signal_of(teacher_lp, denom_lp, reward[:, None] > 0, args.positive_signal)
            a_hat = standardize(a_hat, mean, std, mask)                # Sec. 3.3: whitened over all responses
            loss = distill_loss(logp, entropy, old_lp, a_hat, mask, args.clip, args.kl_coef,
                                args.entropy_coef, exact_kl) / n_tokens             # Eq. 9
            (loss * world).backward()                               # DDP averages over ranks; we want the sum
            sums.update(token_sums(loss, logp, entropy, old_lp, mask, reward, a_hat, args.clip, args.clip))
        idle_turns(model, shares, rank, exact)
        grad_norm, sums = clip_gradients(lm, args.max_grad_norm), reduce_sums(sums)
        stop_if_not_finite(step, sums, grad_norm, rollouts, batch)
        inside = copy.deepcopy((lm.state_dict(), optimizer.state_dict())) if args.max_kl else None
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        kl = kl_to_old(*kl_args) if args.max_kl else None
        if args.max_kl and kl > args.max_kl:                     # Eq. 7: back into the trust region, and done
            lm.load_state_dict(inside[0])
            optimizer.load_state_dict(inside[1])
            print_once(f"step {step} would be at kl(new,old) {kl:.4f} > {args.max_kl:g}: it is not taken")
            break
        more, inside = {"signal_mean": mean, "signal_std": std, "kl_new_old": kl}, None     # frees the copy
        end_step(args, step, args.steps, start, sums, grad_norm, n_tokens, more, metrics, bar, caught,
                 lm, tokenizer, optimizer)
    save_step(args.out, "final", lm, tokenizer, optimizer, metrics, args.save_every)


# ---- machinery: nothing below is about the method ----------------------------------------------------------

def kl_to_old(policy, rollouts, indices, micro_tokens):
    """Mean KL(pi || pi_old) in nats over the whole vocabulary at the response tokens of `indices`."""
    rank, world, device = setup_ddp()
    sums, shares = Counter(), micro_batches(rollouts["offsets"].diff()[indices], micro_tokens, world)
    with torch.no_grad():
        for micro in shares[rank]:
            input_ids, mask = pad_responses(rollouts, indices[micro], device)
            kl = policy(input_ids, mask, exact_kl=True)[2]
            sums.update(kl=kl.double().sum(), tokens=mask.double().sum())
        idle_turns(policy, shares, rank, True)
    sums = reduce_sums(sums)
    return sums["kl"] / sums["tokens"]


def signal_statistics(responses, mean, std, tokens):
    """Of the raw signal, for run.json: moments, percentiles, histograms by kind of response (Fig. 10)."""
    edges = torch.linspace(-5, 5, 51, dtype=torch.float64)
    every = max(1, tokens // 10 ** 6)       # percentiles of a million tokens: exact up to two million
    histogram, sample, fourth = {True: torch.zeros(50), False: torch.zeros(50)}, [], 0.0
    for signal, positive in responses:
        values = signal.double()
        sample.append(values[::every].clone())                                  # a view would keep them all
        fourth += ((values - mean) / (std + 1e-8)).pow(4).sum().item()
        histogram[positive] = histogram[positive] + torch.histogram(values.clamp(-5, 5), edges).hist
    ranked, count = torch.cat(sample).sort().values, sum(histogram.values()).sum().item()
    return {"mean": mean, "std": std, "kurtosis": fourth / count, "histogram_edges": edges.tolist(),
            "histogram_positive": histogram[True].tolist(), "histogram_negative": histogram[False].tolist(),
            **{f"p{q}": ranked[len(ranked) * q // 100].item() for q in (1, 50, 99)}}


if __name__ == "__main__":
    run_main(main, lambda: memory_advice(parse_args()))
