"""Encodes a clip, decodes a stream: schedule x model x bottleneck x coder x container.

One compiled program per picture size codes a unit in both directions (see
`nvc_jax.entropy.bottleneck.Coded`): the encoder runs it with the picture as the source of symbols
and hands symbols and indices to the host coder; the decoder runs the same machine code and pulls
the symbols from the host coder through `jax.pure_callback`.
"""

import functools
import os
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, groupby, islice, repeat
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nvc_jax import colour
from nvc_jax import schedule as schedules
from nvc_jax.bitstream import (
    AccessPoint,
    BrokenStream,
    Header,
    Packet,
    Stream,
    read_varint,
    varint,
)
from nvc_jax.entropy import calibration, coder
from nvc_jax.entropy.bottleneck import (
    FROM_CALLER,
    FROM_PICTURE,
    FROM_STREAM,
    Coded,
    Step,
)
from nvc_jax.entropy.calibration import CALIBRATED, EXACT, FLOAT, MARGIN_EXPONENT, Margin
from nvc_jax.errors import NvcError, OtherTables, StreamError, WeightsMismatch
from nvc_jax.machine import cores
from nvc_jax.metrics import psnr_611
from nvc_jax.models import registry, released
from nvc_jax.models.released import Released
from nvc_jax.quality import QP_COUNT, lambda_of_qp
from nvc_jax.schedule import AUTO
from nvc_jax.video import Planes, VideoInfo

MAX_QP = QP_COUNT - 1


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
      reliability: of the references, see `nvc_jax.schedule.Unit`.
    """

    pictures: list[Planes] | None
    refs: Any
    symbols: list[np.ndarray]
    indices: list[np.ndarray]
    flags: list[np.ndarray]
    scales: list[jax.Array]
    coder_state: np.ndarray
    reliability: tuple[int, ...] = ()


class UnitCodec(NamedTuple):
    """A released model prepared for one picture size: see `prepare`.

    Attributes:
      model: the released model.
      tables: its tables, prepared for the host coder.
      width, height: of the pictures.
      mode: FLOAT, CALIBRATED or EXACT.
      margin_exponents: the margins are 2^-exponent, one per level of the hierarchy; only if
        CALIBRATED.
      margins: their thresholds.
      steps: of units (without, with) references, see `registry.steps`.
      program: jitted, see `_unit_program`.
      judge: jitted, see `_judge_program`; None for codecs that do not judge their references.
    """

    model: Released
    tables: coder.PreparedTables
    width: int
    height: int
    mode: int
    margin_exponents: tuple[int, ...]
    margins: tuple[Margin, ...]
    steps: dict[bool, tuple[Step, ...]]
    program: Any
    judge: Any = None

    def steps_of(self, refs: Any) -> tuple[Step, ...]:
        """The coding steps of a unit with references, or without if `refs` is empty or False."""
        return self.steps[bool(refs) if len(self.steps) > 1 else next(iter(self.steps))]


def default_mode(model: Released) -> int:
    """EXACT if the model can do that, else CALIBRATED."""
    return EXACT if model.exact else CALIBRATED


def prepare(
    model: Released,
    width: int,
    height: int,
    mode: int | None = None,
    margin_exponents: Sequence[int] = (),
) -> UnitCodec:
    """Gets a model ready for pictures of one size. Compilation happens at the first unit.

    Args:
      mode: FLOAT, CALIBRATED or EXACT; by default `default_mode(model)`.
      margin_exponents: CALIBRATED only, the margin is 2^-exponent levels for units of each level of
        the hierarchy, the last one also for the levels beyond; by default (11,).

    Raises:
      NvcError: the model has no scale head for the exact mode, this machine's integer arithmetic
        fails its test, or a margin is out of range.
    """
    module = model.module
    mode = default_mode(model) if mode is None else mode
    if mode == EXACT:
        if not model.exact:
            raise NvcError(f"the model '{model.name}' has no integer scales for the exact mode")
        released.check_integers(model)
    variables = model.variables if mode == EXACT else {"params": model.variables["params"]}
    steps = registry.steps(module, variables, _padded(height), _padded(width), mode == EXACT)
    tables = coder.prepare(model.tables)
    program = jax.jit(functools.partial(_unit_program, model, tables, width, height, mode))
    judge = None
    if hasattr(module, "reliability"):
        judge = jax.jit(functools.partial(_judge_program, model, width, height))
    codec = UnitCodec(model, tables, width, height, mode, (), (), steps, program, judge)
    if mode == CALIBRATED:
        codec = with_margins(codec, margin_exponents or (MARGIN_EXPONENT,))
    return codec


def with_margins(codec: UnitCodec, exponents: Sequence[int]) -> UnitCodec:
    """The same codec, which must be CALIBRATED, under other margins; see `prepare`.

    They are inputs of the program, so nothing is compiled again.
    """
    boundaries = codec.model.spec.scale_boundaries
    margins = tuple(calibration.margin(boundaries, exponent) for exponent in exponents)
    return codec._replace(margin_exponents=tuple(exponents), margins=margins)


def _unit_program(model, tables, width, height, mode, variables, planes, refs, qp, source, render,
                  payload, coder_state, given, margin, flags):  # fmt: skip
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

    bottleneck = Coded(model.spec, mode, source, render, pull, coder_state, given, margin, flags)
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
    n, h, w, _ = frames.shape
    chroma = frames[..., 1:].reshape(n, h // 2, 2, w // 2, 2, 2).mean((2, 4))
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
    if codec.mode == CALIBRATED:
        margin = codec.margins[min(unit.level, len(codec.margins) - 1)]
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
        out if render else None, refs, symbols, indices, flags, scales, state, unit.reliability
    )


def _stacked(pictures: Sequence[Planes]) -> tuple[np.ndarray, ...]:
    """Pictures as the programs take them."""
    return tuple(np.stack(planes) for planes in zip(*pictures, strict=True))


def _completed(codec: UnitCodec, refs: tuple, unit: schedules.Unit) -> Any:
    """References as the programs take them."""
    height, width = _padded(codec.height), _padded(codec.width)
    return codec.model.module.complete(refs, unit, height, width, codec.mode == EXACT)


def _capacity(codec: UnitCodec, refs: tuple) -> int:
    """Bytes that no payload exceeds, see `coder.encode`.

    One size for all units of a kind: another would be another program, whose machine code may round
    otherwise, and encoder and decoder have to run the same.
    """
    return 4 * sum(step.size for step in codec.steps_of(refs)) + 512


def symbols_crc(symbols: Sequence[np.ndarray]) -> int:
    """CRC-32 of a unit's symbols as little-endian int16, in coding order."""
    crc = 0
    for s in symbols:
        crc = zlib.crc32(s.astype("<i2", copy=False).tobytes(), crc)
    return crc


