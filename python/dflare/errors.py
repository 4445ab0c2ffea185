"""Errors that reach the user: each says what was given, what was expected and what to do."""


class DFlareError(Exception):
    """Base of every error that this package raises on purpose."""


class CheckpointError(DFlareError):
    """A drafter checkpoint, or a drafter and target that do not fit together."""


class UnsupportedError(DFlareError):
    """A configuration, target or SGLang version that this package does not support."""
