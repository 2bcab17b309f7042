"""Generation in one program: prefill with expanded MLA, then decoding with absorbed MLA over a latent cache.

Layout. Prompts are right-padded to P slots; completion token n of every sequence is in slot P + n, at position
`prompt_length + n` of its sequence. Cache, expert ids and reinforcement learning all use these T = P + N slots, so
nothing is ever moved. Padding slots hold position -1, which no query attends to.

`start` and `advance` are the two halves of `generate`, for callers that read the tokens in between.
"""

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deepseek_jax.errors import DataError
from deepseek_jax.generation.sampling import SamplingConfig, are_finite, sample
from deepseek_jax.model.cache import Cache, init_cache, write
from deepseek_jax.model.transformer import Output, Transformer


@flax.struct.dataclass
class Generation:
    """Completions of B sequences, at most N tokens each.

    tokens_BN int32, pad after the end; mask_BN bool, true on the tokens of the completion, eos included; lengths_B
    int32 their number; finished_B bool, whether eos was reached; finite_B bool, false where the network's logits were
    NaN or infinite: nothing is drawn from those, and the sequence ends before them, unfinished. logp_BN float32 is the
    log-probability of each token under the distribution it was drawn from (temperature, top-k and top-p applied; 0 when
    greedy, and on padding). expert_ids_LBTK int32 are the experts chosen for every slot that was fed through the model,
    in the order the router chose them; other slots hold 0…K-1. None unless asked for, or without MoE.
    """

    tokens_BN: jax.Array
    mask_BN: jax.Array
    lengths_B: jax.Array
    finished_B: jax.Array
    finite_B: jax.Array
    logp_BN: jax.Array
    expert_ids_LBTK: jax.Array | None


@flax.struct.dataclass
class State:
    """Decoding between two tokens: `step` tokens were drawn for every sequence, and the last of them is not in the
    cache yet.

    uniform_BN is the randomness of every token to come; the other arrays are those of `Generation`.
    """

    cache: Cache
    step: jax.Array
    uniform_BN: jax.Array
    prompt_lengths_B: jax.Array
    lengths_B: jax.Array
    finished_B: jax.Array
    finite_B: jax.Array
    tokens_BN: jax.Array
    logp_BN: jax.Array
    expert_ids_LBTK: jax.Array | None

    @property
    def live_B(self) -> jax.Array:
        """Sequences that want more tokens. A sequence without a prompt is batch padding and never does."""
        return ~self.finished_B & self.finite_B & (self.prompt_lengths_B > 0)


def generate(
    model: Transformer,
    variables,
    prompts_BP: jax.Array,
    prompt_lengths_B: jax.Array,
    rng: jax.Array,
    sampling: SamplingConfig,
    *,
    sequence_ids_B: jax.Array | None = None,
    samples_per_prompt: int = 1,
    return_experts: bool = False,
) -> Generation:
    """Completes every prompt until eos or `sampling.max_new_tokens`; pure, to be jitted with `model`, `sampling`,
    `samples_per_prompt` and `return_experts` static.

    A sequence's result depends on its prompt and its random key alone, never on the other sequences of the batch or on
    its padding. That key is `fold_in(rng, sequence id)`. Sequence ids default to 0…B-1; pass them to give a sequence
    the same samples in another batch.

    Args:
        prompts_BP: int32 [B, P], right-padded.
        prompt_lengths_B: int32 [B], 1…P; 0 marks a sequence that only fills the batch and gets an empty completion.
        samples_per_prompt: G completions for each prompt, which is prefilled once; the result has B·G sequences, those
            of a prompt adjacent.
        return_experts: also keep the chosen experts of all layers.

    Raises:
        DataError: prompts that `check_prompts` refuses.
    """
    state = start(
        model,
        variables,
        prompts_BP,
        prompt_lengths_B,
        rng,
        sampling,
        sequence_ids_B=sequence_ids_B,
        samples_per_prompt=samples_per_prompt,
        return_experts=return_experts,
    )
    state = advance(model, variables, state, sampling, sampling.max_new_tokens)
    return finish(state)


