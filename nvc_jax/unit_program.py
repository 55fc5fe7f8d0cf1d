"""Codes one unit, the frames that a model codes at once, in both directions.

One compiled program per picture size does it (see `nvc_jax.entropy.bottleneck.Coded`): the encoder
runs it with the picture as the source of symbols and hands symbols and indices to the host coder;
the decoder runs the same machine code and pulls the symbols from the host coder through
`jax.pure_callback`.
"""

import functools
import os
import threading
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nvc_jax import colour
from nvc_jax import schedule as schedules
from nvc_jax.bitstream import read_varint, varint
from nvc_jax.entropy import calibration, coder, motion
from nvc_jax.entropy.bottleneck import (
    FROM_CALLER,
    FROM_PICTURE,
    FROM_STREAM,
    Coded,
    Step,
)
from nvc_jax.entropy.calibration import CALIBRATED, EXACT, MARGIN_EXPONENT, Margin
from nvc_jax.errors import NvcError, StreamError
from nvc_jax.machine import cores
from nvc_jax.models import registry, released
from nvc_jax.models.released import Released
from nvc_jax.nn.motion import BLOCK
from nvc_jax.nn.warp import halve
from nvc_jax.video import Planes


class CodedUnit(NamedTuple):
    """Result of one run of the unit program.

    Attributes:
      pictures: one `Planes` per frame of the unit; None when not rendered.
      refs: what the next units refer to.
      symbols: int16 arrays, one per coding step.
      indices: uint16 arrays, one per coding step.
      flags: bool arrays, one per coding step with scales; none unless in calibrated mode.
      scales: float32 arrays likewise, on the device; none in exact mode.
      coder_state: of the host coder, uint32.
      reliability, motion: of the references, see `nvc_jax.schedule.Unit`.
      motion_bytes: that the motion takes in the payload.
    """

    pictures: list[Planes] | None
    refs: Any
    symbols: list[np.ndarray]
    indices: list[np.ndarray]
    flags: list[np.ndarray]
    scales: list[jax.Array]
    coder_state: np.ndarray
    reliability: tuple[int, ...] = ()
    motion: np.ndarray | None = None
    motion_bytes: int = 0


class UnitCodec(NamedTuple):
    """A released model prepared for one picture size: see `prepare`.

    Attributes:
      model: the released model.
      tables: its tables, prepared for the host coder.
      width, height: of the pictures.
      entropy_mode: FLOAT, CALIBRATED or EXACT.
      margin_exponents: the margins are 2^-exponent, one per level of the hierarchy; only if
        CALIBRATED.
      margins: their thresholds.
      steps: of units (without, with) references, see `registry.steps`.
      program: jitted, see `_unit_program`.
      judge: jitted, see `_judge_program`; None for codecs that do not judge their references.
      search: jitted, see `_search_program`; None for codecs without searched motion.
    """

    model: Released
    tables: coder.PreparedTables
    width: int
    height: int
    entropy_mode: int
    margin_exponents: tuple[int, ...]
    margins: tuple[Margin, ...]
    steps: dict[bool, tuple[Step, ...]]
    program: Any
    judge: Any = None
    search: Any = None

    def steps_of(self, refs: Any) -> tuple[Step, ...]:
        """The coding steps of a unit with references, or without if `refs` is empty or False."""
        return self.steps[bool(refs) if len(self.steps) > 1 else next(iter(self.steps))]

    def latents(self, coded: CodedUnit, refs: Any) -> list[np.ndarray]:
        """Indices of a unit's steps that have scales: those of latents, not of hyper-latents."""
        steps = zip(coded.indices, self.steps_of(refs), strict=True)
        return [indices for indices, step in steps if step.family]


def default_mode(model: Released) -> int:
    """EXACT if the model can do that, else CALIBRATED."""
    return EXACT if model.exact else CALIBRATED


