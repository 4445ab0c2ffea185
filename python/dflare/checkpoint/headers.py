"""Read what safetensors files hold, without reading a weight."""

import json
import struct
from dataclasses import dataclass
from pathlib import Path

from dflare.checkpoint.folder import find_folder, read_json
from dflare.checkpoint.problems import name_some, raise_problems
from dflare.errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "I64": "int64"}


@dataclass(frozen=True)
class TensorHeader:
    """What a safetensors file says of a tensor.

    Attributes:
        name: As the file has it, in the checkpoint's dialect.
        shape: Sizes.
        dtype: bfloat16, float16, float32 or int64, else safetensors' own name (F8_E4M3, I32, ...).
        file: Where it lies.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path


def read_headers(path: str | Path) -> dict[str, TensorHeader]:
    """Read the headers of a checkpoint's safetensors files.

    Args:
        path: Folder or hub id; one file, or several with or without an index.

    Returns:
        Headers by the name in the file.

    Raises:
        CheckpointError: A file is missing, cut short or not safetensors, or a name occurs twice.
    """
    folder = find_folder(path)
    files = _weight_files(folder)
    headers: dict[str, TensorHeader] = {}
    problems = []
    for file in files:
        try:
            found = _read_header(file)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        for name in sorted(headers.keys() & found.keys()):
            problems.append(
                f"`{name}` is in both {headers[name].file.name} and {file.name}; remove one"
            )
        headers |= found
    raise_problems(folder, problems)
    return headers


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX_FILE
    if not index.exists():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise CheckpointError(
                f"{folder}: no *.safetensors file, expected model.safetensors; fetch it again, or "
                "save the weights as safetensors"
            )
        return files
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: `weight_map` is empty or missing; fetch the file again")
    files = [folder / str(name) for name in sorted(set(weight_map.values()))]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise CheckpointError(
            f"{folder}: {INDEX_FILE} names files that are not there: {name_some(missing)}; "
            "fetch them again"
        )
    return files


def _read_header(file: Path) -> dict[str, TensorHeader]:
    """Parse a safetensors header: its length (u64), then JSON, then the weights."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise CheckpointError(
                f"{file.name} is cut short or not safetensors ({size} bytes, its header alone "
                f"would need {8 + length}); fetch it again"
            )
        try:
            content = json.loads(stream.read(length))
            entries = {key: value for key, value in content.items() if key != "__metadata__"}
            end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
            headers = {
                name: TensorHeader(
                    name,
                    tuple(entry["shape"]),
                    _DTYPES.get(entry["dtype"], entry["dtype"]),
                    file,
                )
                for name, entry in entries.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{file.name} has no safetensors header ({error}); fetch it again"
            ) from error
    if 8 + length + end != size:
        raise CheckpointError(
            f"{file.name} has {size} bytes, expected {8 + length + end}: it is cut short or "
            "damaged; fetch it again"
        )
    return headers
