"""What is installed has the manifests of k8s/: from a wheel, from a source archive, and editable; images do without."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig

import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
MANIFESTS = {str(path.relative_to(ROOT / "k8s")) for path in (ROOT / "k8s").rglob("*.yaml")}
COPIED = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "distpad")  # of what the Dockerfiles copy, what counts
FOUND = """
import distpad
from distpad.launcher import kubernetes
print(distpad.__file__, kubernetes.FOLDER, *kubernetes.kinds(), sep="\\n")
"""

pytestmark = pytest.mark.timeout(300)


def run(*command: object, cwd: pathlib.Path, path: object = "") -> str:
    environ = {**os.environ, "PYTHONPATH": str(path), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environ, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def source(place: pathlib.Path, *more: str) -> pathlib.Path:
    for name in (*COPIED, *more):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, place / name)
    return place


def installed(place: pathlib.Path, *what: object) -> tuple[pathlib.Path, pathlib.Path, list[str]]:
    """In an environment of its own: where distpad is, where its manifests are, and which kinds of jobs these have."""
    run(sys.executable, "-m", "venv", "--without-pip", place / "env", cwd=place)
    # setuptools comes from this environment by a path, which later would lead to this environment's distpad, too
    ours, pip = sysconfig.get_path("purelib"), (sys.executable, "-m", "pip", "--python", place / "env")
    run(*pip, "install", "--quiet", "--no-deps", "--no-build-isolation", *what, cwd=place, path=ours)
    (place / "needed").mkdir()
    (place / "needed" / "yaml").symlink_to(pathlib.Path(yaml.__file__).parent)
    printed = run(place / "env" / "bin" / "python", "-c", FOUND, cwd=place, path=place / "needed").splitlines()
    return pathlib.Path(printed[0]).parent, pathlib.Path(printed[1]), printed[2:]


def kinds() -> list[str]:
    return sorted(path.name for path in (ROOT / "k8s" / "overlays").iterdir())


@pytest.mark.wide
def test_a_wheel_of_a_source_archive(tmp_path):
    run(sys.executable, "setup.py", "-q", "sdist", "-d", tmp_path, cwd=source(tmp_path / "source", "k8s"))
    (archive,) = tmp_path.glob("distpad-*.tar.gz")
    shutil.rmtree(tmp_path / "source")
    package, folder, found = installed(tmp_path, archive)  # pip makes a wheel of it
    assert (tmp_path / "env") in package.parents and folder == package / "k8s" and found == kinds()
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == MANIFESTS
    assert all((folder / name).read_bytes() == (ROOT / "k8s" / name).read_bytes() for name in MANIFESTS)


def test_an_editable_checkout(tmp_path):
    place = source(tmp_path / "source", "k8s")
    assert installed(tmp_path, "-e", place) == (place / "distpad", place / "k8s", kinds())


@pytest.mark.parametrize(
    "more", [pytest.param((), marks=pytest.mark.wide), ("k8s/image",)], ids=["nothing", "what images have"]
)
def test_without_the_manifests(tmp_path, more):
    place = source(tmp_path / "source", *more)
    assert installed(tmp_path, "-e", place) == (place / "distpad", place / "k8s", [])
