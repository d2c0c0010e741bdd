"""
Benchmark of logps_from_hidden: time against the matrix products that cannot be avoided, and peak memory,
beside other ways.

    python tests/bench_logps.py --tokens 2048 --dtype bf16        # prints one JSON object; progress on stderr
    python tests/bench_logps.py --scaling                         # ours at 512 ... 8192 tokens: how time and
    memory grow

Time: all variants take turns in one process, the minimum of the rounds counts (CPU: process time; GPU:
events). `products` is the yardstick: the four products (logits, logits again, dh, dW) of any implementation
that recomputes, in tiles of 1024 x 8192. Memory: each variant in a fresh process; the peak beyond inputs and
the two gradients.
"""
import argparse
import json
import os
import platform
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import teacher  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def ours(hidden, weight, targets, entropy=True):
    return teacher.logps_from_hidden(hidden, weight, targets, 1.0, with_entropy=entropy)


def dense(hidden, weight, targets, entropy=True):
    logits = (hidden @ weight.T).float()
    logp = logits.log_softmax(-1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1) if entropy else None


def checkpointed(hidden, weight, targets, entropy=True, rows=512):
    """torch.utils.checkpoint around each chunk of full rows."""
    parts = [checkpoint(dense, h, weight, t, entropy, use_reentrant=False) for h,
             t in zip(hidden.split(rows), targets.split(rows))]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]) if entropy else None


class FullRows(torch.autograd.Function):
    """Chunks of full rows, recomputed in backward: the way of verl's torch path, written anew."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, rows):
        ctx.save_for_backward(hidden, weight, targets)
        ctx.rows = rows
        with torch.no_grad():
            parts = [dense(h, weight, t) for h, t in zip(hidden.split(rows), targets.split(rows))]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    @staticmethod
    def backward(ctx, grad_logp, grad_entropy):
        hidden, weight, targets = ctx.saved_tensors
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        for row in range(0, len(hidden), ctx.rows):
            i = slice(row, row + ctx.rows)
            log_p = (hidden[i] @ weight.T).float().log_softmax(-1)
            p = log_p.exp()
            entropy = -(p * log_p).sum(-1, keepdim=True)
            grad = -p * grad_logp[i, None] - p * (log_p + entropy) * grad_entropy[i, None]
            grad.scatter_add_(1, targets[i, None], grad_logp[i, None])
            grad = grad.to(hidden.dtype)
            grad_hidden[i] = grad @ weight
            grad_weight += grad.T @ hidden[i]
        return grad_hidden, grad_weight, None, None


def full_rows(hidden, weight, targets, entropy=True):
    return FullRows.apply(hidden, weight, targets, 512)


def trl(hidden, weight, targets, entropy=True):
    from trl.kernels import ChunkedLogProbFunction
    out = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 32768, None, 1.0,
                                       ("entropy",) if entropy else ())
    return out[0], out[1]


def liger(hidden, weight, targets, entropy=True):
    """Log-probs only: Liger's selective log-prob has no entropy."""
    from liger_kernel.chunked_loss.fused_linear_ppo import _ChunkedSelectiveLogProbFunction
    return _ChunkedSelectiveLogProbFunction.apply(hidden, weight, targets, None, 1.0, 4096), None


VARIANTS = {f.__name__: f for f in (ours, dense, checkpointed, full_rows, trl, liger)}


def products(hidden, weight, train):
    """The bare matrix products, in tiles: logits, and for training logits again, dh and dW."""
    tile = 8192
    for _ in range(2 if train else 1):
        for row in range(0, len(hidden), 1024):
            for v in range(0, len(weight), tile):
                z = hidden[row:row + 1024] @ weight[v:v + tile].T
    if train:
        for v in range(0, len(weight), tile):
            for row in range(0, len(hidden), 1024):
                z = torch.zeros(len(hidden[row:row + 1024]), len(weight[v:v + tile]), dtype=hidden.dtype,
                                device=hidden.device)
                z @ weight[v:v + tile]
                z.T @ hidden[row:row + 1024]


def inputs(args, tokens=None):
    generator = torch.Generator().manual_seed(0)
    n = tokens or args.tokens
    hidden = torch.randn(n, args.hidden, generator=generator)
    weight = torch.randn(args.vocab, args.hidden, generator=generator) / args.hidden ** 0.5 * 3
    targets = torch.randint(args.vocab, (n,), generator=generator)
    cast = [x.to(args.device, DTYPES[args.dtype]).requires_grad_() for x in (hidden, weight)]
    return *cast, targets.to(args.device), torch.randn(2, n, generator=generator).to(args.device)


