"""
Stage 1: train a teacher on one fixed batch of rollouts, for dozens of weakly constrained off-policy steps (Sec. 3.1, 3.4).

    CE    R(y) = beta * sum_t log pi/pi_old,  BCE with logits of R(y) against the reward            Eq. 2, 3
    MSE   (pi(a|s) - R)^2 per token: unlearns first, then recovers, and ends degenerate            Eq. 10
    SAPO, GRPO, PPO, SFT: the losses they are compared with                                        Sec. 4.1

The teacher extracts the signal of the batch and drifts; it is not the result. distill.py takes what it learnt back
into pi_old, inside a trust region.

1 GPU, or CPU:  python teacher.py --model M --rollouts runs/rollouts --out runs/teacher --loss ce --beta 0.001
8 GPUs:         torchrun --standalone --nproc-per-node 8 teacher.py ...

Words used in all files: pi_old wrote the rollouts and is where training starts; pi_e is the trained teacher; pi_un an
early, "unlearned" checkpoint of an MSE run. B responses, T tokens, V vocabulary, D hidden size, N tokens of a flat list.
`logp[:, t]` is the log-probability of `input_ids[:, t + 1]`. R is the reward, 0 or 1. Read next: distill.py.
"""
import argparse
import hashlib
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import transformers
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict, get_optimizer_state_dict, set_model_state_dict,
                                                     set_optimizer_state_dict)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from rollout import (InputError, Parser, RunError, check_out, check_weights, checkpoint_fingerprint, defer_signals, is_flat, join_shards, load_lm,
                     load_shards, load_tokenizer, one_line, one_writer, read_json, read_tensors, remove, run_main, tokenizer_fingerprint, write_atomic, write_json)


# ---- log-probs: one function for every role ----------------------------------------------------------------------------

# columns of the head that are in memory at once: a GPU wants large tiles, a CPU tiles that fit its cache
VOCAB_TILE = 8192 if torch.cuda.is_available() else 1024


class HeadLogps(torch.autograd.Function):
    """log p(target) and entropy of softmax(h W^T / temperature), in tiles of tokens x vocabulary.

    At 32k tokens and V = 152k the logits are 20 GB in fp32. Here they exist one tile at a time: forward keeps only the
    log-normaliser and the entropy of each token, backward computes the tiles again. With p = softmax(z), z the logits
    divided by the temperature,

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
                z = tile_logits(hidden[i], w, temperature, wide)        # (C, tile)
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
        at_target, at_all = grad_logp / ctx.temperature, -(grad_logp + grad_entropy * entropy) / ctx.temperature
        at_log_p = -grad_entropy / ctx.temperature
        for v in range(0, len(weight), VOCAB_TILE):         # vocabulary outside: each slice of dW is summed once, in fp32
            w = weight[v:v + VOCAB_TILE].to(hidden.dtype)
            grad_w = torch.zeros(w.shape, dtype=ctx.wide, device=w.device)
            for row in range(0, len(hidden), ctx.chunk):
                i = slice(row, row + ctx.chunk)
                log_p = tile_logits(hidden[i], w, ctx.temperature, ctx.wide).sub_(log_z[i, None])
                p = log_p.exp()
                grad_z = log_p.mul_(at_log_p[i, None]).add_(at_all[i, None]).mul_(p)    # both formulas, sorted by powers of log p
                here = targets[i] - v
                inside = (here >= 0) & (here < len(w))
                grad_z[inside.nonzero()[:, 0], here[inside]] += at_target[i][inside]
                grad_z = grad_z.to(hidden.dtype)
                grad_hidden[i] += product(grad_z, w, ctx.wide)
                grad_w += product(grad_z.T, hidden[i], ctx.wide)
            grad_weight[v:v + VOCAB_TILE] = grad_w
        return grad_hidden.to(hidden.dtype), grad_weight, None, None, None


def tile_logits(hidden, weight, temperature, wide):
    """(C, D) x (tile, D) -> (C, tile), the logits divided by the temperature, in `wide`."""
    z = product(hidden, weight.T, wide).to(wide)
    return z if temperature == 1 else z.div_(temperature)


def product(a, b, wide):
    """a @ b. CUDA gives its fp32 sums out as `wide`; elsewhere they are rounded to the operands' type."""
    return torch.mm(a, b, out_dtype=wide) if a.is_cuda and a.dtype != wide else torch.mm(a, b)


def logps_from_hidden(hidden, weight, targets, temperature=1.0, chunk=1024, with_entropy=True):
    """Log-probs of `targets` [N] (nats) and entropies under the head `weight` [V, D] at hidden states [N, D].

    Returns (logp [N], entropy [N] or None) in fp32 (fp64 for fp64 input), both differentiable in hidden and weight.
    `chunk` is the number of tokens per tile and changes memory, not values.
    """
    logp, entropy = HeadLogps.apply(hidden, weight, targets.long(), temperature, chunk)
    return logp, entropy if with_entropy else None


def exact_kl_from_hidden(hidden, weight, old_hidden, old_weight, temperature=1.0):
    """KL(pi || pi_old) in nats over the whole vocabulary at each of N states: [N], differentiable in hidden and weight.

    ours: the estimate from sampled tokens misses mass that leaks to tokens that nobody sampled; this sum sees it.
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
    """What the forward computes in. Parameters, gradients, logits and everything after them are fp32 everywhere."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def hidden_states(model, input_ids):
    """Last hidden states (B, T-1, D) that predict tokens 1 to T-1. Right padding needs no mask: attention is causal."""
    device, dtype = input_ids.device, forward_dtype(input_ids.device)
    # no cache: it would hold a bf16 copy of every weight until the end, and each is used once
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16, cache_enabled=False):
        embedded = model.base_model.get_input_embeddings()(input_ids)
        if dtype == torch.bfloat16:
            embedded = embedded.bfloat16()                  # and with it what the layers add to, which is what checkpointing keeps
        hidden = model.base_model(inputs_embeds=embedded, use_cache=False).last_hidden_state[:, :-1]
    return hidden.bfloat16() if dtype == torch.bfloat16 else hidden


def token_logps(model, input_ids, temperature=1.0, chunk=1024, mask=None):
    """log pi(a_t | s_t) and the entropy of pi(. | s_t) in nats, for every token of input_ids (B, T) but the first.

    Returns two (B, T-1) tensors in fp32; with a mask (B, T-1) only its positions are computed, the others are 0.
    The distribution is the one that was sampled from: logits / temperature, not truncated by top-p.
    """
    keep = torch.ones_like(input_ids[:, 1:], dtype=torch.bool) if mask is None else mask.bool()
    hidden = hidden_states(model, input_ids)[keep]                                  # (N, D)
    flat = logps_from_hidden(hidden, model.get_output_embeddings().weight, input_ids[:, 1:][keep], temperature, chunk)
    return tuple(torch.zeros(keep.shape, dtype=x.dtype, device=x.device).masked_scatter(keep, x) for x in flat)


