"""The built distributions hold everything, and work away from the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import rotquant_tvm

ROOT = Path(__file__).parents[1]
PACKAGES = (
    *("passes", "schedules", "tuning_logs", "formats.rotations", "cli", "runtime", "frontend", "ops"),
    "integrations",
)

pytestmark = pytest.mark.slow


def run(*command, **options):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """A folder with the sdist, and the wheel that was built from it."""
    # From a copy: setuptools leaves build folders beside the sources.
    source = tmp_path_factory.mktemp("source") / "checkout"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignored)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", source.parent / "dist", source)
    return source.parent / "dist"


@pytest.fixture(scope="module")
def installed(dist, tmp_path_factory) -> Path:
    """The wheel, installed alone into a folder."""
    target = tmp_path_factory.mktemp("installed")
    wheel = next(dist.glob("*.whl"))
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", target, wheel)
    return target


def away(installed, tmp_path):
    """Options of a process that sees the installed wheel and its dependencies, but no editable install."""
    path = os.pathsep.join([str(installed), sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]])
    return {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": path}}


def test_the_wheel_is_one_package_without_tests(dist):
    names = zipfile.ZipFile(next(dist.glob("*.whl"))).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"rotquant_tvm"}
    assert "rotquant_tvm/py.typed" in names and any(name.endswith("licenses/LICENSE") for name in names)


def test_every_module_of_the_checkout_is_in_the_wheel(dist):
    names = set(zipfile.ZipFile(next(dist.glob("*.whl"))).namelist())
    expected = {
        f"rotquant_tvm/{file.relative_to(folder.parent if folder.name != 'rotquant_tvm' else folder)}"
        for folder in (ROOT / "rotquant_tvm", ROOT / "passes", ROOT / "schedules", ROOT / "tuning_logs")
        for file in folder.rglob("*")
        if file.suffix in (".py", ".json")
    }
    assert len(expected) > 50 and expected - names == set()


def test_the_sdist_can_be_built_and_read(dist):
    names = {name.partition("/")[2] for name in tarfile.open(next(dist.glob("*.tar.gz"))).getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "passes/__init__.py", "schedules/__init__.py"} <= names


def test_an_installed_wheel_imports_away_from_the_checkout(installed, tmp_path):
    script = (
        "import importlib, sys\n"
        f"names = ['rotquant_tvm'] + ['rotquant_tvm.' + name for name in {PACKAGES!r}]\n"
        "for name in names: print(importlib.import_module(name).__file__)\n"
        "from rotquant_tvm.passes.quantize_kv_cache import QuantizeKVCache\n"
        "from rotquant_tvm.schedules.schedule_for_llvm import ScheduleForLLVM\n"
        "from rotquant_tvm.formats import KVFormat\n"
        "print(KVFormat.parse('rq3').codec(64).bits_per_element)\n"
    )
    *files, bits = run(sys.executable, "-S", "-c", script, **away(installed, tmp_path)).splitlines()
    assert len(files) == len(PACKAGES) + 1 and all(Path(file).is_relative_to(installed) for file in files)
    assert float(bits) == 3.25


def test_the_command_is_installed(installed, tmp_path):
    options = away(installed, tmp_path)
    command = installed / "bin" / "tvmc"
    assert rotquant_tvm.__version__ in run(sys.executable, "-S", command, "--version", **options)
    assert "rq3 (preset)" in run(sys.executable, "-S", command, "formats", **options)
