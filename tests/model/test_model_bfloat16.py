"""The bfloat16 policy on the whole network: close to float32, and float32 where the design says so."""

import jax.numpy as jnp
import numpy as np
from tiny_models import batch, forward, tiny_config, variables

CONFIG = tiny_config()


def test_bfloat16_is_close_and_keeps_float32_where_it_counts():
    vars_, arguments = variables(CONFIG), batch()
    exact, exact_logits = forward(CONFIG)(vars_, *arguments)
    rounded, logits = forward(CONFIG, "bfloat16")(vars_, *arguments, exact.routing.expert_ids_LBTK)
    assert logits.dtype == jnp.float32
    assert rounded.hidden_BTD.dtype == jnp.bfloat16 and rounded.mtp_hidden[1].dtype == jnp.bfloat16
    assert {leaf.dtype for pair in rounded.latents.values() for leaf in pair} == {jnp.dtype(jnp.bfloat16)}
    # Sums that bfloat16 could not hold: of 11 tokens, and of those with a token one and two places on.
    for routing, tokens_L1 in ((rounded.routing, [[11]]), (rounded.mtp_routing, [[10], [9]])):
        assert routing.counts_LBE.dtype == routing.probs_LBE.dtype == routing.tokens_LB.dtype == jnp.float32
        np.testing.assert_allclose(
            jnp.sum(routing.probs_LBE, axis=-1), np.broadcast_to(tokens_L1, routing.tokens_LB.shape), rtol=1e-6
        )
    error = np.asarray(logits - exact_logits)
    assert 1e-4 < np.sqrt(np.mean(error**2)) < 0.03 * np.std(exact_logits)


def test_routing_follows_float32_scores():
    """The experts of most tokens survive the rounding of what the router reads; none survives by chance."""
    vars_, arguments = variables(CONFIG), batch()
    exact = forward(CONFIG)(vars_, *arguments)[0].routing
    own = forward(CONFIG, "bfloat16")(vars_, *arguments, None)[0].routing
    same = np.mean(np.sort(exact.expert_ids_LBTK[0]) == np.sort(own.expert_ids_LBTK[0]))
    assert same > 0.9
