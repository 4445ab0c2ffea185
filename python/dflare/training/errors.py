"""What can go wrong in data generation and training, by what the user would change."""

from dflare.errors import DFlareError


class ConfigError(DFlareError):
    """A training configuration that makes no sense, or does not fit the target."""


class DataError(DFlareError):
    """Training data that cannot be read or does not fit the target."""


class TrainingError(DFlareError):
    """A run that cannot go on: the loss is not finite, or the disk is full."""
