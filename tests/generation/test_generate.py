"""The sampler against the training forward pass, and the promises about rows, padding, eos and memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generation_cases import EOS, LENGTHS, PAD, SAMPLING, N, P, V

from deepseek_jax.errors import DataError
from deepseek_jax.generation.generate import advance, check_prompts, feed, finish, generate, start
from deepseek_jax.generation.sampling import log_probs
from deepseek_jax.model.cache import init_cache

B = len(LENGTHS)


PLAIN = dataclasses.replace(SAMPLING, temperature=1.0, top_k=0, top_p=1.0)
COLD = dataclasses.replace(PLAIN, temperature=0.7)
GREEDY = dataclasses.replace(SAMPLING, temperature=0.0, top_k=0, top_p=1.0)


@pytest.fixture(scope="module")
def rollout(mla):
    return mla.rollout(mla.prompts_BP, LENGTHS)


def layout(prompts, lengths, generation):
    """Tokens, segment ids and positions of the T = P + N slots that training sees."""
    tokens = np.concatenate([prompts, generation.tokens_BN], axis=1)
    real = np.concatenate([np.arange(P) < lengths[:, None], generation.mask_BN], axis=1)
    positions = np.concatenate([np.broadcast_to(np.arange(P), prompts.shape), lengths[:, None] + np.arange(N)], axis=1)
    return tokens, real.astype(np.int32), np.where(real, positions, -1).astype(np.int32)


def completion_logits(logits_BTV, lengths):
    """The logits [B, N, V] that completion tokens are drawn from: after the last prompt token, then after each
    token."""
    last_prompt = np.take_along_axis(np.asarray(logits_BTV), (lengths - 1)[:, None, None], axis=1)
    return np.concatenate([last_prompt, logits_BTV[:, P:-1]], axis=1)


def pick(values_BNV, tokens_BN):
    return np.take_along_axis(np.asarray(values_BNV), np.asarray(tokens_BN)[..., None], axis=-1)[..., 0]


def assert_same(a, b, atol=1e-5):
    np.testing.assert_array_equal(a.tokens_BN, b.tokens_BN)
    np.testing.assert_array_equal(a.mask_BN, b.mask_BN)
    np.testing.assert_array_equal(a.finished_B, b.finished_B)
    np.testing.assert_allclose(a.logp_BN, b.logp_BN, atol=atol)
    np.testing.assert_array_equal(a.finite_B, b.finite_B)


def without_experts(generation):
    return generation.replace(expert_ids_LBTK=None)


def sampled_log_probs(logits_BNV, tokens_BN, sampling=SAMPLING):
    """Log-probabilities [B, N] of tokens under the distribution they are drawn from."""
    logp = log_probs(jnp.asarray(np.asarray(logits_BNV).reshape(-1, V)), sampling).reshape(*logits_BNV.shape)
    return pick(logp, tokens_BN)


@pytest.mark.parametrize("sampling", [SAMPLING, PLAIN, COLD], ids=["top-k, top-p", "plain", "temperature 0.7"])
def test_log_probs_are_those_of_the_full_forward_pass(case, sampling):
    """For prompts of unequal length, each token from the logits behind its own row's last token, divided by the
    temperature."""
    generation = finish(case.advance(case.start(case.prompts_BP, LENGTHS, sampling=sampling), N, sampling=sampling))
    logits_BTV, _ = case.forward(*layout(case.prompts_BP, LENGTHS, generation))
    logits_BNV, mask_BN = completion_logits(logits_BTV, LENGTHS), np.asarray(generation.mask_BN)
    expected = sampled_log_probs(logits_BNV, generation.tokens_BN, sampling)
    np.testing.assert_allclose(generation.logp_BN, np.where(mask_BN, expected, 0), atol=1e-5)
    if sampling.top_k == 0:
        by_hand = pick(jax.nn.log_softmax(logits_BNV / sampling.temperature), generation.tokens_BN)
        np.testing.assert_allclose(np.asarray(generation.logp_BN)[mask_BN], by_hand[mask_BN], atol=1e-5)
    assert len(set(np.asarray(generation.tokens_BN)[mask_BN].tolist())) > 6 and np.all(generation.finite_B)


def test_feeding_an_empty_cache_equals_the_full_forward_pass(case):
    """Every position through the cached path alone, three tokens at a time, one row with padding in between."""
    T, width, model = 12, 3, case.model
    tokens = np.random.default_rng(1).integers(4, V, size=(2, T)).astype(np.int32)
    positions = np.broadcast_to(np.arange(T), (2, T)).astype(np.int32).copy()
    positions[1] = np.where(np.arange(T) % 4 == 3, -1, np.cumsum(np.arange(T) % 4 != 3) - 1)

    def body(cache, slot):
        chunk = [jax.lax.dynamic_slice_in_dim(jnp.asarray(x), slot, width, axis=1) for x in (tokens, positions)]
        cache, output = feed(model, case.variables, cache, *chunk, slot)
        return cache, model.apply(case.variables, output.hidden_BTD, method="unembed")

    cache = init_cache(model.config, 2, T, jnp.float32)
    _, logits = jax.jit(lambda cache: jax.lax.scan(body, cache, jnp.arange(0, T, width)))(cache)
    logits = np.asarray(logits).transpose(1, 0, 2, 3).reshape(2, T, V)
    full, _ = case.forward(tokens, (positions >= 0).astype(np.int32), positions)
    real = positions >= 0
    np.testing.assert_allclose(logits[real], np.asarray(full)[real], atol=1e-5, rtol=1e-5)


def test_experts_are_those_of_the_full_forward_pass_and_replay_changes_nothing(mla, rollout):
    inputs = layout(mla.prompts_BP, LENGTHS, rollout)
    logits, expert_ids = mla.forward(*inputs)
    # The last token of a row is never fed back: nobody needs its experts.
    fed = inputs[1].astype(bool) & (np.arange(P + N) != (P + rollout.lengths_B - 1)[:, None])
    assert rollout.expert_ids_LBTK.shape == expert_ids.shape == (2, B, P + N, 3)
    np.testing.assert_array_equal(rollout.expert_ids_LBTK[:, fed], expert_ids[:, fed])
    assert len(set(np.asarray(expert_ids[:, fed]).ravel().tolist())) == 8

    replayed, replayed_ids = mla.forward(*inputs, rollout.expert_ids_LBTK)
    np.testing.assert_array_equal(replayed_ids, rollout.expert_ids_LBTK)
    before, after = (jax.nn.log_softmax(completion_logits(x, LENGTHS)) for x in (logits, replayed))
    mask = np.asarray(rollout.mask_BN)
    np.testing.assert_allclose(np.asarray(after)[mask], np.asarray(before)[mask], atol=1e-5)
    replayed_logp = sampled_log_probs(completion_logits(replayed, LENGTHS), rollout.tokens_BN)
    np.testing.assert_allclose(replayed_logp[mask], np.asarray(rollout.logp_BN)[mask], atol=1e-5)


def test_every_expert_slot_holds_a_valid_choice(rollout):
    ids = np.sort(np.asarray(rollout.expert_ids_LBTK), axis=-1)
    assert ids.min() >= 0 and ids.max() < 8 and np.all(np.diff(ids, axis=-1) > 0)


def test_a_sampled_sequence_gets_alone_what_it_gets_in_a_batch(gqa):
    together = gqa.rollout(gqa.prompts_BP, LENGTHS)
    for b in range(B):
        rows = slice(b, b + 1)
        alone = gqa.rollout(gqa.prompts_BP[rows], LENGTHS[rows], sequence_ids_B=jnp.asarray([b]))
        assert_same(alone, jax.tree.map(lambda x, rows=rows: x[rows], together))


def test_a_greedy_sequence_gets_alone_what_it_gets_in_a_batch(mla):
    together = mla.generate(mla.prompts_BP, LENGTHS, sampling=GREEDY)
    for b in range(B):
        rows = slice(b, b + 1)
        alone = mla.generate(mla.prompts_BP[rows], LENGTHS[rows], sampling=GREEDY)
        assert_same(alone, jax.tree.map(lambda x, rows=rows: x[rows], together))
    logits_BTV, _ = mla.forward(*layout(mla.prompts_BP, LENGTHS, together))
    mask = np.asarray(together.mask_BN)
    np.testing.assert_array_equal(
        np.asarray(together.tokens_BN)[mask], completion_logits(logits_BTV, LENGTHS).argmax(-1)[mask]
    )
    assert not np.any(together.logp_BN)


def test_padding_is_never_seen(mla, rollout):
    junk = np.random.default_rng(7).integers(0, V, size=mla.prompts_BP.shape)
    prompts = np.where(np.arange(P) < LENGTHS[:, None], mla.prompts_BP, junk).astype(np.int32)
    assert np.any(prompts != mla.prompts_BP)
    assert_same(mla.rollout(prompts, LENGTHS), rollout)


def test_rows_have_their_own_randomness(mla):
    prompts, lengths = np.repeat(mla.prompts_BP[:1], B, axis=0), np.repeat(LENGTHS[:1], B)
    same_prompt = mla.rollout(prompts, lengths)
    assert len({tuple(row) for row in np.asarray(same_prompt.tokens_BN).tolist()}) == B
    assert np.any(mla.rollout(prompts, lengths, seed=1).tokens_BN != same_prompt.tokens_BN)
    assert_same(mla.rollout(prompts, lengths), same_prompt, atol=0)


def test_samples_per_prompt_share_a_prefill(mla):
    """The rows of a prompt lie side by side and equal those of a batch that repeats the prompts."""
    grouped = mla.rollout(mla.prompts_BP[:2], LENGTHS[:2], samples_per_prompt=2)
    repeated = mla.rollout(np.repeat(mla.prompts_BP[:2], 2, axis=0), np.repeat(LENGTHS[:2], 2))
    assert_same(grouped, repeated)
    np.testing.assert_array_equal(grouped.expert_ids_LBTK, repeated.expert_ids_LBTK)


def test_eos_ends_a_row(rollout):
    tokens, lengths = np.asarray(rollout.tokens_BN), np.asarray(rollout.lengths_B)
    assert 0 < np.sum(rollout.finished_B) < B  # the seed gives both kinds
    for b in range(B):
        ended = EOS in tokens[b]
        assert rollout.finished_B[b] == ended
        assert lengths[b] == (tokens[b].tolist().index(EOS) + 1 if ended else N)
        assert rollout.mask_BN[b].tolist() == [True] * lengths[b] + [False] * (N - lengths[b])
        assert np.all(tokens[b, lengths[b] :] == PAD)
        assert not np.any(rollout.logp_BN[b, lengths[b] :])


def test_any_of_several_stop_tokens_ends_a_row(mla, rollout):
    """Row by row the first stop token ends it; what was drawn before is unchanged."""
    plain = dataclasses.replace(SAMPLING, eos_id=-1)
    free = finish(mla.advance(mla.start(mla.prompts_BP, LENGTHS, sampling=plain), N, sampling=plain))
    tokens = np.asarray(free.tokens_BN)
    stops = (int(tokens[0, 4]), int(tokens[1, 2]), 10**6)
    both = dataclasses.replace(SAMPLING, eos_id=stops)
    stopped = finish(mla.advance(mla.start(mla.prompts_BP, LENGTHS, sampling=both), N, sampling=both))
    for b in range(B):
        ends = [n for n in range(N) if tokens[b, n] in stops]
        length = ends[0] + 1 if ends else N
        assert stopped.lengths_B[b] == length and stopped.finished_B[b] == bool(ends)
        assert np.asarray(stopped.tokens_BN)[b].tolist() == tokens[b, :length].tolist() + [PAD] * (N - length)
    assert stopped.lengths_B[0] <= 5 and stopped.lengths_B[1] <= 3


@pytest.mark.parametrize("sampling", [SAMPLING, GREEDY], ids=["sampled", "greedy"])
def test_logits_that_are_no_numbers_are_never_sampled_from(mla, sampling):
    """A NaN in one token's embedding spoils the rows that hold it, from there on, and no other row."""
    healthy = finish(mla.advance(mla.start(mla.prompts_BP, LENGTHS, sampling=sampling), N, sampling=sampling))
    tokens = np.asarray(healthy.tokens_BN)
    in_prompts = set(mla.prompts_BP[np.arange(P) < LENGTHS[:, None]].tolist())
    place, bad = next((n, int(tokens[2, n])) for n in range(N) if int(tokens[2, n]) not in in_prompts | {EOS})
    leaf = np.asarray(mla.variables["params"]["embed"]["embedding"]).copy()
    leaf[bad] = np.nan
    params = mla.variables["params"] | {"embed": mla.variables["params"]["embed"] | {"embedding": leaf}}
    spoiled = mla._replace(variables=mla.variables | {"params": params})
    rows = finish(spoiled.advance(spoiled.start(mla.prompts_BP, LENGTHS, sampling=sampling), N, sampling=sampling))
    assert not rows.finite_B[2] and not rows.finished_B[2] and rows.lengths_B[2] == place + 1
    assert np.asarray(rows.tokens_BN)[2].tolist() == tokens[2, : place + 1].tolist() + [PAD] * (N - place - 1)
    assert np.all(np.isfinite(rows.logp_BN))
    for b in range(B):
        whole = bad not in tokens[b, : int(healthy.lengths_B[b]) - 1]
        assert bool(rows.finite_B[b]) == whole
        if whole:
            assert np.asarray(rows.tokens_BN)[b].tolist() == tokens[b].tolist()

    everywhere = mla._replace(variables=jax.tree.map(lambda x: np.full(x.shape, np.nan, x.dtype), mla.variables))
    state = everywhere.start(mla.prompts_BP, LENGTHS * (np.arange(B) > 0), sampling=sampling)
    assert state.finite_B.tolist() == [True, False, False, False], "a row without a prompt has no numbers"
    assert not np.any(state.lengths_B) and np.all(state.tokens_BN == PAD) and not np.any(state.live_B)


