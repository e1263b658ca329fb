"""Private members of accelerate that mmtune uses. A test compares each with the installed version."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from accelerate import DistributedType
from accelerate.state import AcceleratorState, PartialState


@contextlib.contextmanager
def fsdp_on_cpu() -> Iterator[None]:
    """Inside, accelerate shards with FSDP2 on the CPU too, which torch supports; by itself it falls back to DDP there."""
    plain_init = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        plain_init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init
    try:
        yield
    finally:
        AcceleratorState.__init__ = plain_init
