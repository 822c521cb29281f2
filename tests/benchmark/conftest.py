"""One small measurement that several tests look at."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from small_runs import QUICK  # noqa: E402

from omnifp4.receipt.bench import BenchReceipt  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """So small a model is fastest on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def measured() -> BenchReceipt:
    """The synthetic tiny model against its BF16 twin, at two contexts, with speech."""
    from omnifp4 import bench

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        wanted = QUICK | {"parts": "all", "context": (12, 40), "speech_seconds": 1.0}
        return bench(synthetic="tiny", against="bf16", **wanted)
    finally:
        torch.set_num_threads(before)
