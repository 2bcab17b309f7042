"""Group relative policy optimization as jitted functions (DeepSeekMath §4.1, R1 §2.1).

Where every reward is in-graph, `iteration` is one call: sample problems, roll out, reward, advantages, all minibatch
updates with the router's bias, reference refresh. Otherwise `sample` and `learn` are the two halves around the Python
rewards. Weights are arguments of all three, never captured.
"""

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from deepseek_jax.model.transformer import Transformer
from deepseek_jax.parallel.arrays import constrain_state
from deepseek_jax.rl.advantages import finite_mean, first_live_groups, group_advantages, group_metrics
from deepseek_jax.rl.config import GRPOConfig
from deepseek_jax.rl.losses import grpo_loss, log_ratio
from deepseek_jax.rl.rewards import RewardSet, reward_to_go
from deepseek_jax.rl.rollout import Trajectories, completion_log_probs, roll_out
from deepseek_jax.rl.tasks.base import Instance, Task
from deepseek_jax.training.auxiliary import add_names, auxiliary_losses, auxiliary_metrics, mean_metrics, weighted
from deepseek_jax.training.balance import load_metrics
from deepseek_jax.training.state import TrainState, abstract_state, state_from_variables
from deepseek_jax.training.step import guarded_update
from deepseek_jax.training.targets import valid_counts


@flax.struct.dataclass
class GRPOState(TrainState):
    """`step` counts optimizer updates, as R1's "steps" do. `reference` is the policy the KL term holds on to, None
    without one."""

    reference: dict[str, Any] | None  # {"params", "router_bias"}
    rollouts: jax.Array  # int32


@flax.struct.dataclass
class Samples:
    """A rollout before its rewards are known."""

    instances: Instance  # [B], each problem repeated for its group
    trajectories: Trajectories


def grpo_state(
    model: Transformer,
    variables: dict[str, Any],
    optimizer: optax.GradientTransformation,
    rng: jax.Array,
    has_reference: bool = True,
) -> GRPOState:
    """A state at step 0 whose reference, if it has one, is the policy it starts from."""
    train = state_from_variables(model, variables, optimizer, rng)
    reference, rollouts = jax.tree.map(jnp.copy, (train.variables if has_reference else None, train.step))
    return GRPOState(**vars(train), reference=reference, rollouts=rollouts)


def abstract_grpo_state(
    model: Transformer, optimizer: optax.GradientTransformation, has_reference: bool = True
) -> GRPOState:
    """Shapes, dtypes and places of `grpo_state`; nothing is allocated."""
    train = abstract_state(model, optimizer)
    return GRPOState(**vars(train), reference=train.variables if has_reference else None, rollouts=train.step)


