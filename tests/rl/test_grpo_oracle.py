"""Two GRPO rollouts against a plain reading of the equations (DeepSeekMath §4.1; the definitions are TRL's too).

From the sampled tokens and the weights before: log-probabilities of whole sequences without gaps, advantages and Adam
in numpy, and the loss written down once more. Prompts differ in length, the temperature is 0.7, and the reference stays
what the policy was at the start. The router returns a loss of its own, which the stage weighs.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_policy import CONFIG, MODEL, digit_share_in_graph, grpo_of, random_variables

from deepseek_jax.generation.generate import generate
from deepseek_jax.generation.sampling import SamplingConfig
from deepseek_jax.model.auxiliary import auxiliary_loss, auxiliary_metric
from deepseek_jax.model.router import Router
from deepseek_jax.rl.grpo import grpo_state
from deepseek_jax.rl.rewards import Reward, RewardSet
from deepseek_jax.rl.tasks import base
from deepseek_jax.rl.tasks.parity import ParityTask

Z_WEIGHT = 0.02
BETA, TEMPERATURE, EPS, FLOOR, GAMMA, RATE, ADAM_EPS = 0.1, 0.7, 0.05, 0.02, 1e-3, 1e-3, 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnevenParity(ParityTask):
    """Shows four to eight of the bits, so that prompts have different lengths."""

    def prompts(self, instances):
        tokens_BP, lengths_B = super().prompts(instances)
        lengths_B = lengths_B - jnp.sum(instances.bits_BK[:, :4], axis=1)
        slots_P, last_B1 = jnp.arange(tokens_BP.shape[1]), lengths_B[:, None] - 1
        tokens_BP = jnp.where(slots_P < last_B1, tokens_BP, jnp.where(slots_P == last_B1, base.ASSISTANT, base.PAD))
        return tokens_BP, lengths_B


class ZLossRouter(Router):
    def route(self, logits_BTE, valid_BT, expert_ids_BTK):
        z_BT = jnp.square(jax.nn.logsumexp(logits_BTE, axis=-1))
        auxiliary_loss(self, "z", z_BT, valid_BT)
        auxiliary_metric(self, "z_again", z_BT, valid_BT)
        return super().route(logits_BTE, valid_BT, expert_ids_BTK)


def length_in_graph(task, instances, completions_BN, mask_BN):
    return mask_BN.sum(1) / mask_BN.shape[1]


REWARDS = RewardSet(
    (Reward("digits", digit_share_in_graph, True), Reward("length", length_in_graph, True)), (1.0, 0.25)
)
Z_MODEL = MODEL.clone(
    config=MODEL.config.replace(
        moe=dataclasses.replace(MODEL.config.moe, router="test_grpo_oracle:ZLossRouter"), num_layers=3
    )
)
GRPO = grpo_of(
    CONFIG.replace(
        num_minibatches=2,
        steps=4,
        kl_coefficient=BETA,
        reference_refresh_every=0,
        learning_rate=RATE,
        temperature=TEMPERATURE,
        clip_epsilon=(0.2, 0.28),
        aggregation="token_mean",
        advantage_eps=EPS,
        advantage_std_floor=FLOOR,
        bias_update_speed=GAMMA,
        auxiliary=(("z", Z_WEIGHT),),
    ),
    REWARDS,
    model=Z_MODEL,
    task=UnevenParity(bits=8),
    eps=ADAM_EPS,
)


def sequences(t, rows):
    """Prompt and completion without a gap, and where each completion token is predicted. All int [rows, T]."""
    P, N = t.prompts_BP.shape[1], t.completions_BN.shape[1]
    tokens, segments = np.zeros((2, len(rows), P + N), np.int32)
    experts = np.zeros((t.expert_ids_BLTK.shape[1], len(rows), P + N, t.expert_ids_BLTK.shape[3]), np.int32)
    fed = np.zeros((len(rows), P + N), bool)
    for i, row in enumerate(rows):
        L, n = int(t.prompt_lengths_B[row]), int(t.mask_BN[row].sum())
        tokens[i, : L + n] = [*t.prompts_BP[row, :L], *t.completions_BN[row, :n]]
        segments[i, : L + n] = 1
        experts[:, i, :L], experts[:, i, L : L + n] = (
            t.expert_ids_BLTK[row, :, :L],
            t.expert_ids_BLTK[row, :, P : P + n],
        )
        fed[i, : L + n - 1] = True  # the last token was drawn, and nothing after it
    where = np.asarray(t.prompt_lengths_B)[rows, None] - 1 + np.arange(N)
    return tokens, segments, np.broadcast_to(np.arange(P + N), tokens.shape), experts, fed, where


@jax.jit
def log_softmax(variables, tokens, segments, positions, experts=None):
    output = Z_MODEL.apply(variables, tokens, segment_ids_BT=segments, positions_BT=positions, expert_ids_LBTK=experts)
    return jax.nn.log_softmax(Z_MODEL.apply(variables, output.hidden_BTD, method="unembed") / TEMPERATURE)


@jax.jit
def loss_and_gradient(params, router_bias, arrays, fed, where, drawn, mask, old, ref, A):
    def loss_fn(params):
        variables = {"params": params, "router_bias": router_bias}
        logp_BTV = log_softmax(variables, *arrays)
        tokens, _, positions, experts = arrays
        _, returned = Z_MODEL.apply(
            variables,
            tokens,
            segment_ids_BT=fed.astype(jnp.int32),
            positions_BT=positions,
            expert_ids_LBTK=experts,
            mutable=("auxiliary_losses",),
        )
        z = jnp.sum(returned["auxiliary_losses"]["moe_layers"]["ffn"]["router"]["z"].total) / jnp.sum(fed)
        logp_BNV = jnp.take_along_axis(logp_BTV, where[..., None], axis=1)
        logp = jnp.take_along_axis(logp_BNV, drawn[..., None], axis=-1)[..., 0]
        ratio = jnp.exp(logp - old)
        surrogate = jnp.minimum(ratio * A[:, None], jnp.clip(ratio, 0.8, 1.28) * A[:, None])
        kl = jnp.exp(ref - logp) - (ref - logp) - 1
        pg_loss, kl = (jnp.sum(jnp.where(mask, x, 0.0)) / jnp.sum(mask) for x in (-surrogate, kl))
        entropy = jnp.sum(jnp.where(mask, -jnp.sum(jnp.exp(logp_BNV) * logp_BNV, -1), 0.0)) / jnp.sum(mask)
        loss = pg_loss + BETA * kl + Z_WEIGHT * z
        return loss, {
            "loss": loss,
            "pg_loss": pg_loss,
            "kl": kl,
            "entropy": entropy,
            "z": z,
            "z_again": z / len(experts),
            "ratio": jnp.where(mask, ratio, 1.0),
        }

    (_, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    return metrics, grads


class Oracle:
    """Weights, biases and moments as numpy arrays, moved on by what was sampled."""

    def __init__(self, variables):
        self.reference = jax.tree.map(np.array, variables)
        self.params, self.bias = jax.tree.map(np.array, (variables["params"], variables["router_bias"]))
        self.moments = [jax.tree.map(np.zeros_like, self.params) for _ in range(2)]
        self.count = 0

    def rollout(self, key, t, rewards_B):
        """The updates of one rollout, given its trajectories and rewards -> metrics, as lists over minibatches."""
        A = np.zeros(len(rewards_B))
        for g in range(0, len(A), 4):
            group = np.asarray(rewards_B, np.float64)[g : g + 4]
            A[g : g + 4] = (group - group.mean()) / (max(group.std(), FLOOR) + EPS)
        order = jax.random.permutation(jax.random.split(jax.random.split(key)[1], 1)[0], len(A))
        return order, [self.update(t, rows, A) for rows in np.asarray(order).reshape(2, -1)]

    def update(self, t, rows, A):
        *arrays, experts, fed, where = sequences(t, rows)
        drawn, mask = np.asarray(t.completions_BN)[rows], np.asarray(t.mask_BN)[rows] > 0
        ref_BTV = log_softmax(self.reference, *arrays)
        ref = np.take_along_axis(np.take_along_axis(np.asarray(ref_BTV), where[..., None], 1), drawn[..., None], -1)[
            ..., 0
        ]
        old = np.asarray(t.old_logp_BN)[rows]
        metrics, grads = loss_and_gradient(
            self.params, self.bias, (*arrays, experts), fed, where, drawn, mask, old, ref, A[rows]
        )
        metrics["grad_norm"] = norm = np.sqrt(sum(float(np.sum(np.float64(g) ** 2)) for g in jax.tree.leaves(grads)))
        self.count += 1
        grads = jax.tree.map(lambda g: np.asarray(g) / max(norm, 1.0), grads)
        self.moments[0] = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, self.moments[0], grads)
        self.moments[1] = jax.tree.map(lambda v, g: 0.95 * v + 0.05 * g**2, self.moments[1], grads)
        m_scale, v_scale = 1 - 0.9**self.count, 1 - 0.95**self.count
        self.params = jax.tree.map(
            lambda p, m, v: p - RATE * (m / m_scale) / (np.sqrt(v / v_scale) + ADAM_EPS), self.params, *self.moments
        )
        loads = np.stack([np.bincount(layer[fed].reshape(-1), minlength=8) for layer in experts])
        bias = self.bias["moe_layers"]["ffn"]["router"]["bias"]
        bias += GAMMA * np.sign(loads.mean(1, keepdims=True) - loads)
        metrics["expert_load"] = loads / loads.mean(1, keepdims=True)
        metrics["max_violation_mean"] = np.mean(loads.max(1) / loads.mean(1) - 1)
        metrics["max_violation_max"] = np.max(loads.max(1) / loads.mean(1) - 1)
        return metrics


@pytest.fixture(scope="module")
def rollouts():
    """For each of two rollouts: (state before, state after, metrics, samples, rewards), and what the oracle makes of
    it."""
    variables = random_variables(Z_MODEL)
    head = variables["params"]["head"]["kernel"]
    variables["params"]["head"]["kernel"] = head.at[:, base.EOS].multiply(4.0)  # some completions end early
    state, oracle, made = grpo_state(Z_MODEL, variables, GRPO.optimizer, jax.random.key(2)), Oracle(variables), []
    for _ in range(2):
        before = jax.tree.map(jnp.copy, state)
        state, metrics, samples, rewards_B = GRPO.iteration(state)
        key = jax.random.fold_in(jax.random.key(2), len(made))
        order, minibatches = oracle.rollout(key, jax.tree.map(np.asarray, samples.trajectories), rewards_B)
        expected = {
            "order": order,
            "minibatches": minibatches,
            "params": oracle.params,
            "bias": jax.tree.map(np.copy, oracle.bias),
        }
        made.append((before, jax.tree.map(jnp.copy, state), metrics, samples, rewards_B, expected))
    return made


@pytest.mark.parametrize("rollout", [0, 1])
def test_metrics_and_update_are_those_of_the_equations(rollouts, rollout):
    before, after, metrics, samples, rewards_B, expected = rollouts[rollout]
    counted = ("expert_load", "max_violation_mean", "max_violation_max")
    for name in ("loss", "pg_loss", "kl", "entropy", "grad_norm", "z", "z_again", *counted):
        value = np.mean([m[name] for m in expected["minibatches"]], axis=0)
        assert np.shape(metrics[name]) == np.shape(value) and np.any(value), name
        np.testing.assert_allclose(metrics[name], value, rtol=1e-3, atol=1e-5, err_msg=name)
    ratios = np.stack([m["ratio"] for m in expected["minibatches"]])
    assert ratios[1].max() > 1.001, "the second minibatch is off policy"
    np.testing.assert_allclose([metrics["ratio_max"], metrics["ratio_min"]], [ratios.max(), ratios.min()], rtol=1e-4)
    for ours, theirs, old in zip(*map(jax.tree.leaves, (after.params, expected["params"], before.params)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
        assert np.abs(theirs - old).max() > 20 * 1e-5 or not np.any(theirs - old), "far more than the tolerance"
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-7),
        after.router_bias,
        expected["bias"],
    )


def test_the_policy_leaves_its_reference_and_shuffles_anew(rollouts):
    assert float(rollouts[1][2]["kl"]) > 1e-3
    orders = [np.asarray(rollout[-1]["order"]) for rollout in rollouts]
    assert not np.array_equal(*orders) and all(sorted(order) == list(range(16)) for order in orders)
    assert all(float(rollout[2]["first_ratio_error"]) < 1e-5 for rollout in rollouts), "at temperature 0.7"


def test_completions_are_drawn_with_a_key_of_their_own(rollouts):
    """Problems, completions and the order of updates each have one; none is a function of another's numbers."""
    before, _, _, samples, _, _ = rollouts[1]
    t, rollout_key = samples.trajectories, jax.random.fold_in(jax.random.key(2), 1)
    problem_key, sample_key = jax.random.split(jax.random.split(rollout_key)[0])
    np.testing.assert_array_equal(samples.instances.bits_BK[::4], GRPO.task.sample(problem_key, 4, "train").bits_BK)
    sampling = SamplingConfig(max_new_tokens=6, eos_id=base.EOS, pad_id=base.PAD, temperature=TEMPERATURE)
    drawn = generate(
        Z_MODEL,
        before.variables,
        t.prompts_BP[::4],
        t.prompt_lengths_B[::4],
        sample_key,
        sampling,
        samples_per_prompt=4,
    )
    np.testing.assert_array_equal(drawn.tokens_BN, t.completions_BN)
    assert len(set(t.prompt_lengths_B.tolist())) > 1
    keys = [
        problem_key,
        sample_key,
        *(jax.random.fold_in(sample_key, row) for row in range(16)),
        jax.random.split(rollout_key)[1],
    ]
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == len(keys)


def test_metrics_are_those_of_the_samples(rollouts):
    _, _, metrics, samples, rewards_B, _ = rollouts[1]
    t, rewards = samples.trajectories, np.asarray(rewards_B).reshape(4, 4)
    lengths = np.asarray(t.mask_BN).sum(1)
    assert len(set(lengths.tolist())) > 1, "some completion ended early"
    finished = [base.EOS in row[:n] for row, n in zip(np.asarray(t.completions_BN).tolist(), lengths, strict=True)]
    expected = {
        "reward_mean": rewards.mean(),
        "reward_std": rewards.std(1).mean(),
        "reward_length": lengths.mean() / 6,
        "length_mean": lengths.mean(),
        "length_max": lengths.max(),
        "truncated_fraction": 1 - np.mean(finished),
        "non_finite_rewards": 0,
        "non_finite_completions": 0,
        "skipped_updates": 0,
    }
    assert 0 < np.mean(finished) < 1
    for name, value in expected.items():
        assert float(metrics[name]) == pytest.approx(value, abs=1e-5), name