def prepare(
    model: Released,
    width: int,
    height: int,
    entropy_mode: int | None = None,
    margin_exponents: Sequence[int] = (),
) -> UnitCodec:
    """Gets a model ready for pictures of one size. Compilation happens at the first unit.

    Args:
      entropy_mode: FLOAT, CALIBRATED or EXACT; by default `default_mode(model)`.
      margin_exponents: CALIBRATED only, the margin is 2^-exponent levels for units of each level of
        the hierarchy, the last one also for the levels beyond; by default (11,).

    Raises:
      NvcError: the model has no scale head for the exact mode, this machine's integer arithmetic
        fails its test, or a margin is out of range.
    """
    module = model.module
    if entropy_mode is None:
        entropy_mode = default_mode(model)
    exact = entropy_mode == EXACT
    if exact:
        if not model.exact:
            raise NvcError(f"the model '{model.name}' has no integer scales for the exact mode")
        released.check_integers(model)
    variables = model.variables if exact else {"params": model.variables["params"]}
    steps = registry.steps(module, variables, _padded(height), _padded(width), exact)
    tables = coder.prepare(model.tables)
    program = jax.jit(functools.partial(_unit_program, model, tables, width, height, entropy_mode))
    judge = search = None
    if registry.judges_references(module):
        judge = jax.jit(functools.partial(_judge_program, model, width, height))
    if registry.searches_motion(module):
        search = jax.jit(functools.partial(_search_program, model, width, height))
    codec = UnitCodec(
        model, tables, width, height, entropy_mode, (), (), steps, program, judge, search
    )
    if entropy_mode == CALIBRATED:
        codec = with_margins(codec, margin_exponents or (MARGIN_EXPONENT,))
    return codec


def with_margins(codec: UnitCodec, exponents: Sequence[int]) -> UnitCodec:
    """The same codec, which must be CALIBRATED, under other margins; see `prepare`.

    They are inputs of the program, so nothing is compiled again.
    """
    boundaries = codec.model.spec.scale_boundaries
    margins = tuple(calibration.margin(boundaries, exponent) for exponent in exponents)
    return codec._replace(margin_exponents=tuple(exponents), margins=margins)


def _unit_program(model, tables, width, height, entropy_mode, variables, planes, refs, qp, source,
                  render, payload, coder_state, given, margin, flags):  # fmt: skip
    """Codes one unit; traced once.

    Args:
      planes: uint8 (y [frames, height, width], u and v at half size): the encoder's pictures;
        decoding ignores them.
      refs: pytree of the model's references.
      qp: int32 [1, frames].
      source, render: see `Coded`.
      payload: uint8 [capacity]; coder_state: uint32 [STATE_WORDS]; given: int16 [symbols].
      margin, flags: see `Coded`; flags are bool [symbols].
    """

    def pull(state, index):
        result = (
            jax.ShapeDtypeStruct(index.shape, jnp.int16),
            jax.ShapeDtypeStruct(state.shape, jnp.uint32),
        )
        return jax.pure_callback(_pull_on_host(tables), result, payload, state, index)

    bottleneck = Coded(
        model.spec, entropy_mode, source, render, pull, coder_state, given, margin, flags
    )
    rgb = model.module.rgb
    frames = planes_to_frames(planes, height, width, rgb)
    recon, new_refs = model.module.apply(variables, frames, refs, qp, bottleneck)
    pictures = jax.lax.cond(
        render,
        lambda: frames_to_planes(recon, height, width, rgb),
        lambda: jax.tree.map(jnp.zeros_like, planes),
    )
    b = bottleneck
    return pictures, new_refs, b.symbols, b.indices, b.flags, b.scales, b.state


def _judge_program(model, width, height, variables, planes, refs, qp):
    """Levels of reliability of a unit's references, int32 [references]."""
    frames = planes_to_frames(planes, height, width, model.module.rgb)
    logits = model.module.apply(variables, frames, refs, qp, method="reliability")
    return jnp.argmax(logits[0], -1)


def _search_program(model, width, height, variables, planes, refs, qp):
    """Motion of a unit's picture, int16 [blocks down, blocks across, 3]."""
    frames = planes_to_frames(planes, height, width, model.module.rgb)
    field = model.module.apply(variables, frames[:, 0], refs[0], qp[:, 0], method="search")
    return field[0]


def _pull_on_host(tables: coder.PreparedTables):
    def pull(payload, state, index):
        # NumPy only: a callback that enters JAX can wait for itself.
        return coder.decode_step(np.asarray(payload), np.asarray(state), np.asarray(index), tables)

    return pull


