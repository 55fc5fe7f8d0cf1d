"""Motion fields: what a unit says about where its blocks are found in a reference."""

BLOCK = 8  # pixels that share a vector, in each direction
PRECISION = 4  # vector units per pixel
MAX_VECTOR = 2047  # of each component, in vector units
