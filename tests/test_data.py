"""Prompts, grading, shards and batches: nothing lost, nothing doubled, nothing misread."""
import json
import multiprocessing
import shutil
from pathlib import Path

import pytest
import torch

import conftest
import evaluate
import rollout
import teacher


META = {"model": "m", "model_fingerprint": "f", "tokenizer_fingerprint": "t", "temperature": 1.0, "shards": 1}


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.mark.parametrize("row, prompt, answer", [
    ({"problem": "1+1", "answer": "2"}, "1+1", "2"),
    ({"question": "1+1", "ground_truth": 2}, "1+1", 2),
    ({"Problem": "1+1", "Short Answer": "2", "Category": "Algebra"}, "1+1", "2"),
    ({"prompt": [{"role": "user", "content": "1+1"}], "reward_model": {"ground_truth": 2.0, "style": "rule"}},
     [{"role": "user", "content": "1+1"}], 2.0),
    ({"problem": "roots", "answer": ["1", "-1"]}, "roots", ["1", "-1"]),
    # GSM8K
    ({"question": "eggs", "answer": "She has 16 - 3 = <<16-3=13>>13.\nSo 9 * 2 = 18.\n#### 18"}, "eggs",
     "18"),
    ({"question": "eggs", "answer": "#### 1,234,500"}, "eggs", "1234500"),
    # MATH
    ({"problem": "area", "solution": "It is \\boxed{3}, no, $\\boxed{\\frac{1}{2}}$.", "level": "Level 5"},
     "area", "\\frac{1}{2}"),
    ({"problem": "p", "solution": "so \\boxed{3}", "answer": "4"}, "p", "4"),
])
def test_known_layouts_are_recognised(tmp_path, row, prompt, answer):
    assert rollout.load_prompts(write(tmp_path / "p.jsonl", [row])) == [{"prompt": prompt, "answer": answer,
                                                                         "index": 0}]


def test_json_csv_and_parquet_read_the_same_and_a_byte_order_mark_is_accepted(tmp_path):
    rows = [{"problem": "a, \"b\"", "answer": "1"}, {"problem": "c\nd", "answer": "2"}]
    (tmp_path / "p.json").write_text("\ufeff" + json.dumps(rows), encoding="utf-8")
    (tmp_path / "p.csv").write_text('\ufeffproblem,answer\n"a, ""b""",1\n"c\nd",2\n', encoding="utf-8")
    import pyarrow
    import pyarrow.parquet
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    wanted = rollout.load_prompts(write(tmp_path / "p.jsonl", rows))
    for ending in ("json", "csv", "parquet"):
        assert rollout.load_prompts(tmp_path / f"p.{ending}") == wanted


def test_a_hub_set_may_name_its_configuration_and_split(monkeypatch):
    import datasets
    asked = []

    def load_dataset(name, configuration=None):
        asked.append((name, configuration))
        return {"train": [{"question": "a", "answer": "#### 1"}],
                "test": [{"question": "b", "answer": "#### 2"}]}
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for path, wanted in (("openai/gsm8k:main[test]", "b"), ("openai/gsm8k:main", "a"),
                         ("openai/gsm8k[test]", "b"), ("openai/gsm8k", "a")):
        assert rollout.load_prompts(path)[0]["prompt"] == wanted
    assert asked == [("openai/gsm8k", "main"), ("openai/gsm8k", "main"), ("openai/gsm8k", None),
                     ("openai/gsm8k", None)]
    with pytest.raises(rollout.InputError, match="openai/gsm8k has the splits train, test"):
        rollout.load_prompts("openai/gsm8k:main[dev]")
    assert evaluate.parse_benchmark("gsm8k=openai/gsm8k:main[test]:8", 32) == ("gsm8k",
                                                                               "openai/gsm8k:main[test]", 8)
    for wrong in ("nowhere.jsonl", "a/b.jsonl", "no such file", "gsm8k:main[test]"):
        with pytest.raises(rollout.InputError, match="does not exist or is not a file"):
            rollout.load_prompts(wrong)