def encode_unit(
    codec: UnitCodec,
    pictures: Sequence[Planes],
    refs: tuple,
    qps: Sequence[int],
    render: bool,
    unit: schedules.Unit = FLAT,
) -> tuple[bytes, CodedUnit]:
    """Codes pictures and returns (payload, what the program left).

    Args:
      refs: what the units that are referred to left; () for none.
      unit: of the schedule: its level and place between its references count. If it does not say
        how reliable these are, codecs that can judge that do so.
    """
    # What refers to a frame of a separate intra codec refers to its picture.
    render = render or unit.shown or (len(codec.steps) > 1 and not refs)
    if refs and codec.judge and not unit.reliability:
        unit = unit._replace(reliability=_judged(codec, refs, qps, unit, pictures))
    coded = _run(codec, refs, qps, FROM_PICTURE, render, unit, pictures=pictures)
    payload = coder.encode(list(zip(coded.symbols, coded.indices, strict=True)), codec.tables)
    return _reliability_byte(codec, refs, unit) + _calibration_bytes(codec, coded) + payload, coded


def _judged(codec, refs, qps, unit, pictures) -> tuple[int, ...]:
    slots, planes = _completed(codec, refs, unit), _stacked(pictures)
    levels = codec.judge(codec.model.variables, planes, slots, np.array([qps], np.int32))
    return tuple(np.asarray(levels)[: len(refs)].tolist())


def _reliability_byte(codec: UnitCodec, refs: tuple, unit: schedules.Unit) -> bytes:
    """Two bits for each reference, of codecs that judge them."""
    if not refs or not codec.judge:
        return b""
    return bytes([sum(level << 2 * i for i, level in enumerate(unit.reliability))])


