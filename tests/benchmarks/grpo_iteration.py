"""One GRPO iteration against the same work with transformers' `generate` and a torch update: seconds, same weights,
cores, float32.

    python tests/benchmarks/grpo_iteration.py [--prompts=16] [--group=16] [--new_tokens=64] [--breakdown]
        [--json=out.json]

Needs `.[parity]`. Both sides sample completions of the main job's task, reward them and make the main job's updates
with clipped ratio and KL to a reference. Random weights hardly ever end a completion, so that both sides decode all
tokens. The peer gets prompts and rewards for free, from our own functions. Checked first: on one and the same rollout,
log-probabilities, loss and gradient norm of both sides agree.
"""

import common

if __name__ == "__main__":
    FLAGS = common.flags(__doc__, experts="eager,grouped_mm", prompts=16, group=16, new_tokens=64)

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch
from breakdown import print_parts, where_time_goes

from deepseek_jax.model.transformer import Transformer, init_variables
from deepseek_jax.rl.advantages import group_advantages
from deepseek_jax.rl.config import GRPOConfig
from deepseek_jax.rl.grpo import GRPO, grpo_state
from deepseek_jax.rl.rewards import build_rewards
from deepseek_jax.rl.rollout import Trajectories
from deepseek_jax.rl.tasks import build_task
from deepseek_jax.rl.tasks.base import EOS, PAD
from deepseek_jax.stages.grpo import divided
from deepseek_jax.training.optimizer import OptimizerConfig, build_optimizer
from deepseek_jax.training.schedules import Schedule

OURS = "deepseek_jax, one jitted call"


class Ours:
    def __init__(self, grpo: GRPO, variables):
        self.grpo = grpo
        self.state = grpo_state(grpo.model, variables, grpo.optimizer, jax.random.key(0))

    def __call__(self) -> None:
        self.state, metrics, _, _ = self.grpo.iteration(self.state)
        jax.block_until_ready(metrics)


