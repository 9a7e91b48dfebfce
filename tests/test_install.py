"""What is handed out, a wheel and a source archive, holds what it should and works without the checkout."""

import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

import weightdyn as wd

ROOT = Path(__file__).parent.parent
SOURCES = {str(path.relative_to(ROOT)) for path in (ROOT / "weightdyn").rglob("*.py")} | {
    "weightdyn/py.typed"
}


def test_the_citation_is_of_this_version():
    said = dict(
        re.findall(r"^([\w-]+): (.+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    )
    assert (said["title"], said["version"], said["license"]) == ("weightdyn", wd.__version__, "MIT")


def test_the_oldest_versions_allowed_are_those_of_constraints_lowest():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    needed = project[project.index("\ndependencies = [") : project.index("\ntest = [")]
    lowest = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', needed))
    pins = re.findall(r"^([\w-]+)==([\d.]+)", (ROOT / "constraints-lowest.txt").read_text(), re.MULTILINE)
    assert {"torch", "numpy", "transformers"} <= set(lowest)
    for name, version in pins:
        if name in lowest:
            assert f"{version}.0".startswith(f"{lowest[name]}."), name
    assert set(lowest) <= {name for name, _ in pins}


def built(kind, source, folder):
    command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(folder)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (archive,) = folder.iterdir()
    return archive


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    return built("sdist", ROOT, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """Built from the source archive, as an installer does that finds no wheel."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    return built("wheel", source, tmp_path_factory.mktemp("wheel"))


@pytest.mark.slow
def test_the_source_archive_holds_the_package_and_its_papers_and_nothing_else(sdist):
    with tarfile.open(sdist) as archive:
        held = {name.split("/", 1)[1] for name in archive.getnames()}
    papers = {
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "CITATION.cff",
        "pyproject.toml",
        "PKG-INFO",
        ".gitignore",
    }
    assert held == SOURCES | papers


@pytest.mark.slow
def test_the_wheel_holds_the_package_its_licence_and_the_readme(wheel):
    assert wheel.name == f"weightdyn-{wd.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        info = f"weightdyn-{wd.__version__}.dist-info"
        rest = {
            f"{info}/{name}"
            for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")
        }
        assert set(archive.namelist()) == SOURCES | rest
        metadata = message_from_string(archive.read(f"{info}/METADATA").decode("utf-8"))
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()


@pytest.mark.slow
def test_the_installed_wheel_runs_the_demo_without_the_checkout(wheel, tmp_path):
    venv.create(tmp_path / "venv")
    binaries = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin")
    pip = [sys.executable, "-m", "pip", "--python", str(binaries / "python")]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    place = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(run(binaries / "python", "-c", place))
    # What it needs comes from here; the .pth files here, that of an editable weightdyn too, are not read.
    (packages / "needed.pth").write_text(run(sys.executable, "-c", place))
    assert Path(run(binaries / "python", "-c", "import weightdyn; print(weightdyn.__file__)")) == (
        packages / "weightdyn/__init__.py"
    )
    run(binaries / "weightdyn", "demo", "--steps", "20", "--batch-size", "2", "--out", "runs/demo")
    assert {path.stem for path in (tmp_path / "runs/demo/figures").glob("*.png")} >= {
        "overview",
        "force_budget",
        "loss",
    }
    assert len(wd.RunLog(tmp_path / "runs/demo").forces()) > 100