def read_reliability(
    codec: UnitCodec, payload: bytes, refs: tuple, unit: schedules.Unit
) -> tuple[schedules.Unit, bytes]:
    """(a unit whose references count as they did for its encoder, the payload behind what says so).

    Raises:
      StreamError: the payload does not say it.
    """
    if not refs or not codec.judge:
        return unit, payload
    if not payload or payload[0] >> 2 * len(refs):
        raise StreamError("what the payload says about references is damaged")
    levels = tuple(payload[0] >> 2 * i & 3 for i in range(len(refs)))
    return unit._replace(reliability=levels), payload[1:]


def _calibration_bytes(codec: UnitCodec, unit: CodedUnit) -> bytes:
    """What stands before the coder's payload: in calibrated mode, the listed elements."""
    if codec.mode != CALIBRATED:
        return b""
    data = calibration.write_flags(unit.flags)
    return varint(len(data)) + data


def _split_payload(
    codec: UnitCodec, payload: bytes, refs: tuple
) -> tuple[np.ndarray | None, bytes]:
    """(flags of the calibrated mode, the coder's payload). Raises StreamError."""
    flags = None
    if codec.mode == CALIBRATED:
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
    unit, payload = read_reliability(codec, payload, refs, unit)
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
    unit, payload = read_reliability(codec, payload, refs, unit)
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


class Trial(NamedTuple):
    """A group of frames coded in one of several modes.

    Attributes:
      bytes: of all its packets' payloads.
      psnr: 6:1:1, mean over its frames, dB.
      cost: bits per pixel of one frame, plus the distortion times lambda of the qp.
    """

    bytes: int
    psnr: float
    cost: float


class Choice(NamedTuple):
    """How the frames `first` to `last` came out in every mode; the cheapest was chosen."""

    first: int
    last: int
    trials: dict[str, Trial]


class EncodedUnit(NamedTuple):
    """What `encode` yields per unit.

    Attributes:
      packet: for the container.
      pictures: the originals.
      recons: the decoder's pictures; None unless rendered, which units that a later one needs the
        picture of always are.
      plan: what the schedule says of the unit.
      coded: what the program left; without references and scales where modes were tried.
      ideal_bits: code length of the symbols under the integer tables.
      choice: of the mode of the group that the unit begins, if the encoder had one.
    """

    packet: Packet
    pictures: list[Planes]
    recons: list[Planes] | None
    plan: schedules.Unit
    coded: CodedUnit
    ideal_bits: float
    choice: Choice | None = None


def modes(model: Released) -> dict[str, str]:
    """Name -> coding order, of codecs that know several."""
    own = getattr(model.module, "modes", {})
    return own and own | {AUTO: "mixed"}


def schedule_for(
    model: Released,
    intra_period: int | None = None,
    gop: int | None = None,
    closed: bool = False,
    mode: str | None = None,
) -> schedules.Schedule:
    """The coding order of a model.

    Args:
      intra_period: distance of frames at which decoding can start; 0 for the first frame only. By
        default that, and for B-frames the group's size.
      gop, closed: of groups of B-frames, see `schedule.hierarchical`; by default 32 frames, or the
        intra period if that is shorter.
      mode: of a codec that knows several; AUTO for groups that differ.

    Raises:
      NvcError: there is no such order, or the model does not code in groups.
    """
    if mode is not None and mode not in modes(model):
        there = ", ".join(modes(model)) or "the one that it was made for"
        raise NvcError(f"'{model.name}' has no mode '{mode}'; there is: {there}")
    name = modes(model)[mode] if mode else model.module.schedule
    if name == "mixed":
        gop = gop or intra_period or 32
        if closed or intra_period not in (None, gop):
            raise NvcError(
                f"the mode '{AUTO}' has an intra frame at the end of every group, to which the "
                "next group refers: its intra period is its --gop, and no group is closed"
            )
        return schedules.mixed(gop)
    if name == "hierarchical":
        if gop is None:
            gop = min(intra_period, 32) if intra_period and intra_period > 1 else 32
        return schedules.hierarchical(gop, intra_period, closed)
    if gop is not None or closed:
        which = f"the mode '{mode}'" if mode else f"'{model.name}'"
        raise NvcError(f"{which} has no B-frames, so its groups cannot be chosen")
    if name == "all_intra":
        return schedules.all_intra()
    return getattr(schedules, name)(intra_period or 0)


