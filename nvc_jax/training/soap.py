"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner (Vyas et al., arXiv 2409.11321).

Of a matrix's gradients G, running means of G G^T and G^T G tell along which directions of inputs
and outputs they vary. Adam in coordinates along these takes steps of their own size along each
pair, where weights as they are mix strong directions with weak ones. It is reported to suit learned
compression, whose rate and distortion pull in different directions (arXiv 2601.20769).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

MAX_SIDE = 512  # of matrices; a longer side keeps its own coordinates, which the paper allows for
REFRESH_EVERY = 10  # steps; so often bases follow their means, as published
B1, B2 = 0.95, 0.95  # decays of Adam's moments, the latter also of the means; as published
EPS = 1e-8
# The least size of gradients along a pair of directions, beside the mean of all: what is smaller is
# but rounding of the others, which must not become steps of full size.
NOISE = 1e-5


class Matrices(NamedTuple):
    """What is known of n matrices of one shape, all float32.

    Attributes:
      seen: int32 [n], gradients other than zero.
      mean, squares: [n, rows, columns], Adam's moments, in coordinates along the bases.
      factors: by the names of sides, "rows" and "columns": [n, side, side], running means of G G^T
        and of G^T G. Sides above `MAX_SIDE` are missing.
      bases: likewise, orthogonal, with directions as columns, strong ones first.
    """

    seen: jax.Array
    mean: jax.Array
    squares: jax.Array
    factors: dict[str, jax.Array]
    bases: dict[str, jax.Array]


class SoapState(NamedTuple):
    """`count`: int32 [], steps. `groups`: `Matrices` by shape, as "64x32", in the tree's order."""

    count: jax.Array
    groups: dict[str, Matrices]


