"""SOAP: that it solves what it should, and leaves alone what it must."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from nvc_jax.training import soap as module
from nvc_jax.training.soap import scale_by_soap, soap


def are_matrices(params):
    flat = traverse_util.flatten_dict(params)
    flat = {path: path[-1] == "kernel" and leaf.ndim > 1 for path, leaf in flat.items()}
    return traverse_util.unflatten_dict(flat)


def params_of(rng):
    """Two kernels of one shape as matrices, and what is none."""
    shapes = {
        ("dense", "kernel"): (36, 8),
        ("convolution", "kernel"): (3, 3, 4, 8),
        ("other", "kernel"): (8, 12),
        ("dense", "bias"): (8,),
        ("gain",): (),
        ("table",): (4, 8),
    }
    flat = {path: jnp.float32(rng.normal(size=shape)) for path, shape in shapes.items()}
    return traverse_util.unflatten_dict(flat)


def ill_conditioned(rng, side, condition):
    left, _ = np.linalg.qr(rng.normal(size=(side, side)))
    right, _ = np.linalg.qr(rng.normal(size=(side, side)))
    return jnp.float32(left * np.geomspace(1, 1 / condition, side) @ right)


def steps_until_solved(optimizer_at, limit):
    """Of A W B = C, whose answer is known, until W is within 1 % of it; `limit` if it never is."""
    rng = np.random.default_rng(1)
    left, right = (ill_conditioned(rng, side, 30) for side in (24, 16))
    answer = jnp.float32(rng.normal(size=(24, 16)))
    optimizer = optimizer_at(optax.cosine_decay_schedule(0.1, limit))

    def step(carry, _):
        params, state = carry
        grads = jax.grad(lambda p: jnp.sum((left @ (p["a"]["kernel"] - answer) @ right) ** 2))(
            params
        )
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), jnp.linalg.norm(params["a"]["kernel"] - answer)

    params = {"a": {"kernel": jnp.zeros((24, 16))}}
    _, errors = jax.lax.scan(step, (params, optimizer.init(params)), length=limit)
    far = np.flatnonzero(errors > 0.01 * jnp.linalg.norm(answer))
    return len(far) and far[-1] + 1


def test_it_solves_ill_conditioned_least_squares_where_adamw_does_not():
    limit = 1000
    assert 0 < steps_until_solved(lambda rate: soap(rate, are_matrices), limit) < limit
    assert steps_until_solved(lambda rate: optax.adamw(rate, weight_decay=0.0), limit) == limit


def test_vectors_and_scalars_follow_adamw_exactly():
    rng = np.random.default_rng(2)
    params, optimizer = params_of(rng), soap(0.1, are_matrices, weight_decay=0.01)
    adamw = optax.adamw(0.1, weight_decay=0.01)
    update, adamw_update = jax.jit(optimizer.update), jax.jit(adamw.update)
    state, other_state = optimizer.init(params), adamw.init(params)
    for _ in range(3):
        grads = params_of(rng)
        updates, state = update(grads, state, params)
        expected, other_state = adamw_update(grads, other_state, params)
        for path in (("dense", "bias"), ("gain",), ("table",)):
            ours, theirs = (traverse_util.flatten_dict(u)[path] for u in (updates, expected))
            np.testing.assert_array_equal(ours, theirs)
        assert not np.allclose(updates["dense"]["kernel"], expected["dense"]["kernel"])


def test_matrices_follow_the_published_algorithm():
    """Written out for one matrix, with the sides' bases from NumPy, until these follow on."""
    rng = np.random.default_rng(3)
    grads = rng.normal(size=(6, 5, 4)).astype(np.float32)
    optimizer = scale_by_soap()
    update = jax.jit(optimizer.update)
    state = optimizer.init({"kernel": jnp.zeros((5, 4))})
    first, state = update({"kernel": jnp.asarray(grads[0])}, state)
    assert not first["kernel"].any()
    rows, columns = (
        np.linalg.eigh(grads[0] @ grads[0].T)[1],
        np.linalg.eigh(grads[0].T @ grads[0])[1],
    )
    mean, squares = np.zeros((5, 4)), np.zeros((5, 4))
    for number, grad in enumerate(grads[1:], 1):
        steps, state = update({"kernel": jnp.asarray(grad)}, state)
        rotated = rows.T @ grad @ columns
        mean = 0.95 * mean + 0.05 * rotated
        squares = 0.95 * squares + 0.05 * rotated**2
        step = mean / np.sqrt(squares) * np.sqrt(1 - 0.95**number) / (1 - 0.95**number)
        np.testing.assert_allclose(steps["kernel"], rows @ step @ columns.T, atol=1e-3)


