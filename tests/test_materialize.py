"""Values that compilers may not compute again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nvc_jax.nn.materialize import materialized, one_by_one


@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.uint16, np.int8, bool])
@pytest.mark.parametrize("first", [0, 1])
def test_the_same_array(dtype, first):
    x = (np.arange(first, first + 12) % 3).astype(dtype).reshape(3, 4)
    for function in (materialized, jax.jit(materialized), jax.vmap(materialized)):
        result = function(x)
        assert result.dtype == dtype
        np.testing.assert_array_equal(result, x)


def test_gradients_pass():
    gradient = jax.grad(lambda x: (materialized(x) ** 2).sum())(jnp.array([-1.0, 2.0]))
    np.testing.assert_allclose(gradient, [-2, 4])


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="others keep barriers")
def test_compilers_leave_it_alone():
    """If they ever see through it, search and compensation take half as long again."""

    def program(keep):
        function = one_by_one(lambda x: jnp.broadcast_to(keep(x * 3 + 1), (50, 8)))
        return jax.jit(function).lower(jnp.ones((1, 8))).compile().as_text()

    assert "conditional(" in program(materialized)
    assert "conditional(" not in program(lambda x: x)


@pytest.mark.parametrize("batch", [1, 3])
def test_one_by_one_is_vmap(batch):
    a, b = np.arange(2 * batch, dtype=np.float32).reshape(batch, 2), np.ones(batch, np.float32)
    function = lambda x, y: (x.sum(), x * y)  # noqa: E731
    for ours, theirs in zip(one_by_one(function)(a, b), jax.vmap(function)(a, b), strict=True):
        np.testing.assert_array_equal(ours, theirs)