def make_header(codec: UnitCodec, info: VideoInfo, schedule: schedules.Schedule) -> Header:
    """Header of a stream that `codec` writes, for pictures of `info`."""
    c = info.colour
    return Header(
        model=codec.model.name,
        fingerprint=codec.model.fingerprint,
        width=info.width,
        height=info.height,
        fps=info.fps,
        schedule=schedule,
        colour=(c.primaries, c.transfer, c.matrix, c.full_range),
        entropy_mode=codec.mode,
        margin_exponents=codec.margin_exponents,
    )


def encode(
    codec: UnitCodec,
    pictures: Iterable[Planes],
    qp: int,
    schedule: schedules.Schedule,
    render: bool = False,
    layer_qp: Sequence[int] = (),
    mode_of: Callable[[int], str] | None = None,
) -> Iterator[EncodedUnit]:
    """Encodes pictures as they come, one group of the schedule in memory at a time.

    Args:
      layer_qp: added to the qp by layer of the hierarchy, lowest first; the last one counts for all
        above, where the intra frames are. What leaves the range of qps is set to its end. By
        default those of the codec.
      mode_of: for "mixed" orders, the mode of the group that begins with a frame. By default all
        are tried, and the one that costs least is chosen.

    Raises:
      NvcError: qp out of range, or layers where there are none.
    """
    layered = schedules.in_layers(schedule)
    if layer_qp and not layered:
        raise NvcError(f"schedule {schedule.name} has no layers whose qp could differ")
    if not 0 <= qp <= MAX_QP:
        raise NvcError(f"qp {qp} is out of range; give 0 (smallest file) to {MAX_QP} (best)")
    if layered:
        layer_qp = layer_qp or registry.entry(codec.model.codec).layer_qp
    pictures = iter(pictures)
    slots, frame, number = {}, 0, 0
    while group := list(islice(pictures, schedules.group_size(schedule, frame))):
        code = functools.partial(
            _encode_group, codec, group, frame, number, qp=qp, schedule=schedule, layer_qp=layer_qp
        )
        if schedule.name != "mixed":
            coded = code(slots, render=render)
        elif not frame:  # alone in its group: the same in all modes
            coded = code(slots, render=render, mode=schedules.MODES[0])
        elif mode_of:
            coded = code(slots, render=render, mode=mode_of(frame))
        else:
            content = registry.entry(codec.model.codec).content
            coded = _best_of_all_modes(code, slots, lambda_of_qp(qp, content))
        for unit in coded:
            number += 1
            yield unit
        frame += len(group)


def _encode_group(
    codec: UnitCodec,
    group: list[Planes],
    first_frame: int,
    first_unit: int,
    slots: dict[int, tuple],
    *,
    qp: int,
    schedule: schedules.Schedule,
    layer_qp: Sequence[int],
    render: bool,
    mode: str | None = None,
) -> Iterator[EncodedUnit]:
    """Units of one group; `slots` gets what they leave."""
    whole = len(group) == schedules.group_size(schedule, first_frame)
    short = None if whole or not schedules.in_layers(schedule) else len(group)
    planned = schedules.units(schedule, first_frame, len(group), first_unit, mode)
    for number, unit in enumerate(planned, first_unit):
        originals = [group[f - first_frame] for f in unit.frames]
        qps = tuple(qp + offset for offset in unit.qp_offset)
        if layer_qp and unit.layered:
            last = len(layer_qp) - 1
            extra = layer_qp[min(unit.level, last) if unit.refs else last]
            qps = tuple(min(max(qp + extra, 0), codec.model.module.qp_rows - 1) for qp in qps)
        refs = references(unit, slots)
        payload, coded = encode_unit(codec, originals, refs, qps, render, unit)
        slots[number] = coded.refs
        for slot in unit.release:
            del slots[slot]
        steps = list(zip(coded.symbols, coded.indices, strict=True))
        packet = Packet(unit.frames, qps, payload, symbols_crc(coded.symbols))
        if number == first_unit:
            packet = replace(packet, random_access=not unit.refs, group=short, mode=mode)
        bits = coder.code_length_bits(steps, codec.tables)
        yield EncodedUnit(packet, originals, coded.pictures, unit, coded, bits)


