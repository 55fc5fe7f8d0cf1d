"""Scale levels from integer arithmetic: the same integers on every machine.

Which probability table a symbol is coded under must not depend on rounding, or a file written on
one machine decodes to noise on another. The networks here therefore see decoded symbols only, which
are equal everywhere, and compute with integers only: int8 activations and weights, int32 sums,
shifts, also for the non-linearity. Every intermediate result is exact, so neither the order of
additions nor fusion nor the kind of processor can change it. The idea is Ballé et al., "Integer
networks for data compression with latent-variable models" (ICLR 2019).

An activation a in -128..127 stands for a / 32. A weight w of an output channel stands for
w / 2^k, k being the largest exponent with which the channel's weights fit into -127..127.

While training, the same modules compute in float32 with float parameters that are rounded on the
way, and every value is the very integer that the integer arithmetic gives (sums stay below 2^24,
or are saturated next). Gradients pass through the roundings as if they were not there. `freeze`
turns trained parameters into the integers that a released model holds; given those as the variable
collection "integers", the modules compute in integers.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nvc_jax.entropy.likelihood import LEVELS, round_straight_through
from nvc_jax.nn.blocks import depth_to_space

ACTIVATION_BITS = 5
LEVEL_BITS = 4  # a last layer's result of 1 is 16 levels
MAX_WEIGHT = 127
MAX_EXPONENT = 14
MAX_BIAS = 1 << 22
# Exact, which a power or an exponential function computed on some device need not be.
POWERS = np.ldexp(1.0, np.arange(MAX_EXPONENT + ACTIVATION_BITS + 1)).astype(np.float32)
SCALE_HEAD = "scale_head"  # what the names of heads end with, in codecs
INTEGERS = ("kernel", "bias", "exponent")  # of a frozen layer
# 127 * 128 * inputs + bias stays below 2^24, so that float32 emulates it exactly.
MAX_INPUTS = 768
START_LEVEL = 24  # of a head that nobody trained: a scale of about 1
QP_KNOTS = 10  # hat functions over qp 0..72
# Of SiLU's even part, a polynomial of (x / 128)^2, in units of 1/256, and half of one for rounding.
# Chosen so that all 256 results are right.
EVEN_PART = (127, 32749, -40895, 46994, -32418, 9356)
STATE = 64  # channels that the head hands on from unit to unit, beside symbols and levels


def memory_channels(channels: int) -> int:
    """What `ScaleHead.remember` gives for a latent of so many channels."""
    return 2 * channels + STATE


def no_memory(channels: int, height: int, width: int, cell: int = 16) -> jax.Array:
    """The memory of nothing, for a picture of this size; `cell` pixels are a side of an element."""
    return jnp.zeros((1, height // cell, width // cell, memory_channels(channels)), jnp.int8)


def activation(x, np=jnp):
    """SiLU of activations, real numbers in units of 1/32."""
    return x / (1 + np.exp(-x / 32))


def exact_activation(x: jax.Array) -> jax.Array:
    """`activation`, rounded, of integers in -128..127: int8.

    SiLU is x/2 and an even function, here a polynomial of x^2. Processors take many elements at
    once, which they do not with a look-up table.
    """
    x = x.astype(jnp.int32)
    even = EVEN_PART[-1]
    for coefficient in EVEN_PART[-2::-1]:
        even = (even * x * x >> 14) + coefficient
    return saturate(128 * x + even >> 8, -127)


def symbol_code(s, np=jnp):
    """Symbols as activations: their sign times log2(1 + magnitude), so that 15 gives 4."""
    # Not with sign and abs, whose gradients at 0 would vanish.
    return 32 * (np.log2(1 + np.maximum(s, 0)) - np.log2(1 + np.maximum(-s, 0)))


def exact_symbol_code(s: jax.Array) -> jax.Array:
    """`symbol_code`, rounded, of integers in -128..127, and beyond +-14 taken as +-127: int8."""
    steps = np.diff(np.round(symbol_code(np.arange(15.0), np)), append=127)
    s = s.astype(jnp.int32)
    magnitude = jnp.abs(s)
    code = sum(jnp.where(magnitude > k, int(step), 0) for k, step in enumerate(steps))
    return jnp.where(s < 0, -code, code).astype(jnp.int8)


def _table(function) -> np.ndarray:
    """int8 [256], entry x + 128: what an exact function gives for x."""
    return np.asarray(function(jnp.arange(-128, 128)))


class Function(nn.Module):
    """A function of activations.

    Released models have it as a table, with which older versions of this program computed.

    Attributes:
      smooth: the function, which gives gradients.
      exact: of integers, the same, rounded.
    """

    smooth: Callable
    exact: Callable

    def frozen(self) -> bool:
        """Whether to compute with integers."""
        return self.has_variable("integers", "table")

    def __call__(self, x):
        if self.frozen():
            return self.exact(x)
        smooth = self.smooth(x)
        return smooth + lax.stop_gradient(self.exact(x) - smooth)


def saturate(x: jax.Array, low: int = -128, high: int = 127) -> jax.Array:
    """Clips; integers become int8. Out of range, only gradients that lead back pass."""
    if jnp.issubdtype(x.dtype, jnp.integer):
        return jnp.clip(x, low, high).astype(jnp.int8)
    return _clip(x, low, high)


@jax.custom_vjp
def _clip(x, low, high):
    return jnp.clip(x, low, high)


_clip.defvjp(
    lambda x, low, high: (jnp.clip(x, low, high), (x, low, high)),
    lambda res, g: (
        jnp.where(((res[0] > res[1]) | (g < 0)) & ((res[0] < res[2]) | (g > 0)), g, 0),
        None,
        None,
    ),
)


def exponent(kernel: jax.Array) -> jax.Array:
    """The weights' exponents k, int32 [outputs], of kernel [..., outputs]."""
    largest = jnp.max(jnp.abs(kernel), axis=tuple(range(kernel.ndim - 1)))
    # Powers of two are compared, not logarithms taken, so that nothing is rounded.
    limits = (MAX_WEIGHT + 0.49) / POWERS[1 : MAX_EXPONENT + 1]
    return jnp.sum(largest[:, None] <= limits, axis=1, dtype=jnp.int32)


