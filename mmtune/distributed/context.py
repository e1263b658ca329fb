"""The processes that train together: what they were asked to be, what each does alone, and what all do at once.

accelerate's launcher says in the environment what it was asked for; `init_distributed` holds that against what came to be.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState, PartialState
from torch import distributed, nn
from torch.utils.cpp_extension import get_default_build_root
from transformers import TrainingArguments

from mmtune.utils.errors import RecipeValueError, UserError

LAUNCHED_WITH = "ACCELERATE_MIXED_PRECISION"
LOST_PEER = ("closed by peer", "reset by peer", "remote process exited", "Broken pipe")
"""How gloo and NCCL say that another process is gone; they have no class for it."""
DEEPSPEED, DEEPSPEED_CONFIG = "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_CONFIG_FILE"
FSDP = "ACCELERATE_USE_FSDP"
RENDEZVOUS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
REDUCE_BUCKET = 50_000_000
"""Numbers that ZeRO has on their way at a time, where a configuration does not say."""
COPIES = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
"""What Slurm's srun and MPI's mpirun say about how many processes they started."""


@dataclass(frozen=True)
class DistributedContext:
    """
    Attributes:
        rank: this process's number, from 0.
        size: how many processes there are.
        zero_stage: DeepSpeed's, 0 to 3; None without DeepSpeed.
        fsdp: whether FSDP2 shards the weights.
        construction: while it exists, transformers constructs models sharded (ZeRO-3).
    """

    rank: int = 0
    size: int = 1
    zero_stage: int | None = None
    fsdp: bool = False
    construction: Any = field(default=None, repr=False, compare=False)

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """Whether each process holds a part of the weights, so that a forward pass takes all of them."""
        return self.zero_stage == 3 or self.fsdp

    @property
    def strategy(self) -> str:
        """Such as `2 processes, ZeRO-3`, for people."""
        if self.size == 1 and self.zero_stage is None and not self.fsdp:
            return "one process"
        strategy = "FSDP2" if self.fsdp else "DDP" if self.zero_stage is None else f"ZeRO-{self.zero_stage}"
        return f"{self.size} process{'es' if self.size > 1 else ''}, {strategy}"

    def barrier(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            here = [torch.accelerator.current_device_index()] if distributed.get_backend() == "nccl" else None
            distributed.barrier(device_ids=here)

    @contextlib.contextmanager
    def unwinding(self) -> Iterator[None]:
        """Inside, SIGTERM raises SystemExit, such as a launcher's, which sends it when another process has failed."""
        before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def any_rank(self, mine: bool, device: torch.device) -> bool:
        """Whether it is so in any process."""
        if self.size == 1:
            return mine
        flag = torch.tensor(int(mine), device=device)
        distributed.all_reduce(flag, distributed.ReduceOp.MAX)
        return bool(flag)

    def broadcast_object(self, brought: Any) -> Any:
        """The main process' object, in every process."""
        if self.size > 1:
            passed = [brought]
            distributed.broadcast_object_list(passed, src=0)
            brought = passed[0]
        return brought

    def all_gather_object(self, mine: Any) -> list[Any]:
        """The objects of all processes by rank, in every process."""
        if self.size == 1:
            return [mine]
        brought: list[Any] = [None] * self.size
        distributed.all_gather_object(brought, mine)
        return brought


SINGLE_PROCESS = DistributedContext()


