"""The README's installation, in an environment that holds pip, and what its first line brings."""

import json
import re
import site
import subprocess
import urllib.request
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Not what SGLang brings: the build's own requirements, and the package itself.
OURS = re.compile(
    r"(pip|setuptools|_?distutils|pkg_resources|cmake|wheel|pybind11|dflare|sglang_d|__)"
)


def readme_commands() -> list[str]:
    """The pip commands under the heading of a GPU server."""
    section = (ROOT / "README.md").read_text().split("## Serve a published drafter on a GPU")[1]
    return re.findall(r"^    (pip install .*?)(?:  +#.*)?$", section.split("\n## ")[0], re.M)


@pytest.fixture
def environment(tmp_path) -> Path:
    """An environment after the README's first command: pip, and links to what SGLang needs."""
    folder = tmp_path / "venv"
    venv.create(folder, with_pip=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    for path in Path(site.getsitepackages()[0]).iterdir():
        if not OURS.match(path.name) and not (packages / path.name).exists():
            (packages / path.name).symlink_to(path)
    return folder / "bin/python"


def test_the_readme_installs_sglang_and_this_package_and_nothing_by_hand():
    assert readme_commands() == ["pip install 'sglang==0.5.23'", "pip install ."]


@pytest.mark.long
@pytest.mark.slow
def test_the_package_installs_beside_pip_and_sglang_alone(environment, tmp_path, monkeypatch):
    try:
        urllib.request.urlopen("https://pypi.org/simple/ninja/", timeout=20).close()
    except OSError as error:
        pytest.skip(f"pip's isolated build fetches cmake and ninja: no package index ({error})")
    monkeypatch.setenv("DFLARE_CUDA", "0")
    source = tmp_path / "source"
    subprocess.run(["git", "clone", "-q", ROOT, source], check=True)
    install = [environment, "-m", "pip", "install", "--no-deps", source]
    run = subprocess.run(install, capture_output=True, text=True, timeout=1500)
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"^Successfully installed sglang-dflare-\S+\+cpu$", run.stdout, re.M)
    assert "torch" not in run.stdout.lower(), "a second torch was fetched for the build"

    code = "import json, dflare.ops as ops; print(ops.__file__); print(ops.build_info()['version'])"
    run = subprocess.run([environment, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    file, version = run.stdout.splitlines()
    assert Path(file).is_relative_to(environment.parents[1]) and version.endswith("+cpu")
    (wheel,) = environment.parents[1].glob("lib/python*/site-packages/sglang_dflare-*/WHEEL")
    assert re.search(r"^Tag: py3-none-linux_", wheel.read_text(), re.M)

    # What ends a build is what pip shows of it.
    monkeypatch.setenv("DFLARE_CUDA", "perhaps")
    refused = subprocess.run(install, capture_output=True, text=True, timeout=600)
    assert refused.returncode != 0
    assert "dflare: DFLARE_CUDA is 'perhaps', expected" in refused.stdout + refused.stderr


@pytest.fixture(scope="module")
def wheel() -> Path:
    """What `make wheel` leaves in dist/; CUDA kernels for every architecture take minutes."""
    built = subprocess.run(["make", "wheel"], cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout[-4000:] + built.stderr[-4000:]
    return max((ROOT / "dist").glob("*.whl"), key=lambda file: file.stat().st_mtime)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_wheel_installs_without_a_compiler_and_has_kernels_for_every_gpu(
    wheel, environment, tmp_path
):
    assert re.search(r"\+cu\d+-py3-none-manylinux_2_\d+_x86_64", wheel.name)
    install = [environment, "-m", "pip", "install", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True, capture_output=True, env={"PATH": ""})
    code = (
        "import json, torch; from dflare import ops\n"
        "x, w = torch.randn(3, 64), torch.randn(32, 64)\n"
        "error = (ops.linear(x, w) - x @ w.T).abs().max().item()\n"
        "print(json.dumps([ops.__file__, ops.build_info()['cuda_archs'], error]))"
    )
    done = subprocess.run([environment, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    file, archs, error = json.loads(done.stdout)
    assert Path(file).is_relative_to(environment.parents[1])
    assert archs == ["sm_80", "sm_90", "compute_100", "sm_100", "sm_120"]
    assert error < 1e-4
