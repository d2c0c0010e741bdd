"""
Stage 1: train a teacher on one fixed batch of rollouts, for dozens of weakly constrained off-policy steps.

    CE    R(y) = beta * sum_t log pi/pi_old,  BCE with logits of R(y) against the reward       Eq. 2, 3
    MSE   (pi(a|s) - R)^2 per token: unlearns first, then recovers, and ends degenerate        Eq. 10
    SAPO, GRPO, PPO, SFT: the losses they are compared with                                    Sec. 4.1

The teacher extracts the signal of the batch and drifts (Sec. 3.1, 3.4); it is not the result. distill.py
takes what it learnt back into pi_old, inside a trust region.

1 GPU, or CPU:  python teacher.py --model M --rollouts runs/rollouts --out runs/teacher --loss ce --beta 0.001
8 GPUs:         torchrun --standalone --nproc-per-node 8 teacher.py ...

Words used in all files: pi_old wrote the rollouts and is where training starts; pi_e is the trained teacher;
pi_un an early, "unlearned" checkpoint of an MSE run. B responses, T tokens, V vocabulary, D hidden size,
N tokens of a flat list. R is the reward, 0 or 1. `logp[:, t]` is the log-prob of `input_ids[:, t + 1]`.
Read next: distill.py.
"""
import argparse
import contextlib
import fcntl
import gc
import hashlib
import itertools
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import transformers
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict,
                                                     get_optimizer_state_dict, set_optimizer_state_dict)
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig

from rollout import (STOP_SIGNALS, InputError, Parser, RunError, check_positive, checkpoint_fingerprint,
                     input_errors, join_shards, load_lm, load_shards, load_tokenizer, one_writer, ranks,
                     read_json, read_tensors, remove, resolve_checkpoint, run_main, tokenizer_fingerprint,
                     write_atomic, write_json)

# ---- log-probs: one function for every role ----------------------------------------------------------------

# columns of the head that are in memory at once: a GPU wants large tiles, a CPU tiles that fit its cache
VOCAB_TILE = 8192 if torch.cuda.is_available() else 1024


class HeadLogps(torch.autograd.Function):
    """log p(target) and entropy of softmax(h W^T / temperature), in tiles of tokens x vocabulary.

    At 32k tokens and V = 152k the logits are 20 GB in fp32. Here they exist one tile at a time: forward keeps
    only the log-normaliser and the entropy of each token, backward computes the tiles again. With p =
    softmax(z), z the logits divided by the temperature,

        d logp / dz_v = 1[v = target] - p_v          d H / dz_v = -p_v (log p_v + H)
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, chunk):
        wide = torch.promote_types(hidden.dtype, torch.float32)         # fp32 from the logits on
        top, total, first, target_logit = (torch.full((len(hidden),), fill, dtype=wide, device=hidden.device)
                                           for fill in (-math.inf, 0.0, 0.0, 0.0))
        for v in range(0, len(weight), VOCAB_TILE):
            w = weight[v:v + VOCAB_TILE].to(hidden.dtype)
            for row in range(0, len(hidden), chunk):
                i = slice(row, row + chunk)
                z = product(hidden[i], w.T, wide).to(wide).div_(temperature)        # (C, tile)
                new_top = torch.maximum(top[i], z.amax(1))
                here = targets[i] - v
                inside = (here >= 0) & (here < len(w))
                target_logit[i] += z.gather(1, here.clamp(0, len(w) - 1)[:, None])[:, 0] * inside
                shrink = (top[i] - new_top).exp()                       # rescales what earlier tiles summed
                e = (z - new_top[:, None]).exp_()
                total[i] = total[i] * shrink + e.sum(1)                 # sum of exp(z)
                first[i] = first[i] * shrink + e.mul_(z).sum(1)         # sum of exp(z) z
                top[i] = new_top
        log_z = top + total.log()
        entropy = log_z - first / total                                 # H = log Z - E[z]
        ctx.save_for_backward(hidden, weight, targets, log_z, entropy)
        ctx.temperature, ctx.chunk, ctx.wide = temperature, chunk, wide
        return target_logit - log_z, entropy

    @staticmethod
    def backward(ctx, grad_logp, grad_entropy):
        hidden, weight, targets, log_z, entropy = ctx.saved_tensors
        grad_hidden = torch.zeros(hidden.shape, dtype=ctx.wide, device=hidden.device)
        grad_weight = torch.empty_like(weight)
        at_target, at_log_p = grad_logp / ctx.temperature, -grad_entropy / ctx.temperature
        at_all = -(grad_logp + grad_entropy * entropy) / ctx.temperature
        for v in range(0, len(weight), VOCAB_TILE):      # vocabulary outside: each slice of dW is summed once
            w = weight[v:v + VOCAB_TILE].to(hidden.dtype)
            grad_w = torch.zeros(w.shape, dtype=ctx.wide, device=w.device)
            for row in range(0, len(hidden), ctx.chunk):
                i = slice(row, row + ctx.chunk)
                z = product(hidden[i], w.T, ctx.wide).to(ctx.wide).div_(ctx.temperature)
                log_p = z.sub_(log_z[i, None])
                p = log_p.exp()             # both formulas, sorted by powers of log p:
                grad_z = log_p.mul_(at_log_p[i, None]).add_(at_all[i, None]).mul_(p)
                here = targets[i] - v
                inside = (here >= 0) & (here < len(w))
                grad_z[inside.nonzero()[:, 0], here[inside]] += at_target[i][inside]
                grad_z = grad_z.to(hidden.dtype)
                grad_hidden[i] += product(grad_z, w, ctx.wide)
                grad_w += product(grad_z.T, hidden[i], ctx.wide)
            grad_weight[v:v + VOCAB_TILE] = grad_w
        return grad_hidden.to(hidden.dtype), grad_weight, None, None, None


def product(a, b, wide):
    """a @ b. CUDA gives its fp32 sums out as `wide`; elsewhere they are rounded to the operands' type."""
    return torch.mm(a, b, out_dtype=wide) if a.is_cuda and a.dtype != wide else torch.mm(a, b)


def logps_from_hidden(hidden, weight, targets, temperature=1.0, chunk=1024, with_entropy=True):
    """Log-probs of `targets` [N] (nats) and entropies under the head `weight` [V, D] at hidden states [N, D].

    Returns (logp [N], entropy [N] or None) in fp32 (fp64 for fp64 input), both differentiable in hidden and
    weight. `chunk` is the number of tokens per tile and changes memory, not values.
    """
    logp, entropy = HeadLogps.apply(hidden, weight, targets.long(), temperature, chunk)
    return logp, entropy if with_entropy else None