def scaled(kernel: jax.Array, bias: jax.Array):
    """Float parameters -> (kernel, bias, exponent), the first two as floats that hold integers."""
    k = exponent(lax.stop_gradient(kernel))
    unit = jnp.asarray(POWERS)[k]
    kernel = saturate(round_straight_through(kernel * unit), -MAX_WEIGHT, MAX_WEIGHT)
    bias = round_straight_through(bias * (unit * 2**ACTIVATION_BITS))
    return kernel, saturate(bias, -MAX_BIAS, MAX_BIAS), k


class _Layer(nn.Module):
    """What dense and depth-wise layers share: weights, biases and rescaling.

    Attributes:
      features: output channels.
      out_bits: a result of 1.0 is 2^out_bits.
    """

    features: int
    out_bits: int = ACTIVATION_BITS

    def weights(self, shape, init):
        """(kernel, bias, shift) as integers or as floats that hold the same integers."""
        if self.has_variable("integers", "kernel"):
            kernel, bias, k = (self.get_variable("integers", n) for n in INTEGERS)
            return kernel, bias, k.astype(jnp.int32) + ACTIVATION_BITS - self.out_bits
        kernel = self.param("kernel", init, shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        kernel, bias, k = scaled(kernel, bias)
        return kernel, bias, k + ACTIVATION_BITS - self.out_bits

    def rescale(self, total, shift):
        """total / 2^shift, rounded (half up)."""
        if jnp.issubdtype(total.dtype, jnp.integer):
            half = jnp.left_shift(1, shift) >> 1
            return jnp.right_shift(total + half, shift)
        unit = jnp.asarray(POWERS)[shift]
        value = total / unit
        exact = jnp.floor((total + jnp.floor(unit / 2)) / unit)
        return value + lax.stop_gradient(exact - value)


class IntegerDense(_Layer):
    """A matrix product over channels: [..., inputs] -> [..., features], not yet saturated."""

    @nn.compact
    def __call__(self, x):
        inputs = x.shape[-1]
        assert inputs <= MAX_INPUTS
        init = nn.initializers.lecun_normal()
        kernel, bias, shift = self.weights((inputs, self.features), init)
        contract = (((x.ndim - 1,), (0,)), ((), ()))
        if jnp.issubdtype(x.dtype, jnp.integer):
            total = lax.dot_general(x, kernel, contract, preferred_element_type=jnp.int32)
        else:
            total = lax.dot_general(x, kernel, contract, precision=lax.Precision.HIGHEST)
        return self.rescale(total + bias, shift)


class IntegerDepthwise(_Layer):
    """A depth-wise 3x3 convolution with zero padding: [b, h, w, features], not yet saturated."""

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.normal(1 / 3)
        kernel, bias, shift = self.weights((3, 3, self.features), init)
        _, h, w, _ = x.shape
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))).astype(jnp.float32)
        kernel = kernel.astype(jnp.float32)
        # Integers below 2^24, with which processors multiply faster as floats.
        total = bias.astype(jnp.float32)
        for i in range(3):
            for j in range(3):
                total = total + padded[:, i : i + h, j : j + w] * kernel[i, j]
        return self.rescale(total.astype(bias.dtype), shift)


