from __future__ import annotations

import tarfile
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the recorded results and the datasets they belong to; not to be written to."""
    folder = tmp_path_factory.mktemp("golden")
    with tarfile.open(Path(__file__).parent / "data/golden.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder
