"""The errors that trackkit raises on purpose: each message names the file or value and says what to
do.
"""

from __future__ import annotations


class TrackkitError(ValueError):
    """Base of all errors that a user can mend; the command line prints them without a traceback."""


class DataError(TrackkitError):
    """A data set, sequence, frame, label file or box that cannot be used as it is."""


class CheckpointError(TrackkitError):
    """A checkpoint or result that is missing, damaged, or of another tracker or version."""