def exact_kl_from_hidden(hidden, weight, old_hidden, old_weight, temperature=1.0):
    """KL(pi || pi_old) in nats over the whole vocabulary at each of N states: [N], differentiable.

    ours: the estimate from sampled tokens misses mass that leaks to tokens nobody sampled; this sum sees it.
    """
    def rows_kl(h, h_old, w, w_old):
        wide = torch.promote_types(h.dtype, torch.float32)
        logp, logp_old = ((F.linear(a.to(wide), b.to(wide)) / temperature).log_softmax(-1)      # (C, V)
                          for a, b in ((h, w), (h_old, w_old)))
        return (logp.exp() * (logp - logp_old)).sum(-1)                             # (C,)

    rows = max(1, 2 ** 24 // len(weight))                   # 64 MB of fp32 logits; rebuilt in backward
    kls = [checkpoint(rows_kl, h, h_old, weight, old_weight, use_reentrant=False)
           for h, h_old in zip(hidden.split(rows), old_hidden.split(rows))]
    return torch.cat(kls)


def forward_dtype(device):
    """What the forward computes in. Parameters, gradients, logits and all after them are fp32 everywhere."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def hidden_states(model, input_ids):
    """Last hidden states (B, T-1, D), for tokens 1 to T-1. Attention is causal: padding needs no mask."""
    device, low = input_ids.device, forward_dtype(input_ids.device) == torch.bfloat16
    # no cache: it would hold a bf16 copy of every weight until the end, and each is used once
    with torch.autocast(device.type, torch.bfloat16, enabled=low, cache_enabled=False):
        embedded = model.base_model.get_input_embeddings()(input_ids)
        embedded = embedded.bfloat16() if low else embedded         # and with it what checkpointing keeps
        hidden = model.base_model(inputs_embeds=embedded, use_cache=False).last_hidden_state[:, :-1]
    return hidden.bfloat16() if low else hidden


def token_logps(model, input_ids, temperature=1.0, chunk=1024, mask=None):
    """log pi(a_t | s_t) and the entropy of pi(. | s_t) in nats, (B, T-1) each, for input_ids (B, T).

    With a mask (B, T-1) only its positions are computed, the others are 0. The distribution is the one that
    was sampled from: logits / temperature, not truncated by top-p.
    """
    mask = torch.ones_like(input_ids[:, 1:]) if mask is None else mask
    return Policy(model, temperature, chunk)(input_ids, mask)[:2]


class Policy(nn.Module):
    """A causal LM whose forward returns log-probs: DDP syncs the gradients only of what runs inside forward.

    old_lm, if given, is a frozen pi_old for the exact KL. Also used by distill.py.
    """

    def __init__(self, lm, temperature=1.0, chunk=1024, old_lm=None):
        super().__init__()
        self.lm, self.temperature, self.chunk = lm, temperature, chunk
        self.old_lm = old_lm.requires_grad_(False).eval() if old_lm is not None else None

    def forward(self, input_ids, mask, exact_kl=False):
        """(logp, entropy, exact KL to pi_old or None), each (B, T-1) and 0 outside the mask."""
        keep, targets = mask.bool(), input_ids[:, 1:][mask.bool()]
        hidden, weight = hidden_states(self.lm, input_ids)[keep], self.lm.get_output_embeddings().weight
        flat = logps_from_hidden(hidden, weight, targets, self.temperature, self.chunk)
        if exact_kl:
            with torch.no_grad():
                old_hidden = hidden_states(self.old_lm, input_ids)[keep]
                old_weight = self.old_lm.get_output_embeddings().weight
            flat += (exact_kl_from_hidden(hidden, weight, old_hidden, old_weight, self.temperature),)
        padded = [x.new_zeros(keep.shape).masked_scatter(keep, x) for x in flat]
        return *padded, *([] if exact_kl else [None])


# ---- losses: each returns a SUM, over responses (ce, sapo) or tokens (the others); the loop divides --------
# logp, old_logp, mask (B, T-1) float; reward (B,); adv (B,) or (B, T-1)

CLIP_LOW, CLIP_HIGH = 0.2, 0.28                             # of GRPO and PPO (Sec. 4.1)


def log_ratio(logp, old_logp, mask):
    """log pi/pi_old, 0 outside the mask. ours: clamped to +-20, or exp overflows and 0 * inf is NaN."""
    return (logp - old_logp).masked_fill(mask == 0, 0.0).clamp(-20, 20)


def implicit_reward(logp, old_logp, mask, beta, reduce="sum"):
    """R(y) = beta * sum (or mean) over tokens of log pi/pi_old, (B,): Eq. 3."""
    total = beta * (logp - old_logp).masked_fill(mask == 0, 0.0).sum(1)
    return total if reduce == "sum" else total / mask.sum(1).clamp(min=1)


def ce_loss(logp, old_logp, mask, reward, beta, reduce="sum"):
    """Binary cross-entropy of R(y) against the reward (Eq. 2, its sign corrected). Sum over responses."""
    logits = implicit_reward(logp, old_logp, mask, beta, reduce)
    return F.binary_cross_entropy_with_logits(logits, reward, reduction="sum")


def mse_loss(logp, mask, reward, negative_weight=1.0):
    """(pi(a|s) - R)^2 on probabilities (Eq. 10), negatives weighted by w of Table 9. Sum over tokens."""
    prob = logp.masked_fill(mask == 0, 0.0).clamp(max=20).exp()
    weight = torch.where(reward > 0, reward.new_tensor(1.0), negative_weight)
    return ((prob - reward[:, None]).square() * weight[:, None] * mask).sum()


def sft_loss(logp, mask, reward):
    """Negative log-likelihood of positive responses (Table 9, recovery by SFT). Sum over their tokens."""
    return -(logp.masked_fill(mask == 0, 0.0) * (reward[:, None] > 0)).sum()


def sapo_loss(logp, old_logp, mask, adv, tau_pos=1.0, tau_neg=1.05):
    """SAPO (2511.20347): f(r) = 4/tau sigmoid(tau (r - 1)) in the place of the clipped ratio.

    Mean over the tokens of a response, sum over responses. The weight of logp's gradient is 4 p (1 - p) r,
    p = sigmoid(tau (r - 1)).
    """
    ratio = log_ratio(logp, old_logp, mask).exp()
    adv = adv[:, None].expand_as(ratio) if adv.dim() == 1 else adv
    tau = torch.where(adv > 0, adv.new_tensor(tau_pos), tau_neg)        # two plain numbers would be fp32
    objective = 4 / tau * torch.sigmoid(tau * (ratio - 1)) * adv
    return -((objective * mask).sum(1) / mask.sum(1).clamp(min=1)).sum()


def grpo_loss(logp, old_logp, mask, adv, clip_low=CLIP_LOW, clip_high=CLIP_HIGH):
    """Clipped surrogate (Eq. 5) with the thresholds of Sec. 4.1. Sum over response tokens."""
    ratio = log_ratio(logp, old_logp, mask).exp()
    adv = adv[:, None] if adv.dim() == 1 else adv
    objective = torch.minimum(ratio * adv, ratio.clamp(1 - clip_low, 1 + clip_high) * adv)
    return -(objective.masked_fill(mask == 0, 0.0)).sum()


def kl_term(d, ratio):
    """Per-token KL(pi || pi_old) from old samples (Table 5), d = log r: r log r + (1 - r), which is r * k3.

    ours: E_old[r log r] is the KL; the zero-mean 1 - r makes every token's share positive.
    """
    return ratio * d - (ratio - 1)


def group_advantages(reward, prompt_index):
    """A = (R - mean) / (std + 1e-6) among a prompt's responses, (B,); std unbiased, 0 for a single one."""
    _, group = prompt_index.unique(return_inverse=True)
    size = torch.bincount(group).to(reward.dtype)
    centred = reward - (torch.zeros_like(size).index_add_(0, group, reward) / size)[group]
    var = torch.zeros_like(size).index_add_(0, group, centred.square()) / (size - 1).clamp(min=1)
    return centred / (var.sqrt()[group] + 1e-6)


def gae_advantages(values, reward, mask, lam_alpha=0.05):
    """Generalised advantage estimation for PPO, (B, T) like `values`, not whitened; 0 outside the mask.

    The only reward is R at the last token of a response, gamma is 1. Longer responses look further ahead:
    lambda = max(0, 1 - 1/(lam_alpha * length)); Sec. 4.1 prints 1/(0.05 * length) alone.
    """
    lam = (1 - 1 / (lam_alpha * mask.sum(1).clamp(min=1))).clamp(min=0)             # (B,)
    adv, running, next_value = torch.zeros_like(values), torch.zeros_like(reward), torch.zeros_like(reward)
    seen = torch.zeros_like(mask[:, 0])                  # 1 once the last token of a response has been passed
    for t in reversed(range(values.shape[1])):
        here = mask[:, t]
        terminal = reward * (1 - seen)                      # R at the last token, nothing before it
        running = torch.where(here > 0, terminal + next_value - values[:, t] + lam * running, running)
        next_value = torch.where(here > 0, values[:, t], next_value)
        seen = torch.maximum(seen, here)
        adv[:, t] = running * here
    return adv


# ---- PPO's first phase: values of all states, before the policy trains; never two models in memory ---------

class ValueNetwork(nn.Module):
    """V(s_t), the reward to expect from state s_t: the policy's backbone with a scalar head (Sec. 4.1).

    ours: the head starts with weight 0 and the mean reward as bias: the explained variance starts at 0.
    """

    def __init__(self, lm, mean_reward):
        super().__init__()
        self.base_model = lm.base_model                 # without the vocabulary's head: DDP would wait for it
        self.head = nn.Linear(lm.get_output_embeddings().weight.shape[1], 1, device=lm.device)
        nn.init.zeros_(self.head.weight)
        nn.init.constant_(self.head.bias, mean_reward)

    def forward(self, input_ids, mask=None):
        """[Values (B, T-1) in fp32]; position t is the state before input_ids[:, t + 1], as for logp."""
        return [self.head(hidden_states(self, input_ids).float())[..., 0]]


def train_values(args, rollouts, usable):
    """(V of every response token [sum of response lengths], metrics of V); kept in OUT/value."""
    path = args.out / "value" / "values.pt"
    if not path.exists():
        fit_values(args, rollouts, usable, path)
    values = read_tensors(path, "file of values", "delete it, they will be computed again")
    lengths = rollouts["response_offsets"].diff()
    seen, returns = usable.repeat_interleave(lengths), rollouts["reward"].repeat_interleave(lengths)
    variance = 1 - ((returns - values)[seen].double().var() / returns[seen].double().var()).item()
    print_once(f"values: explained variance {variance:.3f}")
    return values, {"explained_variance": variance}         # of V, not of pi(a|s) as an estimate of R


def fit_values(args, rollouts, usable, path):
    """Fit V to the Monte-Carlo return, which is R at every token (lambda = gamma = 1: Sec. 4.1); save it."""
    rank, world, device = setup_ddp()
    lm = load_policy(args.model, "cpu" if args.shard else device, args.checkpointing, args.trust_remote_code,
                     args.offload_activations)
    network, metrics = ValueNetwork(lm, rollouts["reward"][usable].mean().item()), []
    del lm
    model = parallel(network, args.shard)
    optimizer = torch.optim.AdamW(network.parameters(), lr=args.value_lr, weight_decay=0.0)
    batches = step_batches(rollouts, usable, args.batch_prompts, args.seed)
    for step in tqdm(range(1, args.value_steps + 1), desc="value network", disable=rank > 0):
        start, batch = time.time(), next(batches)
        n_tokens = rollouts["response_offsets"].diff()[batch].sum().item()
        shares = micro_batches(rollouts["offsets"].diff()[batch], args.micro_tokens, world)
        sums = Counter()
        for i, micro in enumerate(shares[rank]):
            model.require_backward_grad_sync = i == len(shares[rank]) - 1
            input_ids, mask = pad_responses(rollouts, batch[micro], device)
            reward = rollouts["reward"][batch[micro]].to(device)
            loss = ((reward[:, None] - model(input_ids)[0]) * mask).square().sum() / n_tokens
            (loss * world).backward()                               # DDP averages over ranks; we want the sum
            sums.update(loss=loss.detach().double())
        idle_turns(model, shares, rank)
        grad_norm, sums = clip_gradients(network, args.max_grad_norm), reduce_sums(sums)
        stop_if_not_finite(step, sums, grad_norm, rollouts, batch)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        metrics.append(json.dumps({"step": step, "loss": sums["loss"], "grad_norm": grad_norm,
                                   "tokens": n_tokens, "seconds": time.time() - start}) + "\n")
    values = per_token(rollouts, network, args.micro_tokens, "values")[0]
    if rank == 0:
        write_atomic(path.with_name("metrics.jsonl"), lambda p: p.write_text("".join(metrics)))
        write_atomic(path, lambda p: torch.save(values, p))
    wait_for_all()


def ppo_advantages(rollouts, usable, values):
    """GAE of every response token, whitened over the usable responses, once: flat [sum of their lengths]."""
    bounds, adv = rollouts["response_offsets"], torch.zeros_like(values)
    for indices in micro_batches(rollouts["offsets"].diff(), 2 ** 22)[0]:      # wide: GAE is a loop over time
        _, mask, v = pad_responses(rollouts, indices, "cpu", values)
        where = torch.cat([torch.arange(bounds[i], bounds[i + 1]) for i in indices])
        adv[where] = gae_advantages(v, rollouts["reward"][indices], mask)[mask.bool()]
    seen = adv[usable.repeat_interleave(bounds.diff())].double()
    return ((adv.double() - seen.mean()) / (seen.std(correction=0) + 1e-8)).float()


# ---- batches: whole prompts per step, micro-batches of like length per rank --------------------------------

def step_batches(rollouts, usable, batch_prompts, seed):
    """Endless batches of response indices. Batches count prompts; all responses of a prompt stay together.

    An epoch of 1,000 prompts at 32 is 32 steps of 31 or 32 (ours: equal parts, not a small last batch).
    """
    prompts = rollouts["prompt_index"][usable].unique()
    for epoch in itertools.count():
        generator = torch.Generator().manual_seed(seed * 1000 + epoch)
        shuffled = prompts[torch.randperm(len(prompts), generator=generator)]
        for part in shuffled.tensor_split(math.ceil(len(prompts) / batch_prompts)):
            yield torch.nonzero(usable & torch.isin(rollouts["prompt_index"], part))[:, 0]


def micro_batches(lengths, micro_tokens, world=1):
    """Split responses into micro-batches of at most `micro_tokens` padded tokens, and deal them to ranks.

    lengths [n] -> per rank a list of index tensors into it. Sorted by length, so that little is padding, and
    dealt in order of cost (FLOPs grow with L, attention's with L^2; ours: equal at 32k): with --shard ranks
    wait for each other in every layer, so each turn is of like cost. The first rank has the most turns.
    """
    if len(lengths) < world:
        raise InputError(f"{len(lengths)} responses do not reach {world} ranks: raise --batch-prompts")
    lengths, micros = lengths.tolist(), [[]]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if micros[-1] and lengths[micros[-1][0]] * (len(micros[-1]) + 1) > micro_tokens:
            micros.append([])
        micros[-1].append(i)
    while len(micros) % world and len(max(micros, key=len)) > 1:        # as many for every rank: none idles
        m = micros.index(max(micros, key=len))
        half = len(micros[m]) // 2
        micros[m:m + 1] = [micros[m][:half], micros[m][half:]]
    micros.sort(key=lambda micro: -sum(lengths[i] * (1 + lengths[i] / 32768) for i in micro))
    return [[torch.tensor(micro) for micro in micros[rank::world]] for rank in range(world)]


def shared_flags(arg):
    """The flags that mean the same in teacher.py and distill.py."""
    arg("--rollouts", type=Path, required=True, help="folder of rollout.py")
    arg("--out", type=Path, required=True, help="checkpoints step-*/ and final/, run.json, metrics.jsonl")
    arg("--old", help="pi_old, if it is no longer at the path that the rollouts name")
    arg("--drop-truncated", action="store_true", help="leave out responses that hit the token limit")
    arg("--kl-coef", type=float, default=0.0, help="weight of a KL to pi_old (Fig. 6, Table 5)")
    arg("--kl-kind", choices=["sampled", "exact"], default="sampled", help="exact: keeps pi_old in memory")
    # Optimization
    arg("--micro-tokens", type=int, default=32768, help="padded tokens per forward pass; memory")
    arg("--lr", type=float, default=1e-6, help="AdamW, constant (Sec. 4.1)")
    arg("--max-grad-norm", type=float, default=1.0)
    arg("--checkpointing", action=argparse.BooleanOptionalAction, default=True,
        help="gradient checkpointing: 1.3x the time")
    arg("--offload-activations", action="store_true", help="keep what checkpointing saves in host memory")
    arg("--shard", action="store_true", help="split weights, gradients, Adam state over ranks (FSDP)")
    arg("--logp-temperature", type=float, help="temperature of the log-probs (default: the rollouts')")
    arg("--seed", type=int, default=0, help="order of the prompts")
    arg("--save-every", type=int, default=10, help="steps between checkpoints")
    arg("--trust-remote-code", action="store_true", help="run code that comes with the checkpoint")


def build_parser():
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arg = p.add_argument
    arg("--model", required=True, help="where training starts: pi_old, or another one of its tokenizer")
    # Loss
    arg("--loss", choices=["ce", "sapo", "grpo", "ppo", "mse", "sft"], required=True, help="Sec. 4.1")
    arg("--beta", type=float, default=0.001, help="CE: beta of R(y) (Sec. 4.1: 0.001 to 0.05)")
    arg("--reduce", choices=["sum", "mean"], default="sum", help="CE: over the tokens (Sec. 4.1)")
    arg("--ref", choices=["old", "start"], default="old",
        help="CE: reference of R(y); start for an unlearned --model (Table 8)")
    arg("--negative-weight", type=float, default=1.0, help="MSE: w of Table 9")
    arg("--value-steps", type=int, default=50, help="PPO: steps of the value network (VAPO)")
    arg("--value-lr", type=float, default=1e-5, help="PPO: its learning rate (the paper gives none)")
    # Length of the run
    arg("--steps", type=int, help="optimizer steps (default: 2 epochs)")
    arg("--epochs", type=float, help="passes over the prompts instead of --steps")
    arg("--batch-prompts", type=int, default=32, help="prompts per step, all ranks (Sec. 4.1)")
    arg("--optimizer-from", type=Path, help="earlier run whose Adam state is carried over (on-policy)")
    shared_flags(arg)
    return p


def parse_args(argv=None):
    args = build_parser().parse_args(argv)
    if args.steps and args.epochs:
        raise InputError("give --steps or --epochs, not both")
    check_positive(args, "steps", "epochs", "batch_prompts", "micro_tokens", "lr", "save_every",
                   "beta", "max_grad_norm", "value_steps", "value_lr", "logp_temperature")
    if not (0 <= args.kl_coef < math.inf and 0 <= args.negative_weight < math.inf):
        raise InputError("--kl-coef and --negative-weight must not be negative")
    return args


def main():
    args = parse_args()
    # ---- data and checks: before any model is loaded ----
    rank, world, device = setup_ddp(args.shard)
    rollouts, tokenizer, old, usable = open_rollouts(args, args.model)
    right = rollouts["reward"] > 0
    if not right[usable].any() or right[usable].all() and args.loss != "sft":
        raise InputError(f"{args.rollouts}: all responses are wrong, or all are right; sample other prompts")
    usable &= right | (args.loss != "sft")                              # SFT sees the right ones only
    run, save, metrics = start_run(args, build_parser(), args.model, rollouts)
    if not run:
        return print_once(f"{args.out}: already finished")

    # ---- reference log-probs, each scored once, and then the one model that trains ----
    old_logp = score(old, rollouts, **score_options(args))
    ref_logp = score(args.model, rollouts, **score_options(args)) if args.ref == "start" else old_logp
    one_writer(args.out)
    if rank == 0:
        write_json(args.out / "run.json", run)
        note_sampler_gap(rollouts, old_logp)
    adv = torch.zeros_like(rollouts["reward"])                          # SAPO and GRPO: one per response
    adv[usable] = group_advantages(rollouts["reward"][usable], rollouts["prompt_index"][usable])
    token_adv, value_metrics = [], {}                                   # PPO: an advantage per token
    if args.loss == "ppo":
        values, value_metrics = train_values(args, rollouts, usable)
        token_adv = [ppo_advantages(rollouts, usable, values)]
    exact = args.kl_coef > 0 and args.kl_kind == "exact"              # the one case with two models in memory
    lm, policy, model = build(args, save or args.model, old if exact else None, rollouts)
    optimizer = torch.optim.AdamW(lm.parameters(), lr=args.lr, weight_decay=0.0)
    load_moments(save or (args.optimizer_from and args.optimizer_from / "final"), lm, optimizer)

    # ---- training loop ----
    done, n_prompts = len(metrics), len(rollouts["prompt_index"][usable].unique())
    steps = args.steps or max(1, round((args.epochs or 2) * math.ceil(n_prompts / args.batch_prompts)))
    batches = itertools.islice(step_batches(rollouts, usable, args.batch_prompts, args.seed), done, None)
    lengths = rollouts["offsets"].diff()                                # of prompt and response
    bar = tqdm(total=steps, initial=done, desc="teacher", disable=rank > 0)
    caught = defer_signals()                                            # a signal waits for the end of a step
    for step in range(done + 1, steps + 1):
        start, batch = time.time(), next(batches)
        n_tokens = rollouts["response_offsets"].diff()[batch].sum().item()          # of all ranks
        shares, sums = micro_batches(lengths[batch], args.micro_tokens, world), Counter()
        n_responses, implicit = len(batch), torch.zeros(len(batch), device=device)  # R(y) of each response
        for i, micro in enumerate(shares[rank]):
            model.require_backward_grad_sync = i == len(shares[rank]) - 1       # DDP: one all-reduce per step
            idx = batch[micro]
            input_ids, mask, old_lp, ref_lp, *ppo = pad_responses(
                rollouts, idx, device, old_logp, ref_logp, *token_adv)
            reward, a = rollouts["reward"][idx].to(device), ppo[0] if ppo else adv[idx].to(device)
            logp, entropy, exact_kl = model(input_ids, mask, exact)
            if args.loss == "ce":
                loss = ce_loss(logp, ref_lp, mask, reward, args.beta, args.reduce) / n_responses       # Eq. 2
            elif args.loss == "mse":
                loss = mse_loss(logp, mask, reward, args.negative_weight) / n_tokens                  # Eq. 10
            elif args.loss == "sapo":
                loss = sapo_loss(logp, old_lp, mask, a) / n_responses
            elif args.loss in ("grpo", "ppo"):
                loss = grpo_loss(logp, old_lp, mask, a) / n_tokens                                     # Eq. 5
            elif args.loss == "sft":
                loss = sft_loss(logp, mask, reward) / n_tokens
            else:
                raise NotImplementedError(f"--loss {args.loss} has no line here")
            if args.kl_coef:
                d = log_ratio(logp, old_lp, mask)
                kl = exact_kl if exact else kl_term(d, d.exp())
                loss = loss + args.kl_coef * (kl * mask).sum() / n_tokens
            (loss * world).backward()                               # DDP averages over ranks; we want the sum
            pushes = a if args.loss == "ppo" else 2 * reward - 1
            sums.update(token_sums(loss, logp, entropy, old_lp, mask, reward, pushes, CLIP_LOW, CLIP_HIGH))
            implicit[micro.to(device)] = implicit_reward(logp.detach(), ref_lp, mask, args.beta, args.reduce)
        idle_turns(model, shares, rank, exact)
        grad_norm, sums = clip_gradients(lm, args.max_grad_norm), reduce_sums(sums)
        stop_if_not_finite(step, sums, grad_norm, rollouts, batch)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        more = ce_metrics(implicit, rollouts, batch) if args.loss == "ce" else value_metrics
        end_step(args, step, steps, start, sums, grad_norm, n_tokens, more, metrics, bar, caught,
                 lm, tokenizer, optimizer)
    save_step(args.out, "final", lm, tokenizer, optimizer, metrics, args.save_every)


# ---- machinery: nothing below is about the method ----------------------------------------------------------

# data, checkpoints and scores

def load_rollouts(folder):
    """The responses of a rollouts folder, read and fingerprinted once a run. Also used by evaluate.py.

    What is per response is joined; token ids stay in the memory-mapped shards, whose pages ranks share.
    """
    shards = load_shards(folder)
    sizes = torch.tensor([0, *(len(s["reward"]) for s in shards)])
    rollouts = join_shards(shards) | {"folder": Path(folder), "shards": shards, "first": sizes.cumsum(0)[:-1]}
    digest = hashlib.sha256()
    for part in [s["input_ids"] for s in shards]:
        digest.update(part.numpy())                         # its buffer, not a copy
    for key in ("offsets", "prompt_len", "prompt_index", "reward"):
        digest.update(rollouts[key].numpy())
    return rollouts | {"fingerprint": digest.hexdigest()}


def response_ids(rollouts, index):
    """Token ids of a response with its prompt: a view of its shard. Also used by tests/paper."""
    number = torch.searchsorted(rollouts["first"], index, right=True) - 1
    shard, within = rollouts["shards"][number], index - rollouts["first"][number]
    return shard["input_ids"][shard["offsets"][within]:shard["offsets"][within + 1]]


def pad_responses(rollouts, indices, device, *token_values):
    """Micro-batch: input_ids (B, T), mask (B, T-1), then each flat per-response-token tensor as (B, T-1)."""
    lengths = rollouts["offsets"][indices + 1] - rollouts["offsets"][indices]
    ids = [response_ids(rollouts, i).long() for i in indices]
    input_ids = nn.utils.rnn.pad_sequence(ids, batch_first=True)       # (B, T); the pad id is never looked at
    position = torch.arange(input_ids.shape[1] - 1)
    mask = (position >= rollouts["prompt_len"][indices, None] - 1) & (position < lengths[:, None] - 1)
    bounds = rollouts["response_offsets"]
    spans = [slice(a, b) for a, b in zip(bounds[indices], bounds[indices + 1])]
    padded = [torch.zeros(mask.shape).masked_scatter(mask, torch.cat([values[s] for s in spans]).float())
              for values in token_values]
    return [x.to(device) for x in (input_ids, mask.float(), *padded)]


def load_policy(path, device="cpu", checkpointing=False, trust_remote_code=False, offload=False):
    """A causal LM in fp32: bf16 rounds most updates of lr 1e-6 away. offload: into the host's memory."""
    gc.collect()                                            # engines and FSDP's modules refer to themselves
    lm = load_lm(path, torch.float32, trust_remote_code)
    if checkpointing:
        kept = {"offload": True} if offload and torch.cuda.is_available() else {}
        lm.gradient_checkpointing_enable({"use_reentrant": False}, **kept)
    return lm.to(device).train()                         # train(): else no checkpointing; there is no dropout


def per_token(rollouts, model, micro_tokens, desc):
    """What model(input_ids, mask) gives per token: (rows, sum of response lengths). Ranks share it."""
    rank, world, device = setup_ddp()
    bounds, flat = rollouts["response_offsets"], None
    shares = micro_batches(rollouts["offsets"].diff(), micro_tokens, world)
    with torch.no_grad():
        for indices in tqdm(shares[rank], desc=desc, disable=rank > 0, leave=False):
            input_ids, mask = pad_responses(rollouts, indices, device)
            rows = [x[mask.bool()] for x in model(input_ids, mask) if x is not None]
            flat = torch.zeros(len(rows), int(bounds[-1]), device=device) if flat is None else flat
            where = torch.cat([torch.arange(bounds[i], bounds[i + 1]) for i in indices]).to(device)
            flat[:, where] = torch.stack(rows)
        idle_turns(model, shares, rank)
    if world > 1:
        dist.all_reduce(flat)                               # each token was computed by one rank
    return flat.cpu()


def score(checkpoint, rollouts, temperature=None, micro_tokens=32768, with_entropy=False, shard=False,
          trust_remote_code=False):
    """log pi(a|s) of every response token, flat fp32; with_entropy: (logp, entropy). Also in evaluate.py.

    Computed once and kept in ROLLOUTS/scores under the fingerprints of checkpoint and rollouts and the
    temperature (default: the one sampled with). rollouts: their folder, or what load_rollouts read.
    """
    rollouts = rollouts if isinstance(rollouts, dict) else load_rollouts(rollouts)
    rank, _, device = setup_ddp()
    temperature = rollouts["meta"]["temperature"] if temperature is None else temperature
    if not 0 < temperature < math.inf:
        raise InputError(f"{rollouts['folder']} was sampled greedily, no log-probs: give --logp-temperature")
    name = f"{checkpoint_fingerprint(checkpoint)[:16]}-{rollouts['fingerprint'][:16]}-T{temperature:g}.pt"
    path = rollouts["folder"] / "scores" / name
    missing = torch.tensor(int(not path.exists()), device=device)
    if dist.is_initialized():
        dist.broadcast(missing, 0)                       # another job may write the file while the ranks look
    if missing:
        check_tokenizer(checkpoint, rollouts, trust_remote_code)
        lm = load_policy(checkpoint, "cpu" if shard else device, trust_remote_code=trust_remote_code)
        policy = Policy(lm.eval(), temperature)
        if shard:
            parallel(policy, shard)
        logp, entropy = per_token(rollouts, policy, micro_tokens, "scoring")
        del lm, policy
        gc.collect()                                        # FSDP's modules refer to each other
        torch.cuda.empty_cache()                            # for an engine in another process, too
        if rank == 0:
            scores = {"logp": logp.clone(), "entropy": entropy.clone()}             # not views of one tensor
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path.parent / ".writing", "a") as turn:     # other runs may score the same just now
                fcntl.lockf(turn, fcntl.LOCK_EX)
                write_atomic(path, lambda p: torch.save(scores, p))
        wait_for_all()
    kept = read_tensors(path, "score file", "delete it, it will be computed again")
    return (kept["logp"], kept["entropy"]) if with_entropy else kept["logp"]


