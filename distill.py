"""
Stage 2: distil what the teacher learnt back into pi_old, inside a trust region (Sec. 3.2 to 3.4).

    A_hat(s, a) = log pi_teacher(a|s) - log pi_denominator(a|s), whitened              Sec. 3.3, 3.4
    maximize  E[ min(r A_hat, clip(r, 1 - eps, 1 + eps) A_hat) ],  r = pi / pi_old     Eq. 9

The same rollouts, 10 to 32 steps. The signal is fixed before training, from scores that are computed once: the teacher is
not in memory while the student trains. Which signal (Fig. 3):

    strategy 1   --teacher T     --denominator old       towards a teacher that is better than pi_old
    strategy 2   --teacher MSE   --denominator UNLEARNED  an MSE run's late over its early checkpoint: weak to strong
    strategy 3   --teacher T     --denominator STUDENT    away from an older, weaker student

1 GPU, or CPU:  python distill.py --student M --teacher runs/teacher/final --denominator old \\
                                  --rollouts runs/rollouts --out runs/student
8 GPUs:         torchrun --standalone --nproc-per-node 8 distill.py ...

Eq. 7 asks for the policy closest to the teacher with KL(pi || pi_old) <= eps. The paper approximates the constraint: the clip
takes the gradient from tokens that have moved, and few steps do not get far. --max-kl EPS (ours) makes it real by stopping:
after each step KL(pi || pi_old) is computed over the whole vocabulary at the states of a fixed part of the rollouts, and the
last policy inside the budget becomes final. It follows the surrogate to the border of the trust region; it does not search
along the border.

Words and shapes: see teacher.py. Read next: evaluate.py.
"""
import argparse
import copy
import json
import math
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from rollout import InputError, Parser, checkpoint_fingerprint, defer_signals, one_writer, run_main, write_atomic, write_json
from teacher import (Policy, check_tokenizer, clip_gradients, find_old, idle_inputs, leave, load_moments, load_policy, load_rollouts, local,
                     log_ratio, memory_advice, micro_batches, newest_save, pad_responses, read_metrics, save_step, score, setup_ddp,
                     shard_over_ranks, split_summary, start_run, step_batches, step_metrics, stop_asked, stop_if_not_finite, token_sums)


# ---- the signal ---------------------------------------------------------------------------------------------------------

def mask_signal(signal, positive, keep="all"):
    """On positive responses keep only min(signal, 0) or max(signal, 0) (Table 12); before whitening, as the paper does."""
    if keep == "min0":
        return torch.where(positive, signal.clamp(max=0), signal)
    if keep == "max0":
        return torch.where(positive, signal.clamp(min=0), signal)
    return signal


def signal_of_responses(rollouts, usable, teacher_logp, denom_logp, keep="all"):
    """Yield (A_hat before whitening [T], whether it is positive) of each usable response (Sec. 3.3, 3.4).

    One at a time: the signal of all responses at once would have the size of all tokens.
    """
    bounds, positive = rollouts["response_offsets"], rollouts["reward"] > 0
    for i in usable.nonzero()[:, 0]:
        span = slice(bounds[i], bounds[i + 1])
        yield mask_signal(teacher_logp[span] - denom_logp[span], positive[i], keep), bool(positive[i])


def whitening(parts):
    """(mean, std) of a signal that comes in parts (flat tensors), in one fp64 pass: fp32 sums over 10^8 tokens would not hold."""
    count, mean, m2 = 0, 0.0, 0.0                           # m2: sum of squared distances from the mean
    for part in parts:
        if len(part) == 0:
            continue
        values = part.double()
        shift = values.mean().item() - mean
        m2 += (values - values.mean()).square().sum().item() + shift ** 2 * count * len(part) / (count + len(part))
        mean += shift * len(part) / (count + len(part))
        count += len(part)
    return mean, math.sqrt(m2 / count)


def standardize(signal, mean, std, mask):
    """(signal - mean) / std in fp64, 0 outside the mask, in the signal's own type."""
    return ((signal.double() - mean) / (std + 1e-8)).to(signal.dtype).masked_fill(mask == 0, 0.0)


