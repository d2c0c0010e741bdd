"""
See the signal (evaluate.py --show RUN): a right and a wrong response that a run of distill.py trained on.

Each token stands in a box coloured by A_hat, the whitened signal (Sec. 3.3): blue is reinforced, red is
discouraged. Under it: log pi_old, log pi_teacher, log pi_student. Writes RUN/signal.html and signal.png.
"""
import html
import itertools
import statistics

import torch
from matplotlib import colormaps, colors, patches
from matplotlib.figure import Figure

from distill import signal_of_responses, standardize, whitening
from rollout import InputError, last_boxed, load_tokenizer, read_json, write_atomic
from teacher import find_old, load_rollouts, response_ids, score

LEGEND = "A_hat: blue positive, red negative. Under each token log pi_old, log pi_teacher, log pi_student."
FARTHEST, TOKENS, WIDE = 3.0, 400, 100      # standard deviations of the full colour; tokens, characters shown
STYLE = """<meta charset="utf-8"><style>body { font: 15px sans-serif; margin: 2em; max-width: 72em }
.t { display: inline-block; border: 1px solid #ccc; margin: 1px; padding: 1px 3px; white-space: pre;
     text-align: center; font-family: monospace } .t small { display: block; font-size: 9px }</style>
"""


def scores_of(run, args, rollouts):
    """Log-probs of all response tokens [N]: old, teacher, student, denominator; 'live' is the student."""
    options = {key: args[key] for key in ("micro_tokens", "trust_remote_code")}
    options["temperature"] = args["logp_temperature"]
    old, student = (score(p, rollouts, **options) for p in (find_old(rollouts, args["old"]), run / "final"))
    known = {"old": old, "live": student, "none": torch.zeros_like(old)}
    teacher, denominator = (known[name] if name in known else score(name, rollouts, **options)
                            for name in (args["teacher"], args["denominator"]))
    return old, teacher, student, denominator


def whitened(args, rollouts, teacher, denominator):
    """{response: its A_hat [T]}, of those that the run used (Sec. 3.3)."""
    usable = ~rollouts["truncated"] if args["drop_truncated"] else torch.ones_like(rollouts["truncated"])
    signal = signal_of_responses(rollouts, usable, teacher, denominator, args["positive_signal"])
    raw = [values for values, _ in signal]
    mean, std = whitening(raw)
    return {i: standardize(values, mean, std, torch.ones_like(values))
            for i, values in zip(usable.nonzero()[:, 0].tolist(), raw)}


def find_pair(rollouts, indices, text):
    """(a right, a wrong response) to one prompt: of other answers and moderate length if there are such."""
    lengths, prompts = rollouts["response_offsets"].diff().tolist(), rollouts["prompt_index"].tolist()
    rewards, median = rollouts["reward"].tolist(), statistics.median(lengths[i] for i in indices)
    groups = [list(group) for _, group in itertools.groupby(indices, lambda i: prompts[i])]
    pairs = [(a, b) for group in groups for a in group for b in group if rewards[a] > 0 >= rewards[b]]
    if not pairs:
        raise InputError("no prompt of the rollouts has a right and a wrong response: nothing to show")
    moderate = [pair for pair in pairs if all(median / 2 <= lengths[i] <= 2 * median for i in pair)]
    answers = (({last_boxed(text(i)) for i in pair}, pair) for pair in moderate)
    return next((pair for found, pair in answers if len(found - {None}) == 2), (moderate or pairs)[0])


def colour(value):
    """(background, text) for a value of the signal: blue if it is positive, red if negative, white at 0."""
    share = max(-1.0, min(1.0, value / FARTHEST))
    return colors.to_hex(colormaps["RdBu"](0.5 + share / 2)), "#fff" if abs(share) > 0.8 else "#000"


