"""Muon on every mesh: the updates of one device, matrices that are whole where they are orthogonalized."""

import functools
import re

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec
from meshes import CONFIG, MESHES, assert_close, jit, on, variables

from deepseek_jax.model.transformer import Transformer, abstract_variables
from deepseek_jax.parallel.arrays import state_sharding, whole_matrix_layouts
from deepseek_jax.training.optimizer import OptimizerConfig, build_optimizer
from deepseek_jax.training.schedules import Schedule
from deepseek_jax.training.state import abstract_state

# Stacks of three layers, which no mesh divides evenly, and an MTP module's matrices, which have no layers.
MODEL = Transformer(CONFIG.replace(num_layers=3, first_k_dense=0))
OPTIMIZER = OptimizerConfig(Schedule(0.01), name="muon", weight_decay=0.1)


def gradients(seed):
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda p: random.normal(size=p.shape).astype(np.float32), abstract_variables(MODEL)["params"])


def shardings(model, optimizer):
    """Of parameters and of the optimizer's state; None on one device."""
    state = state_sharding(model, abstract_state(model, optimizer))
    return (None, None) if state is None else (state.params, state.opt_state)


@functools.cache
def two_updates(name):
    """Parameters after two updates, the state, and the program."""
    model = on(MESHES.get(name), MODEL)
    optimizer = build_optimizer(OPTIMIZER, model)
    params_sharding, state_sharding = shardings(model, optimizer)

    @functools.partial(jit, out_shardings=(params_sharding, state_sharding))
    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.device_put(variables(MODEL.config)["params"], params_sharding)
    state = jax.jit(optimizer.init, out_shardings=state_sharding)(params)
    program = step.lower(params, state, jax.device_put(gradients(0), params_sharding)).compile()
    for seed in range(2):
        params, state = program(params, state, jax.device_put(gradients(seed), params_sharding))
    return params, state, program.as_text()


@pytest.mark.parametrize("name", MESHES)
def test_updates_equal_one_device(name, capfd):
    """And no array is gathered whole on every device because the compiler finds no other way."""
    (params, state, _), (one_params, one_state, _) = two_updates(name), two_updates("one device")
    assert_close((params, state), (one_params, one_state))
    assert "full rematerialization" not in capfd.readouterr().err


def test_momentum_lies_where_its_parameter_does():
    params, state, _ = two_updates("fsdp2 tensor2 expert2")
    up = params["moe_layers"]["ffn"]["experts"]["up"]
    momenta = [x for x in jax.tree.leaves(state[1].inner_states["muon"]) if x.shape == up.shape]
    assert len(momenta) == 2  # of gate and up
    assert all(x.sharding.is_equivalent_to(up.sharding, 4) and not x.sharding.is_fully_replicated for x in momenta)


EXPERTS, FFN = ("layers", "experts", "embed", "expert_ffn"), ("layers", "embed", "ffn")


@pytest.mark.parametrize(
    ("name", "axes", "shape", "spec"),
    [
        ("fsdp2 expert4", EXPERTS, (3, 8, 16, 6), ("fsdp", "expert", None, None)),
        ("fsdp2 expert4", EXPERTS, (1, 8, 16, 6), (None, ("expert", "fsdp"), None, None)),
        ("fsdp2 expert4", EXPERTS, (1, 12, 16, 6), (None, "expert", None, None)),  # 3 on a device are not divided by 2
        ("fsdp2 expert4", FFN, (3, 16, 24), (("fsdp", "expert"), None, None)),
        ("fsdp2 expert4", FFN, (1, 16, 24), (None, None, None)),
        ("fsdp2 expert4", FFN[1:], (16, 24), (None, None)),
        ("data8", EXPERTS[1:], (8, 16, 6), ("data", None, None)),
        ("fsdp2 tensor2 expert2", FFN, (3, 16, 24), (("fsdp", "expert"), None, None)),
        ("fsdp2 tensor2 expert2", FFN, (13, 16, 24), (("fsdp", "expert", "tensor"), None, None)),
        ("fsdp2 tensor2 expert2", FFN, (10, 16, 24), (("fsdp", "expert"), None, None)),  # 12 in threes, 16 in twos
    ],
)
def test_stacks_are_divided_and_matrices_are_not(name, axes, shape, spec):
    ops = on(MESHES[name], MODEL).ops
    first, *_, last = whole_matrix_layouts(ops, axes, shape)
    assert first == ops.spec(axes, shape) and last == PartitionSpec(*spec)


@pytest.mark.parametrize("name", ["fsdp8", "fsdp2 tensor2 expert2"])
def test_devices_sum_norms_and_no_products(name):
    """One number a matrix. GSPMD, left alone, sums X X^T in every iteration."""
    program = two_updates(name)[2]
    summed = {
        shape for line in re.findall(r"= (.*) all-reduce\(", program) for shape in re.findall(r"f32\[(.*?)\]", line)
    }
    assert summed <= {"", "3", "8", "4", "3,8", "3,4"}, summed
    assert "all-to-all(" in program