def _best_of_all_modes(code: Callable, slots: dict[int, tuple], weight: float) -> list[EncodedUnit]:
    """A group in the mode that costs least; `slots` gets what it leaves.

    weight: of the distortion.
    """
    trials, best = {}, None
    for mode in schedules.MODES:
        left = dict(slots)
        # What later units refer to is in `left`: two groups of it would fill memories.
        coded = [
            unit._replace(coded=unit.coded._replace(refs=(), scales=[]))
            for unit in code(left, render=True, mode=mode)
        ]
        trials[mode] = _trial(coded, weight)
        if best is None or trials[mode].cost < best[0].cost:
            best = trials[mode], coded, left
    _, (first, *rest), left = best
    slots.clear()
    slots |= left
    frames = [frame for unit in (first, *rest) for frame in unit.packet.frames]
    return [first._replace(choice=Choice(min(frames), max(frames), trials)), *rest]


def _trial(coded: list[EncodedUnit], weight: float) -> Trial:
    """Bits, and what planes are off as training counts it (`D_yuv`), of all frames alike."""
    pairs = [pair for unit in coded for pair in zip(unit.pictures, unit.recons, strict=True)]
    errors = np.array([list(map(_mean_square, *pair)) for pair in pairs])  # [frames, planes], 0..1
    distortion = 3 * np.exp(np.log(errors) @ np.array([10, 1, 1]) / 12).mean()
    psnr = np.mean([psnr_611(*pair) for pair in pairs])
    payload = sum(len(unit.packet.payload) for unit in coded)
    bpp = 8 * payload / (len(pairs) * pairs[0][0].y.size)
    return Trial(payload, float(psnr), float(bpp + weight * distortion))


def _mean_square(a: np.ndarray, b: np.ndarray) -> float:
    return max(np.mean((a.astype(np.float32) - b) ** 2) / 255**2, 1e-6)


def references(unit: schedules.Unit, slots: dict[int, tuple]) -> tuple:
    """What a unit refers to; slots: unit number -> what it left."""
    return tuple(ref for slot in unit.refs for ref in slots[slot])


def check_model(header: Header, model: Released) -> None:
    """Makes sure that a stream was written with exactly this model.

    Raises:
      WeightsMismatch: it was not.
      StreamError: its frames come in an order that this model cannot have coded.
    """
    if header.fingerprint != model.fingerprint:
        raise WeightsMismatch(
            f"the stream was written with model '{header.model}', weights "
            f"{header.fingerprint.hex()}; the model at hand is '{model.name}', weights "
            f"{model.fingerprint.hex()}. Give the file of the right weights with --model."
        )
    own = model.module.schedule
    known = modes(model).values() or (own, own.removesuffix("_refresh"))
    if header.schedule.name.removesuffix("_closed") not in known:
        raise StreamError(
            f"the stream's schedule '{header.schedule.name}' is not that of its model "
            f"'{header.model}'; the header is damaged"
        )


def decode(
    codec: UnitCodec,
    stream: Stream,
    start: AccessPoint | None = None,
    wanted: range | None = None,
) -> Iterator[tuple[Packet, list[Planes]]]:
    """Decodes a stream unit by unit; frames come in display order.

    Args:
      start: where to begin, which `stream.access_point(frame)` finds; by default the first unit.
      wanted: frames to hand out, by default all from there. Others are decoded only if these refer
        to them.

    Raises:
      StreamError: the file is damaged or cut off (after the last intact unit), or a unit's symbols
        do not have the checksum that the encoder stored.
    """
    first_frame = start.frame if start else 0
    wanted = range(first_frame, _OPEN_END) if wanted is None else wanted
    packets = stream.packets(start)
    outcomes = _outcomes(codec, stream.header.schedule, packets, first_frame, wanted, {})
    return _in_display_order(_unless_lost(outcomes), wanted)


class Lost(NamedTuple):
    """Frames in a row that one unit's failure costs.

    Attributes:
      unit: number of the unit that cannot be decoded or read.
      units: how many of the units with these frames are lost, those included that refer to it.
      frame, frames: display index of the first, and how many they are.
      reason: what is wrong with the unit, for people.

    A file that was cut off does not tell how much is missing: `units` and `frames` are then None.
    """

    unit: int
    units: int | None
    frame: int
    frames: int | None
    reason: str


_OPEN_END = 2**63  # of frames that are wanted: however many come


