"""The vLLM engine for real, on its CPU build where that is installed (.ci/run installs it) or on a GPU."""
import json

import pytest
import torch

import conftest
import rollout
import teacher

pytest.importorskip("vllm", reason="vLLM is not installed")


def test_vllm_writes_complete_shards_whose_log_probs_are_ours(tiny, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"problem": f"{i}A+{i}B-3", "answer": str(i)}) + "\n" for i in range(6)))
    command = ["rollout.py", "--model", tiny[0], "--prompts", prompts, "--out", tmp_path / "r", "--num-prompts", 0, "--n", 3, "--max-tokens", 24,
               "--temperature", 0.7, "--shard-prompts", 4, "--engine", "vllm", "--max-model-len", 64, "--gpu-memory-utilization", 0.2]
    conftest.run_script(*command, env={"VLLM_CPU_KVCACHE_SPACE": "1"})
    shards = rollout.load_shards(tmp_path / "r")
    joined = rollout.join_shards(shards)
    assert joined["prompt_index"].tolist() == [i for i in range(6) for _ in range(3)] and joined["meta"]["engine"] == "vllm"
    eos = rollout.load_tokenizer(tiny[0]).eos_token_id
    for n in range(18):
        ids = joined["input_ids"][joined["offsets"][n]:joined["offsets"][n + 1]].tolist()
        response = ids[joined["prompt_len"][n]:]
        assert joined["truncated"][n] == (len(response) == 24 and response[-1] != eos) and (joined["truncated"][n] or response[-1] == eos)
    gap = (teacher.score(tiny[0], tmp_path / "r") - joined["sampler_logp"]).abs().max()
    assert gap < (1e-3 if not torch.cuda.is_available() else 0.1)


def test_greedy_outputs_agree_with_the_hf_engine(tiny, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"problem": f"{i % 10}A+{i // 10}", "answer": "1"}) + "\n" for i in range(32)))
    responses = {}
    for engine in ("hf", "vllm"):
        conftest.run_script("rollout.py", "--model", tiny[0], "--prompts", prompts, "--out", tmp_path / engine, "--num-prompts", 0, "--n", 1, "--max-tokens", 16,
                            "--temperature", 0, "--engine", engine, "--max-model-len", 64, "--gpu-memory-utilization", 0.2, env={"VLLM_CPU_KVCACHE_SPACE": "1"})
        joined = rollout.join_shards(rollout.load_shards(tmp_path / engine))
        responses[engine] = [joined["input_ids"][a:b].tolist() for a, b in zip(joined["offsets"], joined["offsets"][1:])]
    assert sum(a == b for a, b in zip(*responses.values(), strict=True)) >= 31      # 95 %: a tie may fall either way
