"""How fast and how tight the host entropy coder is, beside constriction on the same symbols.

Symbols are drawn from 64 Gaussian tables, scales 0.11 to 32 in equal ratios, under two mixes of
tables: all equally often (about 3.1 bits per symbol), and mostly narrow ones, as in a P picture at
a low rate (about 0.45). constriction (Bamler, arXiv 2201.01741) is run twice: with its own
per-symbol `QuantizedGaussian`, the way neural codecs use it, and with one `Categorical` model per
table on symbols grouped by table beforehand (the grouping is not timed, so this flatters it).
"""

import statistics
import time
from collections.abc import Callable

import numpy as np

from nvc_jax.entropy import coder
from nvc_jax.entropy.freeze import gaussian_tables
from nvc_jax.entropy.tables import CdfTables

LEVELS = 64
SCALES = np.geomspace(0.11, 32.0, LEVELS)
NARROW_MIX = 8.4  # mean table index of the mix of mostly narrow tables


def _draw(symbols: int, narrow: bool) -> tuple[np.ndarray, np.ndarray]:
    """(symbols int16, table index uint16), both [symbols]."""
    rng = np.random.default_rng(0)
    if narrow:
        index = np.minimum(LEVELS - 1, rng.exponential(NARROW_MIX, symbols)).astype(np.uint16)
    else:
        index = rng.integers(0, LEVELS, symbols, np.uint16)
    return np.round(rng.normal(size=symbols) * SCALES[index]).astype(np.int16), index


