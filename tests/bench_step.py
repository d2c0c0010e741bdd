"""
Benchmark of a training step and of scoring with random weights, against the machine's measured matrix-product
rate.

    python tests/bench_step.py --shape qwen3-4b --lengths 2048 8192 32768 81920     # one GPU; one JSON object
    on stdout MALLOC_MMAP_THRESHOLD_=65536 python tests/bench_step.py --shape small --lengths 1024 4096
    # CPU python tests/bench_step.py --table                                              # the README's
    memory table, computed

A step is what distill.py does with one response as micro-batch: forward with checkpointing, Eq. 9, backward,
clipping, AdamW on fp32 parameters. FLOPs are counted with recomputation: 8 per weight and token, and 4 x 2 x
T^2 x q per layer for causal attention (forward, recomputed, twice that backward; half of the square). Peak
memory is measured and compared with `memory`.
"""
import argparse
import functools
import json
import platform
import subprocess
import sys
from datetime import date
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import bench_logps  # noqa: E402
import distill  # noqa: E402
import teacher  # noqa: E402

SHAPES = {
    "small": transformers.Qwen3Config(vocab_size=8192, hidden_size=256, num_hidden_layers=8,
                                      num_attention_heads=8, num_key_value_heads=2, head_dim=32,
                                      intermediate_size=768, tie_word_embeddings=True),
    "1.5b": transformers.Qwen2Config(vocab_size=151936, hidden_size=1536, num_hidden_layers=28,
                                     # JustRL-Nemotron-1.5B's shape
                                     num_attention_heads=12, num_key_value_heads=2, intermediate_size=8960,
                                     tie_word_embeddings=True),
    "qwen3-4b": transformers.Qwen3Config(vocab_size=151936, hidden_size=2560, num_hidden_layers=36,
                                         num_attention_heads=32, num_key_value_heads=8, head_dim=128,
                                         intermediate_size=9728, tie_word_embeddings=True),
    "7b": transformers.Qwen2Config(vocab_size=152064, hidden_size=3584, num_hidden_layers=28,
                                   # AceReason-Nemotron-1.1-7B's
                                   num_attention_heads=28, num_key_value_heads=4, intermediate_size=18944,
                                   tie_word_embeddings=False),
    "27b-dense": transformers.Qwen3Config(vocab_size=248320, hidden_size=5120, num_hidden_layers=64,
                                          # a stand-in: Qwen3.5's layers are hybrid
                                          num_attention_heads=40, num_key_value_heads=8, head_dim=128,
                                          intermediate_size=21504, tie_word_embeddings=False),
}


def head_dim(config):
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


@functools.cache
def count_parameters(shape):
    """(of one layer, of embedding and head) without allocating anything."""
    config = SHAPES[shape]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layer = sum(p.numel() for p in model.base_model.layers[0].parameters())
    return layer, sum(p.numel() for p in model.parameters()) - layer * config.num_hidden_layers


@functools.cache
def layer_activations(shape, device="cpu", tokens=61):
    """Bytes per token that autograd keeps of one layer: counted through saved-tensor hooks on a few tokens,
    whose number is prime so that it divides the sizes of activations and not those of weights."""
    config = SHAPES[shape]
    one = type(config)(**config.to_dict() | {"num_hidden_layers": 1, "vocab_size": 64, "layer_types": None})
    model = AutoModelForCausalLM.from_config(one).float().train()
    bf16, kept = torch.device(device).type == "cuda", []

    def keep(x):
        kept.append(x)  # alive until counted: an address would be used again
        return x
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
        embedded = torch.randn(1, tokens, config.hidden_size, dtype=torch.bfloat16 if bf16 else torch.float32,
                               requires_grad=True)
        model.base_model(inputs_embeds=embedded, use_cache=False)
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept
                if x.numel() % tokens == 0}
    return sum(storages.values()) / tokens


def memory(shape, tokens, device="cuda", gpus=1, shard=False, offload=False, checkpointing=True, chunk=1024):
    """Peak memory of a training step in decimal GB per GPU, by part.

    `tokens` are those of the largest micro-batch, all of it response.
    """
    config, (layer, rest) = SHAPES[shape], count_parameters(shape)
    layers, d = config.num_hidden_layers, config.hidden_size
    act = 2 if torch.device(device).type == "cuda" else 4
    n = (layer * layers + rest) / (gpus if shard else 1)
    one, tile = layer_activations(shape, device), 8192 if act == 2 else 1024  # teacher.VOCAB_TILE there
    parts = {"weights": 4 * n, "gradients": 4 * n, "adam": 8 * n,
             # gathered: two layers and their gradient, embedding and head and theirs; else the bf16 copies of
             # one layer's weights
             "working copies": 4 * (3 * layer + 2 * rest) if shard else act % 4 * layer,
             "activations kept": (0 if offload else layers * d * act * tokens) if checkpointing
             # and gradients on their way back
             else layers * one * tokens, "one layer again": one * tokens * (1.25 if checkpointing else 0.25),
             # dh in fp32 and as it leaves, the slice of dW, a handful of tiles
             "head": tokens * d * (4 + 2 * act) + 5 * 4 * chunk * tile + 8 * tile * d}
    return {name: x / 1e9 for name, x in parts.items()} | {"total": sum(parts.values()) / 1e9}


