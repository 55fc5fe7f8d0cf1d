"""Neural video codecs in JAX whose bitstreams decode anywhere."""

__version__ = "0.1.0"
