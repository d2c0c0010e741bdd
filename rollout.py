"""
Stage 0: sample K responses to each prompt once, grade them 0/1, and write them as shards (Sec. 4.1, Training Settings).

The fixed batch that both later stages train on is 1,000 prompts x 16 responses from one policy, pi_old. A shard keeps
the token ids exactly as they were sampled (nothing is ever tokenised again) and a reward per response:

    R(y) = 1 if the last \\boxed{} of y equals the gold answer, else 0

1 GPU, or CPU:  python rollout.py --model M --prompts problems.jsonl --out runs/rollouts
8 GPUs:         torchrun --standalone --nproc-per-node 8 rollout.py ...     # one engine per GPU, every 8th shard each

The same command continues an interrupted run: finished shards are kept. Read next: teacher.py.
"""
import argparse
import base64
import concurrent.futures
import contextlib
import csv
import ctypes
import decimal
import fcntl
import fractions
import functools
import hashlib
import io
import json
import logging
import math
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
import zlib
from pathlib import Path

import pebble
import safetensors
import torch
import transformers
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

transformers.utils.logging.disable_progress_bar()           # one bar per run: ours
transformers.utils.logging.set_verbosity_error()            # what it would warn of in a checkpoint, load_lm refuses

SHARD_VERSION = 1
MAX_PROMPT = 1_000_000                                      # characters: a file that went wrong, not a problem
PROMPT_FIELDS = ("problem", "question", "prompt", "Problem", "question_content")
NO_ANSWER = ("", "nan", "inf", "-inf")                       # texts of values that nothing can be graded against
ASK_FOR_BOX = "\n\nPut your final answer within \\boxed{}."    # of MathArena's instructions, whose tools the paper uses (Sec. 4.1)
ANSWER_FIELDS = ("answer", "ground_truth", "Short Answer", "reward_model.ground_truth", "input_output")


class InputError(ValueError):
    """What the user gave cannot be used. The message is one line: what, where, and what to do; exit code 2."""


class RunError(RuntimeError):
    """A run cannot go on: a full disk, a NaN. The message is one line: what, where, and what to do; exit code 1."""


class Parser(argparse.ArgumentParser):
    """argparse whose own complaints (an unknown flag, a wrong choice) are one line and exit code 2 like all others."""

    def error(self, message):
        raise InputError(f"{message}; --help lists the options")


STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)              # a cluster that wants its machine back, and Ctrl-C


def interrupt(number, _):
    raise KeyboardInterrupt(signal.Signals(number).name)


def defer_signals():
    """A list that receives SIGTERM and Ctrl-C from now on, instead of an exception within a step. Also used by teacher.py, distill.py."""
    caught = []
    for number in STOP_SIGNALS:
        signal.signal(number, lambda n, _: caught.append(n))
    return caught


def run_main(main, memory_advice=None):
    """Exit codes of every script: 0 done, 2 bad input (one line on stderr), 1 anything else. Also used by the others.

    SIGTERM and Ctrl-C end a stage at once, except in a training loop, which saves first; either way exit code 1.
    memory_advice() says which flag to change when the GPU's memory was not enough.
    """
    code, name, first = 0, Path(sys.argv[0]).name, os.environ.get("RANK", "0") == "0"
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)          # PR_SET_PDEATHSIG: a rank whose torchrun was killed must not work on
    before = {number: signal.signal(number, interrupt) for number in STOP_SIGNALS}
    try:
        main()
    except InputError as error:
        code = 2
        if first:
            print(f"{name}: error: {error}", file=sys.stderr)
    except RunError as error:                               # whichever rank it is: only that one may know
        code = 1
        print(f"{name}: error: {error}", file=sys.stderr)
    except torch.OutOfMemoryError as error:
        code = 1
        print(f"{name}: error: out of GPU memory: {memory_advice() if memory_advice else one_line(error)}", file=sys.stderr)
    except KeyboardInterrupt as stop:
        code = 1
        if first:
            print(f"{name}: stopped by {stop or 'Ctrl-C'}; the same command continues", file=sys.stderr)
    except Exception:
        code = 1
        traceback.print_exc()
    for number, handler in before.items():                  # for tests, which call this more than once
        signal.signal(number, handler)
    for folder in list(LOCKS):
        release(folder)
    sys.stdout.flush()
    sys.stderr.flush()
    if torch.distributed.is_initialized():                  # gloo's destructor can wait for a thread that waits for Python's
        os._exit(code)                                      # lock: a finished rank would hang, and torchrun with it
    sys.exit(code)


# ---- files: complete or absent, and known by content ------------------------------------------------------------------

def one_line(error):
    """First line of an error of another library, for messages of one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def writing(path):
    """A failure to write as one line: a full disk has another type in each library, and torch does not say that it is full."""
    try:
        yield
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        there = next(p for p in Path(path).absolute().parents if p.is_dir())
        raise RunError(f"{path} cannot be written ({one_line(error)}; {shutil.disk_usage(there).free / 2 ** 20:,.1f} MiB free there): "
                       f"make room, then run the same command again") from error


def remove(path):
    """Delete a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def is_alive(pid):
    """Whether another process of this number runs on this machine."""
    try:
        os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, PermissionError)           # another user's
    return pid != os.getpid()


def exchange(a, b):
    """Swap two folders in one step of the kernel, so that neither name is ever absent; by renaming where it cannot."""
    here, swap = -100, 2                                    # AT_FDCWD, RENAME_EXCHANGE
    if ctypes.CDLL(None).renameat2(here, os.fsencode(a), here, os.fsencode(b), swap):
        aside = b.with_name(f"{a.name}.aside.partial")
        os.rename(b, aside)
        os.rename(a, b)
        os.rename(aside, a)


LOCKS = {}                                                  # folder -> the open file that holds its lock
os.register_at_fork(after_in_child=lambda: [file.close() for file in LOCKS.values()])   # an engine that outlives us holds none


def one_writer(folder):
    """Keep a second run out of a folder until `release` or the end of this process, however it ends; InputError if one is at work.

    A lock for each rank: those of one run write side by side, and those of a second run meet their own numbers.
    Also used by teacher.py.
    """
    path = Path(folder) / f".writer-{os.environ.get('RANK', '0')}"
    if str(folder) in LOCKS:
        return
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise InputError(f"{folder}: another run is at work in it; wait for its end, or use another --out") from error
    LOCKS[str(folder)] = file


def release(folder):
    if str(folder) in LOCKS:
        LOCKS.pop(str(folder)).close()


def write_atomic(path, write):
    """Call write(temporary path), flush to disk, rename to `path`: a reader never sees half a file, or half a folder."""
    path, host = Path(path), os.uname().nodename
    partial = path.with_name(f"{path.name}.{host}.{os.getpid()}.partial")           # of its own: ranks may write the same file
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f"*.{host}.*.partial"):                        # by a process that was killed
            if not is_alive(int(left.name.split(".")[-2])):
                remove(left)
        try:
            write(partial)
            for file in [partial, *partial.rglob("*")]:
                if file.is_file():
                    with open(file, "rb") as f:
                        os.fsync(f.fileno())
            if path.is_dir():
                exchange(partial, path)                     # what was there is removed below
            else:
                os.replace(partial, path)
            folder = os.open(path.parent, os.O_RDONLY)      # the new name, too, has to survive a power cut
            os.fsync(folder)
            os.close(folder)
        finally:
            remove(partial)


