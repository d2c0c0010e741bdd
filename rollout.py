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
MAX_PROMPT = 1_000_000                                     # characters: a file that went wrong, not a problem
ASK_FOR_BOX = "\n\nPut your final answer within \\boxed{}."  # MathArena's words: Sec. 4.1 uses its tools


def load_prompts(path, prompt_field=None, answer_field=None, read_row=None):
    """Read problems and answers: list of dict(prompt, answer, index), in the order of the file.

    `prompt` is a str or a chat list of {role, content}; `answer` a str, int, float or a list any of which is
    right; `index` the row. Known layouts are recognised by their field names, or read by a task's `read_row`.
    Raises InputError that names the row.
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
        chat = isinstance(prompt, list) and all(isinstance(m, dict) and isinstance(m.get("role"), str) and
                                                isinstance(m.get("content"), str) for m in prompt)
        if not prompt or not (isinstance(prompt, str) and prompt.strip() or chat):
            raise InputError(f"{where} has no prompt in {prompt_field or ' | '.join(PROMPT_FIELDS)}: "
                             f"a string or a chat list is needed (fields: {', '.join(map(str, row))})")
        if len(str(prompt)) > MAX_PROMPT:
            raise InputError(f"{where} has a prompt of {len(str(prompt)):,} characters: the right file?")
        prompts.append({"prompt": prompt, "answer": answer, "index": index})
    if not prompts:
        raise InputError(f"{path} holds no prompts")
    return prompts


def math_answer(where, row, field=None):
    """Gold answer of a row: its answer field as it is, the number behind the #### of a worked answer (GSM8K),
    or the last box of `solution` where a row has no answer field (MATH)."""
    answer = pick_field(row, field, ANSWER_FIELDS)
    if answer is None and isinstance(row.get("solution"), str):
        answer = last_boxed(row["solution"])
    worked = re.search(r"(?:^|\n)#### *([^\n]+?)\s*$", answer) if isinstance(answer, str) else None
    if worked:
        answer = re.sub(r"(?<=\d),(?=\d{3})", "", worked[1])             # 1,234 is a number there, not a list
    usable = [isinstance(a, (str, int, float)) and not isinstance(a, bool) and str(a).strip() not in NO_ANSWER
              for a in (answer if isinstance(answer, list) else [answer])]
    if not usable or not all(usable):
        raise InputError(f"{where} has no answer in {field or ' | '.join(ANSWER_FIELDS)}: "
                         f"add it or name its field with --answer-field")
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
    """Token ids of a prompt: the chat template once, with the opening of the assistant's turn; plain text
    without one."""
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
    opening = None
    for opening in re.finditer(r"\\boxed\s*\{", text):
        pass
    depth = 1
    for i in range(opening.end() if opening else len(text), len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[opening.end():i].strip()
    return None


def gold_text(gold):
    """Gold answers come as str, int or float (27.0 means 27)."""
    return str(int(gold)) if isinstance(gold, float) and gold == int(gold) else str(gold).strip()


EXPLODES = re.compile(r"""(\^|\*\*)\s*(\{[^{}]*|\([^()]*|\\?\w+\s*)(\^|\*\*)    # a power in an exponent
    | (\^|\*\*)\s*[{(]?\s*[+-]?\d{5}                                      # an exponent of five digits
    | \d{4}\s*\)?\s*! | \^\s*\{?\w+\}?\s*\)?\s*! | !\s*\)\s*!             # a factorial of something large
    | binom\s*\{[^{}]*(\^|\d{4})
    | \\(sum|prod|int|lim)\b                                             # nobody's final answer""",
                      re.VERBOSE | re.DOTALL)


def quick_verdict(answer, gold, stats):
    """1.0 or 0.0 where no mathematics is needed, else None."""
    if answer is None:
        return 0.0
    if answer == gold:
        return 1.0
    if len(answer) > 1000 or EXPLODES.search(answer):
        stats["refused"] += 1                        # computer algebra would run for ever, or fill the memory
        return 0.0
    integer = r"[+-]?\d+"
    if re.fullmatch(integer, answer) and re.fullmatch(integer, gold):
        return float(int(answer) == int(gold))
    return None


def verify_in_worker(answer, gold):
    """True, False, or None if the gold answer cannot be parsed. Time limits are the pool's: it kills the
    process."""
    from math_verify import parse, verify
    parsed_gold = parse("\\boxed{" + gold + "}", parsing_timeout=None)
    if not parsed_gold:
        return None
    answer = parse("\\boxed{" + answer + "}", parsing_timeout=None)
    return verify(parsed_gold, answer, timeout_seconds=None)                        # gold first


def grade_in_worker(path, response, answer, options):
    """What the `grade` of a task's file says of one response; the machine was checked before."""
    return import_file(path).grade([response], [answer], **options)[0]


def grade(responses, answers, task="math", workers=2, timeout=10.0, stats=None, pool=None, unsafe_code=False):
    """Grade responses (list of str) against gold answers: list of 1.0 right, 0.0 wrong.

    task "math": gold answers are str, int, float or a list any of which is right. Identical strings and plain
    integers are decided at once, everything else by math-verify, each (answer, gold) pair once. Another task:
    its file (see load_task). Both run in worker processes that are killed and replaced after `timeout`
    seconds (`pool`: a grading_pool that is kept between calls; else one of `workers`). The dict `stats`
    receives counts: timeouts, errors, refused (too long or a tower of powers), unparsable_gold, verified
    (asked a worker). InputError if the task cannot be graded here.
    """
    stats = {} if stats is None else stats
    for key in ("timeouts", "errors", "refused", "unparsable_gold", "verified"):
        stats.setdefault(key, 0)
    if task == "math":
        asked = [[(last_boxed(response), gold_text(g)) for g in (gold if isinstance(gold, list) else [gold])]
                 for response, gold in zip(responses, answers, strict=True)]
        verdicts = dict.fromkeys(pair for pairs in asked for pair in pairs)         # equal ones once
        verdicts = {pair: quick_verdict(*pair, stats) for pair in verdicts}
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
    """Sample with transformers' own generate, one left-padded batch per shard. shards: {number: list of
    (index, ids)}."""
    eos = lm.generation_config.eos_token_id
    eos = tokenizer.eos_token_id if eos is None else eos
    eos = set(eos if isinstance(eos, list) else [eos])
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(eos)
    # every setting is given: what is left out would be filled in from the checkpoint's own generation config
    config = GenerationConfig(do_sample=temperature > 0, temperature=temperature or 1.0, top_p=top_p,
                              top_k=max(top_k, 0), repetition_penalty=1.0, max_new_tokens=max_tokens,
                              eos_token_id=sorted(eos), pad_token_id=pad)
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
            end = next((i + 1 for i, token in enumerate(ids) if token in eos), None)
            responses.append({"ids": ids[:end], "truncated": end is None, "logp": None})
        yield number, [responses[i:i + n] for i in range(0, len(responses), n)]


def generate_vllm(llm, shards, n, temperature, top_p, top_k, max_tokens, seed):
    """Sample with vLLM: the requests of all shards are in flight at once, so that continuous batching stays
    full."""
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
    """prompts: list of (index, ids); responses: per prompt a list of dicts; rewards: flat list in the same
    order; grading: the counts of `grade`, which differ from shard to shard and so are not part of the
    settings in meta."""
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
    stats, thinks = {}, None
    rewards = grade(texts, golds, stats=stats, **options)
    if any("</think>" in text for text in texts):
        after = [t.rpartition("</think>")[2] if "</think>" in t else "" for t in texts]
        thinks = grade(after, golds, **options)
    if args.require_think_end:
        rewards = thinks or [0.0] * len(rewards)
    # ours: a response that was cut off at the limit is wrong
    finished = [float(not r["truncated"]) for group in responses for r in group]
    rewards = [a * b for a, b in zip(rewards, finished)]
    thinks = thinks and [a * b for a, b in zip(thinks, finished)]
    if args.rehearse:                                       # graded all the same: a broken grader shows
        rewards = [float(i % 2 == 0) for i in range(len(rewards))]
    return build_shard(prompts, responses, rewards, thinks, meta, stats)


def choose_prompts(args, tokenizer):
    """({index: answer}, [(index, token ids)] that are sampled, meta of the choice)."""
    task = load_task(args.task, args.unsafe_code)           # refuses before anything is sampled
    problems = load_prompts(args.prompts, args.prompt_field, args.answer_field, task and task.read_row)
    answers = {p["index"]: p["answer"] for p in problems}
    if args.num_prompts and args.num_prompts < len(problems):
        problems = random.Random(args.seed).sample(problems, args.num_prompts)
    encoded = [(p["index"], encode_prompt(tokenizer, p["prompt"], args.prompt_suffix)) for p in problems]
    fitting = [(index, ids) for index, ids in encoded if len(ids) <= (args.max_prompt_tokens or math.inf)]
    if not fitting:
        raise InputError(f"every prompt is longer than --max-prompt-tokens {args.max_prompt_tokens}")
    content = hashlib.sha256(json.dumps([(p["prompt"], p["answer"]) for p in problems]).encode())
    return answers, fitting, {"prompts": str(args.prompts), "prompts_sha256": content.hexdigest(),
                              "num_prompts": len(problems), "too_long_prompts": len(encoded) - len(fitting)}


def sample_rollouts(args, pool, rank=0, world=1, local_rank=0):
    """Sample and grade what is missing of the shards of args.out (see parse_args). Also used by evaluate.py.

    Returns tokens per second of all engines together, as fast as this one; None if nothing was missing.
    """
    tokenizer = load_tokenizer(args.model, args.trust_remote_code)
    answers, encoded, chosen = choose_prompts(args, tokenizer)
    slices = [encoded[i:i + args.shard_prompts] for i in range(0, len(encoded), args.shard_prompts)]
    engine, sampling = pick_engine(args.engine), ("temperature", "top_p", "top_k", "max_tokens", "seed")
    settings = {"n": args.num_responses, **{key: getattr(args, key) for key in sampling}}
    meta = {"model": str(args.model), "model_fingerprint": checkpoint_fingerprint(args.model),
            "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer), **settings, **chosen,
            "engine": engine, "engine_version": engine_version(engine), "prompt_suffix": args.prompt_suffix,
            "task": args.task, "require_think_end": args.require_think_end, "shards": len(slices),
            "shard_prompts": args.shard_prompts, **({"rehearsal": 1} if args.rehearse else {})}
    check_settings(args.out, meta)
    paths = [Path(args.out) / f"shard-{i:05d}.pt" for i in range(len(slices))]
    gpus = args.tensor_parallel if engine == "vllm" else 1
    mine = shards_of_rank(len(slices), rank, world, gpus)
    missing = {i: slices[i] for i in mine if not paths[i].exists()}
    if not missing:
        return None
    one_writer(args.out)
    generate, close = open_engine(args, engine, tokenizer, local_rank)
    start, n_tokens, total = time.time(), 0, sum(map(len, missing.values())) * args.num_responses
    bar = tqdm(total=total, desc="sampling", unit="resp", disable=rank > 0)
    for number, responses in generate(missing, **settings):
        shard = grade_shard(tokenizer, slices[number], responses, answers, args, meta, pool)
        write_atomic(paths[number], lambda p: torch.save(shard, p))
        n_tokens += len(shard["sampler_logp"])
        bar.update(len(shard["reward"]))
        bar.set_postfix_str(f"{n_tokens / (time.time() - start):,.0f} tok/s")
    bar.close()
    close()
    release(args.out)
    return n_tokens / (time.time() - start) * min(len(slices), max(1, world // gpus))


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
    arg("--max-prompt-tokens", type=int, help="leave out longer prompts, and count them")
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
    rank, world, local_rank = ranks()
    with grading_pool(args.workers) as pool:
        rate = sample_rollouts(args, pool, rank, world, local_rank)
    written = sorted(args.out.glob("shard-*.pt"))
    if rate is None and (args.out / "rollouts.json").exists():
        if rank == 0:
            print(f"{args.out}: already finished")
    elif written and len(written) == read_shard(written[0])["meta"]["shards"]:
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
        said = (str(error).strip().splitlines() or [""])[0][:300]
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


def interrupt(number, _):
    raise KeyboardInterrupt(signal.Signals(number).name)


def run_main(main, memory_advice=lambda: "use more GPUs"):
    """Exit codes of every script: 0 done, 2 bad input (one line on stderr), 1 anything else.

    SIGTERM and Ctrl-C end a stage at once, but a training loop saves first; either way exit code 1.
    memory_advice() says which flag to change when the GPU's memory was not enough. Also used by the others.
    """
    code, said, first = 0, None, os.environ.get("RANK", "0") == "0"
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)          # PR_SET_PDEATHSIG: no rank outlives its torchrun
    before = {number: signal.signal(number, interrupt) for number in STOP_SIGNALS}
    try:
        main()
    except InputError as error:
        code, said = 2, first and f"error: {error}"
    except (RunError, OSError) as error:                    # whichever rank it is: only that one may know
        code, said = 1, f"error: {error}"
    except torch.OutOfMemoryError:
        code, said = 1, f"error: out of GPU memory: {memory_advice()}"
    except KeyboardInterrupt as stop:
        code, said = 1, first and f"stopped by {stop or 'Ctrl-C'}; the same command continues"
    except Exception:
        code = 1
        traceback.print_exc()
    if said:
        print(f"{Path(sys.argv[0]).name}: {said}", file=sys.stderr)
    for number, handler in before.items():                  # for tests, which call this more than once
        signal.signal(number, handler)
    for folder in list(LOCKS):
        release(folder)
    sys.stdout.flush()
    sys.stderr.flush()
    if torch.distributed.is_initialized():                  # gloo's destructor can wait for a thread that
        os._exit(code)                                      # waits for Python's lock: a rank would hang
    sys.exit(code)


# files: complete or absent, one writer per folder

def remove(path):
    """Delete a file or a folder, if it is there."""
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def exchange(new, old):
    """Swap two folders in one step of the kernel, so that neither name is ever absent; else by renaming."""
    here, swap = -100, 2                                    # AT_FDCWD, RENAME_EXCHANGE
    if ctypes.CDLL(None).renameat2(here, os.fsencode(new), here, os.fsencode(old), swap):
        os.rename(old, aside := old.with_name(f"{old.name}.aside.partial"))         # not on every file system
        os.rename(new, old)
        os.rename(aside, new)


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
                    os.fsync(f.fileno())
        exchange(partial, path) if path.is_dir() else os.replace(partial, path)
        folder = os.open(path.parent, os.O_RDONLY)          # the new name, too, has to survive a power cut
        os.fsync(folder)
        os.close(folder)
    except (RuntimeError, safetensors.SafetensorError) as error:        # their words for a full disk
        room = shutil.disk_usage(path.parent).free / 2 ** 20
        said = f"{path} cannot be written ({str(error).splitlines()[0]}; {room:,.1f} MiB free)"
        raise OSError(said) from error
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


LOCKS = {}                                                  # folder -> the open file that holds its lock
os.register_at_fork(after_in_child=lambda: [file.close() for file in LOCKS.values()])       # a forked engine


def one_writer(folder):
    """Keep a second run out of a folder until `release` or the end of this process; or InputError.

    A lock for each rank: those of one run write side by side, those of a second one meet their own numbers.
    Also used by teacher.py.
    """
    if str(folder) in LOCKS:
        return
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        LOCKS[str(folder)] = open(Path(folder) / f".writer-{ranks()[0]}", "a")
        fcntl.flock(LOCKS[str(folder)], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        release(folder)
        raise InputError(f"{folder}: another run is at work in it; wait, or use another --out") from error
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(f"{folder} cannot be written: it is not a folder; use another --out") from error


def release(folder):
    if str(folder) in LOCKS:
        LOCKS.pop(str(folder)).close()


# checkpoints, tokenizers and tasks, known by their content

def resolve_checkpoint(model):
    """Folder of a checkpoint given as a path or as a hub name (downloaded once into the hub's own cache)."""
    if Path(model).is_dir():
        if not (Path(model) / "config.json").is_file():
            raise InputError(f"{model} has no config.json: give the folder of a Hugging Face checkpoint")
        return Path(model)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)) or Path(model).parent.exists():
        raise InputError(f"checkpoint {model} does not exist: give a folder with config.json and weights")
    import huggingface_hub
    with input_errors(f"{model} is neither a folder nor a hub model that can be fetched", "check the path"):
        wanted = ["*.safetensors", "*.json", "*.txt", "*.jinja"]
        return Path(huggingface_hub.snapshot_download(str(model), allow_patterns=wanted))


@functools.cache
def file_sha256(path, size, mtime_ns):
    """Hash of a file, once per process: size and time of its last change say that it is still the same."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").digest()


def checkpoint_fingerprint(model):
    """Hash of config and weights: a checkpoint with the same content elsewhere is the same policy."""
    folder = resolve_checkpoint(model)
    weights, digest = sorted(folder.glob("*.safetensors")), hashlib.sha256()
    if not weights:
        raise InputError(f"{folder} has no *.safetensors: only safetensors weights are read")
    for path in [folder / "config.json", *weights]:
        with input_errors(f"{path} cannot be read"):
            stat = path.stat()
            digest.update(file_sha256(path, stat.st_size, stat.st_mtime_ns))
    return digest.hexdigest()


def load_lm(model, dtype, trust_remote_code=False):
    """A causal LM from safetensors; InputError if transformers cannot load it. Also used by teacher.py."""
    folder = resolve_checkpoint(model)
    with input_errors(f"{model} is not a checkpoint that can be loaded"):
        lm, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True,
                                                        trust_remote_code=trust_remote_code,
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
    answer. It is called in a worker process, one response at a time, and given `timeout` and `unsafe_code` if
    it has such parameters. Optional: time_limit(answer, timeout) -> seconds; check_machine(unsafe_code),
    which raises if nothing can be graded here.
    """
    if task == "math":
        return None
    path = Path(__file__).parent / "tests" / "tasks" / "code.py" if task == "code" else Path(task)
    if path.suffix != ".py" or not path.is_file():
        raise InputError(f"--task {task} is neither math nor code nor the FILE.py of a task")
    with input_errors(f"--task {task} cannot be used"):
        module = import_file(path.resolve())
        for name in ("read_row", "grade"):
            getattr(module, name)                           # AttributeError without them
        getattr(module, "check_machine", lambda unsafe_code: None)(unsafe_code)
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
            rows = enumerate(pyarrow.parquet.read_table(path).to_pylist())
        else:
            text = Path(path).read_text(encoding="utf-8-sig")           # -sig: a byte-order mark is accepted
            lines = ((i, line) for i, line in enumerate(text.split("\n"), start=1) if line.strip())
            rows = (lines if suffix == ".jsonl" else enumerate(json.loads(text)) if suffix == ".json" else
                    enumerate(csv.DictReader(io.StringIO(text, newline="")), start=2))
        for i, row in rows:
            where = f"{path} row {i}" if suffix in (".json", ".parquet") else f"{path}:{i}"
            if suffix == ".jsonl":
                with input_errors(f"{where} is not JSON"):
                    row = json.loads(row)
            yield where, row


def read_hub(path):
    """read_rows of a hub data set OWNER/NAME:CONFIGURATION[SPLIT]; configuration and split may be left out.

    Without a split: train, else test, else the first.
    """
    hub = re.fullmatch(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?(?:\[([\w.-]+)\])?", str(path))
    if Path(path).exists() or Path(path).suffix.lower() in (".jsonl", ".json", ".csv", ".parquet") or not hub:
        raise InputError(f"prompt file {path} does not exist or is not a file: "
                         f"give .jsonl, .json, .csv, .parquet or a hub name such as openai/gsm8k:main[test]")
    name, configuration, split = hub.groups()
    import datasets
    with input_errors(f"{path} is neither a file nor a hub data set that can be fetched"):
        splits = datasets.load_dataset(name, configuration)
    if split and split not in splits:
        raise InputError(f"{path}: {name} has the splits {', '.join(splits)}")
    split = split or next((s for s in ("train", "test") if s in splits), next(iter(splits)))
    yield from ((f"{name} [{split}] row {i}", row) for i, row in enumerate(splits[split]))


# grading processes and engines

def start_worker():
    """Import math-verify before the clock of the first answer starts; no warning about its time limits."""
    import math_verify  # noqa: F401
    logging.getLogger("math_verify").setLevel(logging.ERROR)


def grading_pool(workers):
    """Worker processes, started when first needed; spawned: a fork of a process with threads can deadlock."""
    context = multiprocessing.get_context("spawn")
    return pebble.ProcessPool(max_workers=workers, initializer=start_worker, context=context)


def derive_seed(*parts):
    """A seed that depends on all parts and nothing else: (seed, shard) with hf, (seed, prompt) with vLLM."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")


def pick_engine(engine):
    """`auto` takes vLLM where it is installed and a GPU is there, else transformers."""
    installed = importlib.util.find_spec("vllm") is not None
    if engine == "vllm" and not installed:
        raise InputError("--engine vllm: vLLM is not installed here; install it or use --engine hf")
    return engine if engine != "auto" else "vllm" if installed and torch.cuda.is_available() else "hf"


def engine_version(engine):
    return transformers.__version__ if engine == "hf" else importlib.import_module("vllm").__version__


def open_engine(args, engine, tokenizer, local_rank):
    """(generate function of the engine without its sampling settings, function that frees its memory)."""
    folder, cuda = resolve_checkpoint(args.model), torch.cuda.is_available()
    if engine == "hf":
        lm = load_lm(folder, torch.bfloat16 if cuda else torch.float32, args.trust_remote_code)
        lm = lm.to(torch.device("cuda", local_rank) if cuda else "cpu").eval()
        return functools.partial(generate_hf, lm, tokenizer), lambda: None
    with own_gpus(local_rank, args.tensor_parallel):
        from vllm import LLM
        llm = LLM(model=str(folder), dtype="bfloat16" if cuda else "float32", seed=0,
                  tensor_parallel_size=args.tensor_parallel, max_model_len=args.max_model_len,
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
        watcher.wait()
    return functools.partial(generate_vllm, llm), close


@contextlib.contextmanager
def own_gpus(local_rank, count):
    """The environment of a rank's engine: its GPUs, nothing of torchrun's, or engines look for each other."""
    saved, visible = dict(os.environ), os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    if gpus and len(gpus[local_rank:local_rank + count]) < count:
        raise InputError(f"--tensor-parallel {count} from GPU {local_rank} on: there are {len(gpus)} GPUs")
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[local_rank:local_rank + count])
    for name in list(os.environ):
        if re.match(r"(LOCAL_)?RANK$|WORLD_SIZE|MASTER_|TORCHELASTIC_|GROUP_|ROLE_|LOCAL_WORLD", name):
            del os.environ[name]
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(saved)


def shards_of_rank(n_shards, rank, world, tensor_parallel):
    """Numbers of the shards that a rank samples; of every `tensor_parallel` ranks the first has an engine."""
    idle = rank % tensor_parallel and world > 1
    return [] if idle else range(rank // tensor_parallel, n_shards, max(1, world // tensor_parallel))


# shards on disk

PATHS = ("model", "prompts")                                # what they point to is known by its content


def check_settings(out, meta):
    """InputError if the shards that are in a folder already were sampled with other settings than `meta`."""
    for path in sorted(Path(out).glob("shard-*.pt")):
        theirs = read_shard(path)["meta"]
        for key in {**meta, **theirs}:
            if theirs.get(key) != meta.get(key) and key not in PATHS:
                raise InputError(f"{path} was sampled with {key} = {theirs.get(key)!r}, now {meta.get(key)!r}"
                                 f": use another --out, or delete that folder to start over")


def read_shard(path):
    """One shard, memory-mapped: InputError names the file if it is not a complete shard of this version."""
    shard = read_tensors(path, "shard", "delete it and sample again")
    with input_errors(f"{path} is not a rollout shard", "delete it and sample again"):
        if shard["version"] != SHARD_VERSION:
            raise ValueError(f"version {shard['version']}, not {SHARD_VERSION}")
        if wrong := [k for k, dtype in SHARD_FIELDS.items() if k in shard and shard[k].dtype != dtype]:
            raise ValueError(f"{wrong[0]} is not {SHARD_FIELDS[wrong[0]]}")
        lengths, n, ids = shard["offsets"].diff(), len(shard["prompt_len"]), shard["input_ids"]
        names = ("prompt_index", "reward", "truncated", "reward_think")
        per_response = [shard[name] for name in names if name != "reward_think" or name in shard]
        if not (n > 0 and all(len(x) == n for x in (lengths, *per_response)) and shard["offsets"][0] == 0
                and shard["offsets"][-1] == len(ids) and (ids >= 0).all() and (shard["prompt_len"] > 0).all()
                and (lengths > shard["prompt_len"]).all()
                and len(shard["sampler_logp"]) == (lengths - shard["prompt_len"]).sum()):
            raise ValueError("its tensors do not fit together: offsets, prompt_len, rewards")
        if not all(((r == 0) | (r == 1)).all() for r in per_response if r.dtype == torch.float32):
            raise ValueError("rewards must be 0 or 1")
        shard["meta"]["model"], shard["meta"]["model_fingerprint"], shard["meta"]["temperature"] + 0
    return shard


def load_shards(folder):
    """All shards of a finished run, in order; InputError if one is missing. Also used by the others."""
    paths = sorted(Path(folder).glob("shard-*.pt"))
    if not paths:
        raise InputError(f"{folder} holds no shard-*.pt: give the --out folder of rollout.py")
    shards = [read_shard(path) for path in paths]
    meta, owner = shards[0]["meta"], {}
    for path, shard in zip(paths, shards):
        other = [key for key in meta if key not in PATHS and shard["meta"].get(key) != meta[key]]
        if other:
            raise InputError(f"{path} was sampled with another {other[0]} than {paths[0].name}: part them")
        for index in shard["prompt_index"].unique().tolist():           # nothing is trained on twice
            if owner.setdefault(index, path) != path:
                raise InputError(f"{path} and {owner[index].name} both hold prompt {index}: delete the copy")
    if len(shards) != meta.get("shards", len(shards)):
        raise InputError(f"{folder} has {len(shards)} of {meta['shards']} shards: "
                         f"run the same rollout.py command again to finish it")
    return shards


def join_shards(shards):
    """What is per response, joined, and response_offsets [N+1] into flat tensors per response token.

    What has the size of all tokens, gigabytes at the paper's size, stays in the memory-mapped shards.
    Also used by teacher.py.
    """
    per_token = ("input_ids", "sampler_logp", "offsets", "reward_think")
    joined = {key: torch.cat([s[key] for s in shards]) for key in SHARD_FIELDS if key not in per_token}
    if any("reward_think" in s for s in shards):            # a shard in which no response thinks has none
        thinks = [s.get("reward_think", torch.zeros_like(s["reward"])) for s in shards]
        joined["reward_think"] = torch.cat(thinks)
    lengths, zero = torch.cat([s["offsets"].diff() for s in shards]), torch.zeros(1, dtype=torch.int64)
    joined["offsets"] = torch.cat([zero, lengths.cumsum(0)])
    joined["response_offsets"] = torch.cat([zero, (lengths - joined["prompt_len"]).cumsum(0)])
    return joined | {"meta": shards[0]["meta"]}


def count_grading(shards):
    """Sum of the grading counts of all shards. Also used by evaluate.py."""
    counts = [s.get("grading", {}) for s in shards]
    return {key: sum(c.get(key, 0) for c in counts) for key in sorted({k for c in counts for k in c})}


def summarize(folder, rate):
    """Write rollouts.json and print one line: what a run is worth before anything is trained on it."""
    shards = load_shards(folder)
    r, grading = join_shards(shards), count_grading(shards)
    groups = [r["reward"][r["prompt_index"] == i] for i in r["prompt_index"].unique()]
    s = {"responses": len(r["reward"]), "prompts": len(groups), "pass_rate": r["reward"].mean().item(),
         "all_right": sum(g.min() == 1 for g in groups).item() / len(groups),
         "all_wrong": sum(g.max() == 0 for g in groups).item() / len(groups),
         "mean_length": r["response_offsets"].diff().float().mean().item(),
         "truncated": r["truncated"].float().mean().item(), "tok_per_s": rate,
         "too_long_prompts": r["meta"].get("too_long_prompts", 0),
         **{f"grading_{k}": v for k, v in grading.items()}}
    write_json(Path(folder) / "rollouts.json", {"summary": s, "meta": r["meta"]})
    print(f"{folder}: {s['responses']:,} responses to {s['prompts']:,} prompts | right {s['pass_rate']:.3f}"
          f" | all right {s['all_right']:.3f} | all wrong {s['all_wrong']:.3f}"
          f" | length {s['mean_length']:.1f} | truncated {s['truncated']:.3f}"
          f" | prompts left out as too long {s['too_long_prompts']}"
          f" | grading time-outs {grading.get('timeouts', 0)}" + (f" | {rate:,.0f} tok/s" if rate else ""))


if __name__ == "__main__":
    run_main(main, lambda: f"try --shard-prompts {max(1, parse_args().shard_prompts // 2)}, or with vLLM a "
                           f"lower --gpu-memory-utilization")
