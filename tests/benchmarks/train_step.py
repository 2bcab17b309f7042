"""Training step (forward, backward, clip, AdamW) against transformers + torch: tokens/s, same weights, batch, cores,
float32.

    python tests/benchmarks/train_step.py [--size=small] [--batch=16] [--length=128] [--breakdown] [--json=out.json]

Needs `.[parity]`. Both sides first take three steps from the same weights; their losses have to agree. The peer runs
eagerly, as transformers' users do, with AdamW's fused CPU kernel; its routed experts are checked to run and to get
gradients.
"""

import common

if __name__ == "__main__":
    FLAGS = common.flags(__doc__, experts="eager,grouped_mm", batch=16, length=128)

import jax
import numpy as np
import torch
from breakdown import print_parts, where_time_goes

from deepseek_jax.model.transformer import Transformer, init_variables
from deepseek_jax.training.objective import ObjectiveConfig
from deepseek_jax.training.optimizer import OptimizerConfig, build_optimizer
from deepseek_jax.training.schedules import Schedule
from deepseek_jax.training.state import state_from_variables
from deepseek_jax.training.step import make_train_step

OURS = "deepseek_jax"
LEARNING_RATE = 1e-3


class Ours:
    def __init__(self, model: Transformer, variables, tokens_BT: np.ndarray):
        optimizer = build_optimizer(OptimizerConfig(learning_rate=Schedule(LEARNING_RATE)))
        objective = ObjectiveConfig(mtp_weight=Schedule(0.0), balance="none")
        self.train_step = make_train_step(model, objective, optimizer, Schedule(LEARNING_RATE), Schedule(0.0))
        self.state = state_from_variables(model, variables, optimizer, jax.random.key(0))
        ones = np.ones_like(tokens_BT)
        positions = np.broadcast_to(np.arange(tokens_BT.shape[1], dtype=np.int32), tokens_BT.shape)
        self.batch = {"tokens": tokens_BT, "segment_ids": ones, "positions": positions, "loss_mask": ones}

    def __call__(self) -> float:
        self.state, metrics = self.train_step(self.state, self.batch)
        return float(metrics["cross_entropy"])


class Theirs:
    def __init__(self, model: torch.nn.Module, tokens_BT: np.ndarray):
        self.model = model.train()
        norms = [p for name, p in model.named_parameters() if name.endswith("norm.weight")]
        others = [p for name, p in model.named_parameters() if not name.endswith("norm.weight")]
        groups = [{"params": norms, "weight_decay": 0.0}, {"params": others, "weight_decay": 0.1}]
        self.optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8, fused=True)
        self.tokens = torch.from_numpy(tokens_BT.astype(np.int64))

    def __call__(self) -> float:
        loss = self.model(input_ids=self.tokens, labels=self.tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def check_experts_have_gradients(self) -> None:
        """In training mode every routed expert that a token chose has to run and to learn."""
        self.model(input_ids=self.tokens, labels=self.tokens, use_cache=False).loss.backward()
        for name, parameter in self.model.named_parameters():
            if ".experts." in name:
                learning = (parameter.grad.abs().amax(dim=(1, 2)) > 0).float().mean().item()
                assert learning > 0.5, f"{name}: only {learning:.0%} of the routed experts have a gradient"
        self.optimizer.zero_grad(set_to_none=True)


def main(flags) -> None:
    config = common.SIZES[flags.size]
    model = Transformer(config, common.our_ops(config))
    variables = init_variables(model, jax.random.key(0))
    tokens_BT = np.random.default_rng(0).integers(0, config.vocab_size, (flags.batch, flags.length), dtype=np.int32)

    candidates = {OURS: Ours(model, variables, tokens_BT)}
    for implementation in flags.experts:
        peer = Theirs(common.twin(config, variables, implementation), tokens_BT)
        peer.check_experts_have_gradients()
        candidates[f"transformers, experts {implementation}"] = peer

    def same_losses(losses: dict[str, list[float]]) -> None:
        for name, values in losses.items():
            np.testing.assert_allclose(values, losses[OURS], rtol=1e-4, err_msg=f"the losses of {name} and ours differ")
        print("losses of the first steps, equal on all sides:", [round(loss, 5) for loss in losses[OURS]])

    timings = common.interleave(candidates, flags, same_losses)
    setting = {**common.describe(config, flags), "batch": flags.batch, "length": flags.length}
    common.print_ratios("Training step", setting, timings, tokens_BT.size, OURS, flags.json)
    if flags.breakdown:
        ours = candidates[OURS]
        print_parts("Our step", where_time_goes(ours.train_step, (ours.state, ours.batch), ours))


if __name__ == "__main__":
    main(FLAGS)
