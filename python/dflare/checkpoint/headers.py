"""What safetensors files hold, read without a weight, and whether that is what it should be."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dflare.checkpoint.dialects import layer_of
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


class Expected(NamedTuple):
    """What a tensor should be: sizes, and a dtype, or none where any will do."""

    shape: tuple[int, ...]
    dtype: str | None


class Advice(NamedTuple):
    """What to do about tensors that are missing, unknown, misshapen or of another dtype."""

    missing: str
    unknown: str
    shape: str
    dtype: str = ""


def compare(
    found: Mapping[str, TensorHeader], expected: Mapping[str, Expected], advice: Advice
) -> list[str]:
    """Hold tensors against what they should be, both ways.

    Args:
        found, expected: By the same names; messages use those of the file.
        advice: Ends the sentences.

    Returns:
        A sentence for each problem. Whole layers too few or too many are told by their number, not
        by the names of their tensors.
    """
    there, wanted = _layers(found), _layers(expected)
    problems = []
    if len(there) != len(wanted):
        problems.append(
            f"`num_hidden_layers` is {len(wanted)} and the weights hold {len(there)} layers; "
            "correct config.json, or fetch the weights that belong to it"
        )
    missing = [n for n in expected if n not in found and layer_of(n) not in wanted - there]
    unknown = [
        header.name
        for name, header in found.items()
        if name not in expected and layer_of(name) not in there - wanted
    ]
    if missing:
        problems.append(f"missing tensors: {name_some(missing)}; {advice.missing}")
    if unknown:
        problems.append(f"unknown tensors: {name_some(unknown)}; {advice.unknown}")
    for name, (shape, dtype) in expected.items():
        header = found.get(name)
        if header and header.shape != shape:
            text = f"`{header.name}` is {list(header.shape)}, expected {list(shape)}"
            problems.append(f"{text}{advice.shape}")
        if header and dtype and header.dtype != dtype:
            text = f"`{header.name}` is {header.dtype}, expected {dtype}"
            problems.append(f"{text}{advice.dtype}")
    return problems


def _layers(names: Iterable[str]) -> set[int]:
    return {layer for layer in map(layer_of, names) if layer is not None}


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
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as weights:
            slices = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118
            return {
                name: TensorHeader(
                    name, tuple(x.get_shape()), _DTYPES.get(x.get_dtype(), x.get_dtype()), file
                )
                for name, x in slices.items()
            }
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{file.name} is cut short, damaged or not safetensors ({error}); fetch it again"
        ) from error
