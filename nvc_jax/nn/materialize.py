"""Values that are computed once, where compilers would compute them again for every use.

XLA fuses a chain of cheap operations into whatever reads its result, and computes it anew for every
element there: addresses of blocks for every sample of them. An optimisation barrier does not help
on CPUs, where barriers are gone before loops are fused (JAX 0.10). What a conditional returns is
not fused with anything.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax


def materialized(x: jax.Array) -> jax.Array:
    """The same array, in memory. Inside of `vmap` it does nothing on CPUs, see `one_by_one`."""
    return lax.platform_dependent(x, cpu=_returned, default=lax.optimization_barrier)


def _returned(x):
    # Both branches give x, so the condition does not matter. It must not be known beforehand, and
    # branches that are alike would be merged.
    return lax.cond(x.reshape(-1)[0] > 0, lax.optimization_barrier, lambda x: x, x)


def one_by_one(function: Callable) -> Callable:
    """`vmap`, except that a batch of one does without, and what it does to conditionals."""

    def batched(*arrays):
        if len(jax.tree.leaves(arrays)[0]) > 1:
            return jax.vmap(function)(*arrays)
        only = jax.tree.map(lambda x: x[0], arrays)
        return jax.tree.map(lambda x: jnp.asarray(x)[None], function(*only))

    return batched