def start(
    model: Transformer,
    variables,
    prompts_BP: jax.Array,
    prompt_lengths_B: jax.Array,
    rng: jax.Array,
    sampling: SamplingConfig,
    *,
    sequence_ids_B: jax.Array | None = None,
    samples_per_prompt: int = 1,
    return_experts: bool = False,
) -> State:
    """Prefills the prompts and draws the first token. Arguments and errors as for `generate`."""
    check_prompts(prompts_BP, prompt_lengths_B, model.config.vocab_size)
    config, (P, N) = model.config, (prompts_BP.shape[1], sampling.max_new_tokens)
    slots_BP = jnp.broadcast_to(jnp.arange(P, dtype=jnp.int32), prompts_BP.shape)
    real_BP = slots_BP < prompt_lengths_B[:, None]
    output = model.apply(variables, prompts_BP, segment_ids_BT=real_BP.astype(jnp.int32), positions_BT=slots_BP)
    last_B1 = jnp.maximum(prompt_lengths_B - 1, 0)[:, None]
    hidden_BD = jnp.take_along_axis(output.hidden_BTD, last_B1[..., None], axis=1)[:, 0]
    logits_BV = model.apply(variables, hidden_BD, method="unembed")

    def divided(x: jax.Array, axis: int = 0) -> jax.Array:
        """On a mesh every device has its own sequences."""
        return model.ops.shard(x, *(None,) * axis, "batch", *(None,) * (x.ndim - axis - 1))

    def per_sample(x: jax.Array, axis: int = 0) -> jax.Array:
        return divided(jnp.repeat(x, samples_per_prompt, axis=axis), axis)

    B = prompts_BP.shape[0] * samples_per_prompt
    latents = jax.tree.map(lambda x: per_sample(x, axis=1), output.latents)
    cache = init_cache(config, B, P + N, model.ops.precision.compute_dtype)
    cache = cache.replace(
        entries=jax.tree.map(lambda x: divided(x, axis=1), cache.entries), positions_BS=divided(cache.positions_BS)
    )
    cache = write(cache, latents, per_sample(jnp.where(real_BP, slots_BP, -1)), 0)

    expert_ids_LBTK = None
    if return_experts and config.num_moe_layers > 0:
        any_experts_K = jnp.arange(config.moe.top_k, dtype=jnp.int32)
        expert_ids_LBTK = jnp.broadcast_to(any_experts_K, (config.num_moe_layers, B, P + N, config.moe.top_k))
        expert_ids_LBTK = expert_ids_LBTK.at[:, :, :P].set(per_sample(output.routing.expert_ids_LBTK, axis=1))

    if sequence_ids_B is None:
        sequence_ids_B = jnp.arange(B)
    state = State(
        cache=cache,
        step=jnp.zeros((), jnp.int32),
        uniform_BN=divided(
            jax.vmap(lambda sequence_id: jax.random.uniform(jax.random.fold_in(rng, sequence_id), (N,)))(sequence_ids_B)
        ),
        prompt_lengths_B=per_sample(prompt_lengths_B.astype(jnp.int32)),
        lengths_B=divided(jnp.zeros(B, jnp.int32)),
        finished_B=divided(jnp.zeros(B, bool)),
        finite_B=divided(jnp.ones(B, bool)),
        tokens_BN=divided(jnp.full((B, N), sampling.pad_id, jnp.int32)),
        logp_BN=divided(jnp.zeros((B, N), jnp.float32)),
        expert_ids_LBTK=expert_ids_LBTK,
    )
    return _append(state, per_sample(logits_BV), sampling)


def check_prompts(
    prompts_BP: jax.Array | np.ndarray, prompt_lengths_B: jax.Array | np.ndarray, vocab_size: int
) -> None:
    """Raises DataError for shapes that don't fit, ids that are not integers, and, outside jit, lengths and ids out of
    range."""
    if prompts_BP.ndim != 2 or prompt_lengths_B.shape != prompts_BP.shape[:1] or prompts_BP.shape[1] == 0:
        raise DataError(
            f"prompts {prompts_BP.shape} and prompt_lengths {prompt_lengths_B.shape}: give [batch, slots] with at "
            "least one slot, and [batch]"
        )
    if not all(jnp.issubdtype(x.dtype, jnp.integer) for x in (prompts_BP, prompt_lengths_B)):
        raise DataError(
            f"prompts are {prompts_BP.dtype}, their lengths {prompt_lengths_B.dtype}: both must be integers"
        )
    if any(isinstance(x, jax.core.Tracer) for x in (prompts_BP, prompt_lengths_B)):
        return
    prompts, lengths = np.asarray(prompts_BP), np.asarray(prompt_lengths_B)
    if np.any((lengths < 0) | (lengths > prompts.shape[1])):
        raise DataError(f"prompt_lengths {lengths.tolist()}: must be from 0 to the {prompts.shape[1]} slots")
    wrong = (np.arange(prompts.shape[1]) < lengths[:, None]) & ((prompts < 0) | (prompts >= vocab_size))
    if np.any(wrong):
        sequence, slot = np.argwhere(wrong)[0]
        raise DataError(
            f"prompt {sequence} has token {prompts[sequence, slot]} in slot {slot}: the model's vocabulary has the ids "
            f"0 to {vocab_size - 1}"
        )