class Policy(nn.Module):
    """A causal LM whose forward returns log-probs: DDP synchronises the gradients only of what runs inside forward.

    old_lm, if given, is a frozen pi_old for the exact KL. Also used by distill.py.
    """

    def __init__(self, lm, temperature=1.0, chunk=1024, old_lm=None):
        super().__init__()
        self.lm, self.temperature, self.chunk = lm, temperature, chunk
        self.old_lm = old_lm.requires_grad_(False).eval() if old_lm is not None else None

    def forward(self, input_ids, mask, exact_kl=False):
        """(logp, entropy, exact KL to pi_old if asked for, else None), each (B, T-1) and 0 outside the mask."""
        if not exact_kl:
            return *token_logps(self.lm, input_ids, self.temperature, self.chunk, mask), None
        keep = mask.bool()
        hidden, weight = hidden_states(self.lm, input_ids)[keep], self.lm.get_output_embeddings().weight
        with torch.no_grad():
            old_hidden = hidden_states(self.old_lm, input_ids)[keep]
            old_weight = self.old_lm.get_output_embeddings().weight
        flat = (*logps_from_hidden(hidden, weight, input_ids[:, 1:][keep], self.temperature, self.chunk),
                exact_kl_from_hidden(hidden, weight, old_hidden, old_weight, self.temperature))
        return tuple(torch.zeros(keep.shape, dtype=x.dtype, device=x.device).masked_scatter(keep, x) for x in flat)


# ---- a model that does not fit one GPU ---------------------------------------------------------------------------------
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)        # states as rank 0 saves them, sharded or not


def shard_over_ranks(model):
    """Each rank keeps its part of parameters, gradients and Adam state, all in fp32, and gathers a layer when it runs (FSDP).

    Gradients are averaged over ranks as in DDP, but after every micro-batch: kept whole until the end of the step they
    would need the memory that is to be saved. Also used by distill.py.
    """
    for part in list(model.modules()):
        if isinstance(getattr(part, "layers", None), nn.ModuleList):
            for layer in part.layers:
                fully_shard(layer)
    return fully_shard(model, reshard_after_forward=True)   # embedding, last norm and head: gathered for forward and backward


def idle_inputs(device):
    """input_ids and mask of a micro-batch without a response: a rank that is done early still hands out its part of the weights."""
    return torch.zeros(1, 2, dtype=torch.long, device=device), torch.zeros(1, 1, device=device)


def local(x):
    """This rank's part of a tensor; all of it unless --shard. Also used by distill.py."""
    return x.to_local() if isinstance(x, DTensor) else x