def score_options(args):
    return dict(temperature=args.logp_temperature, micro_tokens=args.micro_tokens, shard=args.shard,
                trust_remote_code=args.trust_remote_code)


def note_sampler_gap(rollouts, old_logp):
    """Print mean |log-prob that the sampler reported - ours| in nats per token."""
    total = count = start = 0
    for shard in rollouts["shards"]:                # one at a time: together they have the size of all tokens
        gap = (shard["sampler_logp"] - old_logp[start:start + len(shard["sampler_logp"])]).abs().double()
        total, count = total + gap.nansum().item(), count + (~gap.isnan()).sum().item()
        start += len(gap)
    if count:
        print(f"sampler against pi_old: mean |difference of log-probs| {total / count:.2e} nats per token")


# processes: one per GPU

def setup_ddp(shard=False):
    """(rank, world, device); one process without torchrun. Also used by distill.py and evaluate.py."""
    rank, world, local_rank = ranks()
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if shard and world == 1:
        raise InputError("--shard splits a model over processes: give torchrun --nproc-per-node 2 or more")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=24))
    return rank, world, device


def wait_for_all():
    if dist.is_initialized():
        dist.barrier()


def print_once(text):
    if ranks()[0] == 0:
        print(text)


def build(args, start, old, rollouts):
    """(lm, policy, model): the model that trains, bare, as Policy with `old` beside it, and on all ranks."""
    device = "cpu" if args.shard else setup_ddp()[2]        # sharding puts each rank's part on its GPU
    lm = load_policy(start, device, args.checkpointing, args.trust_remote_code, args.offload_activations)
    old_lm = load_policy(old, device, trust_remote_code=args.trust_remote_code) if old else None
    policy = Policy(lm, args.logp_temperature or rollouts["meta"]["temperature"], old_lm=old_lm)
    return lm, policy, parallel(policy, args.shard)