def check_out(out):
    """InputError if nothing can be written in a folder. A full disk shows only when it is written to."""
    there = next(p for p in (Path(out).absolute(), *Path(out).absolute().parents) if os.path.lexists(p))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{out} cannot be written: {there} is {'read-only' if there.is_dir() else 'not a folder'}; use another --out")


def write_json(path, value):
    write_atomic(path, lambda p: p.write_text(json.dumps(value, indent=1, default=str) + "\n"))


def read_json(path, hint):
    """An object from a JSON file; InputError that ends in `hint` if it holds none. Also used by the others."""
    try:
        value = json.loads(Path(path).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not readable JSON ({one_line(error)}): {hint}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no JSON object: {hint}")
    return value


@functools.cache
def file_sha256(path, size, mtime_ns):
    """Hash of a file, computed once per process: size and time of its last change only say that it is still the same."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").digest()


@functools.cache
def damaged_part(path, size, mtime_ns):
    """What of a .pt file fails its own checksum, which torch.load ignores, or is compressed, as torch never writes it; or None."""
    with zipfile.ZipFile(path) as archive:
        return next((part.filename for part in archive.infolist() if part.compress_type), None) or archive.testzip()


def read_tensors(path, what, hint, **options):
    """torch.load of data, never of code; InputError that names the file and ends in `hint`. Also used by teacher.py, distill.py."""
    try:
        stat = Path(path).stat()
        if part := damaged_part(path, stat.st_size, stat.st_mtime_ns):
            raise ValueError(f"{part} is damaged")
        return torch.load(path, weights_only=True, **options)
    except Exception as error:                              # zipfile and torch raise a dozen types on a damaged or foreign file
        raise InputError(f"{path} is not a readable {what} ({type(error).__name__}: {one_line(error)}): {hint}") from error


def resolve_checkpoint(model):
    """Folder of a checkpoint given as a path or as a hub name (downloaded once into the hub's own cache)."""
    if Path(model).is_dir():
        if not (Path(model) / "config.json").is_file():
            raise InputError(f"{model} has no config.json: give the folder of a Hugging Face checkpoint")
        return Path(model)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)) and not Path(model).parent.exists():
        import huggingface_hub
        try:
            wanted = ["*.safetensors", "*.json", "*.txt", "*.jinja"]
            return Path(huggingface_hub.snapshot_download(str(model), allow_patterns=wanted))
        except Exception as error:                          # offline, gated, misspelt: the hub has a dozen types for it
            raise InputError(f"{model} is neither a folder nor a hub model that can be fetched "
                             f"({type(error).__name__}): check the path") from error
    raise InputError(f"checkpoint {model} does not exist: give a folder with config.json and *.safetensors")


def checkpoint_fingerprint(model):
    """Hash of what a checkpoint computes, its config and weights: the same content in another folder is the same policy.

    Checkpoints of ours hold it in fingerprint.txt; InputError if their content is no longer what was saved.
    """
    folder = resolve_checkpoint(model)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise InputError(f"{folder} has no *.safetensors: only safetensors weights are read")
    digest = hashlib.sha256()
    for path in [folder / "config.json", *weights]:
        try:
            stat = path.stat()
            digest.update(file_sha256(path, stat.st_size, stat.st_mtime_ns))
        except OSError as error:
            raise InputError(f"{path} cannot be read: {one_line(error)}") from error
    stored = folder / "fingerprint.txt"
    if stored.exists() and stored.read_bytes().strip() != digest.hexdigest().encode():
        raise InputError(f"{folder} is damaged: its config or weights are not those of its fingerprint.txt; "
                         f"use another copy, or delete that file if you changed them yourself")
    return digest.hexdigest()


def load_lm(model, dtype, trust_remote_code=False):
    """A causal LM from safetensors; InputError if transformers cannot load it. Also used by teacher.py."""
    try:
        lm, info = AutoModelForCausalLM.from_pretrained(resolve_checkpoint(model), dtype=dtype, use_safetensors=True,
                                                        trust_remote_code=trust_remote_code, output_loading_info=True)
    except InputError:
        raise
    except Exception as error:                              # truncated weights, wrong shapes, unknown architecture: many types
        raise InputError(f"{model} is not a checkpoint that can be loaded: {one_line(error)}") from error
    if info["missing_keys"]:                                # transformers would go on with random numbers there
        raise InputError(f"{model} lacks weights, such as {min(info['missing_keys'])}: use another copy")
    return lm


def check_weights(model, trust_remote_code=False):
    """Rows of the vocabulary's head; InputError if the weights of a checkpoint do not fit its config. Loads none of them.

    Also used by teacher.py and evaluate.py.
    """
    folder = resolve_checkpoint(model)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        wanted = lm.state_dict()
        for path in sorted(folder.glob("*.safetensors")):
            with safetensors.safe_open(path, "pt") as file:
                shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
            wrong = [key for key in shapes if key in wanted and shapes[key] != wanted[key].shape]
            if wrong:
                raise ValueError(f"{path.name} has {wrong[0]} of shape {shapes[wrong[0]]}, config.json wants {tuple(wanted[wrong[0]].shape)}")
    except Exception as error:                              # transformers and safetensors raise many types
        raise InputError(f"{model} is not a checkpoint that can be loaded: {one_line(error)}") from error
    return len(lm.get_output_embeddings().weight)


def load_tokenizer(model, trust_remote_code=False):
    folder = resolve_checkpoint(model)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:                              # a damaged tokenizer.json raises a plain Exception
        raise InputError(f"{model} has no usable tokenizer: {one_line(error)}") from error


def tokenizer_fingerprint(tokenizer):
    """Hash of the vocabulary: rollouts are token ids, so every policy that reads them must share it."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def derive_seed(*parts):
    """A seed that depends on all parts and nothing else: (seed, shard) for the hf engine, (seed, prompt) for vLLM."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")


# ---- prompts ----------------------------------------------------------------------------------------------------------

