"""The engine that the tests of serving ask."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mmtune.serving.engine_process import EngineProcess, free_port, running_engine
from mmtune.serving.engines import find_engine


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    """A `transformers serve` that loads the model that a request names."""
    port = free_port()
    command = [word for word in find_engine("transformers").command("", port, ("--device", "cpu")) if word]
    cache = str(tmp_path_factory.mktemp("hub"))
    with running_engine(command, {"HF_HOME": cache, "OMP_NUM_THREADS": "1"}, port) as process:
        process.wait_until_ready(120.0)
        yield process
