"""Where versions of jax differ."""

import jax


def varying_axes(x: jax.Array) -> frozenset[str]:
    """The mesh axes along which `x` may differ from device to device, inside `shard_map`."""
    aval = jax.typeof(x)
    kind = getattr(aval, "manual_axis_type", None)  # jax 0.10; `vma` before and after
    return aval.vma if kind is None else kind.varying