class _Outcome(NamedTuple):
    """What became of a unit. `frames`: display indices of those that are wanted."""

    number: int
    frames: list[int]
    what: Packet | Lost
    pictures: list[Planes]


def _outcomes(
    codec: UnitCodec,
    order: schedules.Schedule,
    numbered: Iterable[tuple[int, Packet]],
    first_frame: int,
    wanted: range,
    slots: dict[int, tuple | Lost],
    missing: Lost | None = None,
) -> Iterator[_Outcome]:
    """Decodes units in a row, in coding order; the first of them must read no reference.

    Units that cannot be decoded, and all that refer to them, come as `Lost`, of which `unit` and
    `reason` are those of the unit to blame.

    Args:
      first_frame: of the first unit. Where it stands inside a group, the group's frames before it
        refer to what came earlier; they are usually not wanted.
      slots: what is left of earlier units; gets what these leave.
      missing: what to blame if a slot is empty.

    Raises:
      StreamError: the packets themselves cannot be read, or not in the schedule's order, or a slot
        is empty and nothing to blame.
    """
    for unit, number, packet, needed in _planned(order, numbered, first_frame, wanted):
        if needed:
            found = [slots.get(slot, missing) for slot in unit.refs]
            if any(left is None for left in found):
                raise StreamError(
                    f"{_place(number, packet)} refers to a unit before the point where decoding "
                    "began; decode the whole file"
                )
            frames = [frame for frame in unit.frames if frame in wanted]
            lost = next((left for left in found if isinstance(left, Lost)), None)
            if lost is None:
                try:
                    refs = references(unit, slots)
                    decoded = _decode_packet(codec, number, packet, unit, refs)
                    slots[number] = decoded.refs
                except StreamError as e:
                    lost = Lost(number, 1, unit.frames[0], len(unit.frames), str(e))
            if lost is None:
                shown = zip(unit.frames, decoded.pictures, strict=True)
                yield _Outcome(number, frames, packet, [p for f, p in shown if f in wanted])
            else:
                slots[number] = lost
                lost = lost._replace(frame=unit.frames[0], frames=len(unit.frames))
                yield _Outcome(number, frames, lost, [])
        for slot in unit.release:
            slots.pop(slot, None)  # not there if it was not needed


def _unless_lost(outcomes: Iterable[_Outcome]) -> Iterator[_Outcome]:
    """Raises StreamError with the reason where a unit was lost."""
    for outcome in outcomes:
        if isinstance(outcome.what, Lost):
            raise StreamError(outcome.what.reason)
        yield outcome


def _in_display_order(
    outcomes: Iterable[_Outcome], wanted: range, fill_gaps: bool = False
) -> Iterator[tuple[Packet | Lost, list[Planes]]]:
    """Hands units out when all frames before theirs were, up to the last that is wanted.

    Args:
      fill_gaps: if the outcomes end with an error, all that were waiting are handed out before it
        is raised, and what they were waiting for comes as `Lost`.

    Raises:
      StreamError: a frame is missing.
    """
    waiting: dict[int, _Outcome] = {}
    shown, number = wanted.start, -1  # every frame that is wanted below was handed out
    try:
        for outcome in outcomes:
            number = outcome.number
            if outcome.frames:
                waiting[outcome.frames[0]] = outcome
            while shown in waiting:
                done = waiting.pop(shown)
                yield done.what, done.pictures
                shown += len(done.frames)
            if shown >= wanted.stop:
                return
        if waiting or wanted.stop < _OPEN_END:
            raise StreamError(f"frame {shown} is missing; encode the video again")
    except StreamError as e:
        for frame, done in sorted(waiting.items()) if fill_gaps else ():
            if gap := frame - shown:  # in orders that leave gaps, a unit has one frame
                yield Lost(number + 1, gap, shown, gap, str(e)), []
            yield done.what, done.pictures
            shown = frame + len(done.frames)
        raise