def clip_gradients(model, largest):
    """Clip the norm over all parameters and ranks (after the sync) and return it. Also used by distill.py."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), largest)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


# ---- losses: each returns a SUM, over responses (ce, sapo) or response tokens (the others); the loop divides -----------
# logp, old_logp, mask (B, T-1) float; reward (B,); adv (B,) or (B, T-1)

def log_ratio(logp, old_logp, mask):
    """log pi/pi_old, 0 outside the mask. ours: clamped to +-20, or exp overflows and 0 * inf is NaN in the gradient."""
    return (logp - old_logp).masked_fill(mask == 0, 0.0).clamp(-20, 20)


def implicit_reward(logp, old_logp, mask, beta, reduce="sum"):
    """R(y) = beta * sum (or mean) over tokens of log pi/pi_old, (B,): Eq. 3."""
    total = beta * (logp - old_logp).masked_fill(mask == 0, 0.0).sum(1)
    return total if reduce == "sum" else total / mask.sum(1).clamp(min=1)


def ce_loss(logp, old_logp, mask, reward, beta, reduce="sum"):
    """Binary cross-entropy of R(y) against the reward (Eq. 2, whose sign the paper prints reversed). Sum over responses."""
    return F.binary_cross_entropy_with_logits(implicit_reward(logp, old_logp, mask, beta, reduce), reward, reduction="sum")


def mse_loss(logp, mask, reward, negative_weight=1.0):
    """(pi(a|s) - R)^2 on probabilities (Eq. 10), negatives weighted by w of Table 9. Sum over response tokens."""
    prob = logp.masked_fill(mask == 0, 0.0).clamp(max=20).exp()
    weight = torch.where(reward > 0, reward.new_tensor(1.0), negative_weight)
    return ((prob - reward[:, None]).square() * weight[:, None] * mask).sum()


def sft_loss(logp, mask, reward):
    """Negative log-likelihood of positive responses (Table 9, recovery by SFT). Sum over their tokens."""
    return -(logp.masked_fill(mask == 0, 0.0) * (reward[:, None] > 0)).sum()


def sapo_loss(logp, old_logp, mask, adv, tau_pos=1.0, tau_neg=1.05):
    """Soft adaptive policy optimisation: f(r) = 4/tau sigmoid(tau (r - 1)) in place of the clipped ratio (arXiv 2511.20347).

    Mean over the tokens of a response, sum over responses. Gradient weight on logp: 4 p (1-p) r, p = sigmoid(tau (r-1)).
    """
    ratio = log_ratio(logp, old_logp, mask).exp()
    adv = adv[:, None].expand_as(ratio) if adv.dim() == 1 else adv
    tau = torch.where(adv > 0, adv.new_tensor(tau_pos), tau_neg)                    # plain numbers would be fp32 in an fp64 check
    objective = 4 / tau * torch.sigmoid(tau * (ratio - 1)) * adv
    return -((objective * mask).sum(1) / mask.sum(1).clamp(min=1)).sum()


def grpo_loss(logp, old_logp, mask, adv, clip_low=0.2, clip_high=0.28):
    """Clipped surrogate (Eq. 5) with the thresholds of Sec. 4.1. Sum over response tokens."""
    ratio = log_ratio(logp, old_logp, mask).exp()
    adv = adv[:, None] if adv.dim() == 1 else adv
    objective = torch.minimum(ratio * adv, ratio.clamp(1 - clip_low, 1 + clip_high) * adv)
    return -(objective.masked_fill(mask == 0, 0.0)).sum()


def gae_advantages(values, reward, mask, lam_alpha=0.05):
    """Generalised advantage estimation for PPO, (B, T) like `values`, not whitened; 0 outside the mask.

    The only reward is R at the last response token and gamma is 1. lambda = max(0, 1 - 1/(lam_alpha * length)) for each
    response: longer ones look further ahead (Sec. 4.1, where the paper prints 1/(0.05 * length) alone).
    """
    lam = (1 - 1 / (lam_alpha * mask.sum(1).clamp(min=1))).clamp(min=0)             # (B,)
    adv, running, next_value = torch.zeros_like(values), torch.zeros_like(reward), torch.zeros_like(reward)
    seen = torch.zeros_like(mask[:, 0])                     # 1 once the last token of a response has been passed
    for t in reversed(range(values.shape[1])):
        here = mask[:, t]
        terminal = reward * (1 - seen)                      # R at the last token, nothing before it
        running = torch.where(here > 0, terminal + next_value - values[:, t] + lam * running, running)
        next_value = torch.where(here > 0, values[:, t], next_value)
        seen = torch.maximum(seen, here)
        adv[:, t] = running * here
    return adv


def group_advantages(reward, prompt_index):
    """A = (R - mean) / (std + 1e-6) within the responses of a prompt, (B,); std unbiased; 0 for a group of one."""
    _, group = prompt_index.unique(return_inverse=True)
    size = torch.bincount(group).to(reward.dtype)
    centred = reward - (torch.zeros_like(size).index_add_(0, group, reward) / size)[group]
    var = torch.zeros_like(size).index_add_(0, group, centred.square()) / (size - 1).clamp(min=1)
    return centred / (var.sqrt()[group] + 1e-6)


# ---- data: whole responses, right-padded -------------------------------------------------------------------------------

def load_rollouts(folder):
    """The responses of a rollouts folder, read and fingerprinted once a run. Also used by distill.py and evaluate.py.

    What is per response is joined (join_shards); token ids stay in the memory-mapped shards, whose pages the ranks of a
    machine share: `response_ids` finds them.
    """
    shards = load_shards(folder)
    rollouts = join_shards(shards, tokens=False)
    rollouts |= {"folder": Path(folder), "shards": shards,
                 "first_response": torch.tensor([0, *(len(s["reward"]) for s in shards)]).cumsum(0)[:-1]}
    for key, kind in (("model", str), ("model_fingerprint", str), ("tokenizer_fingerprint", str), ("temperature", (int, float))):
        if not isinstance(rollouts["meta"].get(key), kind):
            raise InputError(f"{folder}: the meta of its shards has no {key}: sample again with this rollout.py")
    digest = hashlib.sha256()
    for key in ("input_ids", "offsets", "prompt_len", "prompt_index", "reward"):
        for part in [s[key] for s in shards] if key == "input_ids" else [rollouts[key]]:
            digest.update(part.numpy())                     # its buffer, not a copy
    rollouts["fingerprint"] = digest.hexdigest()
    return rollouts


def response_ids(rollouts, index):
    """Token ids of a response with its prompt: a view of its memory-mapped shard. Also used by evaluate.py."""
    number = torch.searchsorted(rollouts["first_response"], index, right=True) - 1
    shard, within = rollouts["shards"][number], index - rollouts["first_response"][number]
    return shard["input_ids"][shard["offsets"][within]:shard["offsets"][within + 1]]


def pad_responses(rollouts, indices, device, *token_values):
    """Micro-batch of responses: input_ids (B, T), mask (B, T-1), then each flat per-response-token tensor as (B, T-1)."""
    start, end = rollouts["offsets"][indices], rollouts["offsets"][indices + 1]
    ids = [response_ids(rollouts, i).long() for i in indices]
    input_ids = nn.utils.rnn.pad_sequence(ids, batch_first=True)                    # (B, T); the pad id is never looked at
    position = torch.arange(input_ids.shape[1] - 1)
    mask = (position >= rollouts["prompt_len"][indices, None] - 1) & (position < (end - start)[:, None] - 1)
    bounds = rollouts["response_offsets"]
    spans = [slice(a, b) for a, b in zip(bounds[indices], bounds[indices + 1])]
    padded = [torch.zeros(mask.shape).masked_scatter(mask, torch.cat([values[s] for s in spans]).float())
              for values in token_values]
    return [x.to(device) for x in (input_ids, mask.float(), *padded)]


def step_batches(rollouts, usable, batch_prompts, seed):
    """Endless batches of response indices. Batches count prompts; all responses of a prompt stay together.

    An epoch of 1,000 prompts at 32 is 32 steps of 31 or 32 prompts (ours: equal parts instead of a small last batch).
    """
    prompts = rollouts["prompt_index"][usable].unique()
    n_steps = math.ceil(len(prompts) / batch_prompts)
    epoch = 0
    while True:
        order = prompts[torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed * 1000 + epoch))]
        for part in order.tensor_split(n_steps):
            yield torch.nonzero(usable & torch.isin(rollouts["prompt_index"], part))[:, 0]
        epoch += 1


def micro_batches(lengths, micro_tokens, world=1, lockstep=False):
    """Split responses into micro-batches of at most `micro_tokens` padded tokens, and deal them to ranks.

    lengths [n] -> per rank a list of index tensors into it. Sorted by length, so that little is padding; dealt longest
    first to the rank with the least work (dense FLOPs grow with L, attention with L^2; ours: equal at 32k tokens).
    lockstep (--shard): ranks wait for each other in every layer, so each turn has micro-batches of like cost; the first
    rank has the most turns.
    """
    if len(lengths) < world:
        raise InputError(f"a batch of {len(lengths)} responses cannot be split over {world} ranks: raise --batch-prompts")
    micros = [[]]
    for i in lengths.argsort(descending=True, stable=True).tolist():
        if micros[-1] and lengths[micros[-1][0]] * (len(micros[-1]) + 1) > micro_tokens:
            micros.append([])
        micros[-1].append(i)
    while len(micros) % world:                              # every rank gets as many, so none idles for a whole micro-batch
        widest = max(range(len(micros)), key=lambda m: len(micros[m]))
        if len(micros[widest]) == 1:
            break
        half = len(micros[widest]) // 2
        micros[widest:widest + 1] = [micros[widest][:half], micros[widest][half:]]
    cost = [sum(lengths[i].item() * (1 + lengths[i].item() / 32768) for i in m) for m in micros]
    dealt, load = [[] for _ in range(world)], [0.0] * world
    order = sorted(range(len(micros)), key=lambda m: -cost[m])
    if lockstep:
        return [[torch.tensor(micros[m]) for m in order[rank::world]] for rank in range(world)]
    for m in order:
        rank = min(range(world), key=lambda r: (bool(dealt[r]), load[r]))           # none stays empty: DDP would wait for it
        dealt[rank].append(torch.tensor(micros[m]))
        load[rank] += cost[m]
    return dealt


def split_summary(lengths, micro_tokens, world, lockstep=False):
    """How the responses of one optimizer step, of `lengths` tokens, are split: one line for the log. Also used by distill.py."""
    shares = micro_batches(lengths, micro_tokens, world, lockstep)
    padded = sum(len(m) * lengths[m].max().item() for share in shares for m in share)
    work = [sum((lengths[m] * (1 + lengths[m] / 32768)).sum().item() for m in share) for share in shares]
    return (f"first step: {sum(map(len, shares))} micro-batches on {world} rank(s), {100 * (1 - lengths.sum().item() / padded):.1f} % padding, "
            f"ranks {100 * sum(work) / world / max(work):.0f} % balanced")


def memory_advice(args):
    """What to change when memory was not enough, the cheapest first. Also used by distill.py."""
    if not args.checkpointing:
        return "leave out --no-checkpointing"
    others = " ".join(flag for flag, given in (("--offload-activations", args.offload_activations), ("--shard", args.shard)) if not given)
    return (f"try --micro-tokens {args.micro_tokens // 2}; a single response is never split, so if the longest one is what does not fit: "
            f"{others or 'more GPUs'}")


# ---- checkpoints and scores --------------------------------------------------------------------------------------------

def setup_ddp():
    """(rank, world, device); one process without torchrun. Also used by distill.py and evaluate.py."""
    rank, world, local_rank = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":               # if torchrun was killed meanwhile this fails at once,
            socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), 60).close()      # the next line in hours
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=24))
    return rank, world, device


def load_policy(path, device="cpu", checkpointing=False, trust_remote_code=False, offload=False):
    """A causal LM with fp32 parameters: at lr 1e-6 bf16 weights would round most updates away. Raises InputError.

    offload: what checkpointing keeps waits in the memory of the host. Also used by distill.py.
    """
    lm = load_lm(path, torch.float32, trust_remote_code)
    if checkpointing:
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False}, **{"offload": True} if offload and torch.cuda.is_available() else {})
    return lm.to(device).train()                            # train(): else checkpointing is off; these models have no dropout


def save_policy(lm, tokenizer, path, state=None, weights=None):
    """An ordinary Hugging Face folder in fp32, complete or absent; `state` (step, optimizer) makes it resumable.

    weights: a state dict in place of the model's own.
    """
    def write(partial):
        lm.save_pretrained(partial, state_dict=weights)
        tokenizer.save_pretrained(partial)
        if state is not None:
            torch.save(state, partial / "optimizer.pt")
        (partial / "fingerprint.txt").write_text(checkpoint_fingerprint(partial) + "\n")   # tells a damaged copy
    write_atomic(path, write)


def per_token(data, compute, micro_tokens, desc, shard=False):
    """compute(input_ids, mask) -> tensors (B, T-1), over all responses: one flat row per tensor, (rows, sum of response lengths).

    No gradient. All ranks share the work and get the whole result; all must call it.
    """
    rank, world, device = setup_ddp()
    bounds, flat = data["response_offsets"], None
    with torch.no_grad():
        shares = micro_batches(data["offsets"].diff(), micro_tokens, world, shard)
        for indices in tqdm(shares[rank], desc=desc, disable=rank > 0, leave=False):
            input_ids, mask = pad_responses(data, indices, device)
            rows = compute(input_ids, mask)
            flat = torch.zeros(len(rows), int(bounds[-1]), device=device) if flat is None else flat
            where = torch.cat([torch.arange(bounds[i], bounds[i + 1]) for i in indices]).to(device)
            flat[:, where] = torch.stack([x[mask.bool()] for x in rows])
        for _ in range(shard * (len(shares[0]) - len(shares[rank]))):
            compute(*idle_inputs(device))
    if world > 1:
        dist.all_reduce(flat)                                                       # each token was computed by one rank
    return flat.cpu()


def score(checkpoint, rollouts, temperature=None, micro_tokens=32768, chunk=1024, with_entropy=False, trust_remote_code=False, shard=False):
    """log pi(a|s) of every response token of the rollouts under a checkpoint: flat fp32 [sum of response lengths], memory-mapped.

    rollouts: their folder, or what load_rollouts read from it. Computed once and kept in ROLLOUTS/scores under the fingerprints of both and the temperature (default: the one
    sampled with). Under torchrun the ranks share the work; all must call it. with_entropy: (logp, entropy in nats).
    """
    data = rollouts if isinstance(rollouts, dict) else load_rollouts(rollouts)
    rollouts = data["folder"]
    rank, world, device = setup_ddp()
    temperature = data["meta"]["temperature"] if temperature is None else temperature
    if not 0 < temperature < math.inf:
        raise InputError(f"{rollouts} was sampled greedily, which has no log-probs: give --logp-temperature")
    fingerprint = checkpoint_fingerprint(checkpoint)
    path = Path(rollouts) / "scores" / f"{fingerprint[:16]}-{data['fingerprint'][:16]}-T{temperature:g}.pt"
    missing = torch.tensor(int(not path.exists()), device=device)
    if world > 1:
        dist.broadcast(missing, 0)                          # another job may write the file while the ranks look
    if missing:
        check_tokenizer(checkpoint, data, trust_remote_code)
        policy = Policy(load_policy(checkpoint, "cpu" if shard else device, trust_remote_code=trust_remote_code).eval(), temperature, chunk)
        if shard:
            shard_over_ranks(policy)
        values = per_token(data, lambda input_ids, mask: policy(input_ids, mask)[:2], micro_tokens, f"scoring with {checkpoint}", shard)
        del policy
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if rank == 0:
            write_atomic(path, lambda p: torch.save({"version": 1, "checkpoint": fingerprint, "rollouts": data["fingerprint"],
                                                     "temperature": temperature, "logp": values[0].clone(),
                                                     "entropy": values[1].clone()}, p))
        if world > 1:
            dist.barrier()
    cached = read_tensors(path, "score file", "delete it, it will be computed again", mmap=True)
    ours = {"version": 1, "checkpoint": fingerprint, "rollouts": data["fingerprint"], "temperature": temperature}
    if not isinstance(cached, dict) or any(cached.get(key) != value for key, value in ours.items()) or not all(
            is_flat(cached.get(key), torch.float32) and len(cached[key]) == data["response_offsets"][-1] for key in ("logp", "entropy")):
        raise InputError(f"{path} belongs to other files: delete it, it will be computed again")
    return (cached["logp"], cached["entropy"]) if with_entropy else cached["logp"]


def check_tokenizer(model, rollouts, trust_remote_code=False):
    """Tokenizer of a checkpoint; InputError if the rollouts' token ids mean something else to it."""
    tokenizer = load_tokenizer(model, trust_remote_code)
    if tokenizer_fingerprint(tokenizer) != rollouts["meta"]["tokenizer_fingerprint"]:
        raise InputError(f"{model} has another tokenizer than {rollouts['meta']['model']}, which wrote the rollouts: "
                         f"use a checkpoint of the same family, or sample again with this one")
    if max(s["input_ids"].max() for s in rollouts["shards"]) >= check_weights(model, trust_remote_code):
        raise InputError(f"{model} has no weights for all token ids of the rollouts: its vocabulary is smaller than its tokenizer's")
    return tokenizer


