"""Building blocks shared by the codecs: point-wise and depth-wise layers, blocks, resampling.

Every array is NHWC. A layer computes in its `dtype` and keeps float32 parameters. float32 always
means float32: products ask for the highest precision, because the default on GPUs and TPUs is a
shorter format, which is neither accurate nor portable enough for anything that reaches the entropy
coder.

The operations are written in the form that XLA runs fastest on CPUs: 1x1 convolutions as matrix
products, depth-wise convolutions as nine shifted multiply-adds, resampling as a reshuffle of pixels
followed by a matrix product. Accelerators fuse the same forms well.

Sources: DCVC-RT (arXiv 2502.20762) for the block and its resampling layers, DCVC-UF
(arXiv 2606.04410) for the two lighter forms.
"""

from functools import partial
from itertools import product
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from nvc_jax.quality import MAX_QP

Dtype = Any

# Residual branches start small so that deep stacks without normalisation keep their signal's size.
RESIDUAL_INIT = nn.initializers.variance_scaling(0.06, "fan_avg", "normal")
KERNEL_INIT = nn.initializers.xavier_normal()


def precision_of(dtype: Dtype) -> lax.Precision | None:
    """HIGHEST for float32, the backend's default for shorter types."""
    return lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def wsilu(x: jax.Array) -> jax.Array:
    """x * sigmoid(4x), DCVC-RT's activation."""
    return x * jax.nn.sigmoid(4.0 * x)


def space_to_depth(x: jax.Array, block: int) -> jax.Array:
    """[b, h, w, c] -> [b, h/block, w/block, c*block*block]; channel order c, row, column."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // block, block, w // block, block, c)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(b, h // block, w // block, c * block * block)


def depth_to_space(x: jax.Array, block: int) -> jax.Array:
    """Inverse of `space_to_depth`."""
    b, h, w, c = x.shape
    c //= block * block
    x = x.reshape(b, h, w, c, block, block)
    return x.transpose(0, 1, 4, 2, 5, 3).reshape(b, h * block, w * block, c)


def _zero_padded(x: jax.Array, size: int) -> jax.Array:
    pad = size // 2
    return jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))


def _shifted_sum(x: jax.Array, kernel: jax.Array) -> jax.Array:
    h, w = x.shape[1:3]
    size = len(kernel)
    padded = _zero_padded(x, size)
    places = product(range(size), repeat=2)
    return sum(padded[:, i : i + h, j : j + w] * kernel[i, j] for i, j in places)


@jax.custom_vjp
def depthwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Depth-wise convolution, zero padding of half the kernel's size.

    Args:
      x: [batch, height, width, channels].
      kernel: [k, k, channels], k odd, same dtype as x.

    Returns:
      [batch, height, width, channels].

    XLA's grouped convolution is some 60 times slower than this form on CPUs (3x3). The gradient is
    written out because XLA would recompute the producers of x and of the cotangent for each of the
    kernel's sums, and sums over rows on one thread.
    """
    return _shifted_sum(x, kernel)


def _depthwise_fwd(x, kernel):
    return _shifted_sum(x, kernel), (x, kernel)


def _depthwise_bwd(residuals, g):
    x, kernel = residuals
    g, x = lax.optimization_barrier((g, x))
    b, h, w, c = x.shape
    size = len(kernel)
    grad_x = _shifted_sum(g, kernel[::-1, ::-1])
    # Fold the rows into bands first: a cheap fused sum; then one matrix product sums the rest.
    bands = next(k for k in (8, 4, 2, 1) if h % k == 0)
    rows = h // bands
    padded = _zero_padded(x, size)
    ones = jnp.ones((1, b * rows * w), x.dtype)

    def kernel_sum(i, j):
        bandsum = sum(
            padded[:, i + t * rows : i + (t + 1) * rows, j : j + w]
            * g[:, t * rows : (t + 1) * rows]
            for t in range(bands)
        )
        return jnp.dot(ones, bandsum.reshape(-1, c), precision=precision_of(x.dtype))[0]

    grad_kernel = jnp.stack([kernel_sum(i, j) for i, j in product(range(size), repeat=2)])
    return grad_x, grad_kernel.reshape(kernel.shape)