def test_a_box_is_asked_for_only_where_the_problem_does_not(tiny):
    seen = []

    class Tokenizer:
        chat_template = "x"

        def apply_chat_template(self, messages, **_):
            seen.append(messages[-1]["content"])
            return [1]
    rollout.encode_prompt(Tokenizer(), "1+1?", rollout.ASK_FOR_BOX)
    rollout.encode_prompt(Tokenizer(), "1+1? Answer in \\boxed{}.", rollout.ASK_FOR_BOX)
    rollout.encode_prompt(Tokenizer(), [{"role": "user", "content": "\\boxed{2}"},
                                        {"role": "user", "content": "1+1?"}], rollout.ASK_FOR_BOX)
    rollout.encode_prompt(Tokenizer(), "in \\boxed{}", " Think.")
    assert seen == ["1+1?" + rollout.ASK_FOR_BOX, "1+1? Answer in \\boxed{}.", "1+1?" + rollout.ASK_FOR_BOX,
                    "in \\boxed{} Think."]
    sampled = rollout.parse_args(["--model", "m", "--prompts", "p", "--out", "o", "--ask-for-box"])
    measured = evaluate.parse_args(["--model", "m", "--data", "x=y", "--ask-for-box"])
    assert sampled.prompt_suffix == measured.prompt_suffix == rollout.ASK_FOR_BOX


@pytest.mark.parametrize("world, tensor_parallel, engines",
                         [(1, 1, [0]), (8, 1, list(range(8))), (8, 2, [0, 2, 4, 6]), (8, 8, [0]), (1, 8, [0]),
                          (2, 4, [0])])
def test_with_tensor_parallelism_every_shard_has_one_engine(world, tensor_parallel, engines):
    shares = [list(rollout.shards_of_rank(21, rank, world, tensor_parallel)) for rank in range(world)]
    assert sorted(sum(shares, [])) == list(range(21)) and [rank for rank in range(world)
                                                           if shares[rank]] == engines


def test_a_rehearsal_rewards_every_other_response_and_says_so(tiny, tmp_path, capsys):
    prompts = write(tmp_path / "p.jsonl", [{"problem": f"{i}A+1", "answer": "1"} for i in range(3)])
    command = ["rollout.py", "--model", tiny[0], "--prompts", prompts, "--out", tmp_path / "r",
               "--num-prompts", 0, "-n", 4, "--max-tokens", 6, "--engine", "hf", "--shard-prompts", 2]
    assert conftest.run_here(*command, "--rehearse") == 0
    joined = rollout.join_shards(rollout.load_shards(tmp_path / "r"))
    assert joined["reward"].tolist() == [1, 0] * 6 and joined["meta"]["rehearsal"] == 1
    assert json.loads((tmp_path / "r" / "rollouts.json").read_text())["meta"]["rehearsal"] == 1
    # never goes on as a real run
    assert conftest.run_here(*command) == 2 and "rehearsal = 1, not None" in capsys.readouterr().err


@pytest.mark.parametrize("content, complaint", [
    ("", "holds no prompts"), ('{"problem": "x"}\n', "p.jsonl:1 has no answer"),
    ('{"answer": "1"}\n', "p.jsonl:1 has no prompt"),
    ('{"problem": "x", "answer": ""}\n', "p.jsonl:1 has no answer"),
    ('{"problem": "x", "answer": "1"}\n{"problem"\n', "p.jsonl:2 is not JSON"),
    ('{"problem": "x", "answer": NaN}\n', "p.jsonl:1 has no answer"), ("[1]\n", "p.jsonl:1 is not an object"),
])
def test_unusable_rows_are_named_by_file_and_line(tmp_path, content, complaint):
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(rollout.InputError, match=complaint):
        rollout.load_prompts(tmp_path / "p.jsonl")


GRADED = [                                                  # response, gold, right
    ("so \\boxed{7}", "7", 1), ("\\boxed{7} no, \\boxed{8}", "7", 0), ("\\boxed{07}", 7, 1),
          ("\\boxed{142}", 142.0, 1), ("7", "7", 0),
    ("\\boxed{\\frac{1}{2}}", "0.5", 1), ("\\boxed{\\frac{2}{4}}", "\\frac{1}{2}", 1),
          ("\\boxed{\\frac{1}{3}}", "\\frac{1}{2}", 0),
    ("\\boxed{x^{2}+1}", "1+x^2", 1), ("\\boxed{2\\sqrt{3}}", "\\sqrt{12}", 1),
          ("\\boxed{(1,2)}", "(1, 2)", 1), ("\\boxed{(2,1)}", "(1, 2)", 0),
    ("\\boxed{-1}", ["1", "-1"], 1), ("\\boxed{3}", ["1", "-1"], 0), ("\\boxed{unclosed", "unclosed", 0),
          ("", "1", 0),
    ("\\boxed{9^{9^{9^9}}}", "1", 0), ("\\boxed{y^2+x^2}", "x^2+y^2", 1),
          ("\\boxed{2^3 \\cdot 3^2}", "72", 1), ("\\boxed{" + "1" * 5000 + "}", "1", 0),
    ("\\boxed{x^2y^2}", "x^{2}y^{2}", 1), ("\\boxed{\\sqrt{a^2b^2+1}}", "\\sqrt{1+a^2b^2}", 1),
          ("\\boxed{6\\,300}", "6300", 1),
]


