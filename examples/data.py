"""Real data from a local folder or its home on GitHub, checked against its sha256.

ETTh1: hourly readings of an electricity transformer. Licence of the data: CC BY-ND 4.0 (Zhou et al., "Informer", AAAI 2021).
WikiText-2: English Wikipedia articles. Licence of the data: CC BY-SA (Merity et al., "Pointer Sentinel Mixture Models", 2016).
Neither is ever part of this project: a download goes to the user's cache folder.
"""

import csv
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen


class DataError(Exception):
    """The data cannot be had; the message is one line for the user."""


@dataclass(frozen=True)
class File:
    """A file as its authors published it; `path` is that below a user's folder of data."""

    path: Path
    url: str
    sha256: str


ETTH1 = File(
    Path("ETT-small") / "ETTh1.csv",
    "https://raw.githubusercontent.com/zhouhaoyi/ETDataset/main/ETT-small/ETTh1.csv",
    "f18de3ad269cef59bb07b5438d79bb3042d3be49bdeecf01c1cd6d29695ee066",
)
WIKITEXT2 = {
    part: File(
        Path("wikitext-2") / f"{part}.txt",
        f"https://raw.githubusercontent.com/pytorch/examples/main/word_language_model/data/wikitext-2/{part}.txt",
        sha256,
    )
    for part, sha256 in (
        ("train", "9e9fa1ad55b1c2c95b08e37dd8e653f638fac2c6de904b79e813611eefbc985f"),
        ("valid", "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8"),
    )
}


def load_oil_temperature(data_dir: Path | None) -> list[float]:
    """Column OT of ETTh1, hour by hour."""
    rows = csv.DictReader(_content(ETTH1, data_dir).decode("ascii").splitlines())
    return [float(row["OT"]) for row in rows]


def load_wikitext2(part: str, data_dir: Path | None) -> bytes:
    """The text of WikiText-2's `part`, train or valid, as it is: UTF-8, rare words replaced by <unk>."""
    return _content(WIKITEXT2[part], data_dir)


def _content(file: File, data_dir: Path | None) -> bytes:
    """What is in the file, of the user's folder or downloaded."""
    path = _download(file) if data_dir is None else data_dir / file.path
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    _check(content, file, str(path))
    return content


def _download(file: File) -> Path:
    """The file in the user's cache folder, fetched there the first time."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "metaadamw_fast"
    path = cache / file.path
    if path.exists():
        return path
    try:
        with urlopen(file.url, timeout=30) as response:
            content = response.read()
    except (URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        raise DataError(f"cannot download {file.url} ({reason}); give a local copy with --data") from error
    _check(content, file, file.url)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Written aside and renamed: an interrupted run leaves no half file that later looks whole.
        partial = path.with_suffix(f".{os.getpid()}.part")
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}") from error
    return path


def _check(content: bytes, file: File, where: str) -> None:
    """Another version of the data would give other results, silently; so refuse it."""
    digest = hashlib.sha256(content).hexdigest()
    if digest != file.sha256:
        raise DataError(f"{where} is not the official {file.path.name}: sha256 {digest}, expected {file.sha256}")