def _decode_packet(
    codec: UnitCodec, number: int, packet: Packet, unit: schedules.Unit, refs: tuple
) -> CodedUnit:
    """Decodes a unit and checks its symbols. Raises StreamError."""
    if packet.damage:
        raise StreamError(packet.damage)
    if max(packet.qps) >= codec.model.module.qp_rows:
        raise StreamError(
            f"unit {number} has a qp of {max(packet.qps)}, beyond the model; encode the video again"
        )
    try:
        decoded = decode_unit(codec, packet.payload, refs, packet.qps, unit)
    except OtherTables:
        reason = "its coded data does not end with its last symbol"
        raise _mismatch(codec.mode, number, packet, reason) from None
    except StreamError as e:
        raise StreamError(f"{_place(number, packet)} cannot be decoded: {e}") from None
    if symbols_crc(decoded.symbols) != packet.symbols_crc:
        raise _mismatch(codec.mode, number, packet, "the checksum of its symbols is wrong")
    return decoded


def _planned(
    schedule: schedules.Schedule,
    numbered: Iterable[tuple[int, Packet]],
    first_frame: int,
    wanted: range,
) -> Iterator[tuple[schedules.Unit, int, Packet, bool]]:
    """Units of a run with their numbers, packets, and whether they lead to frames that are wanted.

    Raises:
      StreamError: a packet is not what the schedule has in its place.
    """
    group_first = schedules.group_start(schedule, first_frame)
    planned: list[schedules.Unit] = []
    for number, packet in numbered:
        if not planned:
            size = packet.group or len(packet.frames)
            if schedules.in_layers(schedule):
                size = packet.group or schedules.group_size(schedule, group_first)
            if schedule.name == "mixed" and not packet.mode:
                reason = f"{_place(number, packet)} does not say in which mode its group is coded"
                raise StreamError(packet.damage or f"{reason}; encode the video again")
            try:
                planned = schedules.units(schedule, group_first, size, number, packet.mode)
            except NvcError as e:
                reason = f"the stream cannot be decoded in its order: {e}"
                raise StreamError(packet.damage or reason) from None
            needed = _needed(planned, number, wanted)
            if wanted.stop > group_first + size:
                needed |= {number}  # later groups refer to the frame that begins this one
            group_first, first_unit = group_first + size, number
        unit = planned[number - first_unit]
        starts = number == first_unit and not unit.refs
        if unit.frames != packet.frames or packet.random_access != starts:
            raise StreamError(
                packet.damage
                or f"unit {number} does not follow the schedule in the header; encode the video "
                "again"
            )
        yield unit, number, packet, number in needed
        if number - first_unit + 1 == len(planned):
            planned = []


def _needed(planned: list[schedules.Unit], first_unit: int, wanted: range) -> set[int]:
    """Numbers of the units of a group that hold frames that are wanted, or that those refer to."""
    needed: set[int] = set()
    for number, unit in reversed(list(enumerate(planned, first_unit))):
        if number in needed or any(frame in wanted for frame in unit.frames):
            needed |= {number, *unit.refs}
    return needed


# What a wrong symbol in a file that is intact means, and what helps.
_CAUSES = {
    FLOAT: "arithmetic here differs from the encoder's, and the file was written without "
    "protection against that. Decode it on the kind of machine, and with the version of JAX, that "
    "wrote it, or encode the video again without `--calibration off`.",
    CALIBRATED: "arithmetic here differs from the encoder's by more than the file's calibration "
    "margin. Decode it on the kind of machine, and with the version of JAX, that wrote it, or "
    "encode the video again with a larger `--calibration` (`nvc calibrate` measures which).",
    EXACT: "its scales do not depend on the machine, so a processor or its memory, here or where "
    "the file was written, made an error. Decode it again, on another machine if possible.",
}


def _mismatch(mode: int, number: int, packet: Packet, what: str) -> StreamError:
    return StreamError(
        f"{_place(number, packet)} does not decode to what was encoded: {what}. The file is "
        f"intact, but {_CAUSES[mode]}"
    )


def _place(number: int, packet: Packet) -> str:
    return f"unit {number} (frames {', '.join(map(str, packet.frames))})"


def decode_part(
    codec: UnitCodec, stream: Stream, start: AccessPoint | None, wanted: range
) -> Iterator[tuple[Packet | Lost, Iterable[Planes]]]:
    """As `decode`; what cannot be decoded comes as one `Lost` at the end, without pictures."""
    frame = wanted.start
    try:
        for packet, pictures in decode(codec, stream, start, wanted):
            yield packet, pictures
            frame += len(pictures)
    except StreamError as e:
        yield Lost(start.unit if start else 0, None, frame, wanted.stop - frame, str(e)), ()


