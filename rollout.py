"""
Stage 0: sample K responses to each prompt once, grade them 0/1, and write them as shards (Sec. 4.1).

Both later stages train on one fixed batch: 1,000 prompts x 16 responses of one policy, pi_old. A shard keeps
the token ids exactly as they were sampled (nothing is ever tokenised again) and a reward per response:

    R(y) = 1 if the last \\boxed{} of y equals the gold answer, else 0

1 GPU, or CPU:  python rollout.py --model M --prompts problems.jsonl --out runs/rollouts
8 GPUs:         torchrun --standalone --nproc-per-node 8 rollout.py ...     # one engine per GPU

The same command continues an interrupted run: finished shards are kept. Read next: teacher.py.
"""
import argparse
import contextlib
import csv
import ctypes
import fcntl
import functools
import hashlib
import importlib.util
import inspect
import io
import json
import logging
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from unittest import mock

import huggingface_hub
import pebble
import safetensors
import torch
import transformers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

transformers.utils.logging.disable_progress_bar()           # one bar per run: ours
transformers.utils.logging.set_verbosity_error()      # what it would warn of in a checkpoint, load_lm refuses


# ---- prompts -----------------------------------------------------------------------------------------------

PROMPT_FIELDS = ("problem", "question", "prompt", "Problem", "question_content")
ANSWER_FIELDS = ("answer", "ground_truth", "Short Answer", "reward_model.ground_truth", "input_output")
NO_ANSWER = ("", "nan", "inf", "-inf")                    # texts of values that nothing can be graded against
ASK_FOR_BOX = "\n\nPut your final answer within \\boxed{}."  # MathArena's words: Sec. 4.1 uses its tools


def load_prompts(path, prompt_field=None, answer_field=None, read_row=None):
    """Read problems and answers: list of dict(prompt, answer, index), in the order of the file.

    `prompt` is a str or a chat list of {role, content}; `answer` a str, int, float or a list any of which is
    right. Known layouts are recognised by their field names, or read by a task's `read_row`.
    """
    prompts = []
    for index, (where, row) in enumerate(read_rows(path)):
        if not isinstance(row, dict):
            raise InputError(f"{where} is not an object with named fields")
        if "public_test_cases" in row:                      # LiveCodeBench
            read_row = load_task("code", unsafe_code=True).read_row
        if read_row and not prompt_field and not answer_field:
            with input_errors(f"{where} has test cases or fields that cannot be read"):
                prompt, answer = read_row(row)
        else:
            prompt = pick_field(row, prompt_field, PROMPT_FIELDS)
            answer = math_answer(where, row, answer_field)
        messages = prompt if isinstance(prompt, list) else [{"content": prompt}]
        if not prompt or not all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in messages):
            raise InputError(f"{where} has no prompt in {prompt_field or ' | '.join(PROMPT_FIELDS)}: "
                             f"a string or a chat list is needed (fields: {', '.join(map(str, row))})")
        prompts.append({"prompt": prompt, "answer": answer, "index": index})
    if not prompts:
        raise InputError(f"{path} holds no prompts")
    return prompts


def math_answer(where, row, field=None):
    """Gold answer of a row: its answer field, the number behind the #### of one that is worked out (GSM8K),
    or the last box of `solution` where a row has no answer field (MATH)."""
    answer = pick_field(row, field, ANSWER_FIELDS)
    if answer is None and isinstance(row.get("solution"), str):
        answer = last_boxed(row["solution"])
    worked = re.search(r"(?:^|\n)#### *([^\n]+?)\s*$", answer) if isinstance(answer, str) else None
    if worked:
        answer = re.sub(r"(?<=\d),(?=\d{3})", "", worked[1])             # 1,234 is a number there, not a list
    golds = answer if isinstance(answer, list) else [answer]
    usable = [isinstance(gold, (str, int, float)) and str(gold).strip() not in NO_ANSWER for gold in golds]
    if not usable or not all(usable):
        raise InputError(f"{where} has no answer in {field or ' | '.join(ANSWER_FIELDS)}: see --answer-field")
    return answer


def pick_field(row, wanted, known):
    """Value of the first known field that the row has; dots go into nested objects."""
    for field in [wanted] if wanted else known:
        value = row
        for key in [field] if field in row else field.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            return value
    return None