def run(variant, hidden, weight, targets, cotangents, train):
    """One forward (and backward) of a variant."""
    with torch.set_grad_enabled(train):
        logp, entropy = VARIANTS[variant](hidden, weight, targets)
        if train:
            total = (logp.float() * cotangents[0]).sum() + (0 if entropy is None
                                                            else (entropy.float() * cotangents[1]).sum())
            torch.autograd.grad(total, (hidden, weight))


def seconds(call, device):
    """CPU: process time of all threads. GPU: wall time around a synchronised call."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    if device != "cpu":
        torch.cuda.synchronize()
    start = clock()
    call()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - start


def resident():
    """Bytes of this process in memory: (now, highest since the mark was reset)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(status[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))


def peak(args, variant):
    """MB beyond inputs and gradients at the peak of one forward and backward: called in a fresh process."""
    hidden, weight, targets, cotangents = inputs(args)
    gradients = sum(x.numel() * x.element_size() for x in (hidden, weight))
    if args.device == "cpu":
        # code and buffers
        run(variant, hidden[:8].detach().requires_grad_(), weight[:64].detach().requires_grad_(),
            targets[:8] % 64, cotangents[:, :8], True)
        Path("/proc/self/clear_refs").write_text("5")
        before = resident()[0]
        run(variant, hidden, weight, targets, cotangents, True)
        return (resident()[1] - before - gradients) / 1e6
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(variant, hidden, weight, targets, cotangents, True)
    return (torch.cuda.max_memory_allocated() - before - gradients) / 1e6


def peak_in_fresh_process(args, variant, tokens=None):
    command = [sys.executable, __file__, "--peak", variant, "--tokens", str(tokens or args.tokens),
               "--hidden", str(args.hidden), "--vocab", str(args.vocab), "--dtype", args.dtype, "--device",
               args.device]
    # freed blocks leave the process
    done = subprocess.run(command, capture_output=True, text=True,
                          env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"})
    return round(float(done.stdout), 1) if done.returncode == 0 else None


def parse_args():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tokens", type=int, default=2048)
    p.add_argument("--hidden", type=int, default=1024)
    p.add_argument("--vocab", type=int, default=151936)
    p.add_argument("--dtype", choices=DTYPES, default="fp32")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    p.add_argument("--memory-tokens", type=int, default=4096, help="0: no memory runs")
    p.add_argument("--scaling", action="store_true")
    p.add_argument("--peak", choices=VARIANTS, help=argparse.SUPPRESS)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return p.parse_args()


def main():
    args = parse_args()
    if args.peak:
        return print(peak(args, args.peak))
    result = {"benchmark": "logps_from_hidden", "command": " ".join(sys.argv),
              "device": torch.cuda.get_device_name() if args.device == "cuda" else
              f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)", "torch": torch.__version__,
              "date": str(date.today()), "hidden": args.hidden, "vocab": args.vocab, "dtype": args.dtype}
    if args.scaling:
        rows = []
        for tokens in (512, 1024, 2048, 4096, 8192):
            data = inputs(args, tokens)
            rows.append({"tokens": tokens, "seconds": min(seconds(lambda: run("ours", *data, True),
                                                                  args.device) for _ in range(args.rounds)),
                         "peak_mb_beyond_gradients": peak_in_fresh_process(args, "ours", tokens)})
            print(rows[-1], file=sys.stderr)
        return print(json.dumps(result | {"scaling": rows}, indent=1))

    data, variants, times = inputs(args), [], {}
    for variant in args.variants:
        try:                                                # on few tokens: is the library here?
            run(variant, data[0][:16], data[1], data[2][:16], data[3][:, :16], True)
            variants.append(variant)
        except ImportError as error:
            print(f"{variant}: {error}", file=sys.stderr)
    for _ in range(args.rounds):
        for train in (True, False):
            key = "forward_backward" if train else "forward"
            calls = {"products": lambda: products(data[0].detach(), data[1].detach(), train)}
            calls |= {variant: lambda variant=variant: run(variant, *data, train) for variant in variants}
            for variant, call in calls.items():
                times.setdefault(key, {}).setdefault(variant, []).append(seconds(call, args.device))
                print(key, variant, f"{times[key][variant][-1]:.2f} s", file=sys.stderr)
    for key, found in times.items():
        best = {variant: min(values) for variant, values in found.items()}
        result[key] = {variant: {"seconds": round(t, 4), "ratio_to_products": round(t / best["products"], 3)}
                       for variant, t in best.items()}
    result |= {"tokens": args.tokens, "rounds": args.rounds}
    if args.memory_tokens:
        peaks = {v: peak_in_fresh_process(args, v, args.memory_tokens) for v in variants}
        result["peak_mb_beyond_gradients"] = {"tokens": args.memory_tokens} | peaks
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