def as_html(title, tokens):
    """One response: a box per token (text, A_hat, log-probs)."""
    boxes = []
    for text, value, *logps in tokens:
        (ground, ink), numbers = colour(value), "".join(f"<small>{logp:.2f}</small>" for logp in logps)
        style = f'title="A_hat {value:+.2f}" style="background:{ground};color:{ink}"'
        boxes.append(f'<span class="t" {style}>{html.escape(text)}{numbers}</span>')
    return f"<h3>{html.escape(title)}</h3>\n<p>{''.join(boxes)}</p>\n"


def rows_of(tokens):
    """Rows of the picture: [(column, width, token)] each, as many tokens as WIDE characters hold."""
    rows, column = [[]], 0
    for token in tokens:
        width = max(5, len(token[0]) + 1)
        if column + width > WIDE:
            rows, column = [*rows, []], 0
        rows[-1].append((column, width, token))
        column += width
    return rows


def as_png(path, parts):
    """The same as a picture; parts: (title, tokens) of each response."""
    rows = [LEGEND, *(row for title, tokens in parts for row in (title, *rows_of(tokens)))]
    figure = Figure(figsize=(WIDE / 9, 0.5 * len(rows)))
    axes = figure.add_axes((0.01, 0, 0.98, 1), xlim=(0, WIDE), ylim=(len(rows), 0))
    axes.axis("off")
    for y, row in enumerate(rows):
        title, boxes = (row, []) if isinstance(row, str) else ("", row)
        axes.text(0, y + 0.75, title, fontsize=9, weight="bold", parse_math=False)
        for x, width, (text, value, *logps) in boxes:
            ground, ink = colour(value)
            axes.add_patch(patches.Rectangle((x, y + 0.04), width, 0.92, facecolor=ground, edgecolor="#ccc"))
            look = dict(ha="center", va="center", color=ink)
            axes.text(x + width / 2, y + 0.22, text, family="monospace", fontsize=8, parse_math=False, **look)
            for k, logp in enumerate(logps):
                axes.text(x + width / 2, y + 0.46 + 0.19 * k, f"{logp:.2f}", fontsize=5, **look)
    write_atomic(path, lambda p: figure.savefig(p, dpi=130, format="png"))


def show(run):
    """Write RUN/signal.html and RUN/signal.png of a finished run of distill.py."""
    args = read_json(run / "run.json", "give the --out of distill.py")["args"]
    if "denominator" not in args or not (run / "final").is_dir():
        raise InputError(f"{run} is no finished run of distill.py: give its --out")
    rollouts = load_rollouts(args["rollouts"])
    tokenizer, bounds = load_tokenizer(run / "final", args["trust_remote_code"]), rollouts["response_offsets"]

    def ids(i):
        return response_ids(rollouts, i)[bounds[i] - bounds[i + 1]:].tolist()
    *shown, denominator = scores_of(run, args, rollouts)    # old, teacher, student
    a_hat, parts = whitened(args, rollouts, shown[1], denominator), []
    pair = find_pair(rollouts, list(a_hat), lambda i: tokenizer.decode(ids(i)))
    for kind, i in zip(("Right", "Wrong"), pair):
        texts = [tokenizer.decode([token]).replace("\n", "\\n") for token in ids(i)[:TOKENS]]
        logps = [values[bounds[i]:bounds[i + 1]].tolist() for values in shown]
        prompt = tokenizer.decode(response_ids(rollouts, i)[:bounds[i] - bounds[i + 1]])
        title = f"{kind} response ({len(a_hat[i])} tokens) to: {' '.join(prompt.split())[-80:]}"
        parts.append((title, list(zip(texts, a_hat[i].tolist(), *logps))))
    page = f"{STYLE}<p>{LEGEND}</p>\n" + "".join(as_html(*part) for part in parts)
    write_atomic(run / "signal.html", lambda p: p.write_text(page))
    as_png(run / "signal.png", parts)
    print(f"{run / 'signal.html'}   {run / 'signal.png'}")
