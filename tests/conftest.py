"""Shared by the tests: small codecs that nobody trained but that code something, and clips."""

import functools
import os
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

# As in the commands, and before anything imports JAX: compiled programs are kept, and nothing runs
# behind a program's back that calls back to the host.
os.environ.setdefault("JAX_CPU_ENABLE_ASYNC_DISPATCH", "0")
from nvc_jax.launch import setup

setup()

import hypothesis  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from flax import traverse_util  # noqa: E402

from nvc_jax import unit_program  # noqa: E402
from nvc_jax.data.synthetic import moving_texture  # noqa: E402
from nvc_jax.entropy.calibration import FLOAT  # noqa: E402
from nvc_jax.models import registry, released  # noqa: E402
from nvc_jax.nn.blocks import quality_ramp  # noqa: E402
from nvc_jax.video import Planes, VideoInfo, write_video  # noqa: E402

# No deadline: the first example compiles, and other processes compute beside this one.
hypothesis.settings.register_profile("nvc", deadline=None)
hypothesis.settings.load_profile("nvc")

MEMORY_MAPS = Path("/proc/self/maps")  # a line each
MEMORY_MAPS_LIMIT = Path("/proc/sys/vm/max_map_count")


@pytest.fixture(autouse=True)
def forget_programs():
    """Forget compiled programs before they take all the memory maps that Linux allows a process.

    Every program takes some; a whole suite in one process takes more than the usual 65,530, and
    then the next one that is compiled, or read from the cache, ends in a segmentation fault.
    """
    yield
    if MEMORY_MAPS.exists() and MEMORY_MAPS_LIMIT.exists():
        with MEMORY_MAPS.open("rb") as maps:
            if 2 * sum(1 for _ in maps) > int(MEMORY_MAPS_LIMIT.read_text()):
                jax.clear_caches()


SIZES = {
    "ui2c": dict(
        width=16, y=16, z=8, recon=16, prior=16, temporal=16, extractor=(1, 1), encoder=1,
        decoder=1, recon_blocks=1, fusion=1, spatial=1, subpixel=1, form="uf2", latent_gain=True,
        scale_head=16,
    ),
    "intra": dict(
        width=16, y=16, z=8, prior=16, spatial_width=16, encoder=1, decoder=1, fusion=1, spatial=1,
        offset=0.5, form="uf", latent_gain=True, scale_head=16,
    ),
    "light": dict(
        width=16, z=8, encoder=1, context=1, decoder=1, fusion=1, spatial=1, scale_head=16,
        form="uf2",
    ),
}  # fmt: skip
B_FRAMES = dict(  # of "brhvc"
    intra=SIZES["intra"] | dict(scale_head=0),
    inter=dict(
        widths=(8, 8, 8), y=16, motion=8, guess=8, tail=8, groups=2, offsets=2, unet=(8, 8, 8),
        unet_blocks=1, flow=(8, 8), flow_kernel=3, patch=2, flow_halvings=1, family="laplace",
        direct=False,
    ),
)  # fmt: skip
ANY_ORDER = dict(  # of "uni_lvc"
    width=16, y=16, z=8, prior=16, spatial_width=16, encoder=2, decoder=2, fusion=1, spatial=1,
    tokens=16, heads=2, groups=2, window=3, temporal=16, judge=8, form="uf2",
    scale_head=16,
)  # fmt: skip
HEM = dict(  # of "light", as its size "full"
    intra=SIZES["intra"],
    inter=dict(
        widths=(8, 8, 8), y=16, z=8, motion="flow", motion_width=8, tail=8, fusion=(16,),
        spatial=(16,), motion_fusion=(16,), motion_spatial=(16,), unet=(8, 8, 8), unet_blocks=1,
        flow=(8, 8), flow_kernel=3, direct=False, scale_head=16,
    ),
)  # fmt: skip
HEM_SEARCHED = HEM | dict(inter=HEM["inter"] | dict(motion="searched", direct=True))
PREDICTED = dict(  # of "dcvc_rt"
    intra=B_FRAMES["intra"], inter=SIZES["ui2c"] | dict(frames=1, scale_head=0)
)