def check_launch(precision: str, deepspeed_config: str | Mapping[str, Any] | None = None) -> None:
    """
    Args:
        precision: the recipe's `model.precision`.
        deepspeed_config: the recipe's `train.deepspeed`: a configuration or its file. The environment variables of accelerate's
            launcher are set for it; a process without a launcher becomes the only one of its group.

    Raises:
        UserError: processes that do not know of each other, a strategy that mmtune does not train with, or a precision or a
            DeepSpeed configuration that is not the recipe's.
    """
    _check_rendezvous()
    if _asked(FSDP):
        if os.environ.get("FSDP_VERSION") != "2":
            raise UserError("launched with FSDP's first version, which is not supported; expected fsdp_version: 2")
        for option in ("FSDP_OFFLOAD_PARAMS", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
            if _asked(option):
                raise UserError(f"launched with {option.lower()}, which is not supported; expected false")
    if _asked("ACCELERATE_USE_PARALLELISM_CONFIG"):
        raise UserError("launched with a parallelism config, which is not supported; expected DDP, DeepSpeed ZeRO or FSDP2")
    if LAUNCHED_WITH in os.environ and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        # accelerate's launcher of one process names a master when it was asked for more
        raise UserError(
            "accelerate was asked for several processes and started one; on GPUs add --multi_gpu, without them launch with "
            "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N"
        )
    asked = os.environ.get(LAUNCHED_WITH, "no")
    if asked not in ("no", "bf16" if precision != "fp32" else "no"):
        raise UserError(
            f"launched with mixed precision {asked}, and the recipe's model.precision is {precision}; the recipe decides: launch "
            "with --mixed_precision no"
        )
    if deepspeed_config is not None:
        _ask_for_deepspeed(deepspeed_config)
    if launched_with_deepspeed():
        if _asked("ACCELERATE_USE_CPU"):
            raise UserError(
                "launched with DeepSpeed and with --cpu (or ACCELERATE_USE_CPU), which switches it off without a word; leave the "
                "latter out, a machine without GPUs is recognized"
            )
        try:
            import deepspeed  # noqa: F401
        except ImportError as error:
            raise UserError("launched with DeepSpeed, which is not installed: pip install 'mmtune[deepspeed]'") from error
        _tell_of_locks()
        os.environ[LAUNCHED_WITH] = "no"  # DeepSpeed's own would round trainable parameters; see `init_distributed`


def _tell_of_locks() -> None:
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in sorted(root.glob("**/lock")):
        print(f"DeepSpeed waits while {lock} is there: a process compiles; if none does, delete the file", flush=True)


def _check_rendezvous() -> None:
    names = [name for name in RENDEZVOUS[:3] if name in os.environ]
    missing = [name for name in RENDEZVOUS if name not in os.environ]
    if names and missing:
        raise UserError(
            f"the environment has {', '.join(names)} and lacks {', '.join(missing)}: the processes would not find each other; "
            "start them with accelerate launch or torchrun"
        )
    copies = [name for name in COPIES if int(os.environ.get(name, "1")) > 1]
    if copies and not names:
        raise UserError(
            f"{copies[0]} says that {os.environ[copies[0]]} copies of this program were started, and none would know of the "
            "others; start one launcher (accelerate launch or torchrun) on each machine"
        )


def _ask_for_deepspeed(config_or_file: str | Mapping[str, Any]) -> None:
    config = _read_json(config_or_file) if isinstance(config_or_file, str) else dict(config_or_file)
    if _asked(FSDP):
        raise RecipeValueError("train.deepspeed", "the launcher was asked for FSDP; leave one of the two out")
    if launched_with_deepspeed():
        file = os.environ.get(DEEPSPEED_CONFIG)
        if file == json.dumps(config):  # as this function has left it
            return
        if file is None or _read_json(file) != config:
            raise RecipeValueError(
                "train.deepspeed", "DeepSpeed was asked for by the launcher too, with other settings; leave one of the two out"
            )
        return
    if not is_launched():
        if torch.accelerator.device_count() > 1:
            raise RecipeValueError(
                "train.deepspeed",
                f"one process was started and {torch.accelerator.device_count()} GPUs are there; start one for "
                "each (accelerate launch --num_processes N mmtune/train.py RECIPE), or choose one with CUDA_VISIBLE_DEVICES=0",
            )
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ |= {DEEPSPEED: "true", DEEPSPEED_CONFIG: json.dumps(config)}


def _read_json(file: str) -> Any:
    try:
        config = json.loads(Path(file).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{file}: no DeepSpeed configuration, which is a JSON object")
    return config


def init_distributed(arguments: TrainingArguments, precision: str, is_sharded: bool = False) -> DistributedContext:
    """The processes that `TrainingArguments` has brought together, checked.

    Under DeepSpeed, precision is what it is in one process: weights as stored, trained ones in fp32, and torch's autocast.

    Args:
        precision: the recipe's `model.precision`.
        is_sharded: models are sharded while they are constructed (ZeRO-3); otherwise each process constructs the full model.

    Raises:
        UserError: fewer processes than the launcher announced, or a DeepSpeed configuration that contradicts the recipe.
    """
    plugin = arguments.deepspeed_plugin
    announced = int(os.environ.get("WORLD_SIZE", "1"))
    if arguments.world_size != announced:
        raise UserError(f"{announced} processes were announced and {arguments.world_size} came together; look at the launcher")
    dist = DistributedContext(arguments.process_index, arguments.world_size)
    _check_backend(arguments)
    dist.barrier()  # until every process has looked at what is there, and before the first makes anything
    if plugin is None:
        return DistributedContext(dist.rank, dist.size, fsdp=_asked(FSDP))
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    if arguments.use_cpu and torch.accelerator.is_available():
        raise RecipeValueError("train.use_cpu", "DeepSpeed takes the accelerator that is there; leave one of the two out")
    config = plugin.hf_ds_config.config  # what the Trainer fills in and hands on
    for kind in ("fp16", "bf16", "torch_autocast"):
        if config.get(kind, {}).get("enabled") is True:
            raise UserError(f"the DeepSpeed configuration enables {kind}; leave it out, the recipe's model.precision decides")
        config.pop(kind, None)
    each = arguments.per_device_train_batch_size
    decided = {
        "gradient_clipping": ("max_grad_norm", arguments.max_grad_norm),
        "train_micro_batch_size_per_gpu": ("per_device_train_batch_size", each),
        "gradient_accumulation_steps": ("gradient_accumulation_steps", arguments.gradient_accumulation_steps),
        "train_batch_size": ("batch", each * arguments.gradient_accumulation_steps * arguments.world_size),
    }
    for key, (name, value) in decided.items():
        configured = config.get(key, "auto")
        # accelerate writes an accumulation of 1 where none is given
        if configured not in ("auto", value) and (key, configured) != ("gradient_accumulation_steps", 1):
            raise UserError(
                f"the DeepSpeed configuration's {key} is {configured}, and the recipe's {name} is {value}; leave the former out"
            )
        config[key] = value
    for section in ("optimizer", "scheduler"):
        if section in config:
            raise UserError(f"the DeepSpeed configuration has a section `{section}`; leave it out, the recipe's train decides")
    config["zero_force_ds_cpu_optimizer"] = False  # with offload too, the optimizer is the recipe's
    config["torch_autocast"] = {
        "enabled": precision != "fp32",
        "dtype": "bfloat16",
        "lower_precision_safe_modules": [],  # gradients are summed in their own precision
    }
    unset_hf_deepspeed_config()  # until the Trainer sets it again
    zero = config.setdefault("zero_optimization", {})
    zero.setdefault("reduce_bucket_size", REDUCE_BUCKET)  # DeepSpeed would take 2 or 4 GB for gradients on their way
    stage, construction = int(zero.get("stage", 0)), None
    if stage == 3 and is_sharded:
        # DeepSpeed makes every weight of the one dtype that its configuration names, here the one that transformers loads.
        dtype = {"bf16": {"enabled": precision == "bf16"}}
        construction = HfDeepSpeedConfig({"zero_optimization": zero, "train_micro_batch_size_per_gpu": 1, **dtype})
    return DistributedContext(arguments.process_index, arguments.world_size, stage, construction=construction)


def check_same(dist: DistributedContext, mine: Mapping[str, Any]) -> None:
    """
    Args:
        mine: what every process must have alike, by name.

    Raises:
        UserError: a process has something else; it and its rank are named.
    """
    first, *others = dist.all_gather_object(dict(mine))
    for rank, theirs in enumerate(others, start=1):
        for name in sorted({*first, *theirs}):
            if first.get(name) != theirs.get(name):
                raise UserError(
                    f"process {rank} has {name}: {theirs.get(name)!r}, and process 0 {first.get(name)!r}; start all "
                    "with the same recipe, overrides, data and installation"
                )


def _check_backend(arguments: TrainingArguments) -> None:
    if arguments.world_size == 1:
        return
    device = arguments.device.type
    backends = dict(part.split(":") for part in distributed.get_backend_config().split(","))
    asked = arguments.ddp_backend or ("nccl" if device == "cuda" else None)
    if asked is not None and backends.get(device) != asked:
        raise UserError(f"processes on {device} were to talk by {asked}, and do by {backends.get(device)}; look at the launcher")


def check_strategy(accelerator: Accelerator, dist: DistributedContext, precision: str) -> None:
    """
    Args:
        precision: the recipe's `model.precision`.

    Raises:
        UserError: the Trainer's accelerator has made something else of what was asked for.
    """
    plugin = accelerator.state.deepspeed_plugin if accelerator.distributed_type == DistributedType.DEEPSPEED else None
    stage = None if plugin is None else plugin.zero_stage
    alone = accelerator.distributed_type == DistributedType.NO
    fsdp = accelerator.distributed_type == DistributedType.FSDP
    came = DistributedContext(dist.rank, accelerator.num_processes, stage, fsdp)
    if came != dist or (alone and dist.size > 1):
        raise UserError(
            f"asked for {dist.strategy}, and accelerate made it {accelerator.distributed_type.value} of "
            f"{accelerator.num_processes}; {'FSDP takes GPUs' if dist.fsdp else 'look at the launcher configuration'}"
        )
    rounded = "no" if precision == "fp32" or plugin else "bf16"
    if accelerator.mixed_precision != rounded:
        raise UserError(
            f"the recipe's model.precision is {precision}, and accelerate made the mixed precision {accelerator.mixed_precision} "
            f"of it, where {rounded} is right; look at the launcher's configuration"
        )


@contextlib.contextmanager
def fsdp_on_cpu() -> Iterator[None]:
    """Inside, accelerate has FSDP2 shard on the CPU too, as torch can; by itself it makes DDP of it there."""
    plain = AcceleratorState.__init__

    def shard(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = shard
    try:
        yield
    finally:
        AcceleratorState.__init__ = plain


def make_models_whole() -> None:
    """After training at ZeRO-3: from here on transformers loads a model whole, so that one process can do it alone."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def is_launched() -> bool:
    """Whether a launcher has started this process, alone or as one of several."""
    return set(RENDEZVOUS) <= os.environ.keys()


def configure_fsdp(accelerator: Accelerator, model: nn.Module) -> None:
    """Have FSDP2 divide a model by its layers, in the dtypes that it is stored in."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    plugin = accelerator.state.fsdp_plugin
    named: Any = model._no_split_modules  # classes of other models of the family too, over which accelerate stumbles
    plugin.transformer_cls_names_to_wrap = sorted({type(module).__name__ for module in model.modules()} & set(named or ()))
    plugin.mixed_precision_policy = MixedPrecisionPolicy()


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether an error only says that another process has ended."""
    return any(words in str(error) for words in LOST_PEER)


def launched_with_fsdp() -> bool:
    """Whether accelerate's launcher was asked for FSDP."""
    return _asked(FSDP)


def launched_with_deepspeed() -> bool:
    """Whether accelerate's launcher was asked for DeepSpeed."""
    return _asked(DEEPSPEED)


def _asked(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true")
