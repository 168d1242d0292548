"""The wheel and the sdist hold what a user needs, and nothing at the top but `longseq`."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An sdist of the tree, and a wheel made from that sdist: what a package index would serve."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return next(out.glob("*.tar.gz")), next(out.glob("*.whl"))


@pytest.mark.slow  # two builds
def test_the_wheel_works_from_anywhere(built: tuple[Path, Path], tmp_path: Path) -> None:
    _, wheel = built
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"longseq"}
    presets = {path.name for path in (ROOT / "configs").glob("*.yaml")}
    assert {f"longseq/configs/{name}" for name in presets} <= set(names)
    modules = {f"longseq/{path.relative_to(ROOT)}" for path in ROOT.rglob("*.py") if _is_library(path)}
    assert modules <= set(names)
    code = "import longseq, longseq.launch.cli as cli; print(longseq.__file__); cli.main(['config', 'list'])"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "site") in done.stdout
    assert "tiny-cpu" in done.stdout


def test_the_sdist_holds_what_is_needed_to_work_on_it(built: tuple[Path, Path]) -> None:
    sdist, _ = built
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        "Makefile",
        "constraints.txt",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        ".ci/run",
        "tests/numerics.py",
    }
    assert wanted <= names
    assert not {name for name in names if name.startswith((".venv", "runs"))}


def _is_library(path: Path) -> bool:
    return path.relative_to(ROOT).parts[0] in ("mst", "cce", "apollo", "distributed", "launch", "configs")
