"""Muon: the momentum of every weight matrix, orthogonalized by Newton-Schulz iterations (Moonlight, arXiv 2502.16982,
§2)."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from deepseek_jax.model.transformer import Transformer, logical_axes
from deepseek_jax.parallel.arrays import on_whole_matrices
from deepseek_jax.ranges import above, at_least, check, one_of

Coefficients = tuple[tuple[float, float, float], ...]

# (a, b, c) of every iteration. The first triple pushes small singular values up quickly and leaves them between 0.68
# and 1.14; V4 ends with two iterations of the second, which converges to 1.
FAST, CONVERGENT = (3.4445, -4.7750, 2.0315), (2.0, -1.5, 0.5)
NEWTON_SCHULZ: dict[str, Coefficients] = {"moonlight": (FAST,) * 5, "v4": (FAST,) * 8 + (CONVERGENT,) * 2}
EPS = 1e-7
STACKS = {"layers", "experts"}  # logical axes along which a parameter holds one matrix after the other
NOT_A_MATRIX = {*STACKS, "norm", "vocab"}


@dataclasses.dataclass(frozen=True)
class MuonConfig:
    """Moonlight's constants. DeepSeek-V4's are update_rms=0.18 and newton_schulz="v4".

    `update_rms` is the root mean square of an update before the learning rate. 0.2 is about AdamW's, so that AdamW's
    learning rates and weight decay hold for Muon too (Moonlight §2.2).
    """

    momentum: float = 0.95
    update_rms: float = 0.2
    newton_schulz: str = "moonlight"

    def __post_init__(self):
        check(
            self,
            "optimizer.muon.",
            momentum=at_least(0, below=1),
            update_rms=above(0),
            newton_schulz=one_of(NEWTON_SCHULZ),
        )


def is_matrix(axes: Sequence[str | None]) -> bool:
    """True for the logical axes of a parameter that Muon updates: a matrix, or a stack of them over layers, experts or
    both.

    That leaves embedding, head and the norms' scales to AdamW, as Moonlight (§2.2) and V4 do. Routers are matrices like
    any other. A projection that the released checkpoints store as one matrix is one here: `kv_a` with its rotary
    columns, `kv_b` and `q` with all their heads.
    """
    return len(axes) >= 2 and STACKS.issuperset(axes[:-2]) and NOT_A_MATRIX.isdisjoint(axes[-2:])


def muon_labels(model: Transformer):
    """The tree of the parameters, with "muon" or "adamw" for each."""
    return jax.tree.map(
        lambda axes: "muon" if is_matrix(axes) else "adamw",
        dict(logical_axes(model))["params"],
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )


def newton_schulz(
    coefficients: Coefficients, x_AB: jax.Array, lay_out: Callable[[jax.Array], jax.Array] = lambda x: x
) -> jax.Array:
    """U V^T of x = U S V^T, approximately, for every matrix of x [..., A, B]: X <- a X + (b X X^T + c (X X^T)^2) X.

    float32 in and out; Moonlight's published code iterates in bfloat16. A matrix of zeros stays zero. `lay_out`
    says how the devices of a mesh share what the loop carries.
    """
    tall = x_AB.shape[-2] > x_AB.shape[-1]
    x = x_AB.mT if tall else x_AB  # the smaller of the two products X X^T and X^T X
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + EPS)

    def iteration(x, abc):
        a, b, c = abc
        gram = x @ x.mT
        return lay_out(a * x + (b * gram + c * (gram @ gram)) @ x), None

    x, _ = jax.lax.scan(iteration, lay_out(x), jnp.asarray(coefficients, x.dtype))
    x = lay_out(x)
    return x.mT if tall else x


def orthogonalized(config: MuonConfig, model: Transformer) -> optax.GradientTransformation:
    """Nesterov momentum, then for every matrix [A, B] `update_rms` · sqrt(max(A, B)) · U V^T (Moonlight eq. 4).

    The momentum is a plain sum, as in Moonlight's code and torch.optim.Muon. `optax.contrib.muon` corrects its bias,
    which gives other directions in the first steps, takes Nesterov's Adam for the rest, and flattens layers and experts
    into one axis, which no mesh can divide as it divides the two.
    """
    axes_of = {
        path: tuple(axes)
        for path, axes in jax.tree_util.tree_leaves_with_path(
            dict(logical_axes(model))["params"], is_leaf=lambda x: isinstance(x, PartitionSpec)
        )
    }

    def one(path, momentum):
        orthogonalize = functools.partial(newton_schulz, NEWTON_SCHULZ[config.newton_schulz])
        scale = config.update_rms * math.sqrt(max(momentum.shape[-2:]))
        return scale * on_whole_matrices(model, axes_of[path], orthogonalize, momentum)

    return optax.chain(
        optax.trace(config.momentum, nesterov=True),
        optax.stateless(lambda momenta, params: jax.tree_util.tree_map_with_path(one, momenta)),
    )
