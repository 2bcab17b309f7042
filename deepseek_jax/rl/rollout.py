"""Completions of sampled prompts, and their log-probabilities under any weights.

The layout is generation's: P prompt slots, then N completion slots, so that the experts that sampling chose line up
with the training forward pass and can be replayed.
"""

import flax.struct
import jax
import jax.numpy as jnp

from deepseek_jax.generation.generate import generate
from deepseek_jax.generation.sampling import SamplingConfig
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.rl.config import GRPOConfig
from deepseek_jax.rl.tasks.base import EOS, PAD, Instance, Task
from deepseek_jax.training.auxiliary import COLLECTIONS
from deepseek_jax.training.log_probs import token_log_probs


@flax.struct.dataclass
class Trajectories:
    """B completions with what training needs to judge them; every leaf has B sequences, siblings of a group adjacent.

    Where the network gave a logit that is not finite, the row is emptied: no prompt, no completion, length 0 and mask
    0, like a row that only fills a batch, so that it reaches no sum and no gradient.
    """

    prompts_BP: jax.Array  # int32, right-padded
    prompt_lengths_B: jax.Array  # int32
    completions_BN: jax.Array  # int32
    mask_BN: jax.Array  # int32, 1 on the completion's tokens, eos included
    finished_B: jax.Array  # bool, eos reached
    old_logp_BN: jax.Array  # float32, log-probability of each token when it was drawn
    expert_ids_BLTK: jax.Array | None  # int32, the experts sampling used, where asked for

    def sequences(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """tokens, segment_ids and positions [B, P+N] of the whole sequences, as generation laid them out.

        A completion's last token is padding here (segment 0), as it was for the sampler: nothing is predicted from it,
        so it was never fed, and no router's load may count it.
        """
        prompt_slots_P = jnp.arange(self.prompts_BP.shape[1])
        completion_slots_N = jnp.arange(self.completions_BN.shape[1])
        real_BP = prompt_slots_P < self.prompt_lengths_B[:, None]
        fed_BN = jnp.pad(self.mask_BN[:, 1:] > 0, ((0, 0), (0, 1)))
        segment_ids_BT = jnp.concatenate([real_BP, fed_BN], axis=1).astype(jnp.int32)
        positions_BP = jnp.broadcast_to(prompt_slots_P, real_BP.shape)
        positions_BT = jnp.concatenate([positions_BP, self.prompt_lengths_B[:, None] + completion_slots_N], axis=1)
        return jnp.concatenate([self.prompts_BP, self.completions_BN], axis=1), segment_ids_BT, positions_BT


def sampling_config(config: GRPOConfig) -> SamplingConfig:
    """Sampling of rollouts: from the whole vocabulary, so that training compares the same distributions that sampling
    used."""
    return SamplingConfig(
        max_new_tokens=config.max_completion_length, temperature=config.temperature, eos_id=EOS, pad_id=PAD
    )


def roll_out(model: Transformer, variables, task: Task, config: GRPOConfig, key: jax.Array, num_prompts: int):
    """-> (instances of the B = num_prompts · group_size completions, Trajectories). Pure; training problems only."""
    problem_key, sample_key = jax.random.split(key)
    instances: Instance = task.sample(problem_key, num_prompts, "train")
    prompts_QP, lengths_Q = task.prompts(instances)
    prompts_QP = model.ops.shard(prompts_QP, "batch", None)
    sampled = generate(
        model,
        variables,
        prompts_QP,
        lengths_Q,
        sample_key,
        sampling_config(config),
        samples_per_prompt=config.group_size,
        return_experts=config.replay_experts,
    )

    def per_completion(x):
        return jnp.repeat(x, config.group_size, axis=0)

    finite_B, finite_B1 = sampled.finite_B, sampled.finite_B[:, None]
    experts = sampled.expert_ids_LBTK
    trajectories = Trajectories(
        prompts_BP=jnp.where(finite_B1, per_completion(prompts_QP), PAD),
        prompt_lengths_B=jnp.where(finite_B, per_completion(lengths_Q), 0),
        completions_BN=jnp.where(finite_B1, sampled.tokens_BN, PAD),
        mask_BN=(sampled.mask_BN & finite_B1).astype(jnp.int32),
        finished_B=sampled.finished_B,
        old_logp_BN=jnp.where(finite_B1, sampled.logp_BN, 0.0),
        expert_ids_BLTK=None if experts is None else jnp.swapaxes(experts, 0, 1),
    )
    return jax.tree.map(per_completion, instances), trajectories


def completion_log_probs(model: Transformer, variables, trajectories: Trajectories, temperature: float, chunk: int):
    """Log-probability of each completion token and entropy, float32 [B, N], at the sampling temperature, and the
    routing.

    Token n is predicted in the slot before it: the last real prompt slot for the first token. Where the trajectories
    carry experts, the forward pass is routed through them.
    """
    tokens_BT, segment_ids_BT, positions_BT = trajectories.sequences()
    experts = trajectories.expert_ids_BLTK
    output, returned = model.apply(
        variables,
        tokens_BT,
        segment_ids_BT=segment_ids_BT,
        positions_BT=positions_BT,
        expert_ids_LBTK=None if experts is None else jnp.swapaxes(experts, 0, 1),
        mutable=COLLECTIONS,
    )
    slots = trajectories.prompts_BP.shape[1]
    last_B11 = jnp.maximum(trajectories.prompt_lengths_B - 1, 0)[:, None, None]
    first_B1D = jnp.take_along_axis(output.hidden_BTD, last_B11, axis=1)
    hidden_BND = jnp.concatenate([first_B1D, output.hidden_BTD[:, slots:-1]], axis=1)
    logp_BN, entropy_BN = token_log_probs(model, variables, hidden_BND, trajectories.completions_BN, chunk, temperature)
    return logp_BN, entropy_BN, output.routing, returned