def test_the_loop_ends_with_its_longest_row(mla, rollout):
    """Rows that finish early leave a shorter loop; a few steps at a time, as in streaming, give the same."""
    short = np.asarray(rollout.finished_B)
    lengths = LENGTHS * short  # rows that would fill their buffers are not there
    state, steps = mla.start(mla.prompts_BP, lengths, return_experts=True), [1]
    while np.any(state.live_B):
        state = mla.advance(state, 2)
        steps.append(int(state.step))
    longest = int(rollout.lengths_B[short].max())
    assert steps == [*range(1, longest, 2), longest] and longest < N
    assert_same(*(jax.tree.map(lambda x: x[short], without_experts(g)) for g in (finish(state), rollout)))
    assert mla.advance(mla.start(mla.prompts_BP, lengths, return_experts=True), N).step == longest


def test_a_sequence_without_a_prompt_only_fills_the_batch(mla, rollout):
    lengths = LENGTHS * (np.arange(B) != 1)
    generation = mla.rollout(mla.prompts_BP, lengths)
    assert generation.lengths_B[1] == 0 and not np.any(generation.mask_BN[1]) and np.all(generation.tokens_BN[1] == PAD)
    others = np.asarray([0, 2, 3])
    assert_same(*(jax.tree.map(lambda x: x[others], without_experts(g)) for g in (generation, rollout)))


