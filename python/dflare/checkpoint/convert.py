"""Rewrite a drafter of any dialect in AngelSlim's."""

from pathlib import Path

from dflare.checkpoint.config import DraftConfig
from dflare.checkpoint.folder import find_folder
from dflare.checkpoint.reader import read_config
from dflare.checkpoint.save import check_destination, save_checkpoint
from dflare.checkpoint.tensors import load_tensors
from dflare.errors import CheckpointError


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    block_size: int | None = None,
    force: bool = False,
) -> DraftConfig:
    """Convert a checkpoint; weights keep their bits, shards become one file.

    Args:
        source: Folder or hub id, any dialect.
        destination: Folder to write.
        block_size: B, for a source whose config does not say (AngelSpec's).
        force: Replace a checkpoint that is there already.

    Returns:
        The configuration written.

    Raises:
        CheckpointError: A bad source, or a destination in use.
    """
    folder = find_folder(source)
    if Path(destination).expanduser().resolve() == folder.resolve():
        raise CheckpointError(f"{destination}: is the source itself; choose another folder")
    check_destination(destination, force=force)
    config = read_config(folder, block_size=block_size)
    tensors = load_tensors(folder, config)
    written = config.model_copy(update={"dialect": "angelslim"})
    save_checkpoint(destination, written, tensors, force=force)
    return written