def read_hub(path):
    """read_rows of a hub data set: OWNER/NAME, with a configuration and a split OWNER/NAME:CONFIGURATION[SPLIT] (either may be left out).

    Without a split: train, else test, else the first.
    """
    hub = re.fullmatch(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?(?:\[([\w.-]+)\])?", str(path))
    is_file_name = Path(path).suffix.lower() in (".jsonl", ".json", ".csv", ".parquet")
    if Path(path).exists() or is_file_name or not hub:
        raise InputError(f"prompt file {path} does not exist or is not a file: "
                         f"give .jsonl, .json, .csv, .parquet or a hub name such as openai/gsm8k:main[test]")
    name, configuration, split = hub.groups()
    import datasets
    try:
        splits = datasets.load_dataset(name, configuration)
    except Exception as error:                              # offline, misspelt, a configuration is missing: its message says which there are
        raise InputError(f"{path} is neither a file nor a hub data set that can be fetched "
                         f"({type(error).__name__}: {one_line(error)[:200]})") from error
    if split and split not in splits:
        raise InputError(f"{path}: {name} has the splits {', '.join(splits)}")
    split = split or next((s for s in ("train", "test") if s in splits), next(iter(splits)))
    yield from ((f"{path if hub[3] else f'{path}[{split}]'} row {i}", row) for i, row in enumerate(splits[split]))


def read_rows(path):
    """Yield (where, row) for each row of a problem file or hub data set; `where` names it in error messages."""
    suffix = Path(path).suffix.lower()
    if not Path(path).is_file():
        yield from read_hub(path)
    elif suffix == ".parquet":
        import pyarrow.parquet
        try:
            rows = pyarrow.parquet.read_table(path).to_pylist()
        except (OSError, ValueError) as error:              # pyarrow's own errors derive from these
            raise InputError(f"{path} is not a parquet file: {str(error).splitlines()[0]}") from error
        yield from ((f"{path} row {i}", row) for i, row in enumerate(rows))
    else:
        try:
            with open(path, encoding="utf-8-sig", newline="") as f:     # -sig: a byte-order mark is accepted
                if suffix == ".csv":
                    yield from ((f"{path}:{i}", row) for i, row in enumerate(csv.DictReader(f), start=2))
                elif suffix == ".json":
                    rows = json.load(f)
                    if not isinstance(rows, list):
                        raise InputError(f"{path} is not a list of objects")
                    yield from ((f"{path} row {i}", row) for i, row in enumerate(rows))
                elif suffix == ".jsonl":
                    for i, line in enumerate(f, start=1):
                        if line.strip():
                            try:
                                row = json.loads(line)
                            except (ValueError, RecursionError) as error:           # a number of 5,000 digits is no JSONDecodeError
                                raise InputError(f"{path}:{i} is not JSON: {one_line(error)[:200]}") from error
                            yield f"{path}:{i}", row
                else:
                    raise InputError(f"{path}: unknown ending {suffix!r}: use .jsonl, .json, .csv or .parquet")
        except InputError:
            raise
        except (OSError, ValueError, RecursionError, csv.Error) as error:           # not UTF-8, not JSON
            raise InputError(f"{path} cannot be read: {one_line(error)[:200]}") from error


class PlainData(pickle.Unpickler):
    """Reads pickles of text and numbers; anything that would name a class or function is refused."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it wants {module}.{name}")


def livecodebench_row(where, row):
    """A row of LiveCodeBench in the form of other code rows: prompt, and answer as the JSON text of {inputs, outputs, fn_name?}."""
    try:
        tests = json.loads(row["public_test_cases"])
        private = row.get("private_test_cases") or "[]"
        if not private.lstrip().startswith("["):            # base64(zlib(pickle(JSON text)))
            private = PlainData(io.BytesIO(zlib.decompress(base64.b64decode(private)))).load()
        tests += json.loads(private)
        name = json.loads(row.get("metadata") or "{}").get("func_name")
        if name:                                            # one JSON value per line of input is one argument
            answer = {"inputs": [[json.loads(line) for line in t["input"].splitlines() if line.strip()] for t in tests],
                      "outputs": [json.loads(t["output"]) for t in tests], "fn_name": name}
        else:
            answer = {"inputs": [t["input"] for t in tests], "outputs": [t["output"] for t in tests]}
    except (KeyError, TypeError, ValueError, zlib.error, pickle.UnpicklingError, EOFError) as error:
        raise InputError(f"{where} has test cases that cannot be read: {one_line(error)}") from error
    task = "Complete this code" if row.get("starter_code") else "Read the input from stdin and print the answer to stdout"
    starter = f"\n\n```python\n{row['starter_code']}\n```" if row.get("starter_code") else ""
    return {"prompt": f"{row['question_content']}\n\n{task}. Give the whole program in one Python code block.{starter}",
            "answer": json.dumps(answer)}


def pick_field(row, wanted, known):
    """Value of the first known field that the row has; dots go into nested objects."""
    for field in [wanted] if wanted else known:
        value = row
        for key in [field] if field in row else field.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            return value
    return None


def final_answer(answer, row):
    """The answer as it is, or the number behind the #### of a worked answer (GSM8K), or the last box of `solution` where a row has no
    answer field (MATH)."""
    if answer is None and isinstance(row.get("solution"), str):
        return last_boxed(row["solution"])
    worked = re.search(r"(?:^|\n)#### *([^\n]+?)\s*$", answer) if isinstance(answer, str) else None
    return re.sub(r"(?<=\d),(?=\d{3})", "", worked[1]) if worked else answer        # 1,234 is a number there, not a list


def pass_rate(where, value):
    """POLARIS writes a problem's difficulty as the pass rate of a small model, '3/8'; a number is taken as it is."""
    try:
        return float(fractions.Fraction(str(value).replace(" ", "")))
    except (ValueError, ZeroDivisionError) as error:
        raise InputError(f"{where} has the difficulty {value!r}: --difficulty needs a pass rate such as 3/8 or 0.4") from error


def load_prompts(path, prompt_field=None, answer_field=None, difficulty=None):
    """Read problems and answers: list of dict(prompt, answer, index), in the order of the file.

    `prompt` is a str or a chat list of {role, content}; `answer` a str, int, float or a list of answers any of which is
    right; `index` the row. Known layouts are recognised by their field names. difficulty: (lowest, highest) pass rate that
    is kept, both included, of the field of that name (POLARIS). Raises InputError that names the row.
    """
    prompts = []
    for index, (where, row) in enumerate(read_rows(path)):
        if not isinstance(row, dict):
            raise InputError(f"{where} is not an object with named fields")
        if "public_test_cases" in row and not prompt_field:
            row = livecodebench_row(where, row)
        if difficulty and not difficulty[0] <= pass_rate(where, row.get("difficulty")) <= difficulty[1]:
            continue
        prompt = pick_field(row, prompt_field, PROMPT_FIELDS)
        answer = final_answer(pick_field(row, answer_field, ANSWER_FIELDS), row)
        chat = isinstance(prompt, list) and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in prompt)
        if not prompt or not (isinstance(prompt, str) and prompt.strip() or chat):
            raise InputError(f"{where} has no prompt in {prompt_field or ' | '.join(PROMPT_FIELDS)}: "
                             f"a string or a chat list is needed (fields: {', '.join(map(str, row))})")
        if len(str(prompt)) > MAX_PROMPT:
            raise InputError(f"{where} has a prompt of {len(str(prompt)):,} characters, beyond {MAX_PROMPT:,}: is this the right file?")
        usable = [isinstance(a, (str, int, float)) and not isinstance(a, bool) and str(a).strip() not in NO_ANSWER
                  for a in (answer if isinstance(answer, list) else [answer])]
        if not usable or not all(usable):
            raise InputError(f"{where} has no answer in {answer_field or ' | '.join(ANSWER_FIELDS)}: "
                             f"add it or name its field with --answer-field")
        prompts.append({"prompt": prompt, "answer": answer, "index": index})
    if not prompts:
        raise InputError(f"{path} holds no prompts" + (f" of difficulty {difficulty[0]:g} to {difficulty[1]:g}" if difficulty else ""))
    return prompts


