"""Quality points: the 64 values of qp, and what a bit is worth at each of them."""

QP_COUNT = 64
# Lambda at qp 0 and at the last qp, by what a codec is for (DCVC-UF, arXiv 2606.04410).
LAMBDA_RANGE = {"image": (10.0, 2048.0), "video": (1.0, 768.0)}


def lambda_of_qp(qp, kind: str):
    """Lagrangian weight of the distortion: log-linear in qp over `LAMBDA_RANGE[kind]`.

    qp: a number, or an array of any kind.
    """
    low, high = LAMBDA_RANGE[kind]
    return low * (high / low) ** (qp / (QP_COUNT - 1))