def table():
    """The README's table: computed, for each model, length and machine the flags with which a step fits into
    93 % of the memory."""
    print("| model | parameters | response | weights + gradients + Adam | activations | total, 1 GPU | "
          "total per GPU, 8 GPUs `--shard` | 1 x 80 GB | 8 x 80 GB | 1 x 141 GB | 8 x 141 GB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in ("1.5b", "qwen3-4b", "7b", "27b-dense"):
        config, (layer, rest) = SHAPES[name], count_parameters(name)
        for tokens in (32768, 81920):
            def fits(limit, gpus):
                for flags in ({}, {"shard": True}, {"offload": True}, {"shard": True, "offload": True}):
                    if (gpus > 1 or not flags.get("shard")) and memory(name, tokens, gpus=gpus,
                                                                       **flags)["total"] < 0.93 * limit:
                        return " ".join({"shard": "`--shard`", "offload": "`--offload-activations`"}[flag]
                                        for flag in flags) or "fits"
                return "no"
            alone, split = memory(name, tokens), memory(name, tokens, gpus=8, shard=True)
            states = alone["weights"] + alone["gradients"] + alone["adam"]
            kept = alone["activations kept"] + alone["one layer again"]
            print(f"| {name} | {(layer * config.num_hidden_layers + rest) / 1e9:.1f} B | {tokens:,} | "
                  f"{states:.0f} | {kept:.0f} | {alone['total']:.0f} | {split['total']:.0f} | "
                  f"{fits(80, 1)} | {fits(80, 8)} | {fits(141, 1)} | {fits(141, 8)} |")


def product_rate(device):
    """Highest FLOP/s of a large square matrix product in the forward's type, of a few tries."""
    n, dtype = (8192, torch.bfloat16) if device == "cuda" else (2048, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n ** 3 / min(bench_logps.seconds(lambda: a @ b, device) for _ in range(10))


def measure(args, tokens, rate):
    """Times, rates and peak memory of a training step and of scoring at one length."""
    config, device = SHAPES[args.shape], torch.device(args.device)
    torch.manual_seed(0)
    with device:
        lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy = teacher.Policy(lm.train())
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-6, weight_decay=0.0)
    ids = torch.randint(config.vocab_size, (1, tokens + 1), device=device)
    mask = torch.ones(1, tokens, device=device)
    adv = torch.randn(1, tokens, device=device)

    def score():
        with torch.no_grad():
            return policy(ids, mask)[0]

    def train():
        logp, entropy, _ = policy(ids, mask)
        (distill.distill_loss(logp, entropy, old_logp, adv, mask, entropy_coef=0.01) / tokens).backward()
        norm = teacher.clip_gradients(lm, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm
    old_logp = score()
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    train()                                                 # Adam's state exists from here on
    timed = {name: min(bench_logps.seconds(call, args.device) for _ in range(args.rounds)) for name,
             call in (("step", train), ("scoring", score))}
    if args.device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 1e9
    else:
        # start with MALLOC_MMAP_THRESHOLD_=65536, or freed blocks count as used
        Path("/proc/self/clear_refs").write_text("5")
        train()
        peak = (bench_logps.resident()[1] - args.start_memory) / 1e9
    layer, rest = count_parameters(args.shape)
    weights = layer * config.num_hidden_layers + (rest if config.tie_word_embeddings else rest / 2)
    # forward, causal half of 4 T^2 q
    attention = config.num_hidden_layers * 2 * tokens ** 2 * config.num_attention_heads * head_dim(config)
    flops = {"step": 8 * weights * tokens + 4 * attention, "scoring": 2 * weights * tokens + attention}
    predicted = memory(args.shape, tokens, args.device)
    row = {"tokens": tokens, "peak_gb": round(peak, 2), "predicted_gb": round(predicted["total"], 2),
           **{key: value for name in timed for key,
              value in ((f"{name}_seconds", round(timed[name], 3)),
                        (f"{name}_tok_per_s", round(tokens / timed[name])),
                                                             (f"{name}_share_of_product_rate",
                                                              round(flops[name] / timed[name] / rate, 3)))}}
    print(row, file=sys.stderr)
    return row


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shape", choices=SHAPES, default="small")
    p.add_argument("--lengths", type=int, nargs="+", default=[512, 2048])
    p.add_argument("--rounds", type=int, default=2)
    p.add_argument("--table", action="store_true")
    p.add_argument("--peers", action="store_true",
                   help="tests/bench_peers.py: one optimizer step of ours and of TRL's")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = p.parse_args()
    if args.table:
        return table()
    if args.peers:
        return subprocess.run([sys.executable, Path(__file__).with_name("bench_peers.py")], check=True)
    args.start_memory = bench_logps.resident()[0]
    rate = product_rate(args.device)
    result = {"benchmark": "training step", "command": " ".join(sys.argv),
              "device": torch.cuda.get_device_name() if args.device == "cuda" else
              f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)",
              "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
              "date": str(date.today()), "shape": args.shape, "product_tflops": round(rate / 1e12, 3),
              "lengths": []}
    for tokens in args.lengths:
        result["lengths"].append(measure(args, tokens, rate))
        if args.device == "cuda":
            torch.cuda.empty_cache()
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
