"""Muon against torch.optim.Muon, for every expert of a stack."""

import jax
import numpy as np
import pytest

from deepseek_jax.training.muon import MuonConfig, orthogonalized

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("name", ["up", "down"])
def test_two_steps_equal_torch(name, model, monkeypatch):
    """Matrices wider than high and higher than wide. torch iterates in bfloat16; here in float32."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self.clone())
    shape_LEAB = (1, 4, 32, 16) if name == "up" else (1, 4, 16, 32)
    gradients = np.random.default_rng(0).normal(size=(2, *shape_LEAB)).astype(np.float32)
    transform = orthogonalized(MuonConfig(), model)

    def tree(x):
        return {"moe_layers": {"ffn": {"experts": {name: x}}}}

    state, update = transform.init(tree(gradients[0])), jax.jit(transform.update)
    theirs = [torch.nn.Parameter(torch.zeros(shape_LEAB[2:])) for _ in range(4)]
    optimizer = torch.optim.Muon(theirs, lr=1.0, weight_decay=0.0, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    ours = np.zeros(shape_LEAB)
    for gradient in gradients:
        updates, state = update(tree(gradient), state)
        ours -= np.asarray(updates["moe_layers"]["ffn"]["experts"][name])
        for expert, parameter in enumerate(theirs):
            parameter.grad = torch.tensor(gradient[0, expert])
        optimizer.step()
    np.testing.assert_allclose(ours[0], np.stack([parameter.detach().numpy() for parameter in theirs]), atol=2e-5)