class Theirs:
    def __init__(self, model: torch.nn.Module, grpo: GRPO):
        self.model, self.reference, self.grpo = model, copy.deepcopy(model).eval(), grpo
        norms = [p for name, p in model.named_parameters() if name.endswith("norm.weight")]
        others = [p for name, p in model.named_parameters() if not name.endswith("norm.weight")]
        groups = [{"params": norms, "weight_decay": 0.0}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(
            groups, lr=grpo.config.learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=True
        )
        task, config = grpo.task, grpo.config
        self.instances = task.sample(jax.random.key(1), config.prompts_per_rollout, "train")
        prompts_QP, lengths_Q = task.prompts(self.instances)
        assert np.all(np.asarray(lengths_Q) == prompts_QP.shape[1]), (
            "prompts of one length need no padding on either side"
        )
        self.prompts_BP = torch.from_numpy(
            np.repeat(np.asarray(prompts_QP), config.group_size, axis=0).astype(np.int64)
        )
        instances = jax.tree.map(lambda x: jnp.repeat(x, config.group_size, axis=0), self.instances)

        @jax.jit
        def advantages(completions_BN, mask_BN):
            components = grpo.rewards.graph_components(task, instances, completions_BN, mask_BN)
            return group_advantages(grpo.rewards.total(components, mask_BN), config).advantages

        self.advantages = advantages

    def __call__(self) -> None:
        config = self.grpo.config
        completions_BN, old_logp_BN = self.roll_out()
        mask_BN = _mask(completions_BN)
        advantages_B = torch.from_numpy(np.array(self.advantages(completions_BN.int().numpy(), mask_BN.int().numpy())))
        for rows_B in torch.randperm(completions_BN.shape[0]).split(config.minibatch_size):
            batch = (self.prompts_BP, completions_BN, mask_BN, old_logp_BN, advantages_B)
            self.loss(*(x[rows_B] for x in batch)).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def roll_out(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Completions [B, N] and the log-probabilities they were drawn with."""
        new_tokens = self.grpo.config.max_completion_length
        out = self.model.eval().generate(
            self.prompts_BP,
            attention_mask=torch.ones_like(self.prompts_BP),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            eos_token_id=EOS,
            pad_token_id=PAD,
            max_new_tokens=new_tokens,
            use_cache=True,
            return_dict_in_generate=True,
            output_logits=True,
        )
        completions_BN = out.sequences[:, self.prompts_BP.shape[1] :]
        logits_BNV = torch.stack(out.logits, dim=1)
        return completions_BN, logits_BNV.log_softmax(-1).gather(-1, completions_BN[..., None])[..., 0]

    def log_probs(self, model: torch.nn.Module, prompts_BP: torch.Tensor, completions_BN: torch.Tensor) -> torch.Tensor:
        hidden = torch.cat([prompts_BP, completions_BN], dim=1)
        logits_BNV = model(input_ids=hidden, use_cache=False, logits_to_keep=completions_BN.shape[1] + 1).logits[:, :-1]
        return logits_BNV.log_softmax(-1).gather(-1, completions_BN[..., None])[..., 0]

    def loss(self, prompts_BP, completions_BN, mask_BN, old_logp_BN, advantages_B) -> torch.Tensor:
        """Clipped surrogate and k3 estimate of the KL, averaged over tokens."""
        low, high = self.grpo.config.clip_epsilon
        logp_BN = self.log_probs(self.model.train(), prompts_BP, completions_BN)
        with torch.no_grad():
            ref_logp_BN = self.log_probs(self.reference, prompts_BP, completions_BN)
        ratio_BN = (logp_BN - old_logp_BN).exp()
        surrogate_BN = torch.minimum(
            ratio_BN * advantages_B[:, None], ratio_BN.clamp(1 - low, 1 + high) * advantages_B[:, None]
        )
        kl_BN = (ref_logp_BN - logp_BN).expm1() - (ref_logp_BN - logp_BN)
        return ((self.grpo.config.kl_coefficient * kl_BN - surrogate_BN) * mask_BN).sum() / mask_BN.sum()


def _mask(completions_BN: torch.Tensor) -> torch.Tensor:
    """1 up to and including the first end of sequence."""
    ended_BN = (completions_BN == EOS).int()
    return ((ended_BN.cumsum(1) - ended_BN) == 0).float()


def check_same_update(grpo: GRPO, ours: Ours, peer: Theirs) -> None:
    """One rollout of ours with made-up advantages, through both updates."""
    trajectories: Trajectories = grpo.sample(ours.state).trajectories
    batch = jax.tree.map(lambda x: x[: grpo.config.minibatch_size], trajectories)
    advantages_B = np.random.default_rng(0).normal(size=grpo.config.minibatch_size).astype(np.float32)
    update = jax.jit(functools.partial(GRPO._update, grpo))
    _, metrics = update(ours.state, batch, jnp.asarray(advantages_B), jnp.ones(advantages_B.shape, bool))

    def tensor(x, dtype):
        return torch.from_numpy(np.array(x, dtype))

    prompts_BP, completions_BN = tensor(batch.prompts_BP, np.int64), tensor(batch.completions_BN, np.int64)
    mask_BN, old_logp_BN = tensor(batch.mask_BN, np.float32), tensor(batch.old_logp_BN, np.float32)
    with torch.no_grad():
        theirs_BN = peer.log_probs(peer.model.eval(), prompts_BP, completions_BN)
    error = ((theirs_BN - old_logp_BN) * mask_BN).abs().max().item()
    loss = peer.loss(prompts_BP, completions_BN, mask_BN, old_logp_BN, torch.from_numpy(advantages_B))
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(peer.model.parameters(), float("inf")).item()
    peer.optimizer.zero_grad(set_to_none=True)
    print(
        f"same rollout: log-probabilities differ by {error:.1e}, losses {loss.item():.6f} "
        f"{float(metrics['loss']):.6f}, ",
        end="",
    )
    print(f"gradient norms {norm:.6f} {float(metrics['grad_norm']):.6f}")
    assert error < 1e-4
    np.testing.assert_allclose(loss.item(), metrics["loss"], rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(norm, metrics["grad_norm"], rtol=1e-3)


def main(flags) -> None:
    config = common.SIZES[flags.size]
    model = Transformer(config, common.our_ops(config))
    variables = init_variables(model, jax.random.key(0))
    task = build_task(common.R1_TINY.task.to_dict())
    section = {name: value for name, value in common.R1_TINY.grpo.to_dict().items() if name != "kind"}
    settings = divided(section)[0] | {"group_size": flags.group, "prompts_per_rollout": flags.prompts}
    settings |= {"max_prompt_length": task.prompt_length, "max_completion_length": flags.new_tokens}
    config = GRPOConfig.from_dict(settings)
    optimizer = build_optimizer(OptimizerConfig(learning_rate=Schedule(config.learning_rate), weight_decay=0.0))
    grpo = GRPO(model, task, config, build_rewards(config, task), optimizer)

    candidates = {OURS: Ours(grpo, variables)}
    for implementation in flags.experts:
        peer = Theirs(common.twin(model.config, variables, implementation), grpo)
        check_same_update(grpo, candidates[OURS], peer)
        candidates[f"transformers + torch, experts {implementation}"] = peer

    timings = common.interleave(candidates, flags, check=lambda returned: None, warm_up=1)
    setting = {**common.describe(model.config, flags), "completions": config.completions_per_rollout}
    setting |= {"prompt": task.prompt_length, "new_tokens": flags.new_tokens, "updates": config.steps_per_rollout}
    tokens = config.completions_per_rollout * flags.new_tokens
    common.print_ratios("GRPO iteration (completion tokens)", setting, timings, tokens, OURS, flags.json)
    if flags.breakdown:
        ours = candidates[OURS]
        print_parts("Our iteration", where_time_goes(GRPO.iteration, (grpo, ours.state), ours))


if __name__ == "__main__":
    main(FLAGS)