def parallel(module, shard):
    """The module in DDP, or with --shard in FSDP: a rank keeps its part and gathers a layer to run it.

    FSDP averages gradients over ranks as DDP does, but after every micro-batch: kept whole until the end of
    the step they would need the memory that is to be saved.
    """
    if not shard:
        return DistributedDataParallel(module, gradient_as_bucket_view=True) if ranks()[1] > 1 else module
    for part in list(module.modules()):
        if isinstance(getattr(part, "layers", None), nn.ModuleList):
            for layer in part.layers:
                fully_shard(layer)
    return fully_shard(module, reshard_after_forward=True)  # embedding, last norm and head


def idle_turns(model, shares, rank, *options):
    """FSDP: a rank without a micro-batch in the others' last turn still hands out its part of the weights."""
    device, turns = setup_ddp()[2], len(shares[0]) - len(shares[rank])
    for _ in range(turns * isinstance(model, FSDPModule)):
        ids, mask = torch.zeros(1, 2, dtype=torch.long, device=device), torch.zeros(1, 1, device=device)
        nothing = model(ids, mask, *options)[0].sum() * 0
        if nothing.requires_grad:
            nothing.backward()


def clip_gradients(model, largest):
    """Clip the norm over all parameters and ranks (after the sync) and return it. Also used by distill.py."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), largest)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def memory_advice(args):
    """What to change when memory was not enough, the cheapest first. Also used by distill.py."""
    return (f"try --micro-tokens {args.micro_tokens // 2}; a response is never split: if the longest is too "
            f"long, --checkpointing --offload-activations --shard")


# starting, saving and resuming

def open_rollouts(args, *checkpoints):
    """(rollouts, tokenizer of the first checkpoint, path of pi_old, which responses are trained on [n])."""
    rollouts = load_rollouts(args.rollouts)
    tokenizer, *_ = [check_tokenizer(path, rollouts, args.trust_remote_code) for path in checkpoints]
    usable = ~(rollouts["truncated"] & args.drop_truncated)
    if not usable.any():
        raise InputError(f"{args.rollouts}: every response is truncated; leave out --drop-truncated")
    return rollouts, tokenizer, find_old(rollouts, args.old), usable


def check_tokenizer(model, rollouts, trust_remote_code=False):
    """Tokenizer of a checkpoint; InputError if the rollouts' token ids mean something else to it."""
    tokenizer = load_tokenizer(model, trust_remote_code)
    if tokenizer_fingerprint(tokenizer) != rollouts["meta"].get("tokenizer_fingerprint"):
        raise InputError(f"{model} has another tokenizer than the rollouts: use a checkpoint of their family")
    with input_errors(f"{model} has no usable config.json"):
        config = AutoConfig.from_pretrained(resolve_checkpoint(model), trust_remote_code=trust_remote_code)
    if max(s["input_ids"].max() for s in rollouts["shards"]) >= config.get_text_config().vocab_size:
        raise InputError(f"{model} has no weights for all token ids of the rollouts: use its own tokenizer's")
    return tokenizer


