"""Makes tests/interop/data: two tiny checkpoints as transformers saves them, with the outputs transformers computes
from them.

    python tests/interop/make_parity_data.py        (needs the `parity` extra)

Weights are rounded to bfloat16, stored as such, and run in float32.
"""

import shutil
from pathlib import Path

import hf_models
import jax_side
import numpy as np
import torch
from transformers import AutoModelForCausalLM

DATA = Path(__file__).parent / "data"


def main() -> None:
    for case in ("v3", "v2"):
        folder = DATA / case
        shutil.rmtree(folder, ignore_errors=True)
        hf_models.build(case, seed=0).to(torch.bfloat16).save_pretrained(folder)
        # Loaded afresh: a model that was once cast to bfloat16 keeps rounded rotary frequencies.
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        prompts = jax_side.tokens(hf_models.COMMON["vocab_size"], seed=0)
        np.savez_compressed(
            folder / "expected.npz",
            tokens_BT=prompts,
            logits_BTV=hf_models.logits(model, prompts),
            greedy_BN=hf_models.greedy(model, prompts, jax_side.NEW_TOKENS),
        )
        (folder / "generation_config.json").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