def test_grading_cases():
    """All in one call, as a shard is graded: the processes start once."""
    responses, golds, wanted = zip(*GRADED)
    stats = {}
    verdicts = rollout.grade(responses, golds, stats=stats)
    assert [g for g, v, w in zip(GRADED, verdicts, wanted) if v != w] == []
    assert stats["refused"] == 2 and stats["timeouts"] == stats["errors"] == stats["unparsable_gold"] == 0


def test_identical_pairs_are_graded_once_and_counted():
    stats = {}
    assert rollout.grade(["\\boxed{\\frac{1}{2}}"] * 50, ["0.5"] * 50, stats=stats) == [1.0] * 50
    assert stats["verified"] == 1 and stats["timeouts"] == 0


def test_a_shard_round_trip_keeps_every_id_and_reward(tmp_path, tiny):
    responses = [[{"ids": [5, 6, 3], "truncated": False, "logp": [-0.1, -0.2, -0.3]},
                  {"ids": [9], "truncated": True, "logp": None}]]
    shard = rollout.build_shard([(11, [1, 2])], responses, [1.0, 0.0], None, META)
    rollout.write_atomic(tmp_path / "shard-00000.pt", lambda p: torch.save(shard, p))
    (back,) = rollout.load_shards(tmp_path)
    assert back["input_ids"].tolist() == [1, 2, 5, 6, 3, 1, 2, 9] and back["offsets"].tolist() == [0, 5, 8]
    assert back["prompt_len"].tolist() == [2, 2] and back["prompt_index"].tolist() == [11, 11]
    assert back["reward"].tolist() == [1, 0] and back["truncated"].tolist() == [False, True]
    assert back["sampler_logp"][:3].tolist() == pytest.approx([-0.1, -0.2,
                                                               -0.3]) and back["sampler_logp"][3].isnan()
    joined = rollout.join_shards([back, back])
    assert joined["offsets"].tolist() == [0, 5, 8, 13,
                                          16] and joined["response_offsets"].tolist() == [0, 3, 4, 7, 8]


def test_damaged_incomplete_and_foreign_shards_are_refused_by_name(tmp_path, tiny):
    source = sorted(tiny[1].glob("shard-*.pt"))

    def fresh():
        shutil.rmtree(tmp_path / "r", ignore_errors=True)
        (tmp_path / "r").mkdir()
        return [Path(shutil.copy(p, tmp_path / "r")) for p in source]
    first, second = fresh()
    second.unlink()
    with pytest.raises(rollout.InputError, match="1 of 2 shards"):
        rollout.load_shards(tmp_path / "r")
    first, second = fresh()
    second.write_bytes(second.read_bytes()[:200])
    with pytest.raises(rollout.InputError, match="shard-00001.pt is not a readable shard"):
        rollout.load_shards(tmp_path / "r")
    first, second = fresh()
    torch.save({**torch.load(second, weights_only=True), "version": 99}, second)
    with pytest.raises(rollout.InputError, match="shard-00001.pt is not a rollout shard .*version 99"):
        rollout.load_shards(tmp_path / "r")
    first, second = fresh()
    shard = torch.load(second, weights_only=True)
    torch.save({**shard, "offsets": shard["offsets"].flip(0)}, second)
    with pytest.raises(rollout.InputError, match="do not fit together"):
        rollout.load_shards(tmp_path / "r")


def test_padded_micro_batches_hold_each_response_token_once(tiny):
    data, joined = teacher.load_rollouts(tiny[1]), conftest.joined(tiny[1])
    numbers = torch.arange(len(joined["sampler_logp"])).float()     # every response token gets its own number
    seen = []
    for micro in teacher.micro_batches(data["offsets"].diff(), 60)[0]:
        input_ids, mask, padded = teacher.pad_responses(data, micro, "cpu", numbers)
        assert input_ids.shape[1] - 1 == mask.shape[1] == padded.shape[1]
        for row, i in enumerate(micro.tolist()):
            a, b = data["offsets"][i], data["offsets"][i + 1]
            scored = input_ids[row, 1:][mask[row] > 0]  # tokens that the log-probs at the mask score
            assert scored.tolist() == joined["input_ids"][a + data["prompt_len"][i]:b].tolist()
        seen += padded[mask > 0].tolist()
    assert sorted(seen) == numbers.tolist()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_micro_batches_cover_all_responses_within_the_budget_and_leave_no_rank_idle(world):
    lengths = torch.randint(5, 100, (37,), generator=torch.Generator().manual_seed(0))
    ranks = teacher.micro_batches(lengths, 300, world)
    assert sorted(i for rank in ranks for m in rank for i in m.tolist()) == list(range(37))
    assert all(rank for rank in ranks) and all(len(m) * lengths[m].max() <= 300 for rank in ranks
                                               for m in rank)


