"""Errors that are meant to be read by people.

Everything a user can do wrong (a missing file, a corrupt stream, the wrong weights) ends in one of
these; the command line prints the message and exits with status 2. Anything else that escapes is a
bug of ours.
"""


class NvcError(Exception):
    """Bad input or usage: the message says what was wrong, where, and what to do."""


class StreamError(NvcError):
    """A `.nvc` stream is damaged, truncated, or not one at all."""


class OtherTables(StreamError):
    """A unit was coded under other probability tables than those it was decoded with."""


class WeightsMismatch(StreamError):
    """A stream was written with other weights than the model that is to decode it."""