class IntegerBlock(nn.Module):
    """x + dense(activation(depthwise(x))), saturated; without the convolution if not `spatial`."""

    activation: Function
    spatial: bool = True

    @nn.compact
    def __call__(self, x):
        features, y = x.shape[-1], x
        if self.spatial:
            y = saturate(IntegerDepthwise(features, name="depthwise")(x))
        y = saturate(IntegerDense(features, name="dense")(self.activation(y)))
        return saturate(_wide(x) + _wide(y))


def _wide(x):
    return x.astype(jnp.int32) if jnp.issubdtype(x.dtype, jnp.integer) else x


class ScaleHead(nn.Module):
    """Scale levels of a latent, from decoded symbols only; for any codec of the project.

    `begin` digests what is known before the latent's first step, `level` is called for every step,
    and `remember` condenses the unit for those that refer to it. Integer or float arithmetic: see
    the module's docstring. Symbols come in as float32 that hold integers, levels go out as int8 or
    float32.

    Attributes:
      channels: of the latent.
      width: of the hidden layers, in channels.
      steps: of the spatial prior.
      references: of a unit.
      marks: channels of what else is known of every element, 0 for nothing.
    """

    channels: int
    width: int
    steps: int
    references: int
    marks: int = 0

    def setup(self):
        self.code = Function(symbol_code, exact_symbol_code)
        self.activation = Function(activation, exact_activation)
        self.hyper = IntegerDense(self.width)
        # Not spatial: in training crops, nearly every element of a hyper-latent lies at the border.
        self.hyper_block = IntegerBlock(self.activation, spatial=False)
        self.up = IntegerDense(16 * self.width)
        self.quality = IntegerDense(self.width)
        self.digest = [IntegerDense(self.width) for _ in range(self.references)]
        self.trunk = [IntegerBlock(self.activation) for _ in range(2)]
        self.later = [IntegerDense(self.width) for _ in range(self.steps - 1)]
        self.blocks = [IntegerBlock(self.activation) for _ in range(self.steps)]
        self.levels = [IntegerDense(self.channels, LEVEL_BITS) for _ in range(self.steps)]
        self.state = IntegerDense(STATE)
        if self.marks:
            self.marked = IntegerDense(self.width)

    def begin(self, z, qp, memories, shape, marks=None):
        """Hidden features [b, h, w, width].

        Args:
          z: float32 [b, ceil(h/4), ceil(w/4), z channels], symbols of the hyper-latent.
          qp: int32 [b, frames], 0..71.
          memories: of each reference, what `remember` gave, or None if it is blank.
          shape: (h, w) of the latent.
          marks: float32 [b, h, w, marks] that hold integers, beyond +-127 taken as +-127.
        """
        h, w = shape
        code = self.code(self._narrow(z))
        # At the hyper-latent's resolution layers cost next to nothing.
        hyper = self.hyper_block(self.activation(saturate(self.hyper(code))))
        x = depth_to_space(self.up(hyper), 4)[:, :h, :w]
        hats = jnp.maximum(0, 64 - 8 * jnp.abs(qp[..., None] - 8 * jnp.arange(QP_KNOTS)))
        x += self.quality(hats.reshape(len(qp), 1, 1, -1).astype(code.dtype))
        blank = jnp.zeros((len(z), h, w, memory_channels(self.channels)), code.dtype)
        for digest, memory in zip(self.digest, memories, strict=True):
            x += digest(blank if memory is None else memory)
        if self.marks:
            x += self.marked(self.code(self._narrow(marks)))
        x = self.activation(saturate(x))
        for block in self.trunk:
            x = block(x)
        return x

    def level(self, hidden, step: int, symbols):
        """Levels of one step, [b, h, w, channels] in 0..63, of which the step uses its group.

        symbols: float32 [b, h, w, channels] of the steps before, zeros elsewhere.
        """
        if step > 0:
            code = jnp.abs(self.code(self._narrow(symbols)))
            x = saturate(self.later[step - 1](jnp.concatenate([hidden, code], axis=-1)))
            hidden = self.activation(x)
        level = self.levels[step](self.blocks[step](hidden)) + START_LEVEL
        return saturate(level, 0, LEVELS - 1)

    def remember(self, hidden, symbols, levels):
        """What later units may know of this one.

        Args:
          hidden: what `begin` gave.
          symbols: float32 [b, h, w, channels].
          levels: [b, h, w, channels] in 0..63.
        Returns:
          [b, h, w, memory_channels(channels)], int8 or float32: codes of the symbols' magnitudes,
          levels, and a state, in which hidden features go on from unit to unit.
        """
        code = jnp.abs(self.code(self._narrow(symbols)))
        known = [code, saturate(2 * _wide(levels) - LEVELS)]
        state = saturate(self.state(jnp.concatenate([hidden, *known], axis=-1)))
        return jnp.concatenate([*known, self.activation(state)], axis=-1)

    def _narrow(self, symbols):
        """Symbols within -127..127 in the type to compute with."""
        clipped = jnp.clip(symbols, -127, 127)
        return clipped.astype(jnp.int8) if self.code.frozen() else clipped