def feed(
    model: Transformer, variables, cache: Cache, tokens_BT: jax.Array, positions_BT: jax.Array, slot: jax.Array
) -> tuple[Cache, Output]:
    """Runs T tokens against the cache and stores them in slots `slot`…`slot + T - 1`; position -1 marks padding.

    Returns the longer cache and the model's output for these tokens.
    """
    real_BT = (positions_BT >= 0).astype(jnp.int32)
    output = model.apply(variables, tokens_BT, segment_ids_BT=real_BT, positions_BT=positions_BT, cache=cache)
    return write(cache, output.latents, positions_BT, slot), output


def advance(model: Transformer, variables, state: State, sampling: SamplingConfig, steps: int | jax.Array) -> State:
    """Draws up to `steps` more tokens per sequence; stops earlier when all sequences are done or their buffers are
    full."""
    N = state.tokens_BN.shape[1]
    P = state.cache.positions_BS.shape[1] - N
    last_step = jnp.minimum(state.step + steps, N)

    def wanted(state: State) -> jax.Array:
        return (state.step < last_step) & jnp.any(state.live_B)

    def decode(state: State) -> State:
        fed = state.step - 1  # the newest completion token
        tokens_B1 = lax.dynamic_slice_in_dim(state.tokens_BN, fed, 1, axis=1)
        positions_B1 = jnp.where(state.live_B, state.prompt_lengths_B + fed, -1)[:, None]
        cache, output = feed(model, variables, state.cache, tokens_B1, positions_B1, P + fed)
        state = state.replace(cache=cache)
        if state.expert_ids_LBTK is not None:
            state = state.replace(
                expert_ids_LBTK=_set(state.expert_ids_LBTK, output.routing.expert_ids_LBTK, P + fed, axis=2)
            )
        return _append(state, model.apply(variables, output.hidden_BTD[:, 0], method="unembed"), sampling)

    return lax.while_loop(wanted, decode, state)


def finish(state: State) -> Generation:
    """The completions so far."""
    return Generation(
        tokens_BN=state.tokens_BN,
        mask_BN=jnp.arange(state.tokens_BN.shape[1]) < state.lengths_B[:, None],
        lengths_B=state.lengths_B,
        finished_B=state.finished_B,
        finite_B=state.finite_B,
        logp_BN=state.logp_BN,
        expert_ids_LBTK=state.expert_ids_LBTK,
    )


def _append(state: State, logits_BV: jax.Array, sampling: SamplingConfig) -> State:
    """Draws token `state.step` of every live sequence from `logits_BV` and stores it; a sequence whose logits are not
    finite ends here."""
    finite_B, step = state.finite_B & (~state.live_B | are_finite(logits_BV)), state.step
    drawn_B = state.live_B & finite_B
    uniform_B = lax.dynamic_index_in_dim(state.uniform_BN, step, axis=1, keepdims=False)
    tokens_B, logp_B = sample(uniform_B, logits_BV, sampling)
    tokens_B = jnp.where(drawn_B, tokens_B, sampling.pad_id)
    return state.replace(
        step=step + 1,
        lengths_B=state.lengths_B + drawn_B,
        finished_B=state.finished_B | (drawn_B & jnp.isin(tokens_B, jnp.asarray(sampling.stop_ids))),
        finite_B=finite_B,
        tokens_BN=_set(state.tokens_BN, tokens_B[:, None], step, axis=1),
        logp_BN=_set(state.logp_BN, jnp.where(drawn_B, logp_B, 0.0)[:, None], step, axis=1),
    )


def _set(buffer: jax.Array, update: jax.Array, index: jax.Array, axis: int) -> jax.Array:
    """`buffer` with `update` at `index` along `axis`; in place where the buffer is a loop carry."""
    return lax.dynamic_update_slice_in_dim(buffer, update.astype(buffer.dtype), index, axis)