def _our_jobs(symbols, index, prepared) -> tuple[dict[str, Callable], bytes]:
    steps = [(symbols, index)]
    payload = coder.encode(steps, prepared)
    buffer = np.zeros((len(payload) + 3) // 4 * 4, np.uint8)
    buffer[: len(payload)] = np.frombuffer(payload, np.uint8)

    def encode(threads):
        coder.encode(steps, prepared, threads=threads)

    def decode(threads):
        state = coder.begin_decode(buffer, len(payload))
        decoded, state = coder.decode_step(buffer, state, index, prepared, threads=threads)
        coder.finish_decode(buffer, state)
        return decoded

    if not np.array_equal(decode(1), symbols):
        raise AssertionError("the coder did not return what it was given")
    jobs = {}
    for threads, name in ((1, "1_thread"), (2, "2_threads")):
        jobs[f"encode_{name}"] = lambda threads=threads: encode(threads)
        jobs[f"decode_{name}"] = lambda threads=threads: decode(threads)
    return jobs, payload


def _constriction_jobs(symbols, index, tables: CdfTables) -> tuple[dict[str, Callable], dict]:
    """Jobs and compressed sizes in bytes of both ways to use constriction; empty without it."""
    try:
        import constriction
    except ImportError:
        print("constriction is not installed, so there is no comparison: pip install constriction")
        return {}, {}
    stream = constriction.stream
    values, deviations = symbols.astype(np.int32), SCALES[index]
    means = np.zeros_like(deviations)
    limit = int(np.abs(values).max()) + 1
    gaussian = stream.model.QuantizedGaussian(-limit, limit)
    groups = []
    for t in range(LEVELS):
        entries = tables.size[t] - 1
        frequency = np.diff(tables.cdf[t, : entries + 1].astype(np.float64))
        place = values[index == t] - tables.offset[t]
        model = stream.model.Categorical(frequency / frequency.sum(), perfect=False)
        # The few values outside a table would be escapes; here they count as its nearest entry.
        groups.append((np.clip(place, 0, entries - 1).astype(np.int32), model))

    def encode_gaussian():
        ans = stream.stack.AnsCoder()
        ans.encode_reverse(values, gaussian, means, deviations)
        return ans.get_compressed()

    def encode_grouped():
        ans = stream.stack.AnsCoder()
        for place, model in reversed(groups):
            ans.encode_reverse(place, model)
        return ans.get_compressed()

    coded_gaussian, coded_grouped = encode_gaussian(), encode_grouped()

    def decode_gaussian():
        stream.stack.AnsCoder(coded_gaussian).decode(gaussian, means, deviations)

    def decode_grouped():
        ans = stream.stack.AnsCoder(coded_grouped)
        for place, model in groups:
            ans.decode(model, len(place))

    jobs = {
        "constriction_gaussian_encode": encode_gaussian,
        "constriction_gaussian_decode": decode_gaussian,
        "constriction_grouped_encode": encode_grouped,
        "constriction_grouped_decode": decode_grouped,
    }
    sizes = {"gaussian": coded_gaussian.nbytes, "grouped": coded_grouped.nbytes}
    return jobs, sizes


def _measure(jobs: dict[str, Callable], repeats: int) -> dict[str, list[float]]:
    """Seconds of each run; the jobs take turns, so that a busy moment hits all of them."""
    seconds = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, job in jobs.items():
            begin = time.perf_counter()
            job()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def benchmark(symbols: int = 2_000_000, repeats: int = 5) -> dict:
    """Measures, prints a table, and returns the numbers.

    Args:
      symbols: how many symbols to code in each of the two mixes.
      repeats: runs of each measurement.

    Returns:
      {"symbols", "repeats", "mixes": {"uniform": numbers, "narrow": numbers}}; the numbers are
      "bits_per_symbol" (ideal), "payload_bytes", "overhead_percent" (of the payload over the
      ideal), for each measurement "<name>_msymbols_per_s" (best run) and
      "<name>_median_msymbols_per_s", and, with constriction, its sizes and
      "<direction>_1_thread_over_constriction_gaussian" (ratios of best runs).
    """
    tables = gaussian_tables(SCALES)
    prepared = coder.prepare(tables)
    result = {"symbols": symbols, "repeats": repeats, "mixes": {}}
    for mix in ("uniform", "narrow"):
        drawn, index = _draw(symbols, mix == "narrow")
        ideal_bytes = coder.code_length_bits([(drawn, index)], prepared) / 8
        jobs, payload = _our_jobs(drawn, index, prepared)
        others, other_bytes = _constriction_jobs(drawn, index, tables)
        seconds = _measure(jobs | others, repeats)

        numbers = {
            "bits_per_symbol": 8 * ideal_bytes / symbols,
            "payload_bytes": len(payload),
            "overhead_percent": 100 * (len(payload) / ideal_bytes - 1),
        }
        for name, runs in seconds.items():
            numbers[f"{name}_msymbols_per_s"] = symbols / min(runs) / 1e6
            numbers[f"{name}_median_msymbols_per_s"] = symbols / statistics.median(runs) / 1e6
        for name, size in other_bytes.items():
            numbers[f"constriction_{name}_bytes"] = size
        if others:
            for direction in ("encode", "decode"):
                numbers[f"{direction}_1_thread_over_constriction_gaussian"] = min(
                    seconds[f"constriction_gaussian_{direction}"]
                ) / min(seconds[f"{direction}_1_thread"])
        result["mixes"][mix] = numbers
        _print(mix, numbers, ideal_bytes)
    return result


def _print(mix: str, numbers: dict, ideal_bytes: float) -> None:
    print(f"\n{mix} mix of tables, {numbers['bits_per_symbol']:.2f} bits per symbol")
    print(f"{'best (median), million symbols/s':34}{'encode':>14}{'decode':>14}{'size':>10}")
    rows = [("nvc_jax, 1 thread", "{}_1_thread", "payload_bytes")]
    rows += [("nvc_jax, 2 threads", "{}_2_threads", "payload_bytes")]
    if "constriction_gaussian_bytes" in numbers:
        rows += [
            ("constriction, Gaussian", "constriction_gaussian_{}", "constriction_gaussian_bytes"),
            ("constriction, grouped", "constriction_grouped_{}", "constriction_grouped_bytes"),
        ]
    for label, name, size in rows:
        cells = ""
        for direction in ("encode", "decode"):
            key = name.format(direction)
            best = numbers[f"{key}_msymbols_per_s"]
            median = numbers[f"{key}_median_msymbols_per_s"]
            cells += f"{f'{best:.1f} ({median:.1f})':>14}"
        print(f"{label:34}{cells}{100 * (numbers[size] / ideal_bytes - 1):>+9.3f}%")
    if "encode_1_thread_over_constriction_gaussian" in numbers:
        encode, decode = (
            numbers[f"{direction}_1_thread_over_constriction_gaussian"]
            for direction in ("encode", "decode")
        )
        print(
            f"{'1 thread : constriction, Gaussian':34}{f'{encode:.0f}x':>14}{f'{decode:.0f}x':>14}"
        )
