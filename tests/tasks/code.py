"""Programs as a task (Table 11): right if the last code block of a response passes all tests of its problem.

    python rollout.py --task code ...

Rows: AReaL's (`question`, `input_output`) and LiveCodeBench's (`question_content`, `public_test_cases`,
`private_test_cases`). The answer is the JSON text of {inputs, outputs, fn_name?}: texts for stdin and stdout,
or, with fn_name, a list of positional arguments and the plain value that the function (or the method of
`class Solution`) returns.

A model's programs run where they can do no harm: in a box made by bubblewrap, without network, home or other
processes, with limits on time, memory, processes and output. A file for --task has `read_row` and `grade`;
`check_machine` and `time_limit` are there for those that need them (rollout.py, `load_task`).
"""
import base64
import contextlib
import decimal
import functools
import io
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

PROMPTS, ANSWERS = ("question", "prompt", "problem", "question_content"), ("input_output", "answer")


class PlainData(pickle.Unpickler):
    """Reads pickles of text and numbers; anything that would name a class or function is refused."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it wants {module}.{name}")


def read_row(row):
    """(prompt, answer) of a row of a data set."""
    if "public_test_cases" in row:
        return livecodebench_row(row)
    return next(row[key] for key in PROMPTS if key in row), next(row[key] for key in ANSWERS if key in row)


def livecodebench_row(row):
    """(prompt, answer) of a row of LiveCodeBench, whose private tests are base64(zlib(pickle(JSON text)))."""
    tests = json.loads(row["public_test_cases"])
    private = row.get("private_test_cases") or "[]"
    if not private.lstrip().startswith("["):
        private = PlainData(io.BytesIO(zlib.decompress(base64.b64decode(private)))).load()
    tests += json.loads(private)
    name = json.loads(row.get("metadata") or "{}").get("func_name")
    if name:                                                # one JSON value per line of input is one argument
        lines = [[json.loads(line) for line in t["input"].splitlines() if line.strip()] for t in tests]
        answer = {"inputs": lines, "outputs": [json.loads(t["output"]) for t in tests], "fn_name": name}
    else:
        answer = {"inputs": [t["input"] for t in tests], "outputs": [t["output"] for t in tests]}
    code = row.get("starter_code")
    task = "Complete this code" if code else "Read the input from stdin and print the answer to stdout"
    starter = f"\n\n```python\n{code}\n```" if code else ""
    return (f"{row['question_content']}\n\n{task}. Give the whole program in one Python code block.{starter}",
            json.dumps(answer))


def grade(responses, answers, timeout=10.0, unsafe_code=False):
    """1.0 where a program passes all tests, each within `timeout` seconds; None where the tests cannot be
    used."""
    box = sandbox(unsafe_code)
    return [verdict(response, answer, timeout, box) for response, answer in zip(responses, answers)]


def verdict(response, answer, timeout, box):
    try:
        tests = read_tests(answer)
    except (ValueError, TypeError, KeyError):
        return None
    program = extract_code(response)
    return 0.0 if program is None else float(passes_tests(box, program, tests, timeout))


def read_tests(answer):
    """{inputs, outputs, fn_name?}; ValueError, TypeError or KeyError if the answer is something else."""
    tests = json.loads(answer) if isinstance(answer, str) else answer
    if not len(tests["inputs"]) == len(tests["outputs"]) > 0:
        raise ValueError("inputs and outputs differ in number")
    return tests


def time_limit(answer, timeout):
    """Seconds that all tests of a problem may take together; LiveCodeBench limits them so."""
    try:
        return (timeout + 1) * len(read_tests(answer)["inputs"]) + 5
    except (ValueError, TypeError, KeyError):
        return timeout


def check_machine(unsafe_code=False):
    """RuntimeError if programs cannot be isolated here: asked before anything is sampled."""
    sandbox(unsafe_code)


# ---- running a program ----

IMPORTS = """import bisect, collections, functools, heapq, itertools, json, math, random, re, string, sys
from collections import *
from functools import *
from itertools import *
from typing import *
"""                                                         # what problems with starter code take for granted
MARK = "<result of the call>"
MEMORY, OUTPUT = 4 << 30, 16 << 20                         # bytes of address space per process, and of output
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
    """(command prefix that isolates, interpreter, user id to become or None); RuntimeError if there is no
    isolation.

    Inside there is the interpreter and the system's libraries, read-only, an empty scratch folder, and
    nothing else. Root becomes an unprivileged user, because the limit on processes does not hold for root.
    """
    python, user = os.path.realpath(sys.executable), None
    if unsafe:
        return [], python, None
    if os.geteuid() == 0:
        user, pythons = 65534, (python, os.path.realpath("/usr/bin/python3"))       # nobody
        python = next((p for p in pythons if os.path.exists(p) and readable_by_all(p)), None)
        if python is None:
            raise RuntimeError("programs cannot be isolated: you are root and no python can be reached by "
                               "others; install /usr/bin/python3, be another user, or give --unsafe-code")
    prefix = str(Path(python).parent.parent)
    system = ["/usr", "/lib", "/lib64", "/bin", *([] if prefix.startswith("/usr") else [prefix])]
    mounts = [word for d in system if os.path.isdir(d) for word in ("--ro-bind", d, d)]
    command = ["bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--clearenv",
               "--proc", "/proc", "--dev", "/dev", *mounts,
               "--size", str(64 << 20), "--tmpfs", "/scratch", "--chdir", "/scratch"]
    if not shutil.which("bwrap") or run_program((command, python, user), "print(6 * 7)", "", 10.0) != "42\n":
        raise RuntimeError("programs cannot be isolated on this machine: install bubblewrap (Debian: apt "
                           "install bubblewrap), or give --unsafe-code to run them as yourself")
    return command, python, user


def run_program(box, source, stdin, seconds, name=None):
    """What a program prints within `seconds`, None if it fails, TimeoutError past the limit. box: of
    `sandbox`.

    With `name` the program's function of that name (or the method of its class Solution) is called with the
    JSON list `stdin`.
    """
    command, python, user = box
    limits = {"RLIMIT_AS": MEMORY, "RLIMIT_CPU": math.ceil(seconds) + 1, "RLIMIT_FSIZE": OUTPUT,
              "RLIMIT_CORE": 0, "RLIMIT_NOFILE": 256}
    if command:
        limits["RLIMIT_NPROC"] = 32                         # in a box of its own the count starts at 0
    file = tempfile.TemporaryFile
    with file() as program, file() as fed, file() as printed:
        for filled, text in ((program, source), (fed, stdin)):
            filled.write(text.encode("utf-8", "replace"))
            filled.seek(0)
        task = json.dumps([limits, program.fileno(), name, IMPORTS, MARK])
        process = subprocess.Popen(
            [*command, python, "-I", "-c", LAUNCHER, task], stdin=fed, stdout=printed,
            stderr=subprocess.DEVNULL, env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}, cwd="/",
            start_new_session=True, pass_fds=[program.fileno()],
            **({} if user is None else {"user": user, "group": user, "extra_groups": []}))
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError from error
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the whole group; the box dies with its first process
            process.wait()
        printed.seek(0)
        return printed.read().decode("utf-8", "replace") if code == 0 else None


def same_output(got, wanted):
    """Equal line by line, white space at the ends aside; lines of numbers may be written differently: 1.50
    and 1.5."""
    def numbers(line):
        try:
            return [decimal.Decimal(word) for word in line.split()]
        except decimal.InvalidOperation:
            return None
    wanted = wanted if isinstance(wanted, str) else "\n".join(map(str, wanted))
    got, wanted = (text.strip().split("\n") for text in (got, wanted))
    return len(got) == len(wanted) and all(
        a.strip() == b.strip() or (numbers(a) is not None and numbers(a) == numbers(b))
        for a, b in zip(got, wanted))


def passes_tests(box, program, tests, seconds):
    """Whether a program passes all of {inputs, outputs, fn_name?}; stops at the first that fails. May
    TimeoutError."""
    name, deadline = tests.get("fn_name"), time.monotonic() + time_limit(tests, seconds)
    for given, wanted in zip(tests["inputs"], tests["outputs"], strict=True):
        if time.monotonic() > deadline:
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
