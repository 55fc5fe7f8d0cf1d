"""Starts a codec's pixel path as a block-transform codec, so that training need not find one.

A freshly drawn network spends its first tens of thousands of steps on learning that low frequencies
matter. Here the linear layers between pixels and latent start as what classical codecs use instead:
8x8 cosine transforms, sums and differences of the two frames of a pair, Haar steps from /8 to /16,
and the inverses on the way back; the residual blocks in between start close to the identity. A
little of each layer's own random values stays. The method is ours; the transforms are
textbook material (Ahmed, Natarajan, Rao 1974; Haar 1910).
"""

from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from nvc_jax.errors import NvcError

RANDOM_SHARE = 0.03
RESIDUAL_SHARE = 0.1
PIXEL_PATH = ("feature_adaptor", "encoder", "decoder", "recon_head")
# How fast expected energy falls along the axes, as penalties on the order of coefficients.
CHROMA_PENALTY, DIFFERENCE_PENALTY = 4.0, 3.0


class Atom(NamedTuple):
    """A channel at /8: cosine coefficient (row, column) of a plane; difference: of the frames."""

    plane: int
    row: int
    column: int
    difference: bool = False


def _penalty(atom: Atom, row: float, column: float) -> float:
    chroma = CHROMA_PENALTY if atom.plane else 1.0
    return (row**2 + column**2 + 1) * chroma * (DIFFERENCE_PENALTY if atom.difference else 1.0)


def _atoms(count: int, temporal: bool) -> list[Atom]:
    """The `count` coefficients of most expected energy."""
    candidates = [
        Atom(plane, row, column, bool(difference))
        for plane in range(3)
        for row in range(8)
        for column in range(8)
        for difference in range(2 if temporal else 1)
    ]
    return sorted(candidates, key=lambda a: _penalty(a, a.row, a.column))[:count]


def _basis(atom: Atom) -> np.ndarray:
    """Orthonormal cosine basis picture, as the 64 channels that `space_to_depth` gives a plane."""
    x = np.arange(8)
    waves = [np.cos(np.pi * (x + 0.5) * k / 8) * (0.5 if k else 8**-0.5) for k in atom[1:3]]
    return np.outer(*waves).reshape(64)


def _analysis(atoms: list[Atom], frames: int) -> np.ndarray:
    """Pixels of one frame or a pair to atoms: [frames * 192, atoms]."""
    kernel = np.zeros((frames, 3, 64, len(atoms)))
    for i, atom in enumerate(atoms):
        kernel[:, atom.plane, :, i] = _basis(atom) / np.sqrt(frames)
        if atom.difference:
            kernel[1] *= np.where(np.arange(len(atoms)) == i, -1, 1)
    return kernel.reshape(frames * 192, len(atoms))


def _haar(index: int) -> np.ndarray:
    """Signs of the 2x2 Haar pictures, orthonormal: [row, column]."""
    row, column = divmod(index, 2)
    return np.outer([1, 1 - 2 * row], [1, 1 - 2 * column]) / 2


def _latents(atoms: list[Atom], count: int) -> list[tuple[int, int]]:
    """(number of the atom, Haar index) of the `count` strongest combinations at /16."""

    def penalty(latent):
        atom, (row, column) = atoms[latent[0]], divmod(latent[1], 2)
        return _penalty(atom, 2 * atom.row + row, 2 * atom.column + column)

    return sorted(((i, h) for i in range(len(atoms)) for h in range(4)), key=penalty)[:count]


