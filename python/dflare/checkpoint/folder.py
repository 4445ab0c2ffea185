"""Find a checkpoint's folder, and read the JSON in it."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dflare.errors import CheckpointError

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_DRAFT_FILES = ("*.json", "*.safetensors")


def find_folder(
    path: str | Path, files: Sequence[str] = _DRAFT_FILES, revision: str | None = None
) -> Path:
    """Return the folder of a checkpoint; one that is not local comes from the Hugging Face hub.

    Args:
        path: A folder, or a hub id such as `AngelSlim/Qwen3-4b-dflare`.
        files: Patterns of what to fetch from the hub.
        revision: Branch, tag or commit on the hub; default its main branch.

    Raises:
        CheckpointError: No such folder, and no such repository or no way to reach it.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{path}: this is a file, expected a folder with config.json in it")
    if not _HUB_ID.fullmatch(str(path)):
        raise CheckpointError(
            f"{path}: no such folder; give a folder with config.json and *.safetensors, or the id "
            "of a Hugging Face repository (owner/name)"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(path), revision=revision, allow_patterns=list(files)))
    except OSError as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403, 404):
            reason = (
                "the hub has no such repository or revision, or it is private: check the id, or "
                "log in"
            )
        elif isinstance(error, LocalEntryNotFoundError):
            reason = "the hub cannot be reached and nothing is cached: check the network"
        else:
            reason = "it cannot be downloaded from the hub"
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: no such folder, and {reason} ({cause})") from error


def read_json(file: Path) -> dict[str, Any]:
    """Parse a JSON file that holds one object.

    Raises:
        CheckpointError: Missing, unreadable, not JSON or not an object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{file}: no such file; give a folder with config.json and *.safetensors"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: holds {type(content).__name__}, expected a JSON object")
    return content