def sampler_gap(rollouts, old_logp):
    """Mean |log-prob that the sampler reported - ours| in nats per token; NaN where it reported none."""
    total = count = start = 0
    for shard in rollouts["shards"]:                        # one at a time: together they have the size of all tokens
        reported = shard["sampler_logp"]
        distance = (reported - old_logp[start:start + len(reported)]).abs().double()
        total, count, start = total + distance.nansum().item(), count + (~distance.isnan()).sum().item(), start + len(reported)
    return total / count if count else math.nan


def find_old(rollouts, old=None):
    """Path of pi_old, the policy that wrote the rollouts: --old, or the path in their meta; known by its content."""
    path, wanted = old or rollouts["meta"]["model"], rollouts["meta"]["model_fingerprint"]
    hint = "give the checkpoint that wrote the rollouts with --old"
    try:
        found = checkpoint_fingerprint(path)
    except InputError as error:
        raise InputError(f"pi_old of the rollouts, {path}, cannot be read: {hint}") from error
    if found != wanted:
        raise InputError(f"{path} is not the policy that wrote the rollouts "
                         f"(fingerprint {found[:12]}, theirs {wanted[:12]}): {hint}")
    return path


# ---- PPO's first phase: values of all states, before the policy trains; never two models in memory -----------------------

class ValueNetwork(nn.Module):
    """V(s_t), the reward that is to be expected from state s_t: the policy's backbone under a scalar head (Sec. 4.1).

    ours: the head starts with weight 0 and the mean reward as bias, so that the explained variance starts at 0.
    """

    def __init__(self, lm, mean_reward):
        super().__init__()
        self.base_model = lm.base_model                     # without the vocabulary's head: DDP would wait for its gradient
        self.head = nn.Linear(lm.get_output_embeddings().weight.shape[1], 1, device=lm.device)
        nn.init.zeros_(self.head.weight)
        nn.init.constant_(self.head.bias, mean_reward)

    def forward(self, input_ids):
        """Values (B, T-1) in fp32; position t is the state before the token input_ids[:, t + 1], as for logp."""
        return self.head(hidden_states(self, input_ids).float())[..., 0]