def soap(
    learning_rate: float, matrices: Callable[[Any], Any], *, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """SOAP for matrices, AdamW for everything else.

    A matrix of which both sides are above `MAX_SIDE` counts among the latter. A matrix's first
    gradient only gives its bases. One whose gradient is all zero gets no step but the weight decay,
    and what is known of it stays.

    Args:
      matrices: params -> tree of bool; a kernel's last axis is its columns, all others its rows.
    """

    def labels(params):
        def label(is_matrix, leaf):
            return "soap" if is_matrix and _sides(*_shape(leaf)) else "adamw"

        return jax.tree.map(label, matrices(params), params)

    rotated = optax.chain(
        scale_by_soap(),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
    others = optax.adamw(learning_rate, weight_decay=weight_decay)
    return optax.partition({"soap": rotated, "adamw": others}, labels)


def scale_by_soap() -> optax.GradientTransformation:
    """Steps of SOAP with the gradient's sign, for trees of matrices only; see `soap`."""

    def init(params):
        groups = {name: _start(*group.shape) for name, group in _grouped(params).items()}
        return SoapState(jnp.int32(0), groups)

    def update(grads, state, params=None):
        refresh = state.count % REFRESH_EVERY == 0
        steps, groups = {}, {}
        # Rotations must not round as networks may.
        with jax.default_matmul_precision("highest"):
            for name, group in _grouped(grads).items():
                steps[name], groups[name] = _step(group, state.groups[name], refresh)
        return _ungrouped(steps, grads), SoapState(state.count + 1, groups)

    return optax.GradientTransformation(init, update)


def _shape(leaf: jax.Array) -> tuple[int, int]:
    return leaf.size // leaf.shape[-1], leaf.shape[-1]


def _name(leaf: jax.Array) -> str:
    rows, columns = _shape(leaf)
    return f"{rows}x{columns}"


def _sides(rows: int, columns: int) -> dict[str, int]:
    """Those that get a basis."""
    sides = {"rows": rows, "columns": columns}
    return {name: side for name, side in sides.items() if side <= MAX_SIDE}


def _grouped(tree: Any) -> dict[str, jax.Array]:
    """[n, rows, columns] of each shape: one operation for many matrices compiles much faster."""
    groups = {}
    for leaf in jax.tree.leaves(tree):
        groups.setdefault(_name(leaf), []).append(leaf.reshape(_shape(leaf)).astype(jnp.float32))
    return {name: jnp.stack(group) for name, group in groups.items()}


def _ungrouped(groups: dict[str, jax.Array], like: Any) -> Any:
    rest = {name: iter(group) for name, group in groups.items()}
    return jax.tree.map(lambda x: next(rest[_name(x)]).reshape(x.shape).astype(x.dtype), like)


def _start(n: int, rows: int, columns: int) -> Matrices:
    sides, moments = _sides(rows, columns), jnp.zeros((2, n, rows, columns))
    return Matrices(
        seen=jnp.zeros(n, jnp.int32),
        mean=moments[0],
        squares=moments[1],
        factors={name: jnp.zeros((n, side, side)) for name, side in sides.items()},
        bases={name: jnp.tile(jnp.eye(side), (n, 1, 1)) for name, side in sides.items()},
    )


def _step(grads: jax.Array, known: Matrices, refresh: jax.Array) -> tuple[jax.Array, Matrices]:
    """(steps [n, rows, columns], what is known after them)"""
    used = jnp.any(grads != 0, (1, 2))
    first = used & (known.seen == 0)
    moved = used & ~first

    def where(condition, new, old):
        return jnp.where(condition[:, None, None], new, old)

    rotated = _along(known.bases, grads)
    mean = where(moved, B1 * known.mean + (1 - B1) * rotated, known.mean)
    squares = where(moved, B2 * known.squares + (1 - B2) * rotated**2, known.squares)
    taken = jnp.maximum(known.seen, 1)[:, None, None]  # Adam's steps, with this one
    size = jnp.sqrt(squares / (1 - B2**taken))
    noise = NOISE * jnp.sqrt(jnp.mean(size**2, (1, 2), keepdims=True))
    steps = mean / (1 - B1**taken) / (size + noise + EPS)
    steps = where(moved, _back(known.bases, steps), 0.0)

    outer = {"rows": lambda g: g @ g.mT, "columns": lambda g: g.mT @ g}
    factors = {
        name: where(used, B2 * factor + (1 - B2) * outer[name](grads), factor)
        for name, factor in known.factors.items()
    }
    known = Matrices(known.seen + used, mean, squares, factors, known.bases)
    known = lax.cond(refresh, _followed, lambda known: known, known)

    def begun(known):
        eigen = {name: jnp.linalg.eigh(f)[1][..., ::-1] for name, f in known.factors.items()}
        bases = {name: where(first, eigen[name], basis) for name, basis in known.bases.items()}
        return known._replace(bases=bases)

    return steps, lax.cond(first.any(), begun, lambda known: known, known)


def _followed(known: Matrices) -> Matrices:
    """With bases one step of power iteration closer to the factors', and moments along these.

    Moments of second order cannot be turned exactly; squares of coordinates that vary independently
    add up as here. (The paper leaves them.)
    """
    bases, turns = {}, {}
    for name, basis in known.bases.items():
        product = known.factors[name] @ basis
        strength = jnp.sum(basis * product, 1)
        order = jnp.argsort(-strength, axis=-1)
        bases[name] = jnp.linalg.qr(jnp.take_along_axis(product, order[:, None], axis=2))[0]
        turns[name] = basis.mT @ bases[name]
    return known._replace(
        bases=bases,
        mean=_along(turns, known.mean),
        squares=_along({name: turn**2 for name, turn in turns.items()}, known.squares),
    )


def _along(bases: dict[str, jax.Array], matrices: jax.Array) -> jax.Array:
    """Their coordinates along the columns of bases."""
    if "rows" in bases:
        matrices = bases["rows"].mT @ matrices
    return matrices @ bases["columns"] if "columns" in bases else matrices


def _back(bases: dict[str, jax.Array], coordinates: jax.Array) -> jax.Array:
    return _along({name: basis.mT for name, basis in bases.items()}, coordinates)
