"""Join what pack_offline.py has cut; needs Python's standard library alone.

    python3 unpack_offline.py UPLOADED DESTINATION

UPLOADED holds parts.json and some of the parts. Repeat the command for every upload: parts that
have arrived stay in DESTINATION, and the status is 3 as long as some are missing. With the last one
everything is unpacked, and DESTINATION/env.sh sets what Python needs to find it.
"""

import hashlib
import json
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

MISSING = 3  # exit status while parts are missing


def collect(uploaded: Path, parts: Path) -> list[str]:
    """Keep the parts that have arrived whole.

    Args:
        uploaded: Folder with parts.json and some parts.
        parts: Where they are kept.

    Returns:
        Names of the parts that are still missing.
    """
    parts.mkdir(parents=True, exist_ok=True)
    shutil.copy(uploaded / "parts.json", parts)
    expected = json.loads((parts / "parts.json").read_text(encoding="utf-8"))
    missing = []
    for name, digest in expected.items():
        for place in (uploaded / name, parts / name):
            if place.exists() and hashlib.sha256(place.read_bytes()).hexdigest() == digest:
                if place.parent != parts:
                    shutil.copy(place, parts)
                break
        else:
            missing.append(name)
    return missing


def unpack(parts: Path, destination: Path) -> None:
    """Join all parts: sources into DESTINATION, wheels into DESTINATION/site."""
    names = json.loads((parts / "parts.json").read_text(encoding="utf-8"))
    joined = destination / "joined.tar"
    with joined.open("wb") as whole:
        for name in names:
            whole.write((parts / name).read_bytes())
    with tarfile.open(joined) as archive:
        archive.extractall(destination, filter="data")
    joined.unlink()
    for wheel in sorted((destination / "wheels").glob("*.whl")):
        with zipfile.ZipFile(wheel) as content:
            content.extractall(destination / "site")
    here = destination.resolve()
    (destination / "env.sh").write_text(
        f"cd '{here}'\nexport PYTHONPATH='{here}/python:{here}/site' DFLARE_CACHE='{here}/cache'\n",
        encoding="utf-8",
    )


def main() -> None:
    """Collect, and unpack when nothing is missing."""
    if len(sys.argv) != 3 or not Path(sys.argv[1], "parts.json").is_file():
        sys.exit("usage: python3 unpack_offline.py UPLOADED DESTINATION; UPLOADED has parts.json")
    uploaded, destination = Path(sys.argv[1]), Path(sys.argv[2])
    missing = collect(uploaded, destination / "parts")
    if missing:
        print(f"still missing, or damaged: {', '.join(missing)}; upload them and repeat")
        sys.exit(MISSING)
    unpack(destination / "parts", destination)
    print(f"unpacked; now: . {destination}/env.sh")


if __name__ == "__main__":
    main()