def find_old(rollouts, old=None):
    """Path of pi_old, which wrote the rollouts: --old, or the one in their meta; known by its content."""
    path = old or rollouts["meta"]["model"]
    with contextlib.suppress(InputError):
        if checkpoint_fingerprint(path) == rollouts["meta"]["model_fingerprint"]:
            return path
    raise InputError(f"{path} is not the policy that wrote the rollouts, or is gone: give it with --old")


def start_run(args, parser, parent, rollouts):
    """(what OUT/run.json is to hold, folder and metrics of the newest save); (None, ...) if it is finished.

    InputError if OUT holds another run. The caller writes run.json, once all input is known to be good.
    """
    out = args.out
    git = subprocess.run(["git", "rev-parse", "--verify", "-q", "HEAD"], cwd=Path(__file__).parent,
                         capture_output=True, text=True).stdout.strip()
    run = {"script": Path(sys.argv[0]).name, "git_commit": git or None,
           "args": json.loads(json.dumps(vars(args), default=str)),     # as they will be read back
           "versions": {"python": sys.version.split()[0], "torch": torch.__version__,
                        "transformers": transformers.__version__},
           "parent": checkpoint_fingerprint(parent), "rollouts_fingerprint": rollouts["fingerprint"]}
    if (out / "run.json").exists():
        check_same_run(out, run, parser)
        if (out / "final").exists():
            if ranks()[0] == 0:
                drop_states(out, "final", args.save_every)              # a kill may have come before this
            return None, None, []
        one_writer(out)
    elif any(p.suffix != ".partial" and not p.name.startswith(".writer-") for p in out.glob("*")):
        raise InputError(f"{out} is not empty and holds no run.json: use another --out")
    wait_for_all()                                          # all have looked before the first writes
    _, save = newest_save(out)
    return run, save, read_state(save)[1] if save else []