def test_bases_follow_the_gradients():
    """After a few refreshments they are those of the running means, strong directions first."""
    rng = np.random.default_rng(4)
    scales = np.geomspace(1, 0.03, 12)
    mixing = np.linalg.qr(rng.normal(size=(12, 12)))[0]
    optimizer = scale_by_soap()
    update = jax.jit(optimizer.update)
    state = optimizer.init({"kernel": jnp.zeros((12, 30))})
    for _ in range(300):
        grad = mixing @ (scales[:, None] * rng.normal(size=(12, 30)))
        _, state = update({"kernel": jnp.float32(grad)}, state)
    basis = state.groups["12x30"].bases["rows"][0]
    np.testing.assert_allclose(basis.T @ basis, np.eye(12), atol=1e-5)
    np.testing.assert_allclose(np.abs(basis.T @ mixing), np.eye(12), atol=0.25)
    expected = np.sqrt(np.mean(state.groups["12x30"].squares[0], 1))
    np.testing.assert_allclose(expected, scales, rtol=0.5)


def test_directions_without_gradients_stay():
    """Rounding in the rotation must not become steps."""
    rng = np.random.default_rng(5)
    inputs = np.linalg.qr(rng.normal(size=(40, 40)))[0]
    optimizer = scale_by_soap()
    update = jax.jit(optimizer.update)
    state = optimizer.init({"kernel": jnp.zeros((40, 24))})
    for _ in range(35):
        grad = jnp.float32(inputs[:, :3] @ rng.normal(size=(3, 24)))
        steps, state = update({"kernel": grad}, state)
        used, unused = inputs[:, :3].T @ steps["kernel"], inputs[:, 3:].T @ steps["kernel"]
        assert np.abs(unused).max() < 0.1
    assert np.abs(used).max() > 0.5


def test_zero_gradients_leave_matrices_and_what_is_known_of_them():
    """Of networks that no step uses, that none does any more, and that one uses at last."""
    rng = np.random.default_rng(6)
    optimizer = scale_by_soap()
    update = jax.jit(optimizer.update)
    kernels = {name: jnp.float32(rng.normal(size=(10, 6))) for name in ("always", "early", "late")}
    state = optimizer.init(kernels)
    for number in range(40):
        grads = {name: jnp.float32(rng.normal(size=(10, 6))) for name in kernels}
        grads["early"] *= number < 12
        grads["late"] *= number >= 25
        before = state
        steps, state = update(grads, state)
        for place, name in enumerate(sorted(kernels)):
            known = jax.tree.map(lambda x, n=place: x[n], state.groups["10x6"])
            assert all(np.isfinite(x).all() for x in jax.tree.leaves((known, steps[name])))
            if not grads[name].any():
                assert not steps[name].any()
                assert known.seen == before.groups["10x6"].seen[place]
                old = before.groups["10x6"].factors["rows"][place]
                np.testing.assert_array_equal(known.factors["rows"], old)
    assert steps["late"].any() and steps["always"].any()
    np.testing.assert_array_equal(state.groups["10x6"].seen, [40, 12, 15])


def test_states_are_trees_of_arrays_that_go_on_as_if_they_had_not_been_stored():
    rng = np.random.default_rng(7)
    params, optimizer = params_of(rng), soap(0.1, are_matrices, weight_decay=0.01)
    update = jax.jit(optimizer.update)
    state = stored = begin = optimizer.init(params)
    for _ in range(12):
        grads = params_of(rng)
        leaves, tree = jax.tree.flatten(stored)
        stored = jax.tree.unflatten(tree, [jnp.asarray(np.asarray(leaf)) for leaf in leaves])
        updates, state = update(grads, state, params)
        others, stored = update(grads, stored, params)
        for one, other in zip(*map(jax.tree.leaves, (updates, others)), strict=True):
            np.testing.assert_array_equal(one, other)
    assert jax.tree.structure(state) == jax.tree.structure(begin)
    for leaf, first in zip(*map(jax.tree.leaves, (state, begin)), strict=True):
        assert leaf.shape == first.shape and leaf.dtype == first.dtype
        assert leaf.size and leaf.dtype in (jnp.float32, jnp.int32)


@pytest.mark.parametrize("shape, sides", [((600, 4), ["columns"]), ((4, 600), ["rows"])])
def test_long_sides_keep_their_coordinates(shape, sides):
    rng = np.random.default_rng(9)
    params = {"a": {"kernel": jnp.zeros(shape)}}
    optimizer = scale_by_soap()
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    (group,) = state.groups.values()
    assert list(group.bases) == list(group.factors) == sides
    for _ in range(3):
        steps, state = update({"a": {"kernel": rng.normal(size=shape)}}, state)
    # Of two random gradients: about as large as Adam's steps.
    assert 0.3 < jnp.std(steps["a"]["kernel"]) < 1.5


def test_matrices_with_two_long_sides_follow_adamw(monkeypatch):
    monkeypatch.setattr(module, "MAX_SIDE", 4)
    rng = np.random.default_rng(10)
    params = {"a": {"kernel": jnp.float32(rng.normal(size=(8, 6)))}}
    optimizer, adamw = soap(0.1, are_matrices), optax.adamw(0.1, weight_decay=0.0)
    ours, _ = jax.jit(optimizer.update)(params, optimizer.init(params), params)
    theirs, _ = jax.jit(adamw.update)(params, adamw.init(params), params)
    np.testing.assert_array_equal(ours["a"]["kernel"], theirs["a"]["kernel"])
