"""
An LLM as judge of answers that the rules call wrong (Sec. 4.1, Table 11).

evaluate.py --judge-url URL --judge-model NAME: any OpenAI-compatible endpoint; its key in OPENAI_API_KEY.
Only boxed answers are asked about, equal ones once.
"""
import concurrent.futures
import http.client
import json
import os
import re
import time
import urllib.request

import torch
from tqdm import tqdm

from rollout import RunError, last_boxed, load_prompts, load_tokenizer, read_json, write_json
from teacher import response_ids

JUDGE_PROMPT = """Problem:
{problem}

Reference answer: {gold}
Given answer: {answer}

Do the two answers mean the same? Differences of notation do not matter. End with one word, YES or NO."""


def judge_question(problem, answer):
    """What the judge is asked about a boxed answer to a problem of load_prompts."""
    text, gold = problem["prompt"], problem["answer"]
    text = text if isinstance(text, str) else text[-1]["content"]
    gold = " or ".join(map(str, gold)) if isinstance(gold, list) else gold
    return JUDGE_PROMPT.format(problem=text, gold=gold, answer=answer[:1000])


def judge(args, problems, responses, indices, wrong, path):
    """(accepted by the judge [N], counts): the boxed answers of the responses in `wrong` [N] are asked.

    Verdicts are kept in `path`: a second run asks what is missing. RunError if nothing gets an answer.
    """
    kept = read_json(path, "delete it, the judge is asked again") if path.exists() else {}
    asked = {n: judge_question(problems[indices[n].item()], answer) for n in wrong.nonzero()[:, 0].tolist()
             if (answer := last_boxed(responses[n]))}
    missing, errors = [question for question in dict.fromkeys(asked.values()) if question not in kept], []

    def answer_one(question):
        try:
            kept[question] = ask_judge(args.judge_url, args.judge_model, question, args.judge_timeout)
        except OSError as error:
            errors.append(error)
    with concurrent.futures.ThreadPoolExecutor(16) as threads:
        list(tqdm(threads.map(answer_one, missing), total=len(missing), desc="judge", leave=False))
    if missing and len(errors) == len(missing):
        raise RunError(f"the judge answers nothing: {errors[0]}") from errors[0]
    write_json(path, kept)
    verdicts = {n: kept.get(question, "unanswered") for n, question in asked.items()}
    names = {"yes": True, "unclear": None, "unanswered": "unanswered"}
    counts = {"asked": len(verdicts)} | {name: list(verdicts.values()).count(v) for name, v in names.items()}
    return torch.tensor([verdicts.get(n) is True for n in range(len(wrong))]), counts


def judge_samples(args, model, file, data, folder):
    """(share of responses that are right if the judge has the last word, counts of judge)."""
    lengths = data["response_offsets"].diff().tolist()
    tokenizer = load_tokenizer(model, args.trust_remote_code)
    responses = tokenizer.batch_decode([response_ids(data, i)[-n:] for i, n in enumerate(lengths)])
    problems, wrong = {p["index"]: p for p in load_prompts(file)}, (data["reward"] == 0) & ~data["truncated"]
    path = folder / f"judge-{re.sub(r'[^A-Za-z0-9.-]+', '_', args.judge_model)}.json"
    accepted, counts = judge(args, problems, responses, data["prompt_index"], wrong, path)
    print(f"judge {args.judge_model}: " + ", ".join(f"{what} {n}" for what, n in counts.items()))
    return (data["reward"].bool() | accepted).double().mean().item(), counts


def ask_judge(url, model, question, timeout=120.0, tries=3, wait=2.0):
    """True, False, or None for a reply without a verdict; OSError if an endpoint gives none in `tries`."""
    body = {"model": model, "messages": [{"role": "user", "content": question}], "temperature": 0.0}
    key = os.environ.get("OPENAI_API_KEY", "none")
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    address = url.rstrip("/").removesuffix("/v1") + "/v1/chat/completions"
    request = urllib.request.Request(address, json.dumps(body).encode(), headers)
    for attempt in range(1, tries + 1):
        try:
            with urllib.request.urlopen(request, timeout=timeout) as reply:
                text = json.load(reply)["choices"][0]["message"]["content"]
                break
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
            if attempt == tries:
                raise OSError(f"{url}: {type(error).__name__}: {error}") from error
            time.sleep(wait * attempt)
    words = re.findall(r"\b(yes|no)\b", str(text), re.IGNORECASE)
    return words[-1].lower() == "yes" if words else None


def check_judge(args):
    """Ask the judge whether 2 is 2: one that does not answer shows before hours of sampling, not after."""
    question = JUDGE_PROMPT.format(problem="What is 1 + 1?", gold="2", answer="2")
    try:
        if ask_judge(args.judge_url, args.judge_model, question, args.judge_timeout) is not True:
            print(f"judge {args.judge_model}: says no YES to the same answer twice; is it the right model?")
    except OSError as error:
        raise RunError(f"the judge answers nothing: {error}") from error