def _padded(side: int) -> int:
    return -(-side // 16) * 16


def planes_to_frames(planes, height: int, width: int, rgb: bool = False) -> jax.Array:
    """uint8 4:2:0 planes -> float32 [1, frames, height', width', 3] in [0, 1], sides padded to 16.

    Chroma samples are repeated 2x2, borders replicated at the bottom and right (DCVC-RT). With
    `rgb` the channels are R, G, B, taken from Y, U, V as from BT.709 in limited range whatever the
    video says, and a little beyond [0, 1] for colours that no screen shows.
    """
    y, u, v = planes

    def full_size(chroma):
        return chroma.repeat(2, axis=1).repeat(2, axis=2)[:, :height, :width]

    frames = jnp.stack([y, full_size(u), full_size(v)], axis=-1).astype(jnp.float32) / 255
    if rgb:
        frames = colour.to_rgb(frames)
    pad = ((0, 0), (0, -height % 16), (0, -width % 16), (0, 0))
    return jnp.pad(frames, pad, mode="edge")[None]


def frames_to_planes(frames: jax.Array, height: int, width: int, rgb: bool = False):
    """Inverse of `planes_to_frames`: clipped, chroma averaged 2x2, rounded to uint8.

    The clip belongs to the networks of DCVC-RT and UF; ours leave it to whoever shows the picture.
    """
    frames = jnp.clip(frames[0], 0, 1)
    if rgb:
        frames = colour.from_rgb(frames)
    frames *= 255
    chroma = halve(frames[..., 1:])
    chroma = chroma[:, : -(-height // 2), : -(-width // 2)]
    y = frames[:, :height, :width, 0]
    return tuple(jnp.round(p).astype(jnp.uint8) for p in (y, chroma[..., 0], chroma[..., 1]))


# The unit of a flat order, as far as it matters for coding it.
FLAT = schedules.Unit((0,), (), 0, (0,), ())


def _run(
    codec: UnitCodec,
    refs: tuple,
    qps: Sequence[int],
    source: int,
    render: bool,
    unit: schedules.Unit,
    *,
    pictures: Sequence[Planes] = (),
    payload: bytes = b"",
    given: np.ndarray | None = None,
    flags: np.ndarray | None = None,
) -> CodedUnit:
    """Runs the unit program once. A unit short of pictures or qps repeats its last one."""
    n = codec.model.module.frames_per_unit
    padded_qps = [*qps, *qps[-1:] * n][:n]
    if pictures:
        repeated = [*pictures, *[pictures[-1]] * n][:n]
        planes = _stacked(repeated)
    else:
        chroma = (n, -(-codec.height // 2), -(-codec.width // 2))
        shapes = (n, codec.height, codec.width), chroma, chroma
        planes = tuple(np.zeros(s, np.uint8) for s in shapes)
    buffer = np.zeros(_capacity(codec, refs), np.uint8)
    buffer[: len(payload)] = np.frombuffer(payload, np.uint8)
    symbols = sum(step.size for step in codec.steps_of(refs))
    refs = _completed(codec, refs, unit)
    if given is None:
        given = np.zeros(symbols, np.int16)
    margin = None
    if codec.entropy_mode == CALIBRATED:
        margin = codec.margins[min(unit.layer, len(codec.margins) - 1)]
        flags = np.zeros(symbols, bool) if flags is None else flags
    out, refs, symbols, indices, flags, scales, state = codec.program(
        codec.model.variables,
        planes,
        refs,
        np.array([padded_qps], np.int32),
        np.int32(source),
        np.bool_(render),
        buffer,
        coder.begin_decode(buffer, len(payload)),
        given,
        margin,
        flags,
    )
    symbols, indices, flags, state = jax.device_get((symbols, indices, flags, state))
    if render:
        out = jax.device_get(out)
        out = [Planes(*(plane[i] for plane in out)) for i in range(len(qps))]
    return CodedUnit(
        out if render else None, refs, symbols, indices, flags, scales, state, unit.reliability,
        unit.motion,
    )  # fmt: skip


def _stacked(pictures: Sequence[Planes]) -> tuple[np.ndarray, ...]:
    """Pictures as the programs take them."""
    return tuple(np.stack(planes) for planes in zip(*pictures, strict=True))


def _completed(codec: UnitCodec, refs: tuple, unit: schedules.Unit) -> Any:
    """References as the programs take them."""
    height, width = _padded(codec.height), _padded(codec.width)
    slots = codec.model.module.complete(refs, unit, height, width, codec.entropy_mode == EXACT)
    if unit.motion is None:
        return slots
    return (slots[0]._replace(motion=unit.motion[None]), *slots[1:])


def _capacity(codec: UnitCodec, refs: tuple) -> int:
    """Bytes that no payload exceeds, see `coder.encode`.

    One size for all units of a kind: another would be another program, whose machine code may round
    otherwise, and encoder and decoder have to run the same.
    """
    return 4 * sum(step.size for step in codec.steps_of(refs)) + 512


def symbols_crc(symbols: Sequence[np.ndarray], motion: np.ndarray | None = None) -> int:
    """CRC-32 of a unit's motion, if any, and symbols as little-endian int16, in coding order."""
    crc = 0
    for s in symbols if motion is None else (motion, *symbols):
        crc = zlib.crc32(s.astype("<i2", copy=False).tobytes(), crc)
    return crc


def encode_unit(
    codec: UnitCodec,
    pictures: Sequence[Planes],
    refs: tuple,
    qps: Sequence[int],
    render: bool,
    unit: schedules.Unit = FLAT,
    kept: bool = True,
) -> tuple[bytes, CodedUnit]:
    """Codes pictures and returns (payload, what the program left).

    Args:
      refs: what the units that are referred to left; () for none.
      kept: whether others may refer to the unit. If not, and without `render`, `CodedUnit.refs` are
        not to be used.
      unit: of the schedule: its layer and place between its references count. If it does not say
        how reliable these are, codecs that can judge that do so, and likewise `with_motion`.
    """
    # What refers to a frame of a separate intra codec refers to its picture.
    by_picture = codec.model.module.refers_to_pictures or (len(codec.steps) > 1 and not refs)
    render = render or unit.shown or (kept and by_picture)
    if refs and codec.judge and not unit.reliability:
        unit = unit._replace(reliability=_judged(codec, refs, qps, unit, pictures))
    unit = with_motion(codec, pictures, refs, qps, unit)
    coded = _run(codec, refs, qps, FROM_PICTURE, render, unit, pictures=pictures)
    payload = coder.encode(list(zip(coded.symbols, coded.indices, strict=True)), codec.tables)
    side = _motion_bytes(codec, refs, unit)
    coded = coded._replace(motion_bytes=len(side))
    side = _reliability_byte(codec, refs, unit) + side + _calibration_bytes(codec, coded)
    return side + payload, coded


def with_motion(
    codec: UnitCodec,
    pictures: Sequence[Planes],
    refs: tuple,
    qps: Sequence[int],
    unit: schedules.Unit,
) -> schedules.Unit:
    """The unit with motion, which is searched if it has none and the codec knows any."""
    if not refs or not codec.search or unit.motion is not None:
        return unit
    slots, planes = _completed(codec, refs, unit), _stacked(pictures)
    field = codec.search(codec.model.variables, planes, slots, np.array([qps], np.int32))
    return unit._replace(motion=np.asarray(field))


def _motion_bytes(codec: UnitCodec, refs: tuple, unit: schedules.Unit) -> bytes:
    """Motion of a unit with references, of codecs that search it."""
    if not refs or not codec.search:
        return b""
    data = motion.encode(unit.motion)
    return varint(len(data)) + data


def _judged(codec, refs, qps, unit, pictures) -> tuple[int, ...]:
    slots, planes = _completed(codec, refs, unit), _stacked(pictures)
    levels = codec.judge(codec.model.variables, planes, slots, np.array([qps], np.int32))
    return tuple(np.asarray(levels)[: len(refs)].tolist())


def _reliability_byte(codec: UnitCodec, refs: tuple, unit: schedules.Unit) -> bytes:
    """Two bits for each reference, of codecs that judge them."""
    if not refs or not codec.judge:
        return b""
    return bytes([sum(level << 2 * i for i, level in enumerate(unit.reliability))])


def read_references(
    codec: UnitCodec, payload: bytes, refs: tuple, unit: schedules.Unit
) -> tuple[schedules.Unit, bytes]:
    """(a unit whose references count as they did for its encoder, the payload behind what says so).

    Raises:
      StreamError: the payload does not say it.
    """
    if refs and codec.judge:
        if not payload or payload[0] >> 2 * len(refs):
            raise StreamError("what the payload says about references is damaged")
        levels = tuple(payload[0] >> 2 * i & 3 for i in range(len(refs)))
        unit, payload = unit._replace(reliability=levels), payload[1:]
    if refs and codec.search:
        size, start = read_varint(payload)
        if size > len(payload) - start:
            raise StreamError("the motion is longer than its payload")
        down, across = _padded(codec.height) // BLOCK, _padded(codec.width) // BLOCK
        field = motion.decode(payload[start : start + size], down, across)
        unit, payload = unit._replace(motion=field), payload[start + size :]
    return unit, payload


def _calibration_bytes(codec: UnitCodec, unit: CodedUnit) -> bytes:
    """What stands before the coder's payload: in calibrated mode, the listed elements."""
    if codec.entropy_mode != CALIBRATED:
        return b""
    data = calibration.write_flags(unit.flags)
    return varint(len(data)) + data


def _split_payload(
    codec: UnitCodec, payload: bytes, refs: tuple
) -> tuple[np.ndarray | None, bytes]:
    """(flags of the calibrated mode, the coder's payload). Raises StreamError."""
    flags = None
    if codec.entropy_mode == CALIBRATED:
        size, start = read_varint(payload)
        # Hyper-latents have fixed tables: nothing of them is ever listed.
        steps = codec.steps_of(refs)
        sizes = [step.size for step in steps if step.family]
        # A Rice code of parameter 0 never takes more than a bit per element and some per step.
        if size > min(len(payload) - start, sum(sizes) // 8 + 8 * len(sizes)):
            raise StreamError("the list of calibrated elements is damaged")
        listed = calibration.read_flags(payload[start : start + size], sizes)
        scaled = np.repeat([step.family is not None for step in steps], [s.size for s in steps])
        flags = np.zeros(len(scaled), bool)
        flags[scaled] = listed
        payload = payload[start + size :]
    if len(payload) > _capacity(codec, refs):
        raise StreamError(f"a unit of {len(payload)} bytes is larger than any of this size can be")
    return flags, payload


def decode_unit(
    codec: UnitCodec,
    payload: bytes,
    refs: tuple,
    qps: Sequence[int],
    unit: schedules.Unit = FLAT,
) -> CodedUnit:
    """Decodes one unit inside one jitted program that calls the host coder back.

    Raises:
      StreamError: the payload is damaged, or was not consumed exactly.
    """
    if _xla_threads() < 2:
        return decode_unit_from_host(codec, payload, refs, qps, unit)
    unit, payload = read_references(codec, payload, refs, unit)
    flags, payload = _split_payload(codec, payload, refs)
    with _ONE_AT_A_TIME:
        coded = _run(codec, refs, qps, FROM_STREAM, True, unit, payload=payload, flags=flags)
    coder.finish_decode(np.frombuffer(payload, np.uint8), coded.coder_state)
    return coded


# Arguments of a callback that are larger than 100 kB are copied on the same threads that run CPU
# programs, while the program waits for its callback. So there must be a thread to spare, and only
# one program may wait at a time; otherwise they wait for ever (JAX 0.10; jax issue 24255).
_ONE_AT_A_TIME = threading.Lock()


def _xla_threads() -> int:
    """Threads of XLA's CPU client: one per core this process may use, or NPROC of them."""
    wanted = os.environ.get("NPROC", "")
    if wanted.isdecimal():
        return int(wanted)
    return cores()


def decode_unit_from_host(
    codec: UnitCodec,
    payload: bytes,
    refs: tuple,
    qps: Sequence[int],
    unit: schedules.Unit = FLAT,
) -> CodedUnit:
    """As `decode_unit`, without callbacks: the host drives.

    The program is run once per coding step with the symbols known so far; each run yields the
    indices of the next step. Slower, but needs nothing of the backend: a cross-check, and the way
    out where callbacks are not available.
    """
    unit, payload = read_references(codec, payload, refs, unit)
    flags, payload = _split_payload(codec, payload, refs)
    buffer = np.frombuffer(payload, np.uint8)
    state = coder.begin_decode(buffer, len(payload))
    replay = functools.partial(_run, codec, refs, qps, FROM_CALLER, unit=unit, flags=flags)
    steps = codec.steps_of(refs)
    known = np.zeros(sum(step.size for step in steps), np.int16)
    position = 0
    for number, (size, _) in enumerate(steps):
        run = replay(render=False, given=known)
        symbols, state = coder.decode_step(buffer, state, run.indices[number], codec.tables)
        known[position : position + size] = symbols
        position += size
    coder.finish_decode(buffer, state)
    return replay(render=True, given=known)


def replay_unit(
    codec: UnitCodec,
    symbols: np.ndarray,
    refs: tuple,
    qps: Sequence[int],
    unit: schedules.Unit = FLAT,
) -> CodedUnit:
    """What a unit's symbols (int16, all steps in coding order) decode to, without a payload."""
    return _run(codec, refs, qps, FROM_CALLER, True, unit, given=symbols)