def head_of(variables: dict) -> tuple[ScaleHead, int]:
    """(the head that has such parameters or integers, the hyper-latent's channels)."""
    z, width = variables["hyper"]["kernel"].shape
    channels = variables["levels_0"]["kernel"].shape[-1]
    steps, references = (
        sum(name.startswith(kind) for name in variables) for kind in ("levels_", "digest_")
    )
    marks = variables["marked"]["kernel"].shape[0] if "marked" in variables else 0
    return ScaleHead(channels, width, steps, references, marks), z


def freeze(params: dict) -> dict:
    """Trained parameters of a `ScaleHead` -> its variables "integers", numpy arrays.

    Returns:
      The same tree with {"kernel": int8, "bias": int32, "exponent": int8} for every layer, and the
      functions, {"table": int8 [256]}.
    """

    types = (np.int8, np.int32, np.int8)

    @jax.jit  # many small programs would take longer to compile
    def scale_all(params):
        return jax.tree.map(
            lambda layer: scaled(layer["kernel"], layer["bias"]),
            params,
            is_leaf=lambda tree: "kernel" in tree,
        )

    def store(layer):
        return {n: np.asarray(a).astype(t) for n, a, t in zip(INTEGERS, layer, types, strict=True)}

    layers = jax.tree.map(store, scale_all(params), is_leaf=lambda tree: isinstance(tree, tuple))
    functions = {"code": exact_symbol_code, "activation": exact_activation}
    tables = {name: {"table": _table(function)} for name, function in functions.items()}
    return layers | tables


def thaw(integers: dict) -> dict:
    """Float parameters that `freeze` turns into these integers again."""
    if "kernel" in integers:
        unit = POWERS[np.asarray(integers["exponent"], np.int32)]
        bias = integers["bias"] / (unit * 2**ACTIVATION_BITS)
        return {"kernel": integers["kernel"] / unit, "bias": bias}
    return {name: thaw(part) for name, part in integers.items() if "table" not in part}