def encode_prompt(tokenizer, prompt, suffix=""):
    """Token ids of a prompt: the chat template once, with the opening of the assistant's turn. Plain text without a template."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
    if suffix != ASK_FOR_BOX or "\\boxed" not in messages[-1]["content"]:
        messages[-1]["content"] += suffix
    try:
        if tokenizer.chat_template is None:
            return tokenizer.encode("\n".join(m["content"] for m in messages))
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    except Exception as error:                              # half a surrogate pair; roles that the template refuses
        raise InputError(f"the prompt {str(prompt)[:80]!r} cannot be encoded: {one_line(error)}") from error


# ---- grading ----------------------------------------------------------------------------------------------------------

def last_boxed(text):
    """Content of the last \\boxed{...}, braces matched; None if there is none or it never closes."""
    opening = None
    for opening in re.finditer(r"\\boxed\s*\{", text):
        pass
    if opening is None:
        return None
    depth = 1
    for i in range(opening.end(), len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[opening.end():i].strip()
    return None


def gold_text(gold):
    """Gold answers come as str, int or float (27.0 means 27)."""
    return str(int(gold)) if isinstance(gold, float) and gold == int(gold) else str(gold).strip()


EXPLODES = re.compile(r"""(\^|\*\*)\s*(\{[^{}]*|\([^()]*|\\?\w+\s*)(\^|\*\*)    # a power in an exponent
    | (\^|\*\*)\s*[{(]?\s*[+-]?\d{5}                                      # an exponent of five digits
    | \d{4}\s*\)?\s*! | \^\s*\{?\w+\}?\s*\)?\s*! | !\s*\)\s*!             # a factorial of a large number, a power or a factorial
    | binom\s*\{[^{}]*(\^|\d{4})
    | \\(sum|prod|int|lim)\b                                             # nobody's final answer""", re.VERBOSE | re.DOTALL)


def quick_verdict(answer, gold, stats):
    """1.0 or 0.0 where no mathematics is needed, else None."""
    if answer is None:
        return 0.0
    if answer == gold:
        return 1.0
    if len(answer) > 1000 or EXPLODES.search(answer):
        stats["refused"] += 1                               # computer algebra would run for ever, or fill the memory
        return 0.0
    integer = r"[+-]?\d+"
    if re.fullmatch(integer, answer) and re.fullmatch(integer, gold):
        return float(int(answer) == int(gold))
    return None


def start_worker():
    """Import math-verify before the clock of the first answer starts; silence its warning that its own limits are off."""
    import math_verify  # noqa: F401
    logging.getLogger("math_verify").setLevel(logging.ERROR)


def verify_in_worker(answer, gold):
    """True, False, or None if the gold answer cannot be parsed. Time limits are the pool's: it kills the process."""
    from math_verify import parse, verify
    parsed_gold = parse("\\boxed{" + gold + "}", parsing_timeout=None)
    if not parsed_gold:
        return None
    return verify(parsed_gold, parse("\\boxed{" + answer + "}", parsing_timeout=None), timeout_seconds=None)   # gold first


# ---- grading code: programs of a model are run where they can do no harm -----------------------------------------------

FUNCTION_IMPORTS = """import bisect, collections, functools, heapq, itertools, json, math, random, re, string, sys
from collections import *
from functools import *
from itertools import *
from typing import *
"""                                                         # what problems with starter code take for granted
MARK = "<result of the call>"
MEMORY, OUTPUT = 4 << 30, 16 << 20                          # bytes of address space per process, and of output
# What runs inside: limits first, then the program. Only inputs come in: what a test expects never does.
LAUNCHER = """
import json, resource, sys
limits, program, name, imports, mark = json.loads(sys.argv[1])
for what, most in limits.items():
    resource.setrlimit(getattr(resource, what), (most, most))
scope = {"__name__": "__main__"}
sys.argv = ["program.py"]
with open(program, encoding="utf-8") as file:
    source = file.read()
if name:
    exec(imports, scope)
exec(compile(source, "program.py", "exec"), scope)
if name:
    call = scope[name] if name in scope else getattr(scope["Solution"](), name)
    result = call(*json.loads(sys.stdin.read()))
    print("\\n" + mark + json.dumps(result), flush=True)
"""


def extract_code(response):
    """The program of a response: the last fenced block, as LiveCodeBench takes it; None without one."""
    lines = response.splitlines()
    fences = [i for i, line in enumerate(lines) if "```" in line]
    return "\n".join(lines[fences[-2] + 1:fences[-1]]) if len(fences) >= 2 else None


def readable_by_all(path):
    """Whether any user can reach a file: all folders above it are open."""
    return all(folder.stat().st_mode & 0o001 for folder in [Path(path), *Path(path).parents])


@functools.cache
def sandbox(unsafe=False):
    """(command prefix that isolates, interpreter, user id to become or None): bubblewrap, else unshare; InputError if neither works.

    Inside there is the interpreter and the system's libraries, read-only, an empty scratch folder, and nothing else: no home,
    no network, no other process. Root becomes an unprivileged user, because the limit on processes does not hold for root.
    """
    python, user = os.path.realpath(sys.executable), None
    if unsafe:
        return [], python, None
    if os.geteuid() == 0:
        user = 65534                                        # nobody
        python = next((p for p in (python, os.path.realpath("/usr/bin/python3")) if os.path.exists(p) and readable_by_all(p)), None)
        if python is None:
            raise InputError("programs cannot be isolated: you are root and no python can be reached by other users; "
                             "install /usr/bin/python3, run as another user, or give --unsafe-code")
    prefix = str(Path(python).parent.parent)
    folders = [d for d in ("/usr", "/lib", "/lib64", "/bin", *([] if prefix.startswith("/usr") else [prefix])) if os.path.isdir(d)]
    bubblewrap = ["bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--clearenv", "--proc", "/proc", "--dev", "/dev",
                  *(x for d in folders for x in ("--ro-bind", d, d)), "--size", str(64 << 20), "--tmpfs", "/scratch", "--chdir", "/scratch"]
    mounts = ["mount -t tmpfs -o size=64m none /mnt", "cd /mnt", "mkdir -p proc dev old scratch", "touch dev/null",
              *(f"mkdir -p .{d} && mount --rbind {d} .{d} && mount -o remount,bind,ro .{d}" for d in folders),
              "mount -t proc none proc", "mount --bind /dev/null dev/null", "mount -t tmpfs -o size=64m none scratch",
              "mount -o remount,bind,ro /mnt", "pivot_root . old", "umount -l old", "cd /scratch",
              'exec env -i setpriv --no-new-privs --bounding-set=-all --inh-caps=-all "$@"']       # root of its own box, without powers
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "--net", "--ipc", "--uts", "--pid", "--fork", "--kill-child=KILL",
               "sh", "-ec", "; ".join(mounts), "sh"]
    for command in (bubblewrap, unshare):
        if shutil.which(command[0]) and run_program((command, python, user), "print(6 * 7)", "", 10.0) == "42\n":
            return command, python, user
    raise InputError("programs cannot be isolated on this machine: install bubblewrap (Debian: apt install bubblewrap), "
                     "or give --unsafe-code to run them as yourself")


def run_program(box, source, stdin, seconds, name=None):
    """What a program prints within `seconds`, None if it fails, TimeoutError past the limit. box: of `sandbox`.

    With `name` the program's function of that name (or the method of its class Solution) is called with the JSON list `stdin`.
    """
    command, python, user = box
    limits = {"RLIMIT_AS": MEMORY, "RLIMIT_CPU": math.ceil(seconds) + 1, "RLIMIT_FSIZE": OUTPUT, "RLIMIT_CORE": 0, "RLIMIT_NOFILE": 256}
    if command:
        limits["RLIMIT_NPROC"] = 32                         # in a box of its own the count starts at 0
    with tempfile.TemporaryFile() as program, tempfile.TemporaryFile() as fed, tempfile.TemporaryFile() as printed:
        for file, text in ((program, source), (fed, stdin)):
            file.write(text.encode("utf-8", "replace"))
            file.seek(0)
        task = json.dumps([limits, program.fileno(), name, FUNCTION_IMPORTS, MARK])
        process = subprocess.Popen([*command, python, "-I", "-c", LAUNCHER, task], stdin=fed, stdout=printed, stderr=subprocess.DEVNULL,
                                   env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}, cwd="/", start_new_session=True, pass_fds=[program.fileno()],
                                   **({} if user is None else {"user": user, "group": user, "extra_groups": []}))
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError from error
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)      # the whole group; the box dies with its first process
            process.wait()
        printed.seek(0)
        return printed.read().decode("utf-8", "replace") if code == 0 else None


