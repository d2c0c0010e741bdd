"""What keeps the stages readable in one sitting: width, length of functions, and the line behind which
nothing is method."""
import ast
import re

import pytest

import conftest

STAGES = ["rollout.py", "teacher.py", "distill.py", "evaluate.py"]
PARTS = sorted(str(path.relative_to(conftest.ROOT)) for folder in ("paper", "tasks")
               for path in (conftest.ROOT / "tests" / folder).glob("*.*") if path.suffix in (".py", ".sh"))
TESTS = sorted(f"tests/{path.name}" for path in (conftest.ROOT / "tests").glob("*.py"))
BANNER = "# ---- machinery: nothing below is about the method "
# Lines in all, and before the banner (what a reader of the method has to read): growth is a decision.
TOTAL = {"rollout.py": 823, "teacher.py": 964, "distill.py": 230, "evaluate.py": 298, "run_rounds.sh": 220,
         "tests/paper/report.py": 480, "tests/paper/recipes.sh": 380}
METHOD = {"rollout.py": 431, "teacher.py": 550, "distill.py": 197, "evaluate.py": 196}


@pytest.mark.parametrize("name", [*STAGES, "run_rounds.sh", *PARTS, *TESTS])
def test_no_line_is_wider_than_110_columns(name):
    lines = (conftest.ROOT / name).read_text().splitlines()
    assert [f"{i}: {line}" for i, line in enumerate(lines, 1) if len(line) > 110] == []


@pytest.mark.parametrize("name", STAGES)
def test_the_method_stands_before_the_machinery(name):
    text = (conftest.ROOT / name).read_text()
    lines = text.splitlines()
    banner, = (i for i, line in enumerate(lines, 1) if line.startswith(BANNER))
    defined = {node.name: node for node in ast.parse(text).body if hasattr(node, "name")}
    assert defined["main"].end_lineno < banner <= METHOD[name]
    assert max(defined.values(), key=lambda node: node.lineno if node.lineno < banner else 0).name == "main"
    topic = {"rollout.py": ["load_prompts", "grade", "generate_hf", "generate_vllm", "build_shard"],
             "teacher.py": ["logps_from_hidden", "token_logps", "ce_loss", "sapo_loss", "grpo_loss",
                            "mse_loss", "sft_loss", "group_advantages", "gae_advantages"],
             "distill.py": ["whiten", "signal_of", "distill_loss"],
             "evaluate.py": ["avg_at_k", "entropy_and_kl", "evaluate", "pick"]}
    assert all(defined[function].lineno < banner for function in topic[name])
    below = {node.name for node in defined.values() if node.lineno > banner}
    assert not {function for function in below if function.endswith("_loss")
                or "advantages" in function} - {"ppo_advantages"}


@pytest.mark.parametrize("name", TOTAL)
def test_files_stay_as_long_as_they_are(name):
    assert len((conftest.ROOT / name).read_text().splitlines()) <= TOTAL[name]


@pytest.mark.parametrize("name", STAGES)
def test_functions_are_short(name):
    """40 lines; main 80, since it is read from top to bottom."""
    most = {"main": 80}
    long = {node.name: node.end_lineno - node.lineno + 1
            for node in ast.walk(ast.parse((conftest.ROOT / name).read_text()))
            if isinstance(node, ast.FunctionDef)}
    assert {function: n for function, n in long.items() if n > most.get(function, 40)} == {}


def test_every_loss_that_can_be_asked_for_has_a_line_and_another_is_an_error():
    text = (conftest.ROOT / "teacher.py").read_text()
    loop = text[text.index("# ---- training loop"):text.index(BANNER)]
    import teacher
    choices = next(action.choices for action in teacher.build_parser()._actions if action.dest == "loss")
    assert all(f'"{loss}"' in loop for loss in choices) and "NotImplementedError" in loop


def test_the_readme_says_how_long_the_files_are():
    text = (conftest.ROOT / "README.md").read_text()
    for name, lines, before in re.findall(r"\| `(\w+\.py)` \| ([\d,]+), (\d+) \|", text):
        code = (conftest.ROOT / name).read_text().splitlines()
        banner = next(i for i, line in enumerate(code) if line.startswith(BANNER))
        assert abs(len(code) - int(lines.replace(",", ""))) <= 10 and abs(banner - int(before)) <= 10, name
    assert len(text.splitlines()) <= 170 and len(text.split()) <= 1800