depthwise.defvjp(_depthwise_fwd, _depthwise_bwd)


class Pointwise(nn.Module):
    """1x1 convolution with bias: [..., i] -> [..., features]."""

    features: int
    dtype: Dtype = jnp.float32
    kernel_init: nn.initializers.Initializer = KERNEL_INIT
    bias_init: nn.initializers.Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, x):
        return nn.Dense(
            self.features,
            dtype=self.dtype,
            precision=precision_of(self.dtype),
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
            name="dense",
        )(x)


class Depthwise(nn.Module):
    """Depth-wise convolution with bias, zero padding; `size` of the kernel is odd."""

    dtype: Dtype = jnp.float32
    size: int = 3

    @nn.compact
    def __call__(self, x):
        c, size = x.shape[-1], self.size
        # size^2 inputs per output: keeps the variance of the signal.
        kernel = self.param("kernel", nn.initializers.normal(1 / size), (size, size, c))
        bias = self.param("bias", nn.initializers.zeros, (c,))
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        return depthwise(x, kernel) + bias


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolution(
    x: jax.Array, kernel: jax.Array, stride: int, precision: lax.Precision | None
) -> jax.Array:
    """Dense convolution, zero padding of half the kernel's size on every side.

    Args:
      x: [batch, height, width, i].
      kernel: [k, k, i, o], k odd, same dtype as x.
      stride: 1, or 2 for even sides.

    Returns:
      [batch, height/stride, width/stride, o].

    The gradient is XLA's, but on CPUs XLA brings the convolutions of gradients into the form
    that its fast kernels take only outside of loops, and inside of them needs ten times as long.
    """
    pad = kernel.shape[0] // 2
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), ((pad, pad), (pad, pad)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=precision,
    )  # fmt: skip


def _convolution_fwd(x, kernel, stride, precision):
    return convolution(x, kernel, stride, precision), (x, kernel)


def _convolution_bwd(stride, precision, residuals, g):
    def by_xla(x, kernel, g):
        plain = partial(convolution.__wrapped__, stride=stride, precision=precision)
        return jax.vjp(plain, x, kernel)[1](g)

    def by_products(x, kernel, g):
        """A matrix product for each element of the kernel, and a convolution as when going on."""
        (b, h, w, i), (k, _, _, o) = x.shape, kernel.shape
        padded = _zero_padded(x, k)
        rows = g.reshape(-1, o)

        def kernel_sum(down, across):
            end = (b, down + h - stride + 1, across + w - stride + 1, i)
            part = lax.slice(padded, (0, down, across, 0), end, (1, stride, stride, 1))
            return jnp.dot(part.reshape(-1, i).T, rows, precision=precision)

        grad_kernel = jnp.stack([kernel_sum(*divmod(n, k)) for n in range(k * k)])
        if stride == 2:
            g = lax.pad(g, jnp.zeros((), g.dtype), ((0, 0, 0), (0, 1, 1), (0, 1, 1), (0, 0, 0)))
        grad_x = convolution(g, kernel[::-1, ::-1].swapaxes(2, 3), 1, precision)
        return grad_x, grad_kernel.reshape(kernel.shape)

    return lax.platform_dependent(*residuals, g, cpu=by_products, default=by_xla)


convolution.defvjp(_convolution_fwd, _convolution_bwd)


def flax_convolution(x, kernel, strides, padding, *, precision, **fixed):
    """`convolution` in the form that `flax.linen.Conv` calls."""
    del padding, fixed
    return convolution(x, kernel, strides[0], precision)


class Conv3x3(nn.Module):
    """Dense 3x3 convolution with bias, zero padding 1 on every side whatever the stride."""

    features: int
    stride: int = 1
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        return nn.Conv(
            self.features,
            (3, 3),
            (self.stride, self.stride),
            padding=((1, 1), (1, 1)),
            dtype=self.dtype,
            precision=precision_of(self.dtype),
            kernel_init=KERNEL_INIT,
            conv_general_dilated=flax_convolution,
            name="conv",
        )(x)


