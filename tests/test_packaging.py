"""The wheel: built from the tree, installed into an empty environment, complete and pure Python."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("dit_accel", "kernels", "pipelines", "eval", "assets", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    tree = tmp_path_factory.mktemp("tree")
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, tree / part, ignore=shutil.ignore_patterns("__pycache__", "*.partial*"))
        else:
            shutil.copy(source, tree / part)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "dist", "."]
    subprocess.run(command, cwd=tree, check=True, capture_output=True, text=True)
    (built,) = (tree / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A python whose environment holds the wheel alone, with the dependencies of the running one behind it."""
    home = tmp_path_factory.mktemp("venv")
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    if not python.exists():
        python = home / "Scripts" / "python.exe"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-compile", "--target", site, str(wheel)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    # A path entry is not searched for .pth files, so an editable install of the running environment stays out.
    env = {**os.environ, "PYTHONPATH": sysconfig.get_path("purelib"), "HF_HUB_OFFLINE": "1"}
    (Path(site) / "first.pth").write_text(f"import sys; sys.path.insert(0, {site!r})\n")

    def run(*arguments, cwd):
        return subprocess.run([str(python), *arguments], cwd=cwd, env=env, capture_output=True, text=True)

    run.site = site
    return run


def test_the_wheel_is_pure_and_keeps_to_its_own_name(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert wheel.name.endswith("py3-none-any.whl")
    assert {name.split("/")[0] for name in names} <= {"dit_accel", wheel.name.split("-py3")[0] + ".dist-info"}
    assert "dit_accel/py.typed" in names


def test_every_source_file_is_in_the_wheel(wheel):
    packed = set(zipfile.ZipFile(wheel).namelist())
    for folder, package in (("dit_accel", "dit_accel"), *((p, f"dit_accel/{p}") for p in PARTS[1:4])):
        for path in (ROOT / folder).rglob("*.py"):
            assert f"{package}/{path.relative_to(ROOT / folder).as_posix()}" in packed, f"{path} is in no package"


def test_the_wheel_carries_the_bundled_model(wheel):
    packed = set(zipfile.ZipFile(wheel).namelist())
    for path in (ROOT / "assets" / "mini").rglob("*"):
        if path.is_file():
            assert f"dit_accel/assets/mini/{path.relative_to(ROOT / 'assets' / 'mini').as_posix()}" in packed


def test_an_installed_wheel_imports_every_module(installed, tmp_path):
    code = (
        "import importlib, pkgutil, dit_accel\n"
        "for m in pkgutil.walk_packages(dit_accel.__path__, 'dit_accel.'):\n"
        "    if not m.name.endswith('__main__') and '.triton' not in m.name: importlib.import_module(m.name)\n"
        "print(dit_accel.__file__)"
    )
    done = installed("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith(installed.site)


def test_an_installed_wheel_plans_a_render_from_any_folder(installed, tmp_path):
    (tmp_path / "prompt.txt").write_text("a red circle moves right on a black background\n")
    done = installed("-m", "dit_accel", "render", "prompt.txt", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