def same_output(got, wanted):
    """Equal line by line, white space at the ends aside; lines of numbers may be written differently, such as 1.50 and 1.5."""
    def numbers(line):
        try:
            return [decimal.Decimal(word) for word in line.split()]
        except decimal.InvalidOperation:
            return None
    got, wanted = (text.strip().split("\n") for text in (got, wanted if isinstance(wanted, str) else "\n".join(map(str, wanted))))
    return len(got) == len(wanted) and all(
        a.strip() == b.strip() or (numbers(a) is not None and numbers(a) == numbers(b)) for a, b in zip(got, wanted))


def passes_tests(box, program, tests, seconds):
    """Whether a program passes all of {inputs, outputs, fn_name?}; stops at the first that fails. Raises TimeoutError."""
    name, deadline = tests.get("fn_name"), time.monotonic() + (seconds + 1) * len(tests["inputs"]) + 5
    for given, wanted in zip(tests["inputs"], tests["outputs"], strict=True):
        if time.monotonic() > deadline:                     # all of them together, as LiveCodeBench limits it
            raise TimeoutError
        stdin = json.dumps(given) if name else given if isinstance(given, str) else "\n".join(map(str, given))
        printed = run_program(box, program, stdin, seconds, name)
        if printed is None:
            return False
        if name:
            _, found, result = printed.rpartition(MARK)
            try:
                if not found or json.loads(result) != wanted:
                    return False
            except ValueError:                              # the program printed the mark itself
                return False
        elif not same_output(printed, wanted):
            return False
    return True


def grade_code(responses, answers, workers, timeout, stats, unsafe_code=False):
    """1.0 where the last code block of a response passes all tests of its answer (JSON text of {inputs, outputs, fn_name?})."""
    box = sandbox(unsafe_code)

    def verdict(response, answer):
        program = extract_code(response)
        try:
            tests = json.loads(answer) if isinstance(answer, str) else answer
            usable = len(tests["inputs"]) == len(tests["outputs"]) > 0
        except (ValueError, TypeError, KeyError):
            usable = False
        if not usable:
            return "unparsable_gold"
        if program is None:
            return False
        try:
            return passes_tests(box, program, tests, timeout)
        except TimeoutError:
            return "timeouts"
    with concurrent.futures.ThreadPoolExecutor(workers) as threads:     # threads only wait: the programs are processes
        verdicts = list(threads.map(verdict, responses, answers))
    for found in verdicts:
        if isinstance(found, str):
            stats[found] += 1
    stats["verified"] += len(verdicts)
    return [float(found is True) for found in verdicts]


def grading_pool(workers):
    """Processes for math-verify, started when first needed; spawned, because a fork of a process with threads can deadlock."""
    return pebble.ProcessPool(max_workers=workers, initializer=start_worker, context=multiprocessing.get_context("spawn"))


def grade(responses, answers, task="math", workers=2, timeout=10.0, stats=None, pool=None, unsafe_code=False):
    """Grade responses (list of str) against gold answers (str, int, float or list of these): list of 1.0 right, 0.0 wrong.

    task "code": answers are tests and responses hold programs, which run isolated (`sandbox`; InputError where that cannot be
    done) with `timeout` seconds per test; all tests must pass. task "math":
    Identical strings and plain integers are decided at once, everything else by math-verify in worker processes that are
    killed and replaced after `timeout` seconds (`pool`: a grading_pool that is kept between calls; else one of `workers`).
    Each (answer, gold) pair is graded once. The dict `stats` receives counts: timeouts, errors, refused (too long or a
    tower of powers), unparsable_gold, verified (asked math-verify).
    """
    if task not in ("math", "code"):
        raise InputError(f"task {task!r} cannot be graded: only math and code are")
    stats = {} if stats is None else stats
    for key in ("timeouts", "errors", "refused", "unparsable_gold", "verified"):
        stats.setdefault(key, 0)
    if task == "code":
        return grade_code(responses, answers, workers, timeout, stats, unsafe_code)
    pairs = [[(last_boxed(response), gold_text(g)) for g in (gold if isinstance(gold, list) else [gold])]
             for response, gold in zip(responses, answers, strict=True)]
    verdicts = {pair: quick_verdict(*pair, stats) for pair in dict.fromkeys(p for ps in pairs for p in ps)}
    open_pairs = [pair for pair, verdict in verdicts.items() if verdict is None]
    stats["verified"] += len(open_pairs)
    with contextlib.nullcontext(pool) if pool or not open_pairs else grading_pool(workers) as pool:
        futures = {pair: pool.schedule(verify_in_worker, args=pair, timeout=timeout) for pair in open_pairs}
        for pair, future in futures.items():
            try:
                verdict = future.result()
                stats["unparsable_gold"] += verdict is None
            except TimeoutError:
                stats["timeouts"] += 1
                verdict = False
            except Exception:                               # the worker died, or math-verify raised: counted, and wrong
                stats["errors"] += 1
                verdict = False
            verdicts[pair] = float(bool(verdict))
    return [max(verdicts[pair] for pair in ps) for ps in pairs]


# ---- sampling: an engine is a generator that yields (shard, responses) as shards get complete --------------------------
# responses: per prompt a list of n dicts (ids: list of int with the EOS; truncated: bool; logp: list of float or None)

def generate_hf(lm, tokenizer, shards, n, temperature, top_p, top_k, max_tokens, seed):
    """Sample with transformers' own generate, one left-padded batch per shard. shards: {number: list of (index, ids)}."""
    eos = lm.generation_config.eos_token_id
    eos = tokenizer.eos_token_id if eos is None else eos
    eos = set(eos if isinstance(eos, list) else [eos])
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(eos)
    # every setting is given: what is left out would be filled in from the checkpoint's own generation config
    config = GenerationConfig(do_sample=temperature > 0, temperature=temperature or 1.0, top_p=top_p, top_k=max(top_k, 0),
                              repetition_penalty=1.0, max_new_tokens=max_tokens, eos_token_id=sorted(eos), pad_token_id=pad)
    for number, prompts in shards.items():
        rows = [ids for _, ids in prompts for _ in range(n)]
        width = max(map(len, rows))
        input_ids = torch.tensor([[pad] * (width - len(r)) + r for r in rows], device=lm.device)
        mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=lm.device)
        torch.manual_seed(derive_seed(seed, number))
        with torch.inference_mode():
            output = lm.generate(input_ids=input_ids, attention_mask=mask, generation_config=config)[:, width:].tolist()
        responses = []
        for ids in output:
            end = next((i + 1 for i, token in enumerate(ids) if token in eos), None)
            responses.append({"ids": ids[:end], "truncated": end is None, "logp": None})
        yield number, [responses[i:i + n] for i in range(0, len(responses), n)]