class DepthConvBlock(nn.Module):
    """The block that all networks are made of: [b, h, w, i] -> [b, h, w, features].

    A depth-wise branch and a point-wise branch, each added to its input. Three forms:

    | form  | depth-wise branch    | point-wise branch              | MAC per position (o = i) |
    | ----- | -------------------- | ------------------------------ | ------------------------ |
    | `rt`  | o -> o, 3x3, o -> o  | o -> 4o, fold to 2o, 2o -> o   | 8o^2 + 9o                |
    | `uf`  | the same             | o -> 4o, fold to o, o -> o     | 7o^2 + 9o                |
    | `uf2` | o -> o/2, 3x3, -> o  | o -> 2o, fold to o/2, o/2 -> o | 3.5o^2 + 4.5o            |

    "Fold" adds equal contiguous parts of the activated channels. (The released DCVC-UF weights add
    interleaved channels: the same function after permuting the rows of two matrices.)

    `shortcut` adds the block's input (after the adaptor) once more at the end.
    """

    features: int
    form: str = "rt"
    shortcut: bool = False
    force_adaptor: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        o = self.features
        dense = lambda n, name, **kw: Pointwise(n, self.dtype, name=name, **kw)  # noqa: E731
        if x.shape[-1] != o or self.force_adaptor:
            x = dense(o, "adaptor")(x)
        inner, expanded, folds = {
            "rt": (o, 4 * o, 2),
            "uf": (o, 4 * o, 4),
            "uf2": (o // 2, 2 * o, 4),
        }[self.form]

        a = wsilu(dense(inner, "depth_in")(x))
        a = Depthwise(self.dtype, name="depth")(a)
        u = x + dense(o, "depth_out", kernel_init=RESIDUAL_INIT)(a)

        b = wsilu(dense(expanded, "point_in")(u))
        b = sum(jnp.split(b, folds, axis=-1))
        v = u + dense(o, "point_out", kernel_init=RESIDUAL_INIT)(b)
        return v + x if self.shortcut else v


class Blocks(nn.Module):
    """`count` DepthConvBlocks in a row; the first adapts the number of channels if needed."""

    features: int
    count: int
    form: str = "rt"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        for i in range(self.count):
            x = DepthConvBlock(self.features, self.form, dtype=self.dtype, name=f"block{i}")(x)
        return x


class Down(nn.Module):
    """Halves height and width: 2x2 patches through a matrix, then a block."""

    features: int
    form: str = "rt"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        x = Pointwise(self.features, self.dtype, name="patch")(space_to_depth(x, 2))
        # The half-width form goes without the extra shortcut, as in DCVC-UF.
        shortcut = self.form != "uf2"
        return DepthConvBlock(self.features, self.form, shortcut, dtype=self.dtype, name="block")(x)


class Up(nn.Module):
    """Doubles height and width: a matrix to four sub-pixels, then a block."""

    features: int
    form: str = "rt"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        x = depth_to_space(Pointwise(4 * self.features, self.dtype, name="subpixel")(x), 2)
        shortcut = self.form != "uf2"
        return DepthConvBlock(self.features, self.form, shortcut, dtype=self.dtype, name="block")(x)


class QpTable(nn.Module):
    """One learned row of channel-wise factors per quality point.

    `__call__(qp)`: int [batch] -> [batch, 1, 1, channels] in `dtype`. Rows beyond 63 serve frames
    with a quality offset. All factors start at 1, or with `ramp` at `quality_ramp`.
    """

    rows: int
    channels: int
    dtype: Dtype = jnp.float32
    ramp: bool = False

    @nn.compact
    def __call__(self, qp):
        def init(key, shape):
            del key
            start = quality_ramp(jnp.arange(self.rows)) if self.ramp else jnp.ones(self.rows)
            # A weak type would have the first training step compiled for it alone.
            return jnp.broadcast_to(start[:, None], shape).astype(jnp.float32)

        table = self.param("table", init, (self.rows, self.channels))
        return table[qp][:, None, None, :].astype(self.dtype)


def quality_ramp(qp: jax.Array) -> jax.Array:
    """A precision that grows as the square root of lambda over 768:1, 2 in the middle of 0..63.

    The step size that is best for a Lagrangian weight goes with its inverse square root, so tables
    that start here need not travel far: a row is only trained when its quality point is drawn.
    """
    return 2.0 * jnp.exp(0.5 * jnp.log(768.0) * (qp / MAX_QP - 0.5))