def test_experts_only_where_asked_for(mla, gqa):
    assert mla.generate(mla.prompts_BP, LENGTHS, sampling=GREEDY).expert_ids_LBTK is None
    assert gqa.rollout(gqa.prompts_BP, LENGTHS).expert_ids_LBTK is None


def test_latent_cache_is_small(mla):
    cache = init_cache(mla.model.config, B, P + N, jnp.float32)
    numbers = sum(leaf.size for leaf in jax.tree.leaves(cache.entries))
    assert numbers == mla.model.config.num_layers * B * (P + N) * (26 + 6)


def shapes(jaxpr):
    """Shapes of all values in a jaxpr and everything it calls."""
    for eqn in jaxpr.eqns:
        for var in eqn.outvars:
            yield tuple(var.aval.shape)
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from shapes(inner)


def expands_heads(shape):
    """True for an array with numbers per slot (P + N, or one more) *and* per head and head dimension."""
    slots, heads, head_dims = {P + N, P + N + 1}, 5, {10, 14, 16, 24}
    flat = {heads * dim for dim in head_dims}
    return bool(slots & set(shape)) and (heads in shape and bool(head_dims & set(shape)) or bool(flat & set(shape)))


def test_decoding_never_expands_the_cache(mla):
    def decode(variables, state):
        return advance(mla.model, variables, state, SAMPLING, N)

    state = jax.eval_shape(
        lambda v: start(mla.model, v, mla.prompts_BP, LENGTHS, jax.random.key(0), SAMPLING), mla.variables
    )
    found = set(shapes(jax.make_jaxpr(decode)(mla.variables, state).jaxpr))
    assert (B, P + N, 26) in found or (3, B, P + N, 26) in found or (2, B, P + N, 26) in found
    assert not [shape for shape in found if expands_heads(shape)]

    # The same search does find the keys and values that the expanded form makes.
    expanded = jax.make_jaxpr(lambda v, t: mla.model.apply(v, t).hidden_BTD)(
        mla.variables, jnp.zeros((B, P + N), jnp.int32)
    )
    assert [shape for shape in shapes(expanded.jaxpr) if expands_heads(shape)]