@dataclasses.dataclass(frozen=True)
class GRPO:
    """The programs of one GRPO run; hashable, everything static about it.

    `loss_chunk` is how many tokens' logits exist at once. Trained on is `model` on `task`, rewarded by `rewards`.
    """

    model: Transformer
    task: Task
    config: GRPOConfig
    rewards: RewardSet
    optimizer: optax.GradientTransformation
    loss_chunk: int = 4096

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def iteration(self, state: GRPOState) -> tuple[GRPOState, dict[str, jax.Array], Samples, jax.Array]:
        """One rollout and its updates -> (state, metrics, samples, rewards_B); all rewards in-graph."""
        return self._learn(state, self._sample(state), {})

    @functools.partial(jax.jit, static_argnums=0)
    def sample(self, state: GRPOState) -> Samples:
        """The first half: problems and completions."""
        return self._sample(state)

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def learn(self, state: GRPOState, samples: Samples, text_components: dict[str, jax.Array]):
        """The second half, given what the Python rewards made of the completions, float32[B] each -> as `iteration`."""
        return self._learn(state, samples, text_components)

    def _sample(self, state: GRPOState) -> Samples:
        config = self.config
        num_prompts = config.prompts_per_rollout * config.oversampling
        return Samples(*roll_out(self.model, state.variables, self.task, config, rollout_keys(state)[0], num_prompts))

    def _learn(self, state: GRPOState, samples: Samples, text_components: dict[str, jax.Array]):
        config = self.config
        trajectories = samples.trajectories
        mask_BN = trajectories.mask_BN
        sampled_B = mask_BN.any(axis=1)
        components = text_components | self.rewards.graph_components(
            self.task, samples.instances, trajectories.completions_BN, mask_BN
        )
        rewards = self.rewards.total(components, mask_BN)
        if config.has_reference and config.kl_in_reward:
            penalty_BN = -config.kl_coefficient * self._rollout_kl(state, trajectories)
            components["kl_penalty"] = penalty_BN
            rewards = (rewards if rewards.ndim == 2 else rewards[:, None]) + reward_to_go(penalty_BN, mask_BN)
        rewards = jnp.where(sampled_B if rewards.ndim == 1 else sampled_B[:, None], rewards, jnp.nan)
        rewards_B = rewards if rewards.ndim == 1 else rewards[:, 0]

        def of_completions(values):
            return jnp.where(sampled_B, values if values.ndim == 1 else values.sum(1), jnp.nan)

        components = {name: of_completions(values) for name, values in components.items()}
        correct_B = next(
            (components[reward.name] for reward in self.rewards.rewards if reward.role == "accuracy"), None
        )
        metrics = group_metrics(rewards_B, config.group_size, correct_B)
        metrics |= {f"reward_{name}": finite_mean(values_B) for name, values_B in components.items()}
        metrics |= length_metrics(trajectories, correct_B)
        advantages = group_advantages(rewards, config, mask_BN)
        batch = (trajectories, advantages.advantages, advantages.live_B)
        if config.oversampling > 1:  # dynamic sampling: the groups that carry a gradient first
            chosen = first_live_groups(advantages.live_B, config.group_size, config.prompts_per_rollout)
            batch, samples, rewards_B = jax.tree.map(lambda x: x[chosen], (batch, samples, rewards_B))

        epoch_keys = jax.random.split(rollout_keys(state)[1], config.inner_epochs)
        order_EB = jax.vmap(lambda key: jax.random.permutation(key, config.completions_per_rollout))(epoch_keys)
        minibatches_MB = order_EB.reshape(config.steps_per_rollout, config.minibatch_size)

        def update(state, indices_B):
            return self._update(state, *self._minibatch(batch, indices_B))

        skipped_before = state.skipped
        state, steps = jax.lax.scan(update, state, minibatches_MB)
        metrics = add_names(metrics, {name: finite_mean(values, axis=0) for name, values in steps.items()})
        # The policy that sampled is the policy of the first minibatch: its ratios are 1 but for rounding.
        metrics["first_ratio_error"] = jnp.maximum(steps["ratio_max"][0] - 1.0, 1.0 - steps["ratio_min"][0])
        metrics |= {"ratio_max": jnp.max(steps["ratio_max"]), "ratio_min": jnp.min(steps["ratio_min"])}
        metrics |= {"skipped": state.skipped, "skipped_updates": state.skipped - skipped_before}
        state = constrain_state(self.model, state.replace(rollouts=state.rollouts + 1))
        return state, metrics, samples, rewards_B

    def _minibatch(self, batch, indices_B: jax.Array):
        """The completions `indices_B` of a pytree; on a mesh every device holds its share of them."""

        def take(x):
            return self.model.ops.shard(x[indices_B], "batch", *(None,) * (x.ndim - 1))

        return jax.tree.map(take, batch)

    def _log_probs(self, variables, trajectories: Trajectories):
        return completion_log_probs(self.model, variables, trajectories, self.config.temperature, self.loss_chunk)

    def _reference_log_probs(self, state: GRPOState, trajectories: Trajectories) -> jax.Array:
        """float32 [B, N]; the experts that are replayed are the policy's, not the reference's."""
        return self._log_probs(state.reference, trajectories.replace(expert_ids_BLTK=None))[0]

    def _rollout_kl(self, state: GRPOState, trajectories: Trajectories) -> jax.Array:
        """k1 = log(pi_old / pi_ref) of every sampled token, float32 [B, N], a minibatch at a time."""
        size = self.config.minibatch_size
        indices_MB = jnp.arange(len(trajectories.mask_BN)).reshape(-1, size)
        of_minibatch = functools.partial(self._reference_log_probs, state)
        ref_logp_MBN = jax.lax.map(lambda indices_B: of_minibatch(self._minibatch(trajectories, indices_B)), indices_MB)
        ref_logp_BN = ref_logp_MBN.reshape(trajectories.mask_BN.shape)
        return log_ratio(trajectories.old_logp_BN, ref_logp_BN, trajectories.mask_BN)

    def _update(self, state: GRPOState, trajectories: Trajectories, advantages: jax.Array, live_B: jax.Array):
        """One optimizer step on one minibatch -> (state, metrics)."""
        config = self.config
        ref_logp_BN = self._reference_log_probs(state, trajectories) if config.kl_in_loss else None

        def loss_fn(params):
            variables = {"params": params, "router_bias": state.router_bias}
            logp_BN, entropy_BN, routing, returned = self._log_probs(variables, trajectories)
            loss, metrics = grpo_loss(
                config,
                logp_BN,
                trajectories.old_logp_BN,
                advantages,
                trajectories.mask_BN,
                ref_logp_BN=ref_logp_BN,
                finished_B=trajectories.finished_B,
                live_B=live_B,
            )
            mask_BN = trajectories.mask_BN.astype(jnp.float32)
            metrics["entropy"] = jnp.sum(entropy_BN * mask_BN) / jnp.maximum(jnp.sum(mask_BN), 1.0)
            valid_BT = trajectories.sequences()[1] > 0
            auxiliary = auxiliary_losses(returned, *valid_counts(valid_BT[None]))
            loss += weighted(auxiliary, config.auxiliary, "grpo.auxiliary")
            reported = add_names(auxiliary, mean_metrics(auxiliary_metrics(returned)))
            loads = {} if routing is None else {"moe_layers": jnp.sum(routing.counts_LBE, axis=1)}
            return loss, (metrics | {"loss": loss}, reported, loads)

        (loss, (metrics, reported, loads)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        state, metrics["grad_norm"] = guarded_update(
            state, self.optimizer, loss, grads, loads, config.bias_update_speed
        )
        if loads:
            metrics |= {name: value for name, value in load_metrics(loads).items() if value.ndim != 1}
        return self._refresh(state), add_names(metrics, reported)

    def _refresh(self, state: GRPOState) -> GRPOState:
        """reference <- ref_mix · policy + (1 - ref_mix) · reference every `reference_refresh_every` steps."""
        every, mix = self.config.reference_refresh_every, self.config.ref_mix
        if every == 0 or not self.config.has_reference:
            return state

        def mixed(reference):
            return jax.tree.map(lambda new, old: mix * new + (1.0 - mix) * old, state.variables, reference)

        return state.replace(
            reference=jax.lax.cond(state.step % every == 0, mixed, lambda reference: reference, state.reference)
        )


def rollout_keys(state: GRPOState) -> jax.Array:
    """The random keys of the rollout to come, [2]: one for problems and completions, one for the order of the
    updates."""
    return jax.random.split(jax.random.fold_in(state.rng, state.rollouts))


def length_metrics(trajectories: Trajectories, correct_B: jax.Array | None) -> dict[str, jax.Array]:
    """Completion lengths in tokens, of right and of wrong answers apart (NaN where there are none), and the share that
    hit the limit. Completions that the network's numbers spoilt have no tokens; they are counted, and enter nothing
    else."""
    lengths_B = jnp.sum(trajectories.mask_BN, axis=1).astype(jnp.float32)
    sampled_B = lengths_B > 0

    def mean(x_B, where_B):
        return finite_mean(jnp.where(sampled_B & where_B, x_B, jnp.nan))

    metrics = {
        "length_mean": mean(lengths_B, True),
        "length_max": jnp.max(lengths_B),
        "truncated_fraction": mean(1.0 - trajectories.finished_B, True),
        "non_finite_completions": jnp.sum(~sampled_B).astype(jnp.float32),
    }
    if correct_B is not None:
        metrics["length_right_mean"] = mean(lengths_B, correct_B > 0)
        metrics["length_wrong_mean"] = mean(lengths_B, correct_B <= 0)
    return metrics
