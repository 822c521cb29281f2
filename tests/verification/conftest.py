"""One tiny omni checkpoint and its artifacts, encoded once; tests damage copies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from verify_artifacts import COMPRESSED, MODELOPT, Artifact, load_folder, quantize

from omnifp4.receipt.verification import VerificationReceipt
from omnifp4.tiny import write_tiny_omni
from omnifp4.verification import verify

Judge = Callable[..., VerificationReceipt]


@pytest.fixture(scope="session")
def source_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_omni(tmp_path_factory.mktemp("verify") / "source", layers=2)


@pytest.fixture(scope="session")
def wide(source_folder: Path) -> Artifact:
    return load_folder(source_folder)


@pytest.fixture(scope="session")
def made(wide: Artifact) -> dict[tuple[str, bool], Artifact]:
    """Right artifacts, by dialect and whether they are W4A4."""
    return {
        (dialect, w4a4): quantize(wide, dialect, w4a4=w4a4)
        for dialect in (MODELOPT, COMPRESSED)
        for w4a4 in (False, True)
    }


@pytest.fixture
def modelopt(made: dict[tuple[str, bool], Artifact]) -> Artifact:
    return made[MODELOPT, False].copy()


@pytest.fixture
def modelopt_w4a4(made: dict[tuple[str, bool], Artifact]) -> Artifact:
    return made[MODELOPT, True].copy()


@pytest.fixture
def compressed(made: dict[tuple[str, bool], Artifact]) -> Artifact:
    return made[COMPRESSED, False].copy()


@pytest.fixture
def compressed_w4a4(made: dict[tuple[str, bool], Artifact]) -> Artifact:
    return made[COMPRESSED, True].copy()


@pytest.fixture
def judge(tmp_path: Path) -> Judge:
    """Writes an artifact and verifies it, alone or against a source."""

    def run(artifact: Artifact, against: Path | None = None, shards: int = 1) -> VerificationReceipt:
        return verify(artifact.write(tmp_path / "artifact", shards), against=against, threads=1)

    return run
