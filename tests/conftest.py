"""What every test stands on: no network, no telemetry, two threads, and no GPU test where there is no GPU."""

from __future__ import annotations

import os

import pytest

# Set before torch and transformers are imported, here and in every process that a test starts. The tests need nothing
# from the network and so must not reach for it; sums in a fixed number of threads come out the same on every machine.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="2",
    MPLBACKEND="Agg",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_tests:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
