"""ETTh1: hourly readings of an electricity transformer, from a local folder or its home on GitHub.

Licence of the data: CC BY-ND 4.0 (Zhou et al., "Informer", AAAI 2021). It is never part of this
project: a download goes to the user's cache folder.
"""

import csv
import hashlib
import os
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

URL = "https://raw.githubusercontent.com/zhouhaoyi/ETDataset/main/ETT-small/ETTh1.csv"
SHA256 = "f18de3ad269cef59bb07b5438d79bb3042d3be49bdeecf01c1cd6d29695ee066"
RELATIVE_PATH = Path("ETT-small") / "ETTh1.csv"


class DataError(Exception):
    """The data cannot be had; the message is one line for the user."""


def load_oil_temperature(data_dir: Path | None) -> list[float]:
    """Column OT, hour by hour, of `data_dir`/ETT-small/ETTh1.csv or of the downloaded file."""
    path = _download() if data_dir is None else data_dir / RELATIVE_PATH
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    _check(content, str(path))
    rows = csv.DictReader(content.decode("ascii").splitlines())
    return [float(row["OT"]) for row in rows]


def _download() -> Path:
    """The file in the user's cache folder, fetched there the first time."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "metaadamw_fast"
    path = cache / RELATIVE_PATH
    if path.exists():
        return path
    try:
        with urlopen(URL, timeout=30) as response:
            content = response.read()
    except (URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        raise DataError(f"cannot download {URL} ({reason}); give a local copy with --data") from error
    _check(content, URL)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Written aside and renamed: an interrupted run leaves no half file that later looks whole.
        partial = path.with_suffix(f".{os.getpid()}.part")
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}") from error
    return path


def _check(content: bytes, where: str) -> None:
    """Another version of the data would give other results, silently; so refuse it."""
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHA256:
        raise DataError(f"{where} is not the official ETTh1.csv: sha256 {digest}, expected {SHA256}")