def generate_vllm(llm, shards, n, temperature, top_p, top_k, max_tokens, seed):
    """Sample with vLLM: the requests of all shards are in flight at once, so that continuous batching stays full."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind
    for number, prompts in shards.items():
        for position, (index, ids) in enumerate(prompts):
            params = SamplingParams(n=n, temperature=temperature, top_p=top_p, top_k=top_k, max_tokens=max_tokens,
                                    seed=derive_seed(seed, index), logprobs=0, output_kind=RequestOutputKind.FINAL_ONLY)
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


def pick_engine(engine):
    """`auto` takes vLLM where it is installed and a GPU is there, else transformers."""
    if engine == "auto":
        try:
            import vllm  # noqa: F401
            return "vllm" if torch.cuda.is_available() else "hf"
        except ImportError:
            return "hf"
    if engine == "vllm":
        try:
            import vllm  # noqa: F401
        except ImportError as error:
            raise InputError("--engine vllm: vLLM is not installed here; install it or use --engine hf") from error
    return engine


def open_engine(model, engine, tokenizer, local_rank, tensor_parallel=1, max_model_len=None, gpu_memory_utilization=0.9,
                trust_remote_code=False):
    """(generate function of the engine without its sampling settings, function that frees its memory)."""
    folder = resolve_checkpoint(model)
    if engine == "hf":
        device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        lm = load_lm(folder, dtype, trust_remote_code).to(device).eval()
        return lambda shards, **settings: generate_hf(lm, tokenizer, shards, **settings), lambda: None
    # each rank has its own engine on its own GPUs: torchrun's variables must not make them look for each other
    saved, visible = dict(os.environ), os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[local_rank:local_rank + tensor_parallel])
    for name in [k for k in os.environ if k in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
                 or k.startswith(("TORCHELASTIC_", "GROUP_", "ROLE_", "LOCAL_WORLD"))]:
        del os.environ[name]
    if gpus and len(os.environ["CUDA_VISIBLE_DEVICES"].split(",")) < tensor_parallel:
        raise InputError(f"--tensor-parallel {tensor_parallel} from process {local_rank} on needs more than the {len(gpus)} GPUs here")
    from vllm import LLM
    llm = LLM(model=str(folder), dtype="bfloat16" if torch.cuda.is_available() else "float32", seed=0,
              tensor_parallel_size=tensor_parallel, max_model_len=max_model_len,
              gpu_memory_utilization=gpu_memory_utilization, trust_remote_code=trust_remote_code,
              logprobs_mode="processed_logprobs")           # of the distribution that is sampled from, temperature included
    os.environ.clear()
    os.environ.update(saved)
    # vLLM's engine is a process of its own, which would outlive a rank that is killed and keep its GPU
    engines = " ".join(str(process.pid) for process in multiprocessing.active_children())
    watch = f"while kill -0 {os.getpid()}; do sleep 1; done; kill -9 {engines}"
    watcher = subprocess.Popen(["sh", "-c", watch], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)

    def close():
        llm.llm_engine.engine_core.shutdown()
        watcher.kill()
        watcher.wait()
    return lambda shards, **settings: generate_vllm(llm, shards, **settings), close


# ---- shards -----------------------------------------------------------------------------------------------------------
# A shard is a dict of flat ("jagged") tensors: response n is input_ids[offsets[n]:offsets[n+1]], its prompt first.
SHARD_FIELDS = {"input_ids": torch.int32, "offsets": torch.int64, "prompt_len": torch.int32, "prompt_index": torch.int64,
                "reward": torch.float32, "truncated": torch.bool, "sampler_logp": torch.float32, "reward_think": torch.float32}


def build_shard(prompts, responses, rewards, rewards_think, meta, grading=None):
    """prompts: list of (index, ids); responses: per prompt a list of dicts; rewards: flat list in the same order;
    grading: the counts of `grade`, which differ from shard to shard and so are not part of the settings in meta."""
    flat = [(index, ids, r) for (index, ids), group in zip(prompts, responses, strict=True) for r in group]
    lengths = torch.tensor([len(ids) + len(r["ids"]) for _, ids, r in flat])
    shard = {
        "version": SHARD_VERSION,
        "input_ids": torch.tensor([t for _, ids, r in flat for t in ids + r["ids"]], dtype=torch.int32),
        "offsets": torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        "prompt_len": torch.tensor([len(ids) for _, ids, _ in flat], dtype=torch.int32),
        "prompt_index": torch.tensor([index for index, _, _ in flat], dtype=torch.int64),
        "reward": torch.tensor(rewards, dtype=torch.float32),
        "truncated": torch.tensor([r["truncated"] for _, _, r in flat]),
        "sampler_logp": torch.tensor([x for _, _, r in flat for x in r["logp"] or [math.nan] * len(r["ids"])],
                                     dtype=torch.float32),
        "meta": meta, "grading": grading or {},
    }
    if rewards_think is not None:
        shard["reward_think"] = torch.tensor(rewards_think, dtype=torch.float32)
    return shard


def is_flat(tensor, dtype):
    """A plain tensor of one dimension, each number of which is in the file: an expanded one could claim any size."""
    return (isinstance(tensor, torch.Tensor) and tensor.dtype == dtype and tensor.layout == torch.strided and tensor.dim() == 1
            and tensor.is_contiguous())


def read_shard(path):
    """One shard, checked: InputError names the file if it is not a complete shard of this version."""
    shard = read_tensors(path, "shard", "delete it and run rollout.py again", mmap=True)
    if not isinstance(shard, dict) or shard.get("version") != SHARD_VERSION or not isinstance(shard.get("meta"), dict):
        raise InputError(f"{path} is not a rollout shard of version {SHARD_VERSION}: sample again with this rollout.py")
    if not all(isinstance(d, dict) and all(isinstance(x, (str, int, float)) for x in d.values()) for d in (shard["meta"], shard.get("grading", {}))):
        raise InputError(f"{path}: its meta holds more than text and numbers: sample again with this rollout.py")
    for key, dtype in SHARD_FIELDS.items():
        if not is_flat(shard.get(key), dtype) and (key in shard or key != "reward_think"):
            raise InputError(f"{path}: {key} is missing or not a flat {dtype} tensor")
    lengths, n = shard["offsets"].diff(), len(shard["prompt_len"])
    consistent = (n > 0 and len(lengths) == n and shard["offsets"][0] == 0 and shard["offsets"][-1] == len(shard["input_ids"])
                  and bool((lengths > shard["prompt_len"]).all()) and bool((shard["prompt_len"] > 0).all())
                  and all(len(shard[k]) == n for k in ("prompt_index", "reward", "truncated", "reward_think") if k in shard)
                  and len(shard["sampler_logp"]) == int((lengths - shard["prompt_len"]).sum()) and bool((shard["input_ids"] >= 0).all()))
    if not consistent:
        raise InputError(f"{path}: its tensors do not fit together (offsets, prompt_len, rewards): delete it and sample again")
    if not all(bool(((r == 0) | (r == 1)).all()) for r in (shard["reward"], shard.get("reward_think", shard["reward"]))):
        raise InputError(f"{path}: rewards must be 0 or 1")
    return shard


def load_shards(folder):
    """All shards of a finished rollout run, in order (section "shards" above). InputError if any is missing or damaged.

    Also used by teacher.py, distill.py and evaluate.py.
    """
    paths = sorted(Path(folder).glob("shard-*.pt"))
    if not paths:
        raise InputError(f"{folder} holds no shard-*.pt: give the --out folder of rollout.py")
    shards = [read_shard(path) for path in paths]
    meta = shards[0]["meta"]
    for path, shard in zip(paths, shards):
        different = [key for key in meta if shard["meta"].get(key) != meta[key] and key not in ("model", "prompts")]
        if different:
            raise InputError(f"{path} was sampled with another {different[0]} than {paths[0].name}: keep one run per folder")
    if len(shards) != meta.get("shards", len(shards)):
        raise InputError(f"{folder} has {len(shards)} of {meta['shards']} shards: "
                         f"run the same rollout.py command again to finish it")
    owner = {}                                              # each prompt belongs to one shard: nothing is trained on twice
    for path, shard in zip(paths, shards):
        for index in shard["prompt_index"].unique().tolist():
            if owner.setdefault(index, path) != path:
                raise InputError(f"{path} and {owner[index].name} both hold prompt {index}: one of them is a copy; delete it")
    return shards


PER_TOKEN = ("input_ids", "sampler_logp")


def join_shards(shards, tokens=True):
    """One dict over all responses: the flat tensors of the shards joined, plus response_offsets [N+1] into flat
    per-response-token tensors such as log-probs. tokens=False leaves out what has the size of all tokens, which at the
    paper's size is gigabytes that stay memory-mapped instead. Also used by teacher.py."""
    left_out = ("offsets", "reward_think", *(() if tokens else PER_TOKEN))
    joined = {key: torch.cat([s[key] for s in shards]) for key in SHARD_FIELDS if key not in left_out}
    if any("reward_think" in s for s in shards):            # a shard in which no response thinks has none
        joined["reward_think"] = torch.cat([s.get("reward_think", torch.zeros_like(s["reward"])) for s in shards])
    lengths = torch.cat([s["offsets"].diff() for s in shards])
    zero = torch.zeros(1, dtype=torch.int64)
    joined["offsets"] = torch.cat([zero, lengths.cumsum(0)])
    joined["response_offsets"] = torch.cat([zero, (lengths - joined["prompt_len"]).cumsum(0)])
    joined["meta"] = shards[0]["meta"]
    return joined


