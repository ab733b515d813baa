"""What an import and a build make of the files in csrc/: an extension of other sources is refused, whatever else lies there."""

import importlib
import runpy
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from metaadamw_fast import ops

ROOT = Path(__file__).parent.parent
PACKAGE = Path(ops.__file__).parent

pytestmark = pytest.mark.skipif(
    ops._unavailable("cpp", torch.device("cpu")) is not None or not (ROOT / "csrc").is_dir(), reason="no extension, or no sources"
)


def names():
    return importlib.import_module("metaadamw_fast._C").source_names.split(",")


def unrelated(csrc):
    shutil.rmtree(csrc)
    csrc.mkdir()
    for name in ("ops.cpp", "main.cpp", *names()[:3]):
        (csrc / name).write_text("another project's")


def old_folder(csrc):
    (csrc / "old").mkdir()
    (csrc / "old" / "adamw.h").write_text("")


def strays(csrc):
    for name in ("notes.txt", "adamw.h~", "ops.cpp.orig", ".adamw.h.swp", "zzz.o"):
        (csrc / name).write_text("stray")
    (csrc / ".#adamw.h").symlink_to("nobody@nowhere")
    (csrc / "aaa.h").mkdir()


def write_to(name):
    return lambda csrc: (csrc / name).write_text((csrc / name).read_text() + "\n")


CHANGES = {  # of csrc/, and whether the extension is then of other sources
    "none": (lambda csrc: None, False),
    "no csrc": (shutil.rmtree, False),
    "a folder": (old_folder, False),
    "stray files": (strays, False),
    "a file in its place": (lambda csrc: (shutil.rmtree(csrc), csrc.write_text("")), False),
    "another project's": (unrelated, False),
    "a header": (write_to("adamw.h"), True),
    "the last": (write_to("table.h"), True),
    "CUDA": (write_to("cuda.cu"), True),
    "one gone": (lambda csrc: (csrc / "sums.h").unlink(), True),
}


def import_beside(tmp_path):
    """Imports the package from a folder that has it and a csrc/ of its own."""
    (tmp_path / "metaadamw_fast").symlink_to(PACKAGE)
    return subprocess.run([sys.executable, "-c", "import metaadamw_fast"], cwd=tmp_path, capture_output=True, text=True)


@pytest.mark.parametrize("name", CHANGES)
def test_an_extension_of_other_sources_is_told_from_one_beside_other_files(name, tmp_path):
    change, differs = CHANGES[name]
    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    change(csrc)
    assert ops._differ(csrc, names(), importlib.import_module("metaadamw_fast._C").source_hash) == differs


@pytest.mark.parametrize("name", ["a folder", "another project's", "a header"])
def test_an_import(name, tmp_path):
    change, differs = CHANGES[name]
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    change(tmp_path / "csrc")
    done = import_beside(tmp_path)
    assert done.returncode == differs, done.stderr
    assert ("was built from older sources than csrc/" in done.stderr) == differs


def test_an_extension_that_recorded_no_names_is_old(monkeypatch):
    monkeypatch.setattr(ops.importlib, "import_module", lambda name: types.SimpleNamespace(source_hash=""))
    with pytest.raises(ImportError, match="was built from older sources"):
        ops._load_extension()


def test_a_build_takes_the_sources_alone(tmp_path):
    setup = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    old_folder(csrc)
    strays(csrc)
    assert [path.name for path in setup["source_files"](csrc)] == names()
