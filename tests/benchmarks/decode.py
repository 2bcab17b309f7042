"""Batched greedy decoding against transformers' `generate`: tokens/s, same weights, prompts, cores, float32.

    python tests/benchmarks/decode.py [--size=small] [--batch=32] [--prompt=32] [--new_tokens=96] [--breakdown]
        [--json=out.json]

Needs `.[parity]`. End-of-sequence is off, so that both sides make the same number of tokens; both use a key-value cache
(ours the latent one) and have to produce the same text. Prefill is part of the time on both sides.
"""

import common

if __name__ == "__main__":
    FLAGS = common.flags(__doc__, experts="eager,grouped_mm,batched_mm", batch=32, prompt=32, new_tokens=96)

import jax
import jax.numpy as jnp
import numpy as np
import torch
from breakdown import print_parts, where_time_goes

from deepseek_jax.generation.generate import generate
from deepseek_jax.generation.sampling import SamplingConfig
from deepseek_jax.model.transformer import Transformer, init_variables

OURS = "deepseek_jax"


class Ours:
    def __init__(self, model: Transformer, variables, prompts_BP: np.ndarray, new_tokens: int):
        sampling = SamplingConfig(max_new_tokens=new_tokens, temperature=0, eos_id=-1, pad_id=0)
        self.generate = jax.jit(lambda *arguments: generate(model, *arguments, sampling).tokens_BN)
        lengths_B = jnp.full(prompts_BP.shape[0], prompts_BP.shape[1], jnp.int32)
        self.arguments = (variables, jnp.asarray(prompts_BP), lengths_B, jax.random.key(0))

    def __call__(self) -> np.ndarray:
        return np.asarray(self.generate(*self.arguments))


class Theirs:
    def __init__(self, model: torch.nn.Module, prompts_BP: np.ndarray, new_tokens: int):
        self.model = model.eval()
        self.prompts = torch.from_numpy(prompts_BP.astype(np.int64))
        self.new_tokens = new_tokens

    @torch.inference_mode()
    def __call__(self) -> np.ndarray:
        tokens = self.model.generate(
            self.prompts,
            attention_mask=torch.ones_like(self.prompts),
            do_sample=False,
            max_new_tokens=self.new_tokens,
            use_cache=True,
        )
        return tokens[:, self.prompts.shape[1] :].numpy()


def main(flags) -> None:
    # Wide weights keep greedy choices far apart, so that rounding decides none of them.
    config = common.SIZES[flags.size].replace(init_std=0.15)
    model = Transformer(config, common.our_ops(config))
    variables = init_variables(model, jax.random.key(0))
    prompts_BP = np.random.default_rng(0).integers(0, config.vocab_size, (flags.batch, flags.prompt), dtype=np.int32)

    candidates = {OURS: Ours(model, variables, prompts_BP, flags.new_tokens)}
    for implementation in flags.experts:
        peer = common.twin(config, variables, implementation)
        candidates[f"transformers, experts {implementation}"] = Theirs(peer, prompts_BP, flags.new_tokens)

    def same_text(texts: dict[str, list[np.ndarray]]) -> None:
        for name, (tokens_BN, *_) in texts.items():
            assert tokens_BN.shape == (flags.batch, flags.new_tokens), f"{name} made {tokens_BN.shape} tokens"
            rows = np.mean(np.all(tokens_BN == texts[OURS][0], axis=1))
            print(f"{name}: {rows:.0%} of the rows are ours token by token")
            assert rows >= 0.9, f"{name} wrote another text than ours"

    timings = common.interleave(candidates, flags, same_text, warm_up=1)
    setting = {**common.describe(config, flags), "batch": flags.batch}
    setting |= {"prompt": flags.prompt, "new_tokens": flags.new_tokens}
    common.print_ratios("Greedy decoding", setting, timings, flags.batch * flags.new_tokens, OURS, flags.json)
    if flags.breakdown:
        ours = candidates[OURS]
        print_parts("Our decoding", where_time_goes(ours.generate, ours.arguments, ours))


if __name__ == "__main__":
    main(FLAGS)
