"""Quality points: the 64 values of qp, what a bit is worth at each of them, and what it buys."""

import numpy

QP_COUNT = 64
MAX_QP = QP_COUNT - 1
# Rows of the tables of codecs that code some of their pictures better than the rest, by up to 8.
QP_ROWS = QP_COUNT + 8
# Lambda at qp 0 and at the last qp, by what a codec is for (DCVC-UF, arXiv 2606.04410).
# "wide" is for codecs that can come as close to their source as anyone likes.
LAMBDA_RANGE = {"image": (10.0, 2048.0), "video": (1.0, 768.0), "wide": (12.0, 6144.0)}


def lambda_of_qp(qp, kind: str):
    """Lagrangian weight of the distortion: log-linear in qp over `LAMBDA_RANGE[kind]`.

    qp: a number, or an array of any kind.
    """
    low, high = LAMBDA_RANGE[kind]
    return low * (high / low) ** (qp / MAX_QP)


def d_yuv(errors, np=numpy):
    """Mean squared errors of Y, U, V [..., 3], of samples in [0, 1] -> distortion [...].

    Three times their geometric mean with weights 10:1:1 (DCVC-UF, arXiv 2606.04410); a floor of
    1e-6 keeps it from vanishing with any single plane. np: numpy, or jax.numpy in programs.
    """
    return 3 * np.exp(np.log(np.maximum(errors, 1e-6)) @ np.asarray([10.0, 1.0, 1.0]) / 12)