def grade_shard(tokenizer, prompts, responses, answers, args, stats, pool):
    """Rewards of a shard's responses, and the same looked for after </think> only (None if no response thinks)."""
    flat = [r for group in responses for r in group]
    texts = tokenizer.batch_decode([r["ids"] for r in flat], skip_special_tokens=False)
    golds = [answers[index] for (index, _), group in zip(prompts, responses) for _ in group]
    rewards = grade(texts, golds, args.task, args.workers, args.grade_timeout, stats, pool, args.unsafe_code)
    thinks = None
    if any("</think>" in text for text in texts):
        thinks = grade([t.rpartition("</think>")[2] if "</think>" in t else "" for t in texts], golds, args.task,
                       args.workers, args.grade_timeout, {}, pool, args.unsafe_code)
    if args.require_think_end:
        rewards = thinks or [0.0] * len(rewards)
    finished = [0.0 if r["truncated"] else 1.0 for r in flat]   # ours: a response cut off at the limit is wrong
    return [a * b for a, b in zip(rewards, finished)], thinks and [a * b for a, b in zip(thinks, finished)]


def shards_of_rank(n_shards, rank, world, tensor_parallel):
    """Numbers of the shards that a rank samples. With tensor parallelism the first of every so many ranks has an engine on their GPUs."""
    if rank % tensor_parallel and world > 1:
        return []
    return range(rank // tensor_parallel, n_shards, max(1, world // tensor_parallel))


def sample_rollouts(args, pool, rank=0, world=1, local_rank=0):
    """Sample and grade what is missing of the shards of args.out (see parse_args). Also used by evaluate.py."""
    if args.task == "code":
        sandbox(args.unsafe_code)                           # refuse before anything is sampled
    tokenizer = load_tokenizer(args.model, args.trust_remote_code)
    problems = load_prompts(args.prompts, args.prompt_field, args.answer_field, args.difficulty)
    answers = {p["index"]: p["answer"] for p in problems}
    if args.num_prompts and args.num_prompts < len(problems):
        problems = random.Random(args.seed).sample(problems, args.num_prompts)
    encoded = [(p["index"], encode_prompt(tokenizer, p["prompt"], args.prompt_suffix)) for p in problems]
    fitting = [(index, ids) for index, ids in encoded if len(ids) <= (args.max_prompt_tokens or math.inf)]
    too_long, encoded = len(encoded) - len(fitting), fitting
    if not encoded:
        raise InputError(f"every prompt is longer than --max-prompt-tokens {args.max_prompt_tokens}")
    slices = [encoded[i:i + args.shard_prompts] for i in range(0, len(encoded), args.shard_prompts)]

    engine = pick_engine(args.engine)
    settings = {"n": args.num_responses, **{k: getattr(args, k) for k in ("temperature", "top_p", "top_k", "max_tokens", "seed")}}
    version = transformers.__version__ if engine == "hf" else __import__("vllm").__version__
    prompt_hash = hashlib.sha256(json.dumps([(p["prompt"], p["answer"]) for p in problems]).encode()).hexdigest()
    meta = {"model": str(args.model), "model_fingerprint": checkpoint_fingerprint(args.model),
            "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer), **settings, "engine": engine, "engine_version": version,
            "prompts": str(args.prompts), "prompts_sha256": prompt_hash, "num_prompts": len(problems), "too_long_prompts": too_long,
            "prompt_suffix": args.prompt_suffix, "task": args.task, "require_think_end": args.require_think_end,
            "shard_prompts": args.shard_prompts, "shards": len(slices), **({"rehearsal": 1} if args.rehearse else {})}
    paths = [Path(args.out) / f"shard-{i:05d}.pt" for i in range(len(slices))]
    for path in sorted(Path(args.out).glob("shard-*.pt")):
        theirs = read_shard(path)["meta"]
        for key in {**meta, **theirs}:
            if theirs.get(key) != meta.get(key) and key not in ("model", "prompts"):    # paths: known by their content
                raise InputError(f"{path} was sampled with {key} = {theirs.get(key)!r}, now {meta.get(key)!r}: "
                                 f"use another --out, or delete that folder to start over")

    shares = [shards_of_rank(len(slices), r, world, args.tensor_parallel if engine == "vllm" else 1) for r in range(world)]
    missing = {i: slices[i] for i in shares[rank] if not paths[i].exists()}
    start, n_tokens = time.time(), 0
    if missing:
        check_out(args.out)
        one_writer(args.out)
        generate, close = open_engine(args.model, engine, tokenizer, local_rank, args.tensor_parallel, args.max_model_len,
                                      args.gpu_memory_utilization, args.trust_remote_code)
        bar = tqdm(total=sum(map(len, missing.values())) * args.num_responses, desc="sampling", unit="resp", disable=rank > 0)
        for number, responses in generate(missing, **settings):
            stats = {}
            rewards, thinks = grade_shard(tokenizer, slices[number], responses, answers, args, stats, pool)
            if args.rehearse:                               # graded all the same: what is wrong with the grader shows
                rewards = [float(i % 2 == 0) for i in range(len(rewards))]
            shard = build_shard(slices[number], responses, rewards, thinks, meta, stats)
            write_atomic(paths[number], lambda p: torch.save(shard, p))
            n_tokens += len(shard["sampler_logp"])
            bar.update(len(rewards))
            bar.set_postfix_str(f"{n_tokens / (time.time() - start):,.0f} tok/s")
        bar.close()
        close()
        release(args.out)
    rate = n_tokens / max(time.time() - start, 1e-9)
    return rate * sum(map(bool, shares)) if missing else None                       # of all engines together, as fast as this one


def count_grading(shards):
    """Sum of the grading counts of all shards. Also used by evaluate.py."""
    counts = [s.get("grading", {}) for s in shards]
    return {key: sum(c.get(key, 0) for c in counts) for key in sorted({k for c in counts for k in c})}


def summarize(folder, rate):
    """Write rollouts.json and print one line: what a run is worth before anything is trained on it."""
    shards = load_shards(folder)
    r, grading = join_shards(shards, tokens=False), count_grading(shards)
    groups = [r["reward"][r["prompt_index"] == i] for i in r["prompt_index"].unique()]
    summary = {"responses": len(r["reward"]), "prompts": len(groups), "pass_rate": r["reward"].mean().item(),
               "all_right": sum(g.min() == 1 for g in groups).item() / len(groups) if groups else 0.0,
               "all_wrong": sum(g.max() == 0 for g in groups).item() / len(groups) if groups else 0.0,
               "mean_length": r["response_offsets"].diff().float().mean().item(),
               "truncated": r["truncated"].float().mean().item(),
               "too_long_prompts": r["meta"].get("too_long_prompts", 0), "tok_per_s": rate, **{f"grading_{k}": v for k, v in grading.items()}}
    write_json(Path(folder) / "rollouts.json", {"summary": summary, "meta": r["meta"]})
    print(f"{folder}: {summary['responses']:,} responses to {summary['prompts']:,} prompts | right {summary['pass_rate']:.3f} | "
          f"all right {summary['all_right']:.3f} | all wrong {summary['all_wrong']:.3f} | length {summary['mean_length']:.1f} | "
          f"truncated {summary['truncated']:.3f} | prompts left out as too long {summary['too_long_prompts']} | grading time-outs {grading.get('timeouts', 0)}"
          + (f" | {rate:,.0f} tok/s" if rate else ""))


def parse_args(argv=None):
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arg = p.add_argument
    # Model and data
    arg("--model", required=True, help="the policy that writes the rollouts, pi_old: folder or hub name")
    arg("--prompts", required=True, help=".jsonl, .json, .csv, .parquet or a hub data set with problems and answers")
    arg("--out", type=Path, required=True, help="folder of the shards")
    arg("--num-prompts", type=int, default=1000, help="a random N of the prompts by --seed, 0 for all in order (Sec. 4.1: 1,000)")
    arg("--difficulty", type=float, nargs=2, metavar=("LOW", "HIGH"), help="keep problems with this pass rate in their difficulty field (POLARIS)")
    arg("--max-prompt-tokens", type=int, help="leave out longer prompts, and count them")
    arg("--prompt-field", help="field of the problem, if it has an unusual name")
    arg("--answer-field", help="field of the gold answer, if it has an unusual name")
    arg("--prompt-suffix", default="", help="text added to every problem")
    arg("--ask-for-box", dest="prompt_suffix", action="store_const", const=ASK_FOR_BOX, help="ask for a boxed answer in problems that do not")
    # Sampling
    arg("-n", "--num-responses", type=int, default=16, help="responses per prompt (Sec. 4.1)")
    arg("--temperature", type=float, default=0.6, help="Sec. 4.1: 0.6, and 1.0 for Qwen3.5")
    arg("--top-p", type=float, default=1.0, help="ours: 1, so that pi_old is the distribution sampled from")
    arg("--top-k", type=int, default=-1, help="-1 for all tokens")
    arg("--max-tokens", type=int, default=32768, help="longest response (Sec. 4.1)")
    arg("--seed", type=int, default=0, help="of the choice of prompts and of the sampling")
    # Engine
    arg("--engine", choices=["auto", "vllm", "hf"], default="auto", help="auto: vLLM on a GPU, else transformers")
    arg("--tensor-parallel", type=int, default=1, help="GPUs per vLLM engine; still start one process per GPU")
    arg("--max-model-len", type=int, help="context that vLLM reserves memory for (default: the model's)")
    arg("--gpu-memory-utilization", type=float, default=0.9, help="share of the GPU that vLLM takes")
    arg("--shard-prompts", type=int, default=16, help="prompts per shard; with --engine hf also the batch, times n")
    arg("--trust-remote-code", action="store_true", help="run code that comes with the checkpoint")
    # Grading
    arg("--task", choices=["math", "code"], default="math", help="math: the last box; code: the last code block passes all tests (Table 11)")
    arg("--unsafe-code", action="store_true", help="run programs without isolation, as yourself")
    arg("--rehearse", action="store_true", help="reward every other response, right or wrong: so short a rehearsal finds no right one to learn from")
    arg("--require-think-end", action="store_true", help="reward only answers after </think> (default: any last box)")
    arg("--workers", type=int, default=2, help="grading processes")
    arg("--grade-timeout", type=float, default=10.0, help="seconds per answer, or per test of a program")
    args = p.parse_args(argv)
    for name in ("num_responses", "max_tokens", "shard_prompts", "tensor_parallel", "workers"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1")
    if not 0 < args.grade_timeout < math.inf:
        raise InputError("--grade-timeout must be positive")
    if not 0 <= args.temperature < math.inf or not 0 < args.top_p <= 1 or args.num_prompts < 0:
        raise InputError("--temperature and --num-prompts must not be negative, and --top-p in (0, 1]")
    return args


def main():
    args = parse_args()
    rank, world, local_rank = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    with grading_pool(args.workers) as pool:
        rate = sample_rollouts(args, pool, rank, world, local_rank)
    written = sorted(args.out.glob("shard-*.pt"))
    if rate is None and (args.out / "rollouts.json").exists():
        if rank == 0:
            print(f"{args.out}: already finished")
    elif written and len(written) == read_shard(written[0])["meta"]["shards"]:
        summarize(args.out, rate)                           # by the rank that finishes last: only it sees all shards


if __name__ == "__main__":
    run_main(main, lambda: f"try --shard-prompts {max(1, parse_args().shard_prompts // 2)}, or with vLLM a lower --gpu-memory-utilization")