def encode_prompt(tokenizer, prompt, suffix=""):
    """Token ids of a prompt, with the opening of the assistant's turn; plain text without a chat template."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
    if suffix != ASK_FOR_BOX or "\\boxed" not in messages[-1]["content"]:
        messages[-1]["content"] += suffix
    with input_errors(f"the prompt {str(prompt)[:80]!r} cannot be encoded"):  # such as roles it does not know
        if tokenizer.chat_template is None:
            return tokenizer.encode("\n".join(m["content"] for m in messages))
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


# ---- grading -----------------------------------------------------------------------------------------------

def last_boxed(text):
    """Content of the last \\boxed{...}, braces matched; None if there is none or it never closes."""
    boxes = list(re.finditer(r"\\boxed\s*\{", text))
    start, depth = boxes[-1].end() if boxes else len(text), 1
    for i in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[start:i].strip()
    return None


def gold_text(gold):
    """Gold answers come as str, int or float (27.0 means 27)."""
    return str(int(gold)) if isinstance(gold, float) and gold == int(gold) else str(gold).strip()


EXPLODES = re.compile(r"""(\^|\*\*)\s*(\{[^{}]*|\([^()]*|(\\[a-zA-Z]+|[a-zA-Z]|\d+)\s*)(\^|\*\*)  # a tower
    | (\^|\*\*)\s*[{(]?\s*[+-]?\d{5}                                      # an exponent of five digits
    | \d{4}\s*\)?\s*! | \^\s*\{?\w+\}?\s*\)?\s*! | !\s*\)\s*!             # a factorial of something large
    | binom\s*\{[^{}]*(\^|\d{4})
    | \\(sum|prod|int|lim)\b                             # nobody's final answer""", re.VERBOSE | re.DOTALL)


def quick_verdict(answer, gold, stats):
    """1.0 or 0.0 where no mathematics is needed, else None."""
    if answer is None or answer == gold:
        return float(answer == gold)
    if len(answer) > 1000 or EXPLODES.search(answer):
        stats["refused"] += 1                        # computer algebra would run for ever, or fill the memory
        return 0.0
    numbers = [text.replace("\\,", "") for text in (answer, gold)]      # 6\,300 is 6300
    if all(re.fullmatch(r"[+-]?\d+", text) for text in numbers):
        return float(int(numbers[0]) == int(numbers[1]))
    return None


def verify_in_worker(answer, gold):
    """True, False, or None if the gold answer cannot be parsed. The time limit is the pool's."""
    import math_verify
    logging.getLogger("math_verify").setLevel(logging.ERROR)            # it warns of running without its own
    gold, answer = (math_verify.parse("\\boxed{" + x + "}", parsing_timeout=None) for x in (gold, answer))
    return math_verify.verify(gold, answer, timeout_seconds=None) if gold else None         # gold first


def grade_in_worker(path, response, answer, options):
    """What the `grade` of a task's file says of one response; the machine was checked before."""
    return import_file(path).grade([response], [answer], **options)[0]


def grade(responses, answers, task="math", workers=2, timeout=10.0, stats=None, pool=None, unsafe_code=False):
    """Grade responses (list of str) against gold answers: list of 1.0 right, 0.0 wrong.

    math: identical strings and plain integers are decided at once, everything else by math-verify, each
    (answer, gold) pair once; of a list of gold answers any is right. Another task: by its file (load_task).
    Worker processes (of `pool`, else of one that lasts for this call) are killed and replaced after `timeout`
    seconds. The dict `stats` receives counts: timeouts, errors, refused (too long or a tower of powers),
    unparsable_gold, verified (asked a worker).
    """
    stats = {} if stats is None else stats
    for key in ("timeouts", "errors", "refused", "unparsable_gold", "verified"):
        stats.setdefault(key, 0)
    if task == "math":
        asked = [[(last_boxed(response), gold_text(g)) for g in (gold if isinstance(gold, list) else [gold])]
                 for response, gold in zip(responses, answers, strict=True)]
        verdicts = {pair: quick_verdict(*pair, stats) for pair in set().union(*asked)}      # equal ones once
        jobs = {pair: (verify_in_worker, pair, timeout) for pair in verdicts if verdicts[pair] is None}
    else:
        file, options = load_task(task, unsafe_code), {"timeout": timeout, "unsafe_code": unsafe_code}
        options = {k: options[k] for k in options if k in inspect.signature(file.grade).parameters}
        limit = getattr(file, "time_limit", lambda answer, timeout: timeout)
        asked, verdicts = [[n] for n in range(len(responses))], {}
        jobs = {n: (grade_in_worker, (Path(file.__file__), response, answer, options), limit(answer, timeout))
                for n, (response, answer) in enumerate(zip(responses, answers, strict=True))}
    stats["verified"] += len(jobs)
    with contextlib.nullcontext(pool) if pool or not jobs else grading_pool(workers) as pool:
        futures = {key: pool.schedule(work, args=given, timeout=seconds)
                   for key, (work, given, seconds) in jobs.items()}
        verdicts |= {key: verdict_of(future, stats) for key, future in futures.items()}
    return [max(verdicts[key] for key in keys) for keys in asked]


def verdict_of(future, stats):
    """1.0 or 0.0 from a worker's answer; what went wrong is counted, and wrong."""
    try:
        verdict = future.result()
        stats["unparsable_gold"] += verdict is None
        return float(bool(verdict))
    except TimeoutError:
        stats["timeouts"] += 1
    except Exception:                                       # the worker died, or its library raised
        stats["errors"] += 1
    return 0.0


# ---- sampling: an engine is a generator that yields (shard, responses) as shards get complete --------------
# responses: per prompt a list of n dicts (ids with the EOS; truncated: bool; logp: list of float, or None)

def generate_hf(lm, tokenizer, shards, n, temperature, top_p, top_k, max_tokens, seed):
    """Sample with transformers, one left-padded batch per shard. shards: {number: list of (index, ids)}."""
    stop = lm.generation_config.eos_token_id
    stop = tokenizer.eos_token_id if stop is None else stop
    stop = stop if isinstance(stop, list) else [stop]
    pad = min(stop)                                         # masked before a prompt, cut off after a response
    # every setting is given: what is left out would be filled in from the checkpoint's own generation config
    config = GenerationConfig(do_sample=temperature > 0, temperature=temperature or 1.0, top_p=top_p,
                              top_k=max(top_k, 0), repetition_penalty=1.0, max_new_tokens=max_tokens,
                              eos_token_id=stop, pad_token_id=pad)
    for number, prompts in shards.items():
        rows = [ids for _, ids in prompts for _ in range(n)]
        width = max(map(len, rows))
        input_ids = torch.tensor([[pad] * (width - len(r)) + r for r in rows], device=lm.device)
        mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=lm.device)
        torch.manual_seed(derive_seed(seed, number))
        with torch.inference_mode():
            output = lm.generate(input_ids=input_ids, attention_mask=mask, generation_config=config)
        responses = []
        for ids in output[:, width:].tolist():
            end = next((i + 1 for i, token in enumerate(ids) if token in stop), None)
            responses.append({"ids": ids[:end], "truncated": end is None, "logp": None})
        yield number, [responses[i:i + n] for i in range(0, len(responses), n)]


def generate_vllm(llm, shards, n, temperature, top_p, top_k, max_tokens, seed):
    """Sample with vLLM: the requests of all shards are in flight at once, so that batches stay full."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind
    for number, prompts in shards.items():
        for position, (index, ids) in enumerate(prompts):
            params = SamplingParams(n=n, temperature=temperature, top_p=top_p, top_k=top_k,
                                    max_tokens=max_tokens, seed=derive_seed(seed, index), logprobs=0,
                                    output_kind=RequestOutputKind.FINAL_ONLY)
            llm.llm_engine.add_request(f"{number}/{position}", {"prompt_token_ids": ids}, params)
    done = {number: {} for number in shards}
    while llm.llm_engine.has_unfinished_requests():
        for request in llm.llm_engine.step():
            if request.finished:
                number, position = map(int, request.request_id.split("/"))
                done[number][position] = [
                    {"ids": list(o.token_ids), "truncated": o.finish_reason == "length",
                     "logp": [step[token].logprob for step, token in zip(o.logprobs, o.token_ids)]}
                    for o in sorted(request.outputs, key=lambda o: o.index)]
                if len(done[number]) == len(shards[number]):
                    responses = done.pop(number)
                    yield number, [responses[i] for i in range(len(responses))]


# ---- shards: flat ("jagged") tensors; response n is input_ids[offsets[n]:offsets[n+1]], prompt first -------

SHARD_VERSION = 1
SHARD_FIELDS = {"input_ids": torch.int32, "offsets": torch.int64, "prompt_len": torch.int32,
                "prompt_index": torch.int64, "reward": torch.float32, "truncated": torch.bool,
                "sampler_logp": torch.float32, "reward_think": torch.float32}      # the last is optional


def build_shard(prompts, responses, rewards, rewards_think, meta, grading=None):
    """prompts: list of (index, ids); responses: per prompt a list of dicts; rewards: flat, in that order;
    grading: the counts of `grade`, which differ between shards and so are no part of the settings in meta."""
    flat = [(index, ids, r) for (index, ids), group in zip(prompts, responses, strict=True) for r in group]
    lengths = torch.tensor([len(ids) + len(r["ids"]) for _, ids, r in flat])
    columns = {
        "input_ids": [t for _, ids, r in flat for t in ids + r["ids"]],
        "offsets": [0, *lengths.cumsum(0).tolist()],
        "prompt_len": [len(ids) for _, ids, _ in flat],
        "prompt_index": [index for index, _, _ in flat],
        "reward": rewards,
        "truncated": [r["truncated"] for _, _, r in flat],
        "sampler_logp": [x for _, _, r in flat for x in r["logp"] or [math.nan] * len(r["ids"])],
        **({} if rewards_think is None else {"reward_think": rewards_think}),
    }
    tensors = {name: torch.tensor(values, dtype=SHARD_FIELDS[name]) for name, values in columns.items()}
    return {"version": SHARD_VERSION, **tensors, "meta": meta, "grading": grading or {}}


def grade_shard(tokenizer, prompts, responses, answers, args, meta, pool):
    """A shard of graded responses; its reward_think is the verdict on what stands after </think> only."""
    texts = tokenizer.batch_decode([r["ids"] for group in responses for r in group])
    golds = [answers[index] for (index, _), group in zip(prompts, responses) for _ in group]
    options = dict(task=args.task, timeout=args.grade_timeout, pool=pool, unsafe_code=args.unsafe_code)
    after = [t.rpartition("</think>")[2] if "</think>" in t else "" for t in texts]
    stats = {}
    rewards = grade(texts, golds, stats=stats, **options)
    thinks = grade(after, golds, **options) if any(after) else None
    if args.require_think_end:
        rewards = thinks or [0.0] * len(rewards)
    finished = [not r["truncated"] for group in responses for r in group]      # ours: cut off is wrong
    rewards = [a * b for a, b in zip(rewards, finished)]
    thinks = thinks and [a * b for a, b in zip(thinks, finished)]
    if args.rehearse:                                       # graded all the same: a broken grader shows
        rewards = [float(i % 2 == 0) for i in range(len(rewards))]
    return build_shard(prompts, responses, rewards, thinks, meta, stats)


def choose_prompts(args, tokenizer):
    """({index: answer}, [(index, token ids)] that are sampled, meta of the choice)."""
    task = load_task(args.task, args.unsafe_code)           # refuses before anything is sampled
    problems = load_prompts(args.prompts, args.prompt_field, args.answer_field, task and task.read_row)
    if args.num_prompts and args.num_prompts < len(problems):
        problems = random.Random(args.seed).sample(problems, args.num_prompts)
    encoded = [(p["index"], encode_prompt(tokenizer, p["prompt"], args.prompt_suffix)) for p in problems]
    content = json.dumps([(p["prompt"], p["answer"]) for p in problems]).encode()
    return {p["index"]: p["answer"] for p in problems}, encoded, {
        "prompts": str(args.prompts), "prompts_sha256": hashlib.sha256(content).hexdigest(),
        "num_prompts": len(problems)}


def sample_rollouts(args, pool):
    """Sample and grade what is missing of the shards of args.out (see parse_args). Also used by evaluate.py.

    Returns (number of shards, tokens per second of all engines or None if nothing was missing).
    """
    rank, world, local_rank = ranks()
    tokenizer = load_tokenizer(args.model, args.trust_remote_code)
    answers, encoded, chosen = choose_prompts(args, tokenizer)
    slices = [encoded[i:i + args.shard_prompts] for i in range(0, len(encoded), args.shard_prompts)]
    engine, version = pick_engine(args.engine)
    settings = {"n": args.num_responses, "temperature": args.temperature, "top_p": args.top_p,
                "top_k": args.top_k, "max_tokens": args.max_tokens, "seed": args.seed}
    meta = {"model": str(args.model), "model_fingerprint": checkpoint_fingerprint(args.model),
            "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer), **settings, **chosen,
            "engine": engine, "engine_version": version, "prompt_suffix": args.prompt_suffix,
            "task": args.task, "require_think_end": args.require_think_end, "shards": len(slices),
            "shard_prompts": args.shard_prompts, **({"rehearsal": 1} if args.rehearse else {})}
    load_shards(args.out, meta)                             # refuses what was sampled with other settings
    paths = [args.out / f"shard-{i:05d}.pt" for i in range(len(slices))]
    gpus = args.tensor_parallel if engine == "vllm" else 1
    mine = shards_of_rank(len(slices), rank, world, gpus)
    missing = {i: slices[i] for i in mine if not paths[i].exists()}
    if not missing:
        return len(slices), None
    one_writer(args.out)
    generate, close = open_engine(args, engine, tokenizer, local_rank)
    start, n_tokens, total = time.time(), 0, sum(map(len, missing.values())) * args.num_responses
    with tqdm(total=total, desc="sampling", unit="resp", disable=rank > 0) as bar:
        for number, responses in generate(missing, **settings):
            shard = grade_shard(tokenizer, slices[number], responses, answers, args, meta, pool)
            write_atomic(paths[number], lambda p: torch.save(shard, p))
            n_tokens += len(shard["sampler_logp"])
            bar.update(len(shard["reward"]))
            bar.set_postfix_str(f"{n_tokens / (time.time() - start):,.0f} tok/s")
    close()
    return len(slices), n_tokens / (time.time() - start) * min(len(slices), max(1, world // gpus))


def sampling_flags(arg):
    """The flags of an engine and of the grading, which evaluate.py has too."""
    arg("--prompt-suffix", default="", help="text added to every problem")
    arg("--ask-for-box", dest="prompt_suffix", action="store_const", const=ASK_FOR_BOX,
        help="ask for a boxed answer in problems that do not")
    arg("--seed", type=int, default=0, help="of the choice of prompts and of the sampling")
    # Engine
    arg("--engine", choices=["auto", "vllm", "hf"], default="auto", help="auto: vLLM on a GPU, else hf")
    arg("--tensor-parallel", type=int, default=1, help="GPUs per vLLM engine; start one process per GPU")
    arg("--max-model-len", type=int, help="context that vLLM reserves memory for (default: the model's)")
    arg("--gpu-memory-utilization", type=float, default=0.9, help="share of the GPU that vLLM takes")
    arg("--shard-prompts", type=int, default=16, help="prompts per shard; with hf also the batch, times n")
    arg("--trust-remote-code", action="store_true", help="run code that comes with the checkpoint")
    # Grading
    arg("--task", default="math", help="math: the last box; code: the last block of code passes all tests; "
                                       "FILE.py: a task of your own, such as tests/tasks/sorting.py")
    arg("--unsafe-code", action="store_true", help="run programs without isolation, as yourself")
    arg("--workers", type=int, default=2, help="grading processes")
    arg("--grade-timeout", type=float, default=10.0, help="seconds per answer, or per test of a program")


def parse_args(argv=None):
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arg = p.add_argument
    # Model and data
    arg("--model", required=True, help="the policy that writes the rollouts, pi_old: folder or hub name")
    arg("--prompts", required=True, help=".jsonl, .json, .csv, .parquet or a hub data set with answers")
    arg("--out", type=Path, required=True, help="folder of the shards")
    arg("--num-prompts", type=int, default=1000, help="a random N by --seed, 0 for all in order (Sec. 4.1)")
    arg("--prompt-field", help="field of the problem, if it has an unusual name")
    arg("--answer-field", help="field of the gold answer, if it has an unusual name")
    # Sampling
    arg("-n", "--num-responses", type=int, default=16, help="responses per prompt (Sec. 4.1)")
    arg("--temperature", type=float, default=0.6, help="Sec. 4.1: 0.6, and 1.0 for Qwen3.5")
    arg("--top-p", type=float, default=1.0, help="ours: 1, so that pi_old is the distribution sampled from")
    arg("--top-k", type=int, default=-1, help="-1 for all tokens")
    arg("--max-tokens", type=int, default=32768, help="longest response (Sec. 4.1)")
    sampling_flags(arg)
    arg("--require-think-end", action="store_true", help="reward only answers after </think> (default: any)")
    arg("--rehearse", action="store_true", help="reward every other response, right or wrong: so few "
                                                "tokens hold no right answer to learn from")
    args = p.parse_args(argv)
    check_positive(args, "num_responses", "max_tokens", "shard_prompts", "tensor_parallel", "workers",
                   "grade_timeout")
    if not 0 <= args.temperature < math.inf or not 0 < args.top_p <= 1 or args.num_prompts < 0:
        raise InputError("--temperature and --num-prompts must not be negative, and --top-p in (0, 1]")
    return args


def main():
    args = parse_args()
    with grading_pool(args.workers) as pool:
        n_shards, rate = sample_rollouts(args, pool)
    if rate is None and (args.out / "rollouts.json").exists():
        if ranks()[0] == 0:
            print(f"{args.out}: already finished")
    elif len(list(args.out.glob("shard-*.pt"))) == n_shards:
        summarize(args.out, rate)                    # by the rank that finishes last: only it sees all shards


# ---- machinery: nothing below is about the method ----------------------------------------------------------

class InputError(ValueError):
    """What the user gave cannot be used. One line: what, where, what to do. Exit code 2."""


class RunError(RuntimeError):
    """A run cannot go on, after a NaN for example. One line: what, where, what to do. Exit code 1."""


class Parser(argparse.ArgumentParser):
    """argparse whose own complaints (an unknown flag, a wrong choice) are one line and exit code 2, too."""

    def error(self, message):
        raise InputError(f"{message}; --help lists the options")


@contextlib.contextmanager
def input_errors(what, hint=""):
    """Whatever a library raises within becomes an InputError: `what`, the first line of its error, `hint`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:                              # a damaged or foreign file has a dozen types
        said = str(error).strip().partition("\n")[0][:300]
        raise InputError(f"{what} ({type(error).__name__}: {said}){hint and ': ' + hint}") from error


def check_positive(args, *names):
    """InputError unless each of these flags is positive or not given. Also used by the others."""
    for name in names:
        if getattr(args, name) is not None and not 0 < getattr(args, name) < math.inf:
            raise InputError(f"--{name.replace('_', '-')} must be positive")


def ranks():
    """(rank, world size, rank on this machine) as torchrun sets them. Also used by teacher.py."""
    return tuple(int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))


STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)              # a cluster wants its machine back, and Ctrl-C


def run_main(main, memory_advice=lambda: "use more GPUs"):
    """Exit codes of every script: 0 done, 2 bad input (one line on stderr), 1 anything else.

    SIGTERM and Ctrl-C end a stage at once, but a training loop saves first; either way exit code 1.
    memory_advice() says which flag to change when the GPU's memory was not enough.
    """
    code, said, first = 1, None, ranks()[0] == 0
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)          # PR_SET_PDEATHSIG: no rank outlives its torchrun
    for number in STOP_SIGNALS:
        signal.signal(number, signal.default_int_handler)
    try:
        main()
        code = 0
    except InputError as error:
        code, said = 2, first and f"error: {error}"
    except (RunError, OSError) as error:                    # whichever rank it is: only that one may know
        said = f"error: {error}"
    except torch.OutOfMemoryError:
        said = f"error: out of GPU memory: {memory_advice()}"
    except KeyboardInterrupt as stop:
        said = first and f"stopped{f' by {stop}' if stop.args else ''}; the same command continues"
    except Exception:
        traceback.print_exc()
    if said:
        print(f"{Path(sys.argv[0]).name}: {said}", file=sys.stderr)
    if torch.distributed.is_initialized():                  # gloo's destructor can wait for a thread that
        sys.stdout.flush()                                  # waits for Python's lock: a rank would hang
        os._exit(code)
    sys.exit(code)


# files: complete or absent, one writer per folder

def remove(path):
    """Delete a file or a folder, if it is there."""
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def write_atomic(path, write):
    """Call write(temporary path), flush to disk, rename to `path`: nobody ever sees half a file or folder."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.{ranks()[0]}.partial")       # ranks may write the same file
    path.parent.mkdir(parents=True, exist_ok=True)
    remove(partial)                                         # of a process that was killed
    try:
        write(partial)
        for file in [partial, *partial.rglob("*")]:
            if file.is_file():
                with open(file, "rb") as f:
                    os.fsync(f.fileno())                    # a network disk says only here that it is full
        os.replace(partial, path)
        folder = os.open(path.parent, os.O_RDONLY)          # the new name, too, has to survive a power cut
        os.fsync(folder)
        os.close(folder)
    except (RuntimeError, safetensors.SafetensorError) as error:        # their words for a full disk
        said, free = str(error).partition("\n")[0], shutil.disk_usage(path.parent).free / 2 ** 20
        raise OSError(f"{path} cannot be written ({said}; {free:,.1f} MiB free)") from error
    finally:
        remove(partial)


def write_json(path, value):
    write_atomic(path, lambda p: p.write_text(json.dumps(value, indent=1, default=str) + "\n"))


def read_json(path, hint):
    """An object from a JSON file; else an InputError that ends in `hint`. Also used by the others."""
    with input_errors(f"{path} is not readable JSON", hint):
        return dict(json.loads(Path(path).read_text()).items())


def read_tensors(path, what, hint):
    """torch.load of data, never of code, memory-mapped; or InputError. Also used by teacher.py."""
    with input_errors(f"{path} is not a readable {what}", hint):
        return torch.load(path, weights_only=True, mmap=True)


LOCKS = []                                                  # open files; a lock ends with its process


def one_writer(folder):
    """Keep a second run out of a folder until the end of this process; or InputError.

    A lock for each rank: those of one run write side by side, those of a second one meet their own numbers.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        LOCKS.append(open(Path(folder) / f".writer-{ranks()[0]}", "a"))
        fcntl.lockf(LOCKS[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)           # which a forked engine does not share
    except BlockingIOError as error:
        raise InputError(f"{folder}: another run is at work in it; wait, or use another --out") from error
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(f"{folder} cannot be written: it is not a folder; use another --out") from error


# checkpoints, tokenizers and tasks, known by their content

def resolve_checkpoint(model):
    """Folder of a checkpoint given as a path or as a hub name (downloaded once into the hub's own cache)."""
    if Path(model).is_dir():
        if not (Path(model) / "config.json").is_file():
            raise InputError(f"{model} has no config.json: give the folder of a Hugging Face checkpoint")
        return Path(model)
    with input_errors(f"checkpoint {model} does not exist, neither as a folder nor on the hub"):
        wanted = ["*.safetensors", "*.json", "*.txt", "*.jinja", "*.model", "*.py"]
        return Path(huggingface_hub.snapshot_download(str(model), allow_patterns=wanted))


@functools.cache
def file_sha256(path, size, mtime_ns):
    """Hash of a file, once per process: size and time of its last change say that it is still the same."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def checkpoint_fingerprint(model):
    """Hash of config and weights: a checkpoint with the same content elsewhere is the same policy."""
    folder, digest = resolve_checkpoint(model), hashlib.sha256()
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise InputError(f"{folder} has no *.safetensors: only safetensors weights are read")
    for path in [folder / "config.json", *weights]:
        with input_errors(f"{path} cannot be read"):
            digest.update(file_sha256(path, path.stat().st_size, path.stat().st_mtime_ns))
    return digest.hexdigest()


def load_lm(model, dtype, trust_remote_code=False):
    """A causal LM from safetensors; InputError if transformers cannot load it. Also used by teacher.py."""
    with input_errors(f"{model} is not a checkpoint that can be loaded"):
        lm, info = AutoModelForCausalLM.from_pretrained(
            resolve_checkpoint(model), dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code,
            output_loading_info=True)
    if info["missing_keys"]:                                # transformers would go on with random numbers
        raise InputError(f"{model} lacks weights, such as {min(info['missing_keys'])}: use another copy")
    return lm


def load_tokenizer(model, trust_remote_code=False):
    with input_errors(f"{model} has no usable tokenizer"):
        return AutoTokenizer.from_pretrained(resolve_checkpoint(model), trust_remote_code=trust_remote_code)


def tokenizer_fingerprint(tokenizer):
    """Hash of the vocabulary: rollouts are token ids, so every policy that reads them must share it."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def load_task(task, unsafe_code=False):
    """Module of a task's file, `code` (tests/tasks/code.py) or a FILE.py; None for math.

    read_row(row) -> (prompt, answer); grade(responses, answers) -> list of 1.0, 0.0, or None for a useless
    answer, called in a worker process, with `timeout` and `unsafe_code` if it has such parameters. Optional:
    time_limit(answer, timeout) -> seconds; check_machine(unsafe_code), which raises if it cannot grade here.
    """
    if task == "math":
        return None
    path = Path(__file__).parent / "tests" / "tasks" / "code.py" if task == "code" else Path(task)
    with input_errors(f"--task {task} is neither math nor code nor the FILE.py of a task"):
        module = import_file(path.resolve())
        assert hasattr(module, "read_row") and hasattr(module, "grade"), "it lacks read_row or grade"
        if hasattr(module, "check_machine"):
            module.check_machine(unsafe_code)
    return module


@functools.cache
def import_file(path):
    spec = importlib.util.spec_from_file_location(f"task_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# problem files

def read_rows(path):
    """Yield (where, row) for each row of a problem file or hub data set; `where` names it in errors."""
    suffix = Path(path).suffix.lower()
    if not Path(path).is_file():
        return (yield from read_hub(path))
    with input_errors(f"{path} cannot be read", "it has to be .jsonl, .json, .csv or .parquet"):
        if suffix == ".parquet":
            import pyarrow.parquet
            rows = pyarrow.parquet.read_table(path).to_pylist()
        else:
            text = Path(path).read_text(encoding="utf-8-sig")           # -sig: a byte-order mark is accepted
            rows = (text.split("\n") if suffix == ".jsonl" else json.loads(text) if suffix == ".json" else
                    list(csv.DictReader(io.StringIO(text, newline=""))))
    for i, row in enumerate(rows, start=1):
        if suffix == ".jsonl":
            if not row.strip():
                continue
            with input_errors(f"{path}:{i} is not JSON"):
                row = json.loads(row)
        yield f"{path}:{i}", row


def read_hub(path):
    """read_rows of a hub data set OWNER/NAME:CONFIGURATION[SPLIT], by default train, test or the first."""
    hub = re.fullmatch(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?(?:\[([\w.-]+)\])?", str(path))
    if not hub or Path(path).suffix.lower() in (".jsonl", ".json", ".csv", ".parquet"):
        raise InputError(f"prompt file {path} does not exist or is not a file: "
                         f"give .jsonl, .json, .csv, .parquet or a hub name such as openai/gsm8k:main[test]")
    name, configuration, split = hub.groups()
    import datasets
    with input_errors(f"{path} is neither a file nor a hub data set that can be fetched"):
        splits = datasets.load_dataset(name, configuration)
    if split and split not in splits:
        raise InputError(f"{path}: {name} has the splits {', '.join(splits)}")
    split = split or next(s for s in ("train", "test", *splits) if s in splits)
    yield from ((f"{name} [{split}] row {i}", row) for i, row in enumerate(splits[split]))


# grading processes and engines

def grading_pool(workers):
    """Worker processes, started when first needed; spawned: a fork of a process with threads can deadlock."""
    return pebble.ProcessPool(max_workers=workers, context=multiprocessing.get_context("spawn"),
                              initializer=importlib.import_module, initargs=["math_verify"])   # takes seconds


def derive_seed(*parts):
    """A seed that depends on all parts and nothing else: (seed, shard) with hf, (seed, prompt) with vLLM."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")


def pick_engine(engine):
    """(engine, its version): `auto` is vLLM where it is installed and a GPU is there, else transformers."""
    if engine == "auto":
        engine = "vllm" if torch.cuda.is_available() and importlib.util.find_spec("vllm") else "hf"
    with input_errors(f"--engine {engine} cannot be used", "install it or use --engine hf"):
        return engine, importlib.import_module("transformers" if engine == "hf" else "vllm").__version__


def open_engine(args, engine, tokenizer, local_rank):
    """(generate function of the engine without its sampling settings, function that frees its memory)."""
    folder, cuda, count = resolve_checkpoint(args.model), torch.cuda.is_available(), args.tensor_parallel
    if engine == "hf":
        lm = load_lm(folder, torch.bfloat16 if cuda else torch.float32, args.trust_remote_code)
        lm = lm.to(torch.device("cuda", local_rank) if cuda else "cpu").eval()
        return functools.partial(generate_hf, lm, tokenizer), lambda: None
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    mine = gpus.split(",")[local_rank:local_rank + count]
    if cuda and len(mine) < count:
        raise InputError(f"--tensor-parallel {count} from GPU {local_rank} on: there are only GPUs {gpus}")
    with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES=",".join(mine)):          # for the engine only
        for name in list(os.environ):
            if re.search("RANK|WORLD_SIZE|MASTER_|TORCHELASTIC_", name):
                del os.environ[name]                        # torchrun's: engines would look for each other
        from vllm import LLM
        llm = LLM(model=str(folder), dtype="bfloat16" if cuda else "float32", seed=0,
                  tensor_parallel_size=count, max_model_len=args.max_model_len,
                  gpu_memory_utilization=args.gpu_memory_utilization,
                  trust_remote_code=args.trust_remote_code,
                  logprobs_mode="processed_logprobs")       # of the distribution that is sampled from
    # vLLM's engine is a process of its own, which would outlive a rank that is killed and keep its GPU
    engines = " ".join(str(process.pid) for process in multiprocessing.active_children())
    watch = f"while kill -0 {os.getpid()}; do sleep 1; done; kill -9 {engines}"
    watcher = subprocess.Popen(["sh", "-c", watch], stderr=subprocess.DEVNULL, start_new_session=True)

    def close():
        llm.llm_engine.engine_core.shutdown()
        watcher.kill()
    return functools.partial(generate_vllm, llm), close


def shards_of_rank(n_shards, rank, world, tensor_parallel):
    """Numbers of the shards that a rank samples; of every `tensor_parallel` ranks the first has an engine."""
    idle = rank % tensor_parallel and world > 1
    return [] if idle else range(rank // tensor_parallel, n_shards, max(1, world // tensor_parallel))


# shards on disk

def read_shard(path):
    """One shard, memory-mapped: InputError names the file if it is not a complete shard of this version."""
    shard = read_tensors(path, "shard", "delete it and sample again")
    with input_errors(f"{path} is not a rollout shard", "delete it and sample again"):
        assert shard["version"] == SHARD_VERSION, f"version {shard['version']}, not {SHARD_VERSION}"
        for name in SHARD_FIELDS.keys() & shard.keys():
            assert shard[name].dtype == SHARD_FIELDS[name], f"{name} is not {SHARD_FIELDS[name]}"
        ids, offsets, prompt_len = shard["input_ids"], shard["offsets"], shard["prompt_len"]
        lengths = offsets.diff() - prompt_len
        rewards = torch.stack([shard["reward"], shard.get("reward_think", shard["reward"])])
        sizes = {len(lengths), len(shard["prompt_index"]), len(shard["truncated"]), rewards.shape[1]}
        assert (len(sizes) == 1 and len(lengths) and offsets[0] == 0 and offsets[-1] == len(ids)
                and lengths.min() > 0 and prompt_len.min() > 0 and ids.min() >= 0
                and len(shard["sampler_logp"]) == lengths.sum()), "its tensors do not fit together"
        assert ((rewards == 0) | (rewards == 1)).all(), "rewards must be 0 or 1"
        shard["meta"]["model"], shard["meta"]["model_fingerprint"], shard["meta"]["temperature"] + 0
    return shard


def load_shards(folder, meta=None):
    """All shards of a finished run, in order; InputError if one is missing or has other settings.

    meta: the settings that they must have; with it shards may be missing, as in an interrupted run.
    """
    paths = sorted(Path(folder).glob("shard-*.pt"))
    shards = [read_shard(path) for path in paths]
    if not shards and meta is None:
        raise InputError(f"{folder} holds no shard-*.pt: give the --out folder of rollout.py")
    wanted = meta or shards[0]["meta"]
    for path, shard in zip(paths, shards):
        for key in {**wanted, **shard["meta"]}:
            there, here = shard["meta"].get(key), wanted.get(key)
            if there != here and key not in ("model", "prompts"):       # which are known by their content
                raise InputError(f"{path} has {key} = {there!r}, not {here!r}: use another --out")
    if meta is None and len(shards) != wanted.get("shards", len(shards)):
        raise InputError(f"{folder} has {len(shards)} of {wanted['shards']} shards: "
                         f"run the same rollout.py command again to finish it")
    return shards


def join_shards(shards):
    """What is per response, joined, the sums of the grading counts, and response_offsets [N+1] into flat
    tensors per response token. What has the size of all tokens stays in the memory-mapped shards."""
    names = ["prompt_len", "prompt_index", "reward", "truncated"]
    if any("reward_think" in s for s in shards):            # a shard in which no response thinks has none
        shards = [{"reward_think": torch.zeros_like(s["reward"])} | s for s in shards]
        names.append("reward_think")
    joined = {name: torch.cat([s[name] for s in shards]) for name in names}
    lengths = torch.cat([s["offsets"].diff() for s in shards])
    for name, sizes in (("offsets", lengths), ("response_offsets", lengths - joined["prompt_len"])):
        joined[name] = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
    grading = {key: sum(s["grading"][key] for s in shards) for key in shards[0].get("grading", {})}
    return joined | {"meta": shards[0]["meta"], "grading": grading}


def summarize(folder, rate):
    """Write rollouts.json and print one line: what a run is worth before anything is trained on it."""
    r = join_shards(load_shards(folder))
    rates = r["reward"].view(-1, r["meta"]["n"]).mean(1)    # the responses of a prompt stand together
    summary = {"responses": len(r["reward"]), "prompts": len(rates), "pass_rate": rates.mean().item(),
               "all_right": (rates == 1).float().mean().item(),
               "all_wrong": (rates == 0).float().mean().item(),
               "mean_length": r["response_offsets"].diff().float().mean().item(),
               "truncated": r["truncated"].float().mean().item(), "tok_per_s": rate,
               **{f"grading_{key}": count for key, count in r["grading"].items()}}
    write_json(folder / "rollouts.json", {"summary": summary, "meta": r["meta"]})
    parts = [f"{key.replace('_', ' ')} {value:.4g}" for key, value in summary.items() if value is not None]
    print(f"{folder}: " + " | ".join(parts))


if __name__ == "__main__":
    run_main(main, lambda: f"try --shard-prompts {max(1, parse_args().shard_prompts // 2)}, or with vLLM a "
                           f"lower --gpu-memory-utilization")
