"""Starts a codec's pixel path as a block-transform codec, so that training need not find one.

A freshly drawn network spends its first tens of thousands of steps on learning that low frequencies
matter. Here the linear layers between pixels and latent start as what classical codecs use instead:
8x8 cosine transforms, sums and differences of the two frames of a pair, Haar steps from /8 to /16,
and the inverses on the way back; the residual blocks in between start close to the identity. A
little of each layer's own random values stays. The method is ours; the transforms are
textbook material (Ahmed, Natarajan, Rao 1974; Haar 1910).
"""

import re
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from nvc_jax.errors import NvcError

RANDOM_SHARE = 0.03
RESIDUAL_SHARE = 0.1
PIXEL_PATH = ("feature_adaptor", "patch", "encoder", "up", "decoder", "recon_head", "pixels")
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


def _cosines(side: int, atom: Atom) -> np.ndarray:
    """Orthonormal cosine basis picture [side, side]."""
    x = np.arange(side)
    waves = [
        np.cos(np.pi * (x + 0.5) * k / side) * (2 / side if k else 1 / side) ** 0.5
        for k in (atom.row, atom.column)
    ]
    return np.outer(*waves)


def _analysis(atoms: list[Atom], frames: int) -> np.ndarray:
    """Pixels of one frame or a pair to atoms: [frames * 192, atoms]."""
    kernel = np.zeros((frames, 3, 64, len(atoms)))
    for i, atom in enumerate(atoms):
        kernel[:, atom.plane, :, i] = _cosines(8, atom).reshape(64) / np.sqrt(frames)
        if atom.difference:
            kernel[1] *= np.where(np.arange(len(atoms)) == i, -1, 1)
    return kernel.reshape(frames * 192, len(atoms))


def _haar(index: int) -> np.ndarray:
    """Signs of the 2x2 Haar pictures, orthonormal: [row, column]."""
    row, column = divmod(index, 2)
    return np.outer([1, 1 - 2 * row], [1, 1 - 2 * column]) / 2


def _order(atom: Atom, haar: int) -> tuple[int, int]:
    """Row and column order of a Haar combination of an atom's neighbours."""
    row, column = divmod(haar, 2)
    return 2 * atom.row + row, 2 * atom.column + column


def _latents(atoms: list[Atom], count: int) -> list[tuple[int, int]]:
    """(number of the atom, Haar index) of the `count` strongest combinations at /16."""

    def penalty(latent):
        atom, haar = atoms[latent[0]], latent[1]
        return _penalty(atom, *_order(atom, haar))

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


def _uni_lvc_kernels(cfg) -> dict[str, np.ndarray]:
    atoms = _atoms(cfg.width, temporal=False)
    down, up = _latent_kernels(atoms, cfg.y)
    # But for the half-width form, the block after the sub-pixels adds its input twice.
    gain = 1.0 if cfg.form == "uf2" else 0.5
    return {
        "patch/adaptor/dense": _analysis(atoms, 1),
        "latent/conv": down,
        "up/subpixel/dense": up * gain,
        "pixels/adaptor/dense": _analysis(atoms, 1).T,
    }


def _intra_kernels(cfg) -> dict[str, np.ndarray]:
    sides = {"patch": "encoder", "latent": "encoder", "up": "decoder", "pixels": "decoder"}
    return {f"{sides[n.split('/')[0]]}/{n}": k for n, k in _uni_lvc_kernels(cfg).items()}


def _small_atoms(count: int, side: int) -> list[Atom]:
    return [a for a in _atoms(3 * 64, temporal=False) if max(a[1:3]) < side][:count]


def _brhvc_kernels(config) -> dict[str, np.ndarray]:
    """For patches of 2x2 pixels; the encoder sees what the prediction leaves of a picture."""
    cfg = config.inter
    w1, w2, w3 = cfg.widths
    if cfg.patch != 2 or not cfg.direct:
        raise NvcError("transform_start serves BRHVC only with `patch` 2 and `direct`")
    fine, middle = _small_atoms(min(w1, cfg.tail, cfg.unet[0]), 2), _small_atoms(w2, 4)

    # Patches [3 planes, 2 rows, 2 columns] at half size to 4x4 cosines at a quarter, and back to
    # 2x2 cosines at half size.
    enter = np.zeros((3, 3, 12 + w1, w2))
    back = np.zeros((2 * w2, cfg.tail, 2, 2))
    for i, atom in enumerate(middle):
        cells = _cosines(4, atom).reshape(2, 2, 2, 2).transpose(0, 2, 1, 3)  # [R, C, r, c]
        enter[1:, 1:, 4 * atom.plane : 4 * atom.plane + 4, i] = cells.reshape(2, 2, 4)
        for k, small in enumerate(fine):
            if small.plane == atom.plane:
                back[i, k] = np.einsum("RCrc,rc->RC", cells, _cosines(2, small))
    pixels = np.zeros((3, 3, w1, 12))
    for k, small in enumerate(fine):
        pixels[1, 1, k, 4 * small.plane : 4 * small.plane + 4] = _cosines(2, small).reshape(4)
    # Haar steps from there to 1/8 and 1/16.
    coarse = _latents(middle, w3)
    down1, up1 = _latent_kernels(middle, w3)
    ranked = [Atom(middle[i].plane, *_order(middle[i], haar)) for i, haar in coarse]
    down2, up2 = _latent_kernels(ranked, cfg.y)

    def rows(kernel, count):
        """With further inputs that are ignored: 3x3, or the middle of a sub-pixel layer."""
        if kernel.ndim == 2:
            kernel = np.pad(kernel[None, None], ((1, 1), (1, 1), (0, 0), (0, 0)))
        return np.pad(kernel, ((0, 0), (0, 0), (0, count - kernel.shape[2]), (0, 0)))

    kernels = {
        "inter/encoder/conv0/conv": enter,
        "inter/encoder/conv1/conv": rows(down1, 2 * w2),
        "inter/encoder/latent/conv": rows(down2, 2 * w3),
        "inter/decoder/up0/subpixel/conv": rows(up2, cfg.y),
        "inter/decoder/up2/subpixel/conv": rows(up1, 2 * w3),
        "inter/decoder/up3/subpixel/conv": rows(back.reshape(2 * w2, -1), 2 * w2),
        "inter/decoder/join/conv": rows(_pass(cfg.tail, w1), cfg.tail + w1),
        "inter/decoder/pixels/conv": pixels,
    }
    for i in range(2):
        kernels[f"inter/decoder/unet{i}/up0/mix/adaptor/dense"] = _pass(2 * cfg.unet[0], w1)
    return kernels


KERNELS = {
    "ui2c": _ui2c_kernels,
    "intra": _intra_kernels,
    "brhvc": _brhvc_kernels,
    "uni_lvc": _uni_lvc_kernels,
}
# Beside the pixel path: a decoded flow starts close to the guessed one.
QUIET = re.compile(
    r"inter/((en|de)coder/(res\d/conv1/conv|.*(mix/point_out|ffn/project)/dense)"
    r"|motion_decoder/flow\d/conv)/kernel"
)


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
        if (branch_end and name.startswith(PIXEL_PATH)) or QUIET.fullmatch(name):
            flat[name] = np.asarray(RESIDUAL_SHARE * value)
    return traverse_util.unflatten_dict(flat, sep="/")