def train_values(args, rollouts, usable, rank, world, device, caught):
    """Fit V to the Monte-Carlo return, which is R at every token (lambda = 1, gamma = 1: Sec. 4.1), then evaluate it once.

    Returns V of every response token, flat fp32 [sum of response lengths], kept in OUT/value/values.pt. Continues where it
    was stopped, like the loop in main.
    """
    out, path = args.out / "value", args.out / "value" / "values.pt"
    if not path.exists():
        reward = rollouts["reward"]
        lengths, response_lengths = rollouts["offsets"].diff(), rollouts["response_offsets"].diff()
        lm = load_policy(args.model, "cpu" if args.shard else device, args.checkpointing, args.trust_remote_code, args.offload_activations)
        network = ValueNetwork(lm, reward[usable].mean().item())
        del lm
        model = (shard_over_ranks(network) if args.shard else
                 DistributedDataParallel(network, gradient_as_bucket_view=True) if world > 1 else network)
        optimizer = torch.optim.AdamW(network.parameters(), lr=args.value_lr, betas=(0.9, 0.999), weight_decay=0.0)
        step = 0
        if (out / "state.pt").exists():
            state = read_tensors(out / "state.pt", "state of the value network", "delete it, its training starts again", mmap=True)
            step = state["step"]
            set_model_state_dict(network, state["network"], options=WHOLE)
            set_optimizer_state_dict(network, optimizer, state["optimizer"], options=WHOLE)
            del state                                       # never two sets of weights
        metrics, batches = read_metrics(out, step), step_batches(rollouts, usable, args.batch_prompts, args.seed)
        for _ in range(step):
            next(batches)
        bar = tqdm(total=args.value_steps, initial=step, desc="value network", disable=rank > 0)
        while step < args.value_steps:
            step, start, batch = step + 1, time.time(), next(batches)
            n_tokens = response_lengths[batch].sum().item()
            sums = torch.zeros(3, dtype=torch.float64, device=device)               # residual, its square, reward
            shares = micro_batches(lengths[batch], args.micro_tokens, world, args.shard)
            for i, micro in enumerate(shares[rank]):
                model.require_backward_grad_sync = i == len(shares[rank]) - 1
                input_ids, mask = pad_responses(rollouts, batch[micro], device)
                r = reward[batch[micro]].to(device)[:, None]
                residual = (r - model(input_ids)) * mask                            # the return is R in every state
                (residual.square().sum() / n_tokens * world).backward()             # DDP averages over ranks; we want the sum
                sums += torch.stack([x.detach().double().sum() for x in (residual, residual.square(), r * mask)])
            for _ in range(args.shard * (len(shares[0]) - len(shares[rank]))):
                (model(idle_inputs(device)[0]).sum() * 0).backward()
            grad_norm = clip_gradients(network, args.max_grad_norm)
            if world > 1:
                dist.all_reduce(sums)
            stop_if_not_finite(step, sums, grad_norm, rollouts, batch)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            m = {"step": step, "loss": sums[1].item() / n_tokens, "grad_norm": grad_norm, "lr": args.value_lr, "tokens": n_tokens,
                 "seconds": time.time() - start, "explained_variance": explained_variance(n_tokens, *sums.tolist())}
            metrics.append(json.dumps(m) + "\n")
            stop = stop_asked(caught, device)
            if rank == 0:
                write_atomic(out / "metrics.jsonl", lambda p: p.write_text("".join(metrics)))
                bar.update()
            if (step % args.save_every == 0 or stop) and step < args.value_steps:
                state = {"step": step, "network": get_model_state_dict(network, options=WHOLE),
                         "optimizer": get_optimizer_state_dict(network, optimizer, options=WHOLE)}
                if rank == 0:
                    write_atomic(out / "state.pt", lambda p: torch.save(state, p))
            if stop:
                leave(stop, f"{out}/state.pt", step)
        bar.close()
        values = per_token(rollouts, lambda input_ids, mask: [network(input_ids)], args.micro_tokens, "values", args.shard)[0]
        if rank == 0:
            write_atomic(path, lambda p: torch.save(values, p))
        if world > 1:
            dist.barrier()
    if rank == 0:
        (out / "state.pt").unlink(missing_ok=True)
    values = read_tensors(path, "file of values", "delete it, they will be computed again")
    if not is_flat(values, torch.float32) or len(values) != rollouts["response_offsets"][-1]:
        raise InputError(f"{path} belongs to other rollouts: delete it")
    return values


def ppo_advantages(rollouts, usable, values):
    """GAE of every response token, whitened over the tokens of usable responses, once: flat [sum of response lengths]."""
    bounds, adv = rollouts["response_offsets"], torch.zeros_like(values)
    for indices in micro_batches(rollouts["offsets"].diff(), 2 ** 22)[0]:           # wide: the loop over time is sequential
        _, mask, v = pad_responses(rollouts, indices, "cpu", values)
        where = torch.cat([torch.arange(bounds[i], bounds[i + 1]) for i in indices])
        adv[where] = gae_advantages(v, rollouts["reward"][indices], mask)[mask.bool()]
    seen = adv[usable.repeat_interleave(bounds.diff())].double()
    return ((adv.double() - seen.mean()) / (seen.std(correction=0) + 1e-8)).float()


# ---- the run: what it was started with, and where it stopped -----------------------------------------------------------