def whiten(signal, mask):
    """Zero mean and unit variance over response tokens (Sec. 3.3), 0 outside the mask; any shape, mask of the same shape."""
    return standardize(signal, *whitening([signal[mask.bool()]]), mask)


def signal_statistics(responses, mean, std, tokens):
    """What run.json keeps of the raw signal: moments, percentiles, and a histogram by kind of response (Fig. 10).

    responses: of signal_of_responses, with `tokens` tokens in all. The percentiles are of every n-th token, n such that
    a million are left: exact up to two million tokens.
    """
    edges, every = torch.linspace(-5, 5, 51, dtype=torch.float64), max(1, tokens // 10 ** 6)
    histogram = {kind: torch.zeros(len(edges) - 1, dtype=torch.float64) for kind in (True, False)}
    sample, seen, fourth, below, positives = [], 0, 0.0, 0, 0
    for signal, positive in responses:
        values = signal.double()
        sample.append(values[-seen % every::every].clone())                         # a view would keep them all
        seen += len(values)
        fourth += ((values - mean) / (std + 1e-8)).pow(4).sum().item()
        histogram[positive] += torch.histogram(values.clamp(-5, 5), edges).hist     # the first and last bin hold what lies beyond
        below, positives = below + positive * (values < 0).sum().item(), positives + positive * len(values)
    ranked = torch.cat(sample).sort().values
    percentiles = {f"p{q}": ranked[min(len(ranked) - 1, int(len(ranked) * q / 100))].item() for q in (1, 50, 99)}
    return {"mean": mean, "std": std, **percentiles, "kurtosis": fourth / tokens,
            "share_below_zero_on_positives": below / positives if positives else math.nan, "histogram_edges": edges.tolist(),
            "histogram_positive": histogram[True].tolist(), "histogram_negative": histogram[False].tolist()}


# ---- the loss -----------------------------------------------------------------------------------------------------------

def distill_loss(logp, entropy, old_logp, adv, mask, clip=0.2, kl_coef=0.0, entropy_coef=0.0, exact_kl=None):
    """Clipped surrogate of Eq. 9, with the KL and entropy terms of Tables 5 and 6. All inputs (B, T-1), adv is A_hat.

    Sum over response tokens; the caller divides by the token count of the optimizer step. exact_kl, if given, takes the
    place of the KL that is estimated from the old samples.
    """
    d = log_ratio(logp, old_logp, mask)                                             # log r(theta); 0 at the first step
    ratio = d.exp()
    surrogate = torch.minimum(ratio * adv, ratio.clamp(1 - clip, 1 + clip) * adv)   # Eq. 9
    # ours: KL(pi || pi_old) = E_old[r log r], with the zero-mean 1 - r added so that no token's share is negative (r * k3)
    kl = ratio * d - (ratio - 1) if exact_kl is None else exact_kl
    objective = surrogate - kl_coef * kl + entropy_coef * entropy                   # Table 5; Table 6b: a bonus
    return -objective.masked_fill(mask == 0, 0.0).sum()


def kl_to_old(policy, rollouts, indices, micro_tokens, shard=False):
    """Mean KL(pi || pi_old) over the whole vocabulary at the response tokens of `indices`, nats per token; all ranks share it.

    Not from the old samples: their estimate misses mass that leaks to tokens that nobody sampled.
    """
    rank, world, device = setup_ddp()
    total = torch.zeros(2, dtype=torch.float64, device=device)
    with torch.no_grad():
        shares = micro_batches(rollouts["offsets"].diff()[indices], micro_tokens, world, shard)
        for micro in shares[rank]:
            input_ids, mask = pad_responses(rollouts, indices[micro], device)
            total += torch.stack([policy(input_ids, mask, exact_kl=True)[2].double().sum(), mask.double().sum()])
        for _ in range(shard * (len(shares[0]) - len(shares[rank]))):
            policy(*idle_inputs(device), exact_kl=True)
    if world > 1:
        dist.all_reduce(total)
    return (total[0] / total[1]).item()


def parse_args(argv=None):
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arg = p.add_argument
    # Checkpoints and data
    arg("--student", required=True, help="where training starts: pi_old, or the first student of an ensemble (Table 8)")
    arg("--teacher", required=True, help="numerator of the signal: a checkpoint, 'old' or 'none' (Table 7)")
    arg("--denominator", default="old", help="'old' (strategy 1), a checkpoint (2, 3), 'none', or 'live': the student itself (Fig. 7)")
    arg("--rollouts", type=Path, required=True, help="folder of rollout.py, the one that the teacher was trained on")
    arg("--out", type=Path, required=True, help="checkpoints step-*/ and final/, run.json, metrics.jsonl")
    arg("--old", help="pi_old, if it is no longer at the path that the rollouts name")
    arg("--drop-truncated", action="store_true", help="leave out responses that hit the token limit")
    # Signal and loss
    arg("--positive-signal", choices=["all", "min0", "max0"], default="all", help="mask on positive responses (Table 12)")
    arg("--clip", type=float, default=0.2, help="eps of Eq. 9 (the paper gives none; ours: PPO's)")
    arg("--kl-coef", type=float, default=0.0, help="weight of the KL to pi_old (Table 5: 0.001 to 0.2)")
    arg("--kl-kind", choices=["sampled", "exact"], default="sampled", help="exact: whole vocabulary, keeps pi_old in memory")
    arg("--max-kl", type=float, help="stop before KL(pi || pi_old) passes this, nats per token (ours: Eq. 7); keeps pi_old in memory")
    arg("--entropy-coef", type=float, default=0.0, help="weight of the entropy bonus (Table 6b: 0.5)")
    # Optimization
    arg("--steps", type=int, default=10, help="10 when iterating rounds (Table 2); 16 or 32 for one round (Sec. 4.1)")
    arg("--batch-prompts", type=int, default=64, help="prompts per step over all ranks (Sec. 4.1: 32, 64)")
    arg("--micro-tokens", type=int, default=32768, help="padded tokens per forward pass and rank; lower it when out of memory")
    arg("--chunk", type=int, default=1024, help="tokens per tile of the head")
    arg("--lr", type=float, default=1e-6, help="AdamW, constant (Sec. 4.1)")
    arg("--max-grad-norm", type=float, default=1.0)
    arg("--checkpointing", action=argparse.BooleanOptionalAction, default=True, help="gradient checkpointing: 1.3x the time")
    arg("--offload-activations", action="store_true", help="keep what checkpointing saves in host memory: for the longest responses")
    arg("--shard", action="store_true", help="split parameters, gradients and Adam state over ranks (FSDP) instead of DDP")
    arg("--logp-temperature", type=float, help="temperature of the log-probs (default: the rollouts')")
    arg("--seed", type=int, default=0, help="order of the prompts")
    # Saving
    arg("--save-every", type=int, default=10, help="steps between checkpoints")
    arg("--fresh", action="store_true", help="delete what --out holds and start over")
    arg("--trust-remote-code", action="store_true", help="run code that comes with the checkpoint")
    args = p.parse_args(argv)
    if args.teacher == "none" and args.denominator in ("none", "old") or args.teacher == args.denominator:
        raise InputError(f"--teacher {args.teacher} --denominator {args.denominator} is no signal: name two different policies")
    for name in ("steps", "batch_prompts", "micro_tokens", "chunk", "lr", "save_every", "clip", "max_grad_norm", "max_kl", "logp_temperature"):
        if getattr(args, name) is not None and not 0 < getattr(args, name) < math.inf:
            raise InputError(f"--{name.replace('_', '-')} must be positive")
    if not (0 <= args.kl_coef < math.inf and math.isfinite(args.entropy_coef)):
        raise InputError("--kl-coef must not be negative, and --entropy-coef a number")
    return args


def main():
    args = parse_args()
    # ---- data and checks: before any model is loaded -------------------------------------------------------------------
    rollouts = load_rollouts(args.rollouts)
    tokenizer = check_tokenizer(args.student, rollouts, args.trust_remote_code)
    old = find_old(rollouts, args.old)
    content = {"none": "none", "live": "live", "old": rollouts["meta"]["model_fingerprint"]}
    for checkpoint in {args.teacher, args.denominator} - set(content):
        check_tokenizer(checkpoint, rollouts, args.trust_remote_code)
        content[checkpoint] = checkpoint_fingerprint(checkpoint)
    if content[args.teacher] == content[args.denominator]:
        raise InputError(f"--teacher {args.teacher} and --denominator {args.denominator} are the same policy: "
                         f"the signal would be zero")
    temperature = args.logp_temperature or rollouts["meta"]["temperature"]
    usable = ~rollouts["truncated"] if args.drop_truncated else torch.ones_like(rollouts["truncated"])
    if not usable.any():
        raise InputError(f"{args.rollouts}: every response is truncated; leave out --drop-truncated")
    rank, world, device = setup_ddp()
    if args.shard and world == 1:
        raise InputError("--shard splits a model over several processes: start it with torchrun --nproc-per-node 2 or more")
    run, finished = start_run(args.out, args, rank, parent=checkpoint_fingerprint(args.student), rollouts_fingerprint=rollouts["fingerprint"])
    if finished:
        if rank == 0:
            print(f"{args.out}: already finished")
        return
    step, save = newest_save(args.out)
    metrics = read_metrics(args.out, step)

    # ---- the signal, from scores that are computed once ------------------------------------------------------------------
    options = dict(temperature=temperature, micro_tokens=args.micro_tokens, chunk=args.chunk,
                   trust_remote_code=args.trust_remote_code, shard=args.shard)
    old_logp = score(old, rollouts, **options)

    def role_logp(role):
        """Log-probs of numerator or denominator; `live` starts as the student."""
        if role == "none":
            return torch.zeros(1).expand_as(old_logp)
        return old_logp if role == "old" else score(args.student if role == "live" else role, rollouts, **options)

    lengths, response_lengths = rollouts["offsets"].diff(), rollouts["response_offsets"].diff()
    teacher_logp, denom_logp = role_logp(args.teacher), role_logp(args.denominator)
    signal = (rollouts, usable, teacher_logp, denom_logp, args.positive_signal)
    mean, std = whitening(values for values, _ in signal_of_responses(*signal))     # of step 0, if live
    one_writer(args.out)
    if rank == 0:
        statistics = signal_statistics(signal_of_responses(*signal), mean, std, response_lengths[usable].sum().item())
        write_json(args.out / "run.json", run | {"signal": statistics})

    # ---- the one model that trains ---------------------------------------------------------------------------------------
    home = "cpu" if args.shard else device                                          # sharding puts each rank's part on its GPU
    lm = load_policy(save or args.student, home, args.checkpointing, args.trust_remote_code, args.offload_activations)
    exact = args.kl_coef > 0 and args.kl_kind == "exact"                            # this and --max-kl: two models in memory
    old_lm = load_policy(old, home, trust_remote_code=args.trust_remote_code) if exact or args.max_kl else None
    policy = Policy(lm, temperature, args.chunk, old_lm)
    model = (shard_over_ranks(policy) if args.shard else
             DistributedDataParallel(policy, gradient_as_bucket_view=True) if world > 1 else policy)
    optimizer = torch.optim.AdamW(lm.parameters(), lr=args.lr, betas=(0.9, 0.999), weight_decay=0.0)
    if save:
        load_moments(save, lm, optimizer)
    kl_states = next(step_batches(rollouts, usable, args.batch_prompts, args.seed + 1))     # --max-kl: one batch, always the same
    if args.max_kl and step == 0 and (kl := kl_to_old(policy, rollouts, kl_states, args.micro_tokens, args.shard)) > args.max_kl:
        raise InputError(f"{args.student} is at KL {kl:.4f} from pi_old, beyond --max-kl {args.max_kl:g} before the first step")

    # ---- training loop ---------------------------------------------------------------------------------------------------
    batches = step_batches(rollouts, usable, args.batch_prompts, args.seed)
    for _ in range(step):
        next(batches)
    bar, caught = tqdm(total=args.steps, initial=step, desc="distill", disable=rank > 0), defer_signals()   # a signal waits for the end of a step
    if rank == 0:
        bar.write(split_summary(lengths[next(step_batches(rollouts, usable, args.batch_prompts, args.seed))], args.micro_tokens, world, args.shard))
    while step < args.steps:
        step, start, batch = step + 1, time.time(), next(batches)
        n_tokens = response_lengths[batch].sum().item()                             # of the whole step, on every rank
        shares = micro_batches(lengths[batch], args.micro_tokens, world, args.shard)
        sums = torch.zeros(12, dtype=torch.float64, device=device)                  # loss, then token_sums
        for i, micro in enumerate(shares[rank]):
            model.require_backward_grad_sync = i == len(shares[rank]) - 1           # DDP: one all-reduce per step
            idx = batch[micro]
            input_ids, mask, old_lp, teacher_lp, denom_lp = pad_responses(rollouts, idx, device, old_logp, teacher_logp, denom_logp)
            reward = rollouts["reward"][idx].to(device)
            logp, entropy, exact_kl = model(input_ids, mask, exact)
            if args.denominator == "live":                                          # Fig. 7: follows the student
                denom_lp = logp.detach()
            signal = mask_signal(teacher_lp - denom_lp, reward[:, None] > 0, args.positive_signal)
            a_hat = standardize(signal, mean, std, mask)                            # Sec. 3.3: whitened over all responses
            loss = distill_loss(logp, entropy, old_lp, a_hat, mask, args.clip, args.kl_coef, args.entropy_coef, exact_kl)
            loss = loss / n_tokens
            (loss * world).backward()                                               # DDP averages over ranks; we want the sum
            sums[0] += loss.detach()
            sums[1:] += token_sums(logp, entropy, old_lp, mask, reward, a_hat, args.clip, args.clip)
        for _ in range(args.shard * (len(shares[0]) - len(shares[rank]))):
            (model(*idle_inputs(device), exact)[0].sum() * 0).backward()
        grad_norm = clip_gradients(lm, args.max_grad_norm)
        if world > 1:
            dist.all_reduce(sums)
        stop_if_not_finite(step, sums, grad_norm, rollouts, batch, old_logp, teacher_logp)
        if args.max_kl:
            inside = [local(p).detach().to("cpu", copy=True) for p in lm.parameters()]
            moments = copy.deepcopy(optimizer.state_dict())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        kl = kl_to_old(policy, rollouts, kl_states, args.micro_tokens, args.shard) if args.max_kl else None
        if args.max_kl and kl > args.max_kl:                                        # Eq. 7: back into the trust region, and done
            with torch.no_grad():
                for p, kept in zip(lm.parameters(), inside, strict=True):
                    local(p).copy_(kept)
            optimizer.load_state_dict(moments)
            if rank == 0:
                write_atomic(args.out / "metrics.jsonl", lambda p: p.write_text("".join(metrics)))
                bar.write(f"step {step:03d} would be at kl(new,old) {kl:.4f} > {args.max_kl:g}: final is step {step - 1}")
            step -= 1
            break

        # ---- metrics and saving ------------------------------------------------------------------------------------------
        seconds = time.time() - start
        m = {"step": step, "loss": sums[0].item(), "grad_norm": grad_norm, "lr": args.lr, "tokens": n_tokens,
             "tok_per_s": n_tokens / seconds, "seconds": seconds,
             "peak_mem_gib": torch.cuda.max_memory_allocated() / 2 ** 30 if device.type == "cuda" else None,
             **step_metrics(sums[1:]), "signal_mean": mean, "signal_std": std, "kl_new_old": kl}
        metrics.append(json.dumps(m) + "\n")
        stop = stop_asked(caught, device)
        if rank == 0:
            write_atomic(args.out / "metrics.jsonl", lambda p: p.write_text("".join(metrics)))
            bar.update()
            bar.write(f"step {step:03d}/{args.steps:03d} | loss {m['loss']:+.4f} | kl(old,new) {m['kl_old_new']:.4f} | "
                      + (f"kl(new,old) {kl:.4f} | " if args.max_kl else "") + f"entropy {m['entropy']:.3f} | "
                      f"clip {m['clip_frac']:.3f} | grad {grad_norm:.2f} | {m['tok_per_s']:,.0f} tok/s")
        if step % args.save_every == 0 or stop and step < args.steps:
            save_step(args.out, f"step-{step:04d}", lm, tokenizer, optimizer, step, args.save_every)
        if stop and step < args.steps:
            leave(stop, args.out, step)
    save_step(args.out, "final", lm, tokenizer, optimizer, step, args.save_every)
    if world > 1:
        dist.barrier()                                      # the others wait until the checkpoint is complete


if __name__ == "__main__":
    run_main(main, lambda: memory_advice(parse_args()))
