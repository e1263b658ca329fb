"""Rules of a recipe's `train` section that TrainingArguments' types do not say, and the libraries that its values need."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

OPTIMIZERS: Mapping[str, tuple[str, str]] = {
    "adamw_torch_xla": ("torch_xla", "torch_xla"),
    "adamw_torch_npu": ("torch_npu", "torch_npu"),
    "adamw_torch_4bit": ("torchao", "torchao"),
    "adamw_torch_8bit": ("torchao", "torchao"),
    "adamw_anyprecision": ("torchdistx", "torchdistx"),
    "galore": ("galore_torch", "galore-torch"),
    "lomo": ("lomo_optim", "lomo-optim"),
    "adalomo": ("lomo_optim", "lomo-optim"),
    "grokadamw": ("grokadamw", "grokadamw"),
    "schedule_free": ("schedulefree", "schedulefree"),
    "apollo": ("apollo_torch", "apollo-torch"),
    "stable_adamw": ("optimi", "torch-optimi"),
}
"""By the beginning of `optim`: the module that it needs, and what pip calls it. The others come with torch or bitsandbytes."""

REPORTERS: Mapping[str, tuple[str, ...]] = {
    "azure_ml": ("azureml",),
    "comet_ml": ("comet_ml",),
    "mlflow": ("mlflow",),
    "neptune": ("neptune",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
    "codecarbon": ("codecarbon",),
    "clearml": ("clearml",),
    "dagshub": ("dagshub",),
    "flyte": ("flytekit",),
    "dvclive": ("dvclive",),
    "swanlab": ("swanlab",),
}
"""By a name of `report_to`: the modules of which it needs one."""


def missing_libraries(train: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """A key and a message for each value whose library is not installed on this machine."""
    optimizer = str(train.get("optim", ""))
    for beginning, (module, package) in OPTIMIZERS.items():
        if optimizer.startswith(beginning) and find_spec(module) is None:
            yield "train.optim", f"{optimizer} needs a library that is not installed: pip install {package}; or give adamw_torch"
    asked = train.get("report_to", "none")
    for name in [asked] if isinstance(asked, str) else asked:
        if name in REPORTERS and not any(map(find_spec, REPORTERS[name])):
            yield "train.report_to", f"{name}: not installed: pip install {REPORTERS[name][0]}; or give none"