def decode_concealing(
    codec: UnitCodec, stream: Stream
) -> Iterator[tuple[Packet | Lost, Iterable[Planes]]]:
    """As `decode`, but goes on after a unit that cannot be decoded.

    Only units that refer to it are lost with it, if it is at least clear where it ends; otherwise,
    decoding resumes at the next random-access unit that the index lists. Frames in a row that are
    lost for the same reason come as one `Lost` with the picture before repeated for each of them;
    mid-grey if there was none yet. No exception for bad data.
    """
    picture = _grey(codec)
    for loss, run in groupby(_salvage(codec, stream), key=_one_loss):
        if loss is None:
            for unit, pictures in run:
                yield unit, pictures
                picture = pictures[-1]
        else:
            lost = functools.reduce(_together, (unit for unit, _ in run))
            yield lost, repeat(picture, lost.frames or 0)


def _one_loss(found: tuple[Packet | Lost, list[Planes]]) -> tuple[int, bool] | None:
    """What frames in a row that are lost for the same reason have in common."""
    unit, _ = found
    return (unit.unit, unit.frames is None) if isinstance(unit, Lost) else None


def _together(a: Lost, b: Lost) -> Lost:
    return a._replace(units=a.units + b.units, frames=a.frames + b.frames)


def _salvage(codec: UnitCodec, stream: Stream) -> Iterator[tuple[Packet | Lost, list[Planes]]]:
    """All frames of a stream in display order, as far as anything is known of them."""
    order = stream.header.schedule
    frame = 0  # the first that was not handed out
    stuck, reason = 0, None  # the unit at which there is no going on, and why
    blamed = set()  # units that losses were put down to
    first, slots, missing = 0, {}, None  # see `_outcomes`
    start, broken = None, None

    def packets():
        nonlocal read_units, read_frames
        for number, packet in stream.packets(start, salvage=True):
            read_units = number + 1
            read_frames += len(packet.frames)
            yield number, packet

    def lost_before(next_unit, next_frame):
        frames = max(next_frame - frame, 0)
        # In layers, some of the units in between are of frames that were or will be decoded.
        units = frames if schedules.in_layers(order) else max(next_unit - stuck, 0)
        return Lost(stuck, units, frame, frames, reason), []

    while True:
        read_units, read_frames = (start.unit, start.frame) if start else (0, 0)
        numbered = packets()
        try:
            for number, packet in numbered:
                if reason:
                    first, last_frame = packet.frames[0], max(packet.frames)
                    known = stream.frame_count or read_frames + order.gop
                    possible = frame <= first <= last_frame < known and not packet.damage
                    if not (packet.random_access and possible):
                        continue
                    # Frames that come after it but are shown before it may have their references.
                    begin = max(frame, schedules.group_start(order, first))
                    yield lost_before(number, begin)
                    missing = Lost(stuck, 1, first, 1, reason)
                    frame, reason = begin, None
                    slots = {n: left for n, left in slots.items() if n >= number - order.gop}
                run = chain([(number, packet)], numbered)
                wanted = range(frame, _OPEN_END)
                outcomes = _outcomes(codec, order, run, first, wanted, slots, missing)
                try:
                    for unit, pictures in _in_display_order(outcomes, wanted, fill_gaps=True):
                        if isinstance(unit, Lost):
                            blamed.add(unit.unit)
                            frame += unit.frames
                        frame += len(pictures)
                        yield unit, pictures
                except BrokenStream:
                    raise
                except StreamError as e:
                    stuck, reason = read_units - 1, str(e)
            break
        except BrokenStream as e:
            broken = str(e)
            if not reason:
                stuck, reason = read_units, broken
            start = stream.next_access_point(read_units)
            if start is None:
                break
    if stream.index:
        read_units, read_frames, *_ = stream.index
    elif broken and not read_units > stuck:
        reason = None  # nothing was read of what follows
    if reason and (read_frames > frame or stuck not in blamed):
        yield lost_before(read_units, read_frames)
        frame = max(frame, read_frames)
    if broken and not stream.index:
        yield Lost(read_units, None, frame, None, broken), []


def _grey(codec: UnitCodec) -> Planes:
    chroma = (-(-codec.height // 2), -(-codec.width // 2))
    shapes = (codec.height, codec.width), chroma, chroma
    return Planes(*(np.full(shape, 128, np.uint8) for shape in shapes))
