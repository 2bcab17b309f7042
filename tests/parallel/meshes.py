"""A V3-shaped tiny network with MTP, a batch for it, and the meshes of eight devices on which it is tested."""

import functools
from collections.abc import Mapping
from types import MappingProxyType

import jax
import numpy as np

from deepseek_jax.model.config import MLAConfig, ModelConfig, MoEConfig, RopeConfig
from deepseek_jax.model.ops import Ops
from deepseek_jax.model.transformer import Transformer, init_variables
from deepseek_jax.parallel.arrays import global_batch, variables_sharding
from deepseek_jax.parallel.dispatch import DispatchConfig
from deepseek_jax.parallel.mesh import MeshConfig, build_mesh, resolve
from deepseek_jax.parallel.rules import build_rules
from deepseek_jax.parallel.sharding import MeshOps
from deepseek_jax.precision import Precision

# Unoptimized code: these programs run once on a few numbers, so that compiling them is what costs time.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

MESHES = {
    "data8": {"data": 8},
    "fsdp8": {"fsdp": 8},
    "expert8": {"expert": 8},
    "fsdp2 expert4": {"fsdp": 2, "expert": 4},
    "fsdp2 tensor2 expert2": {"fsdp": 2, "tensor": 2, "expert": 2},
    "context4 fsdp2": {"context": 4, "fsdp": 2},
}
CONFIG = ModelConfig(
    vocab_size=40,
    hidden_size=16,
    num_layers=2,
    intermediate_size=24,
    attention=MLAConfig(
        num_heads=2, kv_lora_rank=8, qk_nope_head_dim=6, qk_rope_head_dim=8, v_head_dim=5, q_lora_rank=16
    ),
    moe=MoEConfig(
        num_experts=8,
        top_k=3,
        intermediate_size=6,
        num_shared_experts=1,
        num_groups=4,
        topk_groups=2,
        routed_scaling_factor=2.5,
    ),
    first_k_dense=1,
    rope=RopeConfig(theta=1000.0),
    mtp_depth=1,
    init_std=0.3,
)
MODEL = Transformer(CONFIG)


def mesh_ops(
    sizes: dict | None,
    dcn: Mapping = MappingProxyType({}),
    rules: Mapping = MappingProxyType({}),
    precision: Precision | str = "float32",
    target: str | None = None,
    **dispatch,
) -> Ops:
    """On one device (None) or on a mesh of eight."""
    if sizes is None:
        return Ops(precision, target=target)
    resolved = resolve(MeshConfig(**sizes), 8)
    mesh, rules = build_mesh(resolved, dcn, jax.devices()), build_rules(tuple(rules.items()))
    return MeshOps(precision, target=target, mesh=mesh, rules=rules, dispatch=DispatchConfig(**dispatch))


def on(sizes: dict | None, model: Transformer = MODEL, **options) -> Transformer:
    return model.clone(ops=mesh_ops(sizes, precision=model.ops.precision, **options))


@functools.cache
def variables(config: ModelConfig = CONFIG):
    """Random weights, with correction biases that matter."""
    values = init_variables(Transformer(config), jax.random.key(0))
    bias = jax.tree.map(lambda b: 0.1 * jax.random.normal(jax.random.key(1), b.shape), values["router_bias"])
    return {"params": values["params"], "router_bias": bias}


def placed(model: Transformer):
    return jax.device_put(variables(model.config), variables_sharding(model))


def batch(rows: int = 8, length: int = 12) -> dict[str, np.ndarray]:
    """Random tokens: two documents in row 0, padding at the end of row 1, nothing but padding in row 2."""
    tokens = np.random.default_rng(0).integers(1, CONFIG.vocab_size, (rows, length)).astype(np.int32)
    segments, positions = np.ones_like(tokens), np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    segments[0, 8:], positions[0, 8:] = 2, np.arange(length - 8)
    segments[1, 6:], segments[2] = 0, 0
    return {"tokens": tokens, "segment_ids": segments, "positions": positions, "loss_mask": np.ones_like(tokens)}


def placed_batch(model: Transformer):
    return global_batch(model.ops, batch())


def assert_close(got, want, tolerance: float = 1e-5):
    """Every array within `tolerance` of its own largest number."""
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        error = np.max(np.abs(x - y), initial=0.0) / max(np.max(np.abs(y), initial=0.0), 1e-30)
        assert error < tolerance or np.array_equal(x, y), f"{jax.tree_util.keystr(path)}: {error:.2e}"