def random_parameters(module, seed: int = 0) -> dict:
    """Parameters under which latents fill several tables, and at high qp leave them all."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: registry.init(module, jax.random.key(0)))
    params = {}
    for path, leaf in traverse_util.flatten_dict(shapes).items():
        name = "/".join(path)
        if path[-1] == "kernel":
            spread = 0.06 if path[-2:] == ("dense", "kernel") and path[-3][-4:] == "_out" else 1.0
            spread *= 2 / (leaf.shape[-1] + np.prod(leaf.shape[:-1]))
            value = rng.normal(0, spread**0.5, leaf.shape)
            louder = {"latent": 4.0, "params": 0.3, "pixels": 0.15, "feature": 0.5}
            value *= np.prod([louder.get(part, 1.0) for part in path])
        elif path[-1] == "table":
            value = rng.uniform(0.8, 1.2, leaf.shape)
            if "latent" in name:
                value *= np.asarray(quality_ramp(np.arange(leaf.shape[0])))[:, None]
        elif path[-1] == "anchors":
            value = np.geomspace(1, 8, 4)
        elif path[-1] == "basic":
            value = rng.uniform(0.8, 1.2, leaf.shape)
        elif path[-1] == "chain":
            value = rng.normal(0.5, 0.3, leaf.shape)
        elif path[0] == "prior_fusion" and "transform" in shapes:  # "light": logarithms of scales
            value = rng.normal(0, 1.5, leaf.shape)
        else:
            value = rng.normal(0, 0.1, leaf.shape) + ("params" in name)
        params[path] = np.asarray(value, np.float32)
    return traverse_util.unflatten_dict(params)


def noise(width: int, height: int, frames: int, seed: int = 0) -> list[Planes]:
    """Pictures of independent samples, the hardest content there is."""
    rng = np.random.default_rng(seed)
    chroma = (-(-height // 2), -(-width // 2))
    shapes = ((height, width), chroma, chroma)
    return [
        Planes(*(rng.integers(0, 256, shape, np.uint8) for shape in shapes)) for _ in range(frames)
    ]


def write_clip(path: Path, pictures: Iterable[Planes]) -> None:
    """A video file of 25 pictures a second."""
    pictures = list(pictures)
    height, width = pictures[0].y.shape
    with write_video(path, VideoInfo(width, height, Fraction(25))) as out:
        for picture in pictures:
            out.write(picture)


def assert_same_pictures(some, others) -> None:
    assert len(some) == len(others)
    for number, (one, other) in enumerate(zip(some, others, strict=True)):
        for plane, a, b in zip("yuv", one, other, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=f"picture {number}, plane {plane}")


# Name of a small model -> (codec, size): codecs of `SIZES`, and others. "single" is UI2C with one
# frame per unit, "brhvc" has B-frames, "dcvc_rt" predicted frames after those of an intra codec,
# "light" searches motion, "hem" sends flows or, "hem_searched", does likewise, "uni_lvc" codes in
# any order.
MODELS = {name: (name, size) for name, size in SIZES.items()} | {
    "single": ("ui2c", SIZES["ui2c"] | {"frames": 1}),
    "brhvc": ("brhvc", B_FRAMES),
    "dcvc_rt": ("dcvc_rt", PREDICTED),
    "hem": ("light", HEM),
    "hem_searched": ("light", HEM_SEARCHED),
    "uni_lvc": ("uni_lvc", ANY_ORDER),
}


class ModelFiles(Mapping):
    """Name in `MODELS` -> file of a released model with random weights, made when asked for."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __getitem__(self, name: str) -> Path:
        codec_name, size = MODELS[name]
        path = self.folder / f"tiny-{name}.safetensors"
        if not path.exists():
            module = registry.build(codec_name, size)
            frozen = released.freeze(f"tiny-{name}", codec_name, module, random_parameters(module))
            released.save(path, *frozen)
        return path

    def __iter__(self):
        return iter(MODELS)

    def __len__(self):
        return len(MODELS)


@pytest.fixture(scope="session")
def model_files(tmp_path_factory) -> ModelFiles:
    return ModelFiles(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def quick_compilation():
    """For modules that mostly compile: XLA is told to make little effort.

    What users get is compiled with all its effort where results depend on it: in tests of real
    clips, of other platforms, of the commands, and in the demo.
    """
    quick = {"jax_disable_most_optimizations": True, "jax_default_prng_impl": "unsafe_rbg"}
    before = {name: jax.config.values[name] for name in quick}
    for name, value in quick.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def small_models_shipped(model_files, monkeypatch):
    """The package ships the small models "ui2c" and "intra" instead of its own."""
    monkeypatch.setattr(released, "SHIPPED", model_files["ui2c"].parent)
    assert model_files["intra"].parent == released.SHIPPED


@pytest.fixture(scope="session")
def prepared(model_files):
    """prepared(name in `MODELS`, width, height, ...): as `unit_program.prepare`, compiled once.

    Margins are inputs of a program, so that codecs that differ in nothing else share one.
    """
    prepare = unit_program.prepare

    @functools.cache
    def model_of(name):
        return released.load(model_files[name])

    @functools.cache
    def compiled(name, width, height, mode):
        return prepare(model_of(name), width, height, mode)

    def cached(name, width, height, mode=None, margin_exponents=()):
        mode = unit_program.default_mode(model_of(name)) if mode is None else mode
        unit_codec = compiled(name, width, height, mode)
        if margin_exponents:
            unit_codec = unit_program.with_margins(unit_codec, margin_exponents)
        return unit_codec

    return cached


@pytest.fixture
def prepare_once(prepared, monkeypatch):
    """Commands run inside the test share its compiled programs, which take seconds to compile."""
    prepare = unit_program.prepare

    def cached(model, *args):
        name = model.name.removeprefix("tiny-")
        return prepared(name, *args) if name in MODELS else prepare(model, *args)

    monkeypatch.setattr(unit_program, "prepare", cached)


class LargeClip(NamedTuple):
    model_file: Path
    codec: unit_program.UnitCodec
    pictures: list[Planes]


@pytest.fixture(scope="session")
def large(tmp_path_factory) -> LargeClip:
    """Units of 200 kB, under a model whose scales are about those of its latents.

    Payload and indices are more than 100 kB, from where on XLA copies arguments of a callback in
    the background.
    """
    module = registry.build("ui2c", SIZES["ui2c"] | {"y": 96})
    params, y = random_parameters(module), module.cfg.y
    params["prior_fusion"]["params"]["dense"]["bias"][y : 2 * y] = 10
    params["spatial_prior"]["params"]["dense"]["bias"][:y] = 10
    for step in range(2):
        params["scale_head"][f"levels_{step}"]["bias"][:] = 32 / 16
    path = tmp_path_factory.mktemp("large") / "wide-ui2c.safetensors"
    released.save(path, *released.freeze(path.stem, "ui2c", module, params))
    codec = unit_program.prepare(released.load(path), 1280, 720, FLOAT)
    return LargeClip(path, codec, moving_texture(1280, 720, 4))