def check_same_run(out, run, parser):
    """InputError if OUT/run.json was written by another script, with other flags or from other content."""
    hint, free = "use another --out, or delete it", "micro_tokens shard checkpointing offload_activations"
    kept = read_json(out / "run.json", hint)
    for key in ("script", "parent", "rollouts_fingerprint"):
        if kept.get(key) != run[key]:
            raise InputError(f"{out} holds a run with another {key.replace('_', ' ')}: {hint}")
    for key, now in run["args"].items():
        then = kept["args"].get(key, parser.get_default(key))           # a flag that it lacks had its default
        if then != now and key not in free.split():                     # free: the result stays the same
            raise InputError(f"{out} holds a run with --{key.replace('_', '-')} {then}, now {now}: {hint}")


def newest_save(out):
    """(step, folder) of the newest checkpoint with optimizer state, or (0, None)."""
    saves = [p.parent for p in out.glob("step-*[0-9]/optimizer.pt")]
    return max(((int(p.name.split("-")[1]), p) for p in saves), default=(0, None))


def read_state(save):
    """(Adam's state, metrics) of a checkpoint folder of ours; InputError if it is damaged or another's."""
    hint = "delete that folder; an earlier one, or the start, takes its place"
    with input_errors(f"{save / 'optimizer.pt'} is not the optimizer state of a finished run", hint):
        state = torch.load(save / "optimizer.pt", weights_only=True, mmap=True)
        return state["optimizer"], state["metrics"]


WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)        # as one rank saves it, sharded or not


def load_moments(save, lm, optimizer):
    """Adam's state of a save, whichever way it was spread over ranks, under this run's learning rate."""
    moments, lr = read_state(save)[0] if save else {}, optimizer.param_groups[0]["lr"]
    if moments:
        with input_errors(f"{save} holds the optimizer state of another model"):
            set_optimizer_state_dict(lm, optimizer, moments, options=WHOLE)
        optimizer.param_groups[0]["lr"] = lr


def save_step(out, name, lm, tokenizer, optimizer, metrics, save_every):
    """Save OUT/NAME, a Hugging Face folder in fp32 with Adam's state, whole or absent. All ranks call it."""
    once = {name for name, _ in (*lm.named_parameters(), *lm.named_buffers())}      # a tied head: one name
    weights = {name: x for name, x in get_model_state_dict(lm, options=WHOLE).items() if name in once}
    moments = get_optimizer_state_dict(lm, optimizer, options=WHOLE) if optimizer.state else {}

    def write(partial):
        lm.save_pretrained(partial, state_dict=weights)
        tokenizer.save_pretrained(partial)
        kept = metrics if name != "final" else []           # nobody resumes there; seconds would differ
        torch.save({"optimizer": moments, "metrics": kept}, partial / "optimizer.pt")
    if ranks()[0] == 0:
        if name == "final":                                 # what a killed run wrote beyond it goes
            write_atomic(out / "metrics.jsonl", lambda p: p.write_text("".join(metrics)))
        remove(out / name)                                  # its state is gone: the run had to start over
        write_atomic(out / name, write)
        drop_states(out, name, save_every)
        tqdm.write(f"saved {out / name}")
    wait_for_all()