def _latent_kernels(atoms: list[Atom], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Stride-2 convolution [3, 3, atoms, count] and sub-pixel matrix [count, atoms * 4] back."""
    down = np.zeros((3, 3, len(atoms), count))
    up = np.zeros((count, len(atoms), 2, 2))
    for latent, (atom, haar) in enumerate(_latents(atoms, count)):
        down[1:, 1:, atom, latent] = _haar(haar)
        up[latent, atom] = _haar(haar)
    return down, up.reshape(count, -1)


def _pass(inputs: int, outputs: int) -> np.ndarray:
    """The first `outputs` inputs, unchanged; further inputs are ignored."""
    return np.eye(inputs, outputs)


def _ui2c_kernels(cfg) -> dict[str, np.ndarray]:
    atoms = _atoms(cfg.width, temporal=cfg.frames == 2)
    single = _atoms(cfg.recon, temporal=False)
    down, up = _latent_kernels(atoms, cfg.y)
    # A lone frame looks like a pair of equal ones.
    patch = _analysis(atoms, cfg.frames)
    adaptor_i = patch.reshape(cfg.frames, 192, -1).sum(0)
    both = {False: np.zeros((cfg.width, cfg.recon)), True: np.zeros((cfg.width, cfg.recon))}
    for second, kernel in both.items():
        for i, atom in enumerate(atoms):
            target = Atom(atom.plane, atom.row, atom.column)
            if target in single:
                sign = -1 if atom.difference and second else 1
                kernel[i, single.index(target)] = sign / np.sqrt(cfg.frames)
    kernels = {
        "feature_adaptor_i/adaptor/dense": adaptor_i,
        "feature_adaptor_p/dense": _pass(cfg.width, cfg.width),
        "encoder/patch/dense": patch,
        "encoder/blocks/block0/adaptor/dense": _pass(2 * cfg.width, cfg.width),
        "encoder/latent/conv": down,
        "decoder/subpixel/dense": up,
        "decoder/blocks/block0/adaptor/dense": _pass(2 * cfg.width, cfg.width),
        "decoder/feature/dense": _pass(cfg.width, cfg.width),
    }
    for frame in range(cfg.frames):
        kernels |= {
            f"recon_head_{frame}/blocks/block0/adaptor/dense": both[bool(frame)],
            f"recon_head_{frame}/pixels/dense": _analysis(single, 1).T,
        }
    return kernels


def _intra_kernels(cfg) -> dict[str, np.ndarray]:
    atoms = _atoms(cfg.width, temporal=False)
    down, up = _latent_kernels(atoms, cfg.y)
    # But for the half-width form, the block after the sub-pixels adds its input twice.
    gain = 1.0 if cfg.form == "uf2" else 0.5
    return {
        "encoder/patch/adaptor/dense": _analysis(atoms, 1),
        "encoder/latent/conv": down,
        "decoder/up/subpixel/dense": up * gain,
        "decoder/pixels/adaptor/dense": _analysis(atoms, 1).T,
    }


KERNELS = {"ui2c": _ui2c_kernels, "intra": _intra_kernels}


def transform_start(codec: str, cfg: Any, params: dict) -> dict:
    """Params with the pixel path's kernels replaced; for configs with 1x1 sub-pixel layers.

    Raises:
      NvcError: a codec or size for which there is no transform.
    """
    if codec not in KERNELS:
        raise NvcError(f"transform_start does not know '{codec}'; switch it off in the config")
    flat = traverse_util.flatten_dict(params, sep="/")
    for name, kernel in KERNELS[codec](cfg).items():
        old = flat.get(f"{name}/kernel")
        if old is None or old.shape != kernel.shape:
            found = "missing" if old is None else old.shape
            raise NvcError(
                f"transform_start cannot serve this size: {name} is {found} in the model, "
                f"{kernel.shape} in the transform; switch it off in the config"
            )
        flat[f"{name}/kernel"] = (kernel + RANDOM_SHARE * np.asarray(old)).astype(np.float32)
    if codec == "intra":  # its step-size maps start neutral at every quality
        kernel = np.array(flat["prior_fusion/params/dense/kernel"])
        kernel[:, :2] = 0
        flat["prior_fusion/params/dense/kernel"] = kernel
    for name, value in flat.items():
        branch_end = name.endswith(("depth_out/dense/kernel", "point_out/dense/kernel"))
        if branch_end and name.startswith(PIXEL_PATH):
            flat[name] = np.asarray(RESIDUAL_SHARE * value)
    return traverse_util.unflatten_dict(flat, sep="/")