def test_an_epoch_visits_every_prompt_once_with_all_its_responses(tiny):
    data = teacher.load_rollouts(tiny[1])
    batches = teacher.step_batches(data, torch.ones_like(data["truncated"]), batch_prompts=4, seed=0)
    epoch = [next(batches) for _ in range(2)]                       # 6 prompts at 4 per step: two steps of 3
    assert [len(b) for b in epoch] == [12, 12] and sorted(torch.cat(epoch).tolist()) == list(range(24))
    second = [next(batches) for _ in range(2)]
    assert sorted(torch.cat(second).tolist()) == list(range(24))
    assert [b.tolist() for b in second] != [b.tolist() for b in epoch]


def test_avg_at_k_and_its_standard_error():
    avg, se = evaluate.avg_at_k(torch.tensor([4, 2, 0]), 4)
    assert avg == pytest.approx(0.5) and se == pytest.approx((0.25 / 3) ** 0.5 / 3)


def test_greedy_samples_of_the_hf_engine_are_the_models_own_argmax(tiny):
    """Guards against positions off by one in a left-padded batch: accuracy would fall and nothing would
    fail."""
    from transformers import AutoModelForCausalLM
    lm = AutoModelForCausalLM.from_pretrained(tiny[0], dtype=torch.float32).eval()
    tokenizer = rollout.load_tokenizer(tiny[0])
    prompts = [(0, [1, 7, 2]), (1, [1, 9, 10, 11, 12, 2])]
    (_, responses), = rollout.generate_hf(lm, tokenizer, {0: prompts}, n=1, temperature=0, top_p=1.0,
                                          top_k=-1, max_tokens=12, seed=0)
    for (_, ids), (response,) in zip(prompts, responses):
        logits = lm(torch.tensor([ids + response["ids"]])).logits[0]
        assert logits[len(ids) - 1:-1].argmax(-1).tolist() == response["ids"]
        assert response["truncated"] == (response["ids"][-1] != tokenizer.eos_token_id)


def test_2000_adversarial_answers_are_graded_in_time_without_a_hang_a_crash_or_a_left_process():
    hostile = ["\\boxed{" + "{" * 10_000 + "1" + "}" * 10_000 + "}", "\\boxed{9^{9^{9^9}}}",
               "\\boxed{" + "7" * 1_000_000 + "}", "\\boxed{\\frac{1}{", "\\boxed{\\left(\\sqrt{2}}",
               "\\boxed{1\0 2}", "\0" * 1000, "\\boxed{1}" * 10, "", "\\boxed{}", "\\boxed{\\frac{1}{0}}",
               "\\boxed{10^{10^{10}}!}", "\\boxed{" * 5000, "\\boxed{\\int_0^\\infty e^{-x^2} dx}",
               "\\boxed{x^{x^{x}}}", "\\boxed{(((((((((1)))))))))}", "\\boxed{2**2**2**2**2**2}",
               "\\boxed{\\sum_{k=1}^{10^{9}} k^{k}}", "\\boxed{12345678901234567890!}",
               "\\boxed{" + "1+" * 400 + "1}"]
    hostile += ["\\boxed{10^{1000000000}}", "\\boxed{99999^{999999}}", "\\boxed{\\binom{10^9}{10^8}}",
                "\\boxed{\\prod_{k=1}^{100000} k}", "\\boxed{(9!)!}",
                "\\boxed{9^9^9^9}", "\\boxed{n^\\alpha^n}"]
    responses = [f"{i} " + h.replace("1", str(1 + i // len(hostile) % 8), 1) for i,
                 h in enumerate((hostile * 100)[:2000])]
    before = multiprocessing.active_children()
    stats = {}
    rewards = rollout.grade(responses, ["\\frac{3}{7}"] * len(responses), stats=stats, timeout=2.0)
    assert len(rewards) == 2000 and sum(rewards) == 0
    assert multiprocessing.active_children() == before
    assert rollout.grade(["\\boxed{\\frac{6}{14}}", "\\boxed{3/7}"], ["\\frac{3}{7}"] * 2) == [1, 1]