def drop_states(out, name, save_every):
    """Remove the optimizer states that the save `name` has made superfluous: weights stay."""
    for older in out.glob("step-*[0-9]"):
        if older.name != name:
            (older / "optimizer.pt").unlink(missing_ok=True)
            if int(older.name.split("-")[1]) % save_every:  # was saved between two others because of a signal
                shutil.rmtree(older)


def defer_signals():
    """A list that gets SIGTERM and Ctrl-C from now on, instead of an exception within a step."""
    caught = []
    for number in STOP_SIGNALS:
        signal.signal(number, lambda n, _: caught.append(n))
    return caught


def end_step(args, step, steps, start, sums, grad_norm, n_tokens, more, metrics, bar, caught, *to_save):
    """Log a step, save where it is due, and leave if a signal came; to_save: lm, tokenizer, optimizer."""
    cuda, seconds = torch.cuda.is_available(), time.time() - start
    m = {"step": step, "loss": sums["loss"], "grad_norm": grad_norm, "lr": args.lr, "tokens": n_tokens,
         "tok_per_s": n_tokens / seconds, "seconds": seconds, **step_metrics(sums), **more,
         "peak_mem_gib": torch.cuda.max_memory_allocated() / 2 ** 30 if cuda else None}
    metrics.append(json.dumps(m) + "\n")
    flag = torch.tensor(caught[0] if caught else 0, device="cuda" if cuda else "cpu")
    if dist.is_initialized():
        dist.all_reduce(flag, dist.ReduceOp.MAX)            # one rank may have been sent the signal alone
    stopped = flag.item() and step < steps
    if ranks()[0] == 0:
        write_atomic(args.out / "metrics.jsonl", lambda p: p.write_text("".join(metrics)))
        bar.update()
        exact = f"kl(new,old) {m['kl_new_old']:.4f} | " if m.get("kl_new_old") is not None else ""
        bar.write(f"step {step:03d}/{steps:03d} | loss {m['loss']:+.4f} | kl(old,new) {m['kl_old_new']:.4f}"
                  f" | {exact}entropy {m['entropy']:.3f} | clip {m['clip_frac']:.3f} | grad {grad_norm:.2f}"
                  f" | {m['tok_per_s']:,.0f} tok/s")
    if step % args.save_every == 0 or stopped:
        save_step(args.out, f"step-{step:04d}", *to_save, metrics, args.save_every)
    if stopped:
        raise KeyboardInterrupt(f"{signal.Signals(flag.item()).name} after step {step}, saved in {args.out}")


# metrics

def reduce_sums(sums):
    """The sums of all ranks as plain numbers, by name."""
    values = torch.stack(list(sums.values()))
    if dist.is_initialized():
        dist.all_reduce(values)
    return dict(zip(sums, values.tolist()))


@torch.no_grad()
def token_sums(loss, logp, entropy, old_logp, mask, reward, pushes, clip_low, clip_high):
    """Sums over response tokens behind the metrics of a step, fp64, by name. Also used by distill.py.

    pushes (B,) or (B, T-1): which way the loss pushes; clipped is a token whose ratio is past the bound.
    """
    d = log_ratio(logp, old_logp, mask)
    ratio, prob = d.exp(), logp.masked_fill(mask == 0, 0.0).clamp(max=20).exp()
    pushes, reward = pushes[:, None] if pushes.dim() == 1 else pushes, reward[:, None]
    clipped = ((pushes > 0) & (ratio > 1 + clip_high)) | ((pushes < 0) & (ratio < 1 - clip_low))
    positive, residual = mask * (reward > 0), reward - prob
    values = {"kl_old_new": ratio - 1 - d, "entropy": entropy, "clip_frac": clipped, "ratio_mean": ratio,
              "prob_pos": prob * positive, "n_pos": positive, "prob_neg": prob * (mask - positive),
              "n_neg": mask - positive, "residual": residual, "residual2": residual.square(),
              "reward": reward.expand_as(mask)}
    return {"loss": loss.double(), **{name: (x * mask).double().sum() for name, x in values.items()}}


def step_metrics(sums):
    """Means per token, named as in metrics.jsonl. kl_old_new: k3 on the rollouts, of KL(pi_old || pi)."""
    n = sums["n_pos"] + sums["n_neg"]
    means = {name: sums[name] / n for name in ("kl_old_new", "entropy", "clip_frac", "ratio_mean")}
    var_reward = sums["reward"] / n - (sums["reward"] / n) ** 2         # of rewards of 0 or 1
    var_residual = sums["residual2"] / n - (sums["residual"] / n) ** 2
    return {**means, "prob_pos": sums["prob_pos"] / sums["n_pos"] if sums["n_pos"] else None,
            "prob_neg": sums["prob_neg"] / sums["n_neg"] if sums["n_neg"] else None,
            "explained_variance": 1 - var_residual / var_reward if var_reward > 0 else None}


def ce_metrics(implicit, rollouts, batch):
    """Share of responses whose R(y) has the right sign, and of a prompt's (right, wrong) pairs in order."""
    if dist.is_initialized():
        dist.all_reduce(implicit)
    implicit, reward, prompt = implicit.cpu(), rollouts["reward"][batch], rollouts["prompt_index"][batch]
    pairs = (prompt[:, None] == prompt) & (reward[:, None] > reward)                # (B, B)
    ordered = (pairs & (implicit[:, None] > implicit)).sum().item()
    return {"reward_acc": ((implicit > 0) == (reward > 0)).float().mean().item(),
            "reward_pair_acc": ordered / pairs.sum().item() if pairs.any() else None}


def stop_if_not_finite(step, sums, grad_norm, rollouts, batch):
    """A NaN or inf would spread to every weight with the next update: stop before it."""
    if not all(map(math.isfinite, (grad_norm, *sums.values()))):
        prompts = rollouts["prompt_index"][batch].unique().tolist()
        raise RunError(f"step {step}: loss {sums['loss']} or gradient norm {grad_norm} or a metric is not "
                       f"finite; prompts of the batch: {prompts}; the last checkpoint is intact")


if __name__ == "__main__":
    run_main(main, lambda: memory_advice(parse_args()))
