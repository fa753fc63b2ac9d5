"""The sdist builds a wheel, the wheel brings the course, and commands can be typed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from trackkit import cli, paths
from trackkit.doctor import report

ROOT = Path(__file__).parent.parent
LEFT_OUT = {".ci/run", ".gitignore", ".pre-commit-config.yaml"}  # of the sdist: for a clone only


def run(*words, cwd, **environment):
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with a copy of the repository, the sdist of it, the wheel of that, and `site`,
    where the wheel is installed.
    """
    folder = tmp_path_factory.mktemp("package")
    made = (".*", "runs", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder / "copy", ignore=shutil.ignore_patterns(*made))
    # what learners and instructors leave there
    (folder / "copy" / "lessons" / "work").mkdir(exist_ok=True)
    (folder / "copy" / "lessons" / "work" / "01_siamfc.ipynb").write_text("{}")
    build = "from setuptools import build_meta; build_meta.build_sdist('..')"
    run("-c", build, cwd=folder / "copy")
    (sdist,) = folder.glob("*.tar.gz")
    offline = ("--quiet", "--no-deps", "--no-index", "--disable-pip-version-check")
    run("-m", "pip", "wheel", *offline, "--no-build-isolation", sdist, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    run("-m", "pip", "install", *offline, "--target", folder / "site", wheel, cwd=folder)
    return folder


def test_the_sdist_has_all_that_is_needed_to_build_test_and_read(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for name in ("setup.py", "tests/conftest.py", "lessons/nbval.cfg", "requirements.lock"):
        assert name in names
    assert not any("lessons/work" in name for name in names)
    if (ROOT / ".git").exists():
        listed = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True)
        committed = {name for name in listed.split("\0") if name and (ROOT / name).exists()}
        assert committed - names - LEFT_OUT == set()


def test_the_wheel_is_small_and_holds_the_course_as_it_is(built):
    (wheel,) = built.glob("*.whl")
    assert wheel.stat().st_size <= 24e6  # 16 of them weights
    data = built / "site" / "trackkit" / "_data"
    for folder, pattern in (("lessons", "*.ipynb"), ("data_samples", "**/*.*")):
        ours = {p.relative_to(ROOT): p for p in (ROOT / folder).glob(pattern) if p.is_file()}
        theirs = {p.relative_to(data): p for p in (data / folder).rglob("*") if p.is_file()}
        assert set(theirs) - {Path("data_samples/SHA256SUMS")} == set(ours)
        assert all(theirs[name].read_bytes() == path.read_bytes() for name, path in ours.items())


def test_an_installed_package_starts_lessons_and_tracks_in_any_folder(built, tmp_path):
    installed = {"PYTHONPATH": str(built / "site")}
    where = "from trackkit import paths; print(paths.__file__, paths.SAMPLES, sep='\\n')"
    module, samples = run("-c", where, cwd=tmp_path, **installed).splitlines()
    assert Path(module).is_relative_to(built) and Path(samples).is_relative_to(built / "site")
    trackkit = ("-m", "trackkit")
    assert "is yours" in run(*trackkit, "lessons", "start", "1", cwd=tmp_path, **installed)
    assert "YOUR CODE HERE" in (tmp_path / "work" / "01_siamfc.ipynb").read_text()
    weights = f"{samples}/weights/siamfc-tiny.safetensors"
    scores = run(*trackkit, "evaluate", weights, "--split", "train", cwd=tmp_path, **installed)
    assert "siamfc-tiny" in scores
    assert "data_samples (train, val, test)" in run(*trackkit, "doctor", cwd=tmp_path, **installed)


def test_a_checkout_uses_its_own_folders():
    assert ROOT / "data_samples" == paths.SAMPLES and ROOT / "lessons" == paths.LESSONS


# ---- `trackkit` on the PATH ----


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """A virtual environment with `trackkit` that is not on the PATH; its bin folder."""
    folder = tmp_path / "the venv" / "bin"
    folder.mkdir(parents=True)
    for name in ("python", "trackkit", "activate"):
        (folder / name).touch(mode=0o755)
    monkeypatch.setattr("sys.executable", str(folder / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    return folder


def test_a_command_is_named_so_that_it_can_be_typed(environment, monkeypatch):
    assert paths.command("trackkit") == f"'{environment / 'trackkit'}'"
    (environment / "trackkit").unlink()
    assert paths.command("trackkit") == f"'{environment / 'python'}' -m trackkit"
    (environment / "trackkit").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(environment))
    assert paths.command("trackkit") == "trackkit"


def test_messages_that_name_a_command_say_how_to_type_it(
    environment, tmp_path, capsys, monkeypatch
):
    here = f"'{environment / 'trackkit'}'"
    arguments = ["evaluate", "stay", "--data", str(tmp_path / "no")]
    assert cli.main(arguments) == 1
    assert f"trackkit synth --samples DIR (`trackkit` is {here} here)" in capsys.readouterr().err
    assert cli.main(["synth", str(tmp_path / "s"), "--count", "1", "--frames", "2"]) == 0
    assert f"(`trackkit` is {here} here)" in capsys.readouterr().out
    assert cli.main([]) == 0 and here in capsys.readouterr().out
    assert f"not on the PATH, here it is {here}; to type trackkit alone: source" in report()
    monkeypatch.setenv("PATH", str(environment))
    assert cli.main(arguments) == 1 and "here)" not in capsys.readouterr().err
    assert cli.main([]) == 0 and "Here" not in capsys.readouterr().out
    assert "not on the PATH" not in report()


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/your_own_tracker.md"])
def test_pages_that_name_the_command_say_how_to_get_it(page):
    text = (ROOT / page).read_text()
    assert ".venv/bin/trackkit" in text or "source .venv/bin/activate" in text


@pytest.mark.parametrize("path", sorted((ROOT / "lessons").glob("*.ipynb")), ids=lambda p: p.stem)
def test_lessons_that_name_the_command_say_how_to_get_it(path):
    text = path.read_text()
    if '"trackkit ' in text:
        assert "source .venv/bin/activate" in text