def test_prefill_unembeds_one_position(mla):
    def begin(variables):
        return start(mla.model, variables, mla.prompts_BP, LENGTHS, jax.random.key(0), SAMPLING)

    found = set(shapes(jax.make_jaxpr(begin)(mla.variables).jaxpr))
    assert (B, V) in found and (B, P, V) not in found


def test_shapes_that_do_not_fit(mla):
    for prompts, lengths in (
        (np.zeros((2, 0), np.int32), LENGTHS[:2]),
        (mla.prompts_BP, LENGTHS[:2]),
        (mla.prompts_BP[0], LENGTHS),
    ):
        with pytest.raises(DataError, match="prompt_lengths"):
            generate(mla.model, mla.variables, prompts, lengths, jax.random.key(0), SAMPLING)


@pytest.mark.parametrize(
    "token, length, message",
    [
        (V, 4, f"prompt 2 has token {V} in slot 3: the model's vocabulary has the ids 0 to {V - 1}"),
        (-1, 4, "prompt 2 has token -1 in slot 3"),
        (5, P + 1, f"must be from 0 to the {P} slots"),
        (5, -1, f"must be from 0 to the {P} slots"),
    ],
)
def test_prompts_outside_the_vocabulary(mla, token, length, message):
    prompts, lengths = mla.prompts_BP.copy(), LENGTHS.copy()
    prompts[2, 3], lengths[2] = token, length
    with pytest.raises(DataError, match=message):
        start(mla.model, mla.variables, prompts, lengths, jax.random.key(0), SAMPLING)
    with pytest.raises(DataError, match="float32.*must be integers"):
        start(mla.model, mla.variables, prompts.astype(np.float32), lengths, jax.random.key(0), SAMPLING)
    check_prompts(np.where(np.arange(P) < LENGTHS[:, None], mla.prompts_BP, V), LENGTHS, V)  # padding is never read