def start_run(out, args, rank, **facts):
    """(run, finished): what OUT/run.json is to hold, checked against what it holds; facts are fingerprints of what is read.

    The caller writes it once all input is known to be good. Also used by distill.py.
    """
    path, arguments = Path(out) / "run.json", json.loads(json.dumps(vars(args), default=str))     # as they will be read back
    script, hint = Path(sys.argv[0]).name, "use another --out, or --fresh to start over"
    for k in ("model", "student", "teacher", "denominator", "old", "rollouts", "optimizer_from"):
        if args.fresh and arguments.get(k) and Path(out).resolve() in (Path(arguments[k]).resolve(), *Path(arguments[k]).resolve().parents):
            raise InputError(f"--fresh would delete {arguments[k]}, which --{k.replace('_', '-')} needs: use another --out")
    if args.fresh and path.exists():
        one_writer(out)
    if args.fresh and rank == 0 and path.exists():
        for old in sorted(Path(out).iterdir(), key=lambda p: p == path):            # run.json last, or a second try would not know the folder
            if not old.name.startswith(".writer-"):         # a lock that is removed keeps nobody out
                remove(old)
    if dist.is_initialized():
        dist.barrier()
    if path.exists():
        run = read_json(path, hint)
        theirs = run.get("args")
        if run.get("script") != script or not isinstance(theirs, dict):
            raise InputError(f"{out} holds a run of {run.get('script')}, not of {script}: {hint}")
        for k in arguments:
            if k not in ("fresh", "micro_tokens", "chunk", "shard", "offload_activations") and theirs.get(k) != arguments[k]:
                raise InputError(f"{out} holds a run with --{k.replace('_', '-')} {theirs.get(k)}, now {arguments[k]}: {hint}")
        for k in facts:
            if run.get(k) != facts[k]:
                raise InputError(f"{out} holds a run with another {k.replace('_', ' ')} (its content has changed since): {hint}")
        finished = (Path(out) / "final").exists()
        if not finished:
            check_out(out)
            one_writer(out)
        elif rank == 0:
            drop_states(out, "final", args.save_every)      # a kill may have come between the last save and this
        return run, finished
    check_out(out)
    if any(p.suffix != ".partial" and not p.name.startswith(".writer-") for p in Path(out).glob("*")):
        raise InputError(f"{out} is not empty and holds no run.json: use another --out")
    git = subprocess.run(["git", "rev-parse", "--verify", "-q", "HEAD"], cwd=Path(__file__).parent,
                         capture_output=True, text=True).stdout.strip()
    if dist.is_initialized():
        dist.barrier()                                      # all have looked before the first writes
    return {"script": script, "args": arguments, "git_commit": git or None, "versions": {
        "python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__}, **facts}, False


def newest_save(out):
    """(step, folder) of the newest checkpoint with optimizer state, or (0, None); InputError if it is damaged."""
    saves = [p for p in Path(out).glob("step-*") if p.suffix != ".partial" and (p / "optimizer.pt").exists()]
    step, save = max(((int(p.name.split("-")[1]), p) for p in saves), default=(0, None))
    if save:
        checkpoint_fingerprint(save)
        read_state(save)
    return step, save


def read_state(save):
    """Step and optimizer state of a checkpoint folder of ours; InputError if it is damaged or another's."""
    hint = "delete that folder to continue from the one before, or use --fresh to start over"
    state = read_tensors(save / "optimizer.pt", "optimizer state", hint, mmap=True)
    if not isinstance(state, dict) or not isinstance(state.get("optimizer"), dict) or save.name not in ("final", f"step-{state.get('step'):04d}"):
        raise InputError(f"{save / 'optimizer.pt'} is not the optimizer state of this checkpoint: {hint}")
    return state


def drop_states(out, name, save_every):
    """Remove the optimizer states that the save `name` has made superfluous."""
    for older in Path(out).glob("step-*"):
        if older.suffix != ".partial" and older.name != name:
            if (older / "optimizer.pt").exists():
                (older / "optimizer.pt").unlink()
            if int(older.name.split("-")[1]) % save_every:  # was saved between two others because of a signal
                shutil.rmtree(older)


def save_step(out, name, lm, tokenizer, optimizer, step, save_every):
    """Save OUT/NAME with optimizer state, then drop the older state: weights stay, disk use is bounded. Also in distill.py.

    All ranks must call it; with --shard each gives its part.
    """
    once = {name for name, _ in (*lm.named_parameters(), *lm.named_buffers())}      # a tied head is the embedding: one name
    weights = {name: x for name, x in get_model_state_dict(lm, options=WHOLE).items() if name in once}
    moments = get_optimizer_state_dict(lm, optimizer, options=WHOLE) if optimizer.state else {}     # none before the first step
    if not dist.is_initialized() or dist.get_rank() == 0:
        save_policy(lm, tokenizer, Path(out) / name, {"step": step, "optimizer": moments}, weights)
        drop_states(out, name, save_every)
        size, total = (sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 2 ** 30 for folder in (Path(out) / name, Path(out)))
        tqdm.write(f"saved {out}/{name}: {size:.3f} GiB, of {total:.3f} GiB in {out}")


def load_moments(path, lm, optimizer):
    """Adam's state of a save, whichever way it was spread over ranks. Also used by distill.py."""
    moments = read_state(Path(path))["optimizer"]
    if moments:
        try:
            set_optimizer_state_dict(lm, optimizer, moments, options=WHOLE)
        except (KeyError, RuntimeError, ValueError) as error:
            raise InputError(f"{path} holds the optimizer state of another model: {one_line(error)}") from error


def stop_asked(caught, device):
    """The signal that a rank was sent, else None; the same on all ranks, which must all call it. Also used by distill.py."""
    flag = torch.tensor(caught[0] if caught else 0, device=device)
    if dist.is_initialized():
        dist.all_reduce(flag, dist.ReduceOp.MAX)
    return signal.Signals(flag.item()).name if flag.item() else None


def leave(stop, saved, step):
    """End a run that was asked to stop; the other ranks wait until rank 0 has saved. Also used by distill.py."""
    if dist.is_initialized():
        dist.barrier()
    raise KeyboardInterrupt(f"{stop} after step {step}, which is saved in {saved}")


def read_metrics(out, step):
    """Lines of OUT/metrics.jsonl up to `step`: a run that was killed may have written more than its checkpoint knows."""
    path = Path(out) / "metrics.jsonl"
    try:
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({one_line(error)}): repair it, or use --fresh to start over") from error
    if len(kept) != step:
        raise InputError(f"{path} has {len(kept)} of {step} lines for the steps of the newest checkpoint: use --fresh to start over")
    return kept


def token_sums(logp, entropy, old_logp, mask, reward, sign, clip_low, clip_high):
    """Sums over response tokens behind the per-step metrics, fp64 [11]; see step_metrics. Also used by distill.py.

    sign (B,) or (B, T-1): which way the loss pushes; a token counts as clipped if its ratio is already past the bound.
    """
    with torch.no_grad():
        d = log_ratio(logp, old_logp, mask)
        ratio, prob = d.exp(), logp.masked_fill(mask == 0, 0.0).clamp(max=20).exp()
        sign = sign[:, None] if sign.dim() == 1 else sign
        clipped = ((sign > 0) & (ratio > 1 + clip_high)) | ((sign < 0) & (ratio < 1 - clip_low))
        positive = mask * (reward[:, None] > 0)
        residual = reward[:, None] - prob
        rows = (ratio - 1 - d, entropy, clipped, ratio, prob * positive, positive, prob * (mask - positive), mask - positive,
                residual, residual.square(), reward[:, None].expand_as(mask))
        return torch.stack([(x * mask).double().sum() for x in rows])


def step_metrics(sums):
    """Per-token means with the names of metrics.jsonl. kl_old_new is k3 on the rollouts, an estimate of KL(pi_old || pi)."""
    k3, entropy, clipped, ratio, pos, n_pos, neg, n_neg, res, res2, rew = sums.tolist()
    n = n_pos + n_neg
    return {"kl_old_new": k3 / n, "entropy": entropy / n, "clip_frac": clipped / n, "ratio_mean": ratio / n,
            "prob_pos": pos / n_pos if n_pos else None, "prob_neg": neg / n_neg if n_neg else None,
            "explained_variance": explained_variance(n, res, res2, rew)}


def explained_variance(n, residual, residual2, reward):
    """1 - Var(R - prediction) / Var(R) over n tokens, from sums over them (rewards are 0 or 1); None if R is constant."""
    var_reward = reward / n - (reward / n) ** 2
    return 1 - (residual2 / n - (residual / n) ** 2) / var_reward if var_reward > 0 else None


def stop_if_not_finite(step, sums, grad_norm, rollouts, batch, *token_values):
    """A NaN or inf would spread to every weight with the next update: stop before it. Also used by distill.py.

    sums: the loss and the metrics of the step; token_values: flat log-probs [sum of response lengths] that name the prompt.
    """
    if math.isfinite(grad_norm) and sums.isfinite().all():
        return
    bad = ~torch.stack([x.isfinite() for x in token_values]).all(0) if token_values else torch.zeros(0, dtype=torch.bool)
    owners = rollouts["prompt_index"].repeat_interleave(rollouts["response_offsets"].diff())
    where = f"the log-probs of prompts {owners[bad].unique().tolist()} are not, in the cached scores" if bad.any() else \
        f"prompts of the batch: {rollouts['prompt_index'][batch].unique().tolist()}"
    raise RunError(f"step {step}: loss {sums[0].item()} or gradient norm {grad_norm} or a metric is not finite; {where}; "
                   f"the last checkpoint is intact")


def pair_accuracy(values, reward, prompt_index):
    """Share of (right, wrong) pairs of one prompt that `values` (B,) orders rightly; None without pairs."""
    right = total = 0
    for i in prompt_index.unique():
        pos, neg = values[(prompt_index == i) & (reward > 0)], values[(prompt_index == i) & (reward == 0)]
        right += (pos[:, None] > neg).sum().item()
        total += len(pos) * len(neg)
    return right / total if total else None


def parse_args(argv=None):
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arg = p.add_argument
    # Checkpoints and data
    arg("--model", required=True, help="where training starts: pi_old, or another checkpoint with its tokenizer")
    arg("--rollouts", type=Path, required=True, help="folder of rollout.py")
    arg("--out", type=Path, required=True, help="checkpoints step-*/ and final/, run.json, metrics.jsonl")
    arg("--old", help="pi_old, if it is no longer at the path that the rollouts name")
    arg("--drop-truncated", action="store_true", help="leave out responses that hit the token limit (default: reward 0)")
    # Loss
    arg("--loss", choices=["ce", "sapo", "grpo", "ppo", "mse", "sft"], required=True, help="Sec. 4.1")
    arg("--beta", type=float, default=0.001, help="CE: weight of the log-ratio in R(y) (Sec. 4.1: 0.001 to 0.05)")
    arg("--reduce", choices=["sum", "mean"], default="sum", help="CE: over the tokens of a response (Sec. 4.1: tuned)")
    arg("--ref", choices=["old", "start"], default="old", help="CE: reference of R(y); start for an unlearned --model (Table 8)")
    arg("--negative-weight", type=float, default=1.0, help="MSE: w of Table 9")
    arg("--value-steps", type=int, default=50, help="PPO: steps of the value network, before the policy's (VAPO: 50)")
    arg("--value-lr", type=float, default=1e-5, help="PPO: learning rate of the value network (the paper gives none)")
    arg("--kl-coef", type=float, default=0.0, help="weight of a KL to pi_old (Fig. 6: 2)")
    arg("--kl-kind", choices=["sampled", "exact"], default="sampled", help="exact: whole vocabulary, keeps pi_old in memory")
    # Optimization
    arg("--steps", type=int, help="optimizer steps (default: 2 epochs)")
    arg("--epochs", type=float, help="passes over the prompts instead of --steps")
    arg("--batch-prompts", type=int, default=32, help="prompts per step over all ranks (Sec. 4.1: 32, 64, 256)")
    arg("--micro-tokens", type=int, default=32768, help="padded tokens per forward pass and rank; lower it when out of memory")
    arg("--chunk", type=int, default=1024, help="tokens per tile of the head")
    arg("--lr", type=float, default=1e-6, help="AdamW, constant (Sec. 4.1)")
    arg("--max-grad-norm", type=float, default=1.0)
    arg("--optimizer-from", type=Path, help="OUT of an earlier run whose Adam state is carried over (on-policy mode)")
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
    if args.steps and args.epochs:
        raise InputError("give --steps or --epochs, not both")
    for name in ("steps", "epochs", "batch_prompts", "micro_tokens", "chunk", "lr", "save_every", "beta", "max_grad_norm",
                 "value_steps", "value_lr", "logp_temperature"):
        if getattr(args, name) is not None and not 0 < getattr(args, name) < math.inf:
            raise InputError(f"--{name.replace('_', '-')} must be positive")
    if not (0 <= args.kl_coef < math.inf and 0 <= args.negative_weight < math.inf):
        raise InputError("--kl-coef and --negative-weight must not be negative")
    return args


def main():
    args = parse_args()
    # ---- data and checks: before any model is loaded -------------------------------------------------------------------
    rollouts = load_rollouts(args.rollouts)
    tokenizer = check_tokenizer(args.model, rollouts, args.trust_remote_code)
    old = find_old(rollouts, args.old)
    temperature = args.logp_temperature or rollouts["meta"]["temperature"]
    reward = rollouts["reward"]
    usable = ~rollouts["truncated"] if args.drop_truncated else torch.ones_like(rollouts["truncated"])
    for name, count in (("right", (usable & (reward > 0)).sum()), ("wrong", (usable & (reward == 0)).sum())):
        if count == 0 and not (args.loss == "sft" and name == "wrong"):
            raise InputError(f"{args.rollouts} has no {name} response: nothing can be learnt from it; sample other prompts")
    if args.loss == "sft":
        usable &= reward > 0
    if args.optimizer_from and not (args.optimizer_from / "final" / "optimizer.pt").is_file():
        raise InputError(f"--optimizer-from {args.optimizer_from} has no final/optimizer.pt: give the --out of a finished run")
    if args.optimizer_from:
        read_state(args.optimizer_from / "final")
    rank, world, device = setup_ddp()
    if args.shard and world == 1:
        raise InputError("--shard splits a model over several processes: start it with torchrun --nproc-per-node 2 or more")
    run, finished = start_run(args.out, args, rank, parent=checkpoint_fingerprint(args.model), rollouts_fingerprint=rollouts["fingerprint"])
    if finished:
        if rank == 0:
            print(f"{args.out}: already finished")
        return
    step, save = newest_save(args.out)
    metrics = read_metrics(args.out, step)

    # ---- reference log-probs, each scored once, and then the one model that trains ---------------------------------------
    options = dict(temperature=temperature, micro_tokens=args.micro_tokens, chunk=args.chunk,
                   trust_remote_code=args.trust_remote_code, shard=args.shard)
    old_logp = score(old, rollouts, **options)
    ref_logp = score(args.model, rollouts, **options) if args.ref == "start" else old_logp
    one_writer(args.out)
    if rank == 0:
        write_json(args.out / "run.json", run)
    caught = defer_signals()                                # from here on a signal waits for the end of a step
    adv = torch.zeros_like(reward)                                                  # SAPO and GRPO: one per response
    adv[usable] = group_advantages(reward[usable], rollouts["prompt_index"][usable])
    ppo_adv = []                                                                    # PPO: one per token
    if args.loss == "ppo":
        values, lengths = train_values(args, rollouts, usable, rank, world, device, caught), rollouts["response_offsets"].diff()
        seen, returns = usable.repeat_interleave(lengths), reward.repeat_interleave(lengths)
        value_variance = 1 - ((returns - values)[seen].double().var() / returns[seen].double().var()).item()
        if rank == 0:
            print(f"values: explained variance {value_variance:.3f}")
        ppo_adv = [ppo_advantages(rollouts, usable, values)]
    gap = sampler_gap(rollouts, old_logp) if rank == 0 else math.nan
    if math.isfinite(gap):
        print(f"sampler against pi_old: mean |difference of log-probs| {gap:.2e} nats per token")
        summary = args.rollouts / "rollouts.json"
        if summary.exists():                                # beside what rollout.py says of the batch
            kept = read_json(summary, "delete it, rollout.py writes it again")
            write_json(summary, kept | {"summary": kept.get("summary", {}) | {"sampler_gap": gap}})
    home = "cpu" if args.shard else device                                          # sharding puts each rank's part on its GPU
    lm = load_policy(save or args.model, home, args.checkpointing, args.trust_remote_code, args.offload_activations)
    exact = args.kl_coef > 0 and args.kl_kind == "exact"                            # the one case with two models in memory
    old_lm = load_policy(old, home, trust_remote_code=args.trust_remote_code) if exact else None
    policy = Policy(lm, temperature, args.chunk, old_lm)
    model = (shard_over_ranks(policy) if args.shard else
             DistributedDataParallel(policy, gradient_as_bucket_view=True) if world > 1 else policy)
    optimizer = torch.optim.AdamW(lm.parameters(), lr=args.lr, betas=(0.9, 0.999), weight_decay=0.0)
    carried = save or (args.optimizer_from and args.optimizer_from / "final")
    if carried:
        load_moments(carried, lm, optimizer)
        optimizer.param_groups[0]["lr"] = args.lr                                   # the state carries the lr of its run
    n_prompts = len(rollouts["prompt_index"][usable].unique())
    steps = args.steps or max(1, round((args.epochs or 2) * math.ceil(n_prompts / args.batch_prompts)))

    # ---- training loop ---------------------------------------------------------------------------------------------------
    batches = step_batches(rollouts, usable, args.batch_prompts, args.seed)
    for _ in range(step):
        next(batches)
    bar = tqdm(total=steps, initial=step, desc=f"teacher {args.loss}", disable=rank > 0)
    lengths, response_lengths = rollouts["offsets"].diff(), rollouts["response_offsets"].diff()
    if rank == 0:
        bar.write(split_summary(lengths[next(step_batches(rollouts, usable, args.batch_prompts, args.seed))], args.micro_tokens, world, args.shard))
    while step < steps:
        step, start, batch = step + 1, time.time(), next(batches)
        n_tokens, n_responses = response_lengths[batch].sum().item(), len(batch)    # of the whole step, on every rank
        shares = micro_batches(lengths[batch], args.micro_tokens, world, args.shard)
        sums = torch.zeros(12, dtype=torch.float64, device=device)                  # loss, then token_sums
        implicit = torch.zeros(n_responses, device=device)                          # R(y) of each response of the step
        for i, micro in enumerate(shares[rank]):
            model.require_backward_grad_sync = i == len(shares[rank]) - 1           # DDP: one all-reduce per step
            idx = batch[micro]
            input_ids, mask, old_lp, ref_lp, *token_adv = pad_responses(rollouts, idx, device, old_logp, ref_logp, *ppo_adv)
            r, a = reward[idx].to(device), token_adv[0] if token_adv else adv[idx].to(device)
            logp, entropy, exact_kl = model(input_ids, mask, exact)
            if args.loss == "ce":
                loss = ce_loss(logp, ref_lp, mask, r, args.beta, args.reduce) / n_responses     # Eq. 2
            elif args.loss == "mse":
                loss = mse_loss(logp, mask, r, args.negative_weight) / n_tokens                 # Eq. 10
            elif args.loss == "sapo":
                loss = sapo_loss(logp, old_lp, mask, a) / n_responses
            elif args.loss in ("grpo", "ppo"):
                loss = grpo_loss(logp, old_lp, mask, a) / n_tokens                              # Eq. 5
            else:
                loss = sft_loss(logp, mask, r) / n_tokens
            if args.kl_coef:
                d = log_ratio(logp, old_lp, mask)
                kl = exact_kl if exact_kl is not None else d.exp() * (d.neg().exp() - 1 + d)    # r * k3 of KL(pi || pi_old)
                loss = loss + args.kl_coef * (kl * mask).sum() / n_tokens
            (loss * world).backward()                                               # DDP averages over ranks; we want the sum
            sums[0] += loss.detach()
            sums[1:] += token_sums(logp, entropy, old_lp, mask, r, token_adv[0] if token_adv else 2 * r - 1, 0.2, 0.28)
            implicit[micro.to(device)] = implicit_reward(logp.detach(), ref_lp, mask, args.beta, args.reduce)
        for _ in range(args.shard * (len(shares[0]) - len(shares[rank]))):
            (model(*idle_inputs(device), exact)[0].sum() * 0).backward()
        grad_norm = clip_gradients(lm, args.max_grad_norm)
        if world > 1:
            dist.all_reduce(sums)
            dist.all_reduce(implicit)
        stop_if_not_finite(step, sums, grad_norm, rollouts, batch, old_logp, ref_logp)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # ---- metrics and saving ------------------------------------------------------------------------------------------
        seconds = time.time() - start
        m = {"step": step, "loss": sums[0].item(), "grad_norm": grad_norm, "lr": args.lr, "tokens": n_tokens,
             "tok_per_s": n_tokens / seconds, "seconds": seconds,
             "peak_mem_gib": torch.cuda.max_memory_allocated() / 2 ** 30 if device.type == "cuda" else None,
             **step_metrics(sums[1:])}
        if args.loss == "ce":
            sign_right = (implicit.cpu() > 0) == (reward[batch] > 0)
            m |= {"reward_acc": sign_right.float().mean().item(),
                  "reward_pair_acc": pair_accuracy(implicit.cpu(), reward[batch], rollouts["prompt_index"][batch])}
        if args.loss == "ppo":
            m["explained_variance"] = value_variance                                # of V, not of pi(a|s) as an estimate of R
        metrics.append(json.dumps(m) + "\n")
        stop = stop_asked(caught, device)
        if rank == 0:
            write_atomic(args.out / "metrics.jsonl", lambda p: p.write_text("".join(metrics)))
            bar.update()
            bar.write(f"step {step:03d}/{steps:03d} | loss {m['loss']:+.4f} | kl(old,new) {m['kl_old_new']:.4f} | "
                      f"entropy {m['entropy']:.3f} | clip {m['clip_frac']:.3f} | grad {grad_norm:.2f} | {m['tok_per_s']:,.0f} tok/s")
        if step % args.save_every == 0 or stop and step < steps:
            save_step(args.out, f"step-{step:04d}", lm, tokenizer, optimizer, step, args.save_every)
        if stop and step < steps:
            leave(stop, args.out, step)
    save_step(args.out, "final", lm, tokenizer, optimizer, step, args.save_every)
    if world > 1:
        dist.barrier()                                      # the others wait until the checkpoint is complete


if __name__ == "__main__":
    run_main(main, lambda: memory_advice(parse_args()))
