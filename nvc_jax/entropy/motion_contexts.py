"""What decisions of coded motion depend on: contexts and the probabilities that they start from.

Shared by the coder (`nvc_jax.entropy.motion`) and its estimate (`nvc_jax.nn.motion.field_bits`).
"""

import numpy as np

ROOT = 8  # blocks of the largest node, in each direction
CLASSES = 13  # of magnitudes: 0, 1, 2..3, 4..7, ..., up to 2 * MAX_VECTOR
# How far neighbours are apart in a component: 0, 1..2, 3..8, 9..32, more.
SPREAD_LIMITS = (0, 2, 8, 32)
SPREADS = 5

# Where the contexts of each kind of decision begin.
SPLIT = 0  # node sizes 2, 4, 8 x smaller neighbours 0, 1, 2
MOVED = SPLIT + 9  # node sizes 1, 2, 4, 8 x neighbours with "none" 0, 1, 2
MERGE = MOVED + 12  # node sizes
WHICH = MERGE + 4  # the first of 2, the first and second of 3, the first to third of 4 candidates
OTHER = WHICH + 6  # down, across after down as predicted, across after another x spreads
CLASS = OTHER + 3 * SPREADS  # spreads x classes but the first and last
CONTEXTS = CLASS + SPREADS * (CLASSES - 2)
# Probabilities of 1 that estimates start from, in units of 2^-8: fitted to searched fields of
# training clips, kept from the extremes where there was little to fit to.
_CLASS_ROWS = (
    (115, 141, 154, 141, 87, 48, 48, 48, 48, 48, 48),
    (115, 87, 115, 141, 72, 48, 48, 48, 48, 48, 48),
    (184, 141, 102, 115, 87, 48, 48, 48, 48, 48, 48),
    (212, 212, 184, 141, 72, 48, 48, 48, 48, 48, 48),
    (236, 225, 225, 200, 154, 72, 48, 48, 48, 48, 48),
)
INITIAL = np.array(
    (44, 115, 169, 72, 141, 200, 115, 212, 236)
    + 4 * (250, 190, 110)
    + (154, 184, 200, 240)
    + (102, 102, 72, 141, 102, 48)
    + (169, 184, 212, 225, 225, 236, 240, 240, 240, 240, 141, 154, 184, 212, 225)
    + sum(_CLASS_ROWS, ())
)
