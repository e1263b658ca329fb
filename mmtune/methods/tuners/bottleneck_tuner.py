"""Bottleneck adapters for PEFT: small two-layer networks inside the blocks of a transformer, beside frozen weights.

Importing this module registers the method with PEFT as `BOTTLENECK`. An adapter is not linear and cannot be merged: it is
released beside its base. Three placements, `h` being what the wrapped sublayer returns, before the block adds the residual, and
`x` what it is given:

    houlsby   h + s * up(f(down(h)))   after attention and after the feed-forward   Houlsby et al. 2019, arXiv 1902.00751
    pfeiffer  h + s * up(f(down(h)))   after the feed-forward                       Pfeiffer et al. 2021, arXiv 2005.00052
    parallel  h + s * up(f(down(x)))   across the feed-forward                      He et al. 2022, arXiv 2110.04366

Pfeiffer's search over placements ended at the feed-forward alone; its extra layer norm and its moved residual belong to BERT's
post-norm blocks and have no counterpart in the pre-norm blocks wrapped here.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NoReturn, get_args

import torch
from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn
from torch.nn import functional as F

from mmtune.methods.tuners.peft_private import cast_layer_input, register
from mmtune.utils.errors import UserError

Placement = Literal["houlsby", "pfeiffer", "parallel"]
NonLinearity = Literal["relu", "gelu", "silu"]

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}

ATTENTIONS = ("self_attn", "attention", "attn", "linear_attn")
FEED_FORWARDS = ("mlp", "feed_forward", "block_sparse_moe")
"""What transformers calls the sublayers of a block; in all of these the block, not the sublayer, adds the residual."""

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

CANNOT_MERGE = (
    "a bottleneck adapter has a non-linearity and cannot be merged into the weights of its base; release the adapter's "
    "directory beside the base"
)


@dataclass
class BottleneckConfig(PeftConfig):
    """Configuration of bottleneck adapters. `target_modules` are the sublayers to wrap: see `bottleneck_targets`.

    Raises:
        ValueError: a setting is out of its range.
    """

    bottleneck_size: int = field(default=64, metadata={"help": "Width of the bottleneck."})
    placement: Placement = field(
        default="houlsby",
        metadata={
            "help": "houlsby: after attention and after the feed-forward; pfeiffer: after the feed-forward; parallel: from the "
            "feed-forward's input to its output."
        },
    )
    non_linearity: NonLinearity = field(default="relu", metadata={"help": "Between the two projections: relu, gelu or silu."})
    scaling: float = field(
        default=1.0, metadata={"help": "Factor on the adapter's output; He et al. use 4 with the parallel placement."}
    )
    bottleneck_dropout: float = field(
        default=0.0, metadata={"help": "Dropout after the non-linearity, while training; from 0 up to, not including, 1."}
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Modules whose output is adapted (attention and feed-forward sublayers, or linear layers): full paths or "
            "last parts of paths, or a regular expression."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules to leave out, named as in target_modules."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules that are trained in full and saved with the adapter."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("BOTTLENECK")
        if self.bottleneck_size < 1:
            raise ValueError(f"bottleneck_size is {self.bottleneck_size}; it must be at least 1")
        if self.placement not in get_args(Placement):
            raise ValueError(f"placement is {self.placement!r}; there are: {', '.join(get_args(Placement))}")
        if self.non_linearity not in ACTIVATIONS:
            raise ValueError(f"non_linearity is {self.non_linearity!r}; there are: {', '.join(ACTIVATIONS)}")
        if not 0.0 <= self.bottleneck_dropout < 1.0:
            raise ValueError(f"bottleneck_dropout is {self.bottleneck_dropout}; it must be at least 0 and below 1")
        if not math.isfinite(self.scaling):
            raise ValueError(f"scaling is {self.scaling}; it must be finite")

    def to_dict(self) -> dict[str, Any]:
        """As PEFT's, and in a fixed order where PEFT has condensed a list of targets to a set."""
        return {key: sorted(value) if isinstance(value, set) else value for key, value in super().to_dict().items()}


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """A sublayer, or a linear layer, with adapters on its output.

    The wrapped module may return a tensor of shape (..., width) or a tuple whose first element is one. Adapters compute in
    their own dtype (fp32, unless PEFT has `autocast_adapter_dtype=False`), or in autocast's, and the sum is given back in
    the wrapped module's. Several active adapters apply in the order in which they were activated: a sequential one to what
    the one before it left, a parallel one to the input. Attributes that are not the layer's own are the wrapped module's.

    Args:
        base_layer: the module to wrap.
        adapter_name: the first adapter.
        config: its settings.
        width: input and output width of `base_layer`.
    """

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    other_param_names = ("bottleneck_dropout", "bottleneck_config")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: BottleneckConfig, width: tuple[int, int]) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_width = width
        self.bottleneck_down = nn.ModuleDict()
        self.bottleneck_up = nn.ModuleDict()
        self.bottleneck_dropout = nn.ModuleDict()
        self.bottleneck_config: dict[str, BottleneckConfig] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Private names stay each module's own: accelerate would take the wrapped module's hooks for this one's.
            if name.startswith("_") or name == "base_layer":
                raise
            return getattr(super().__getattr__("base_layer"), name)

    def update_layer(self, adapter_name: str, config: BottleneckConfig) -> None:
        """Add an adapter, which changes nothing yet: `up` is zero.

        `down` is drawn as nn.Linear draws its weights, with a zero bias: the start that He et al. (2022) take for every
        adapter in their comparison. Houlsby et al. draw both matrices near zero instead (a standard deviation of 0.01).
        """
        inputs, outputs = self.bottleneck_width
        down = nn.Linear(inputs if config.placement == "parallel" else outputs, config.bottleneck_size)
        up = nn.Linear(config.bottleneck_size, outputs)
        for zero in (down.bias, up.weight, up.bias):
            nn.init.zeros_(zero)
        if not up.weight.is_meta:
            parameters = list(self.base_layer.parameters())
            dtype = next((parameter.dtype for parameter in parameters if parameter.dtype in FLOATS), torch.float32)
            down, up = (linear.to(parameters[0].device, dtype) for linear in (down, up))
        self.bottleneck_down[adapter_name] = down
        self.bottleneck_up[adapter_name] = up
        self.bottleneck_dropout[adapter_name] = nn.Dropout(config.bottleneck_dropout).train(self.base_layer.training)
        self.bottleneck_config[adapter_name] = config
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the wrapped module returns, its (first) tensor adapted. Shapes and dtypes are the wrapped module's.

        Raises:
            TypeError: the wrapped module's output is neither a tensor nor a tuple that starts with one, or a parallel adapter
                cannot tell which argument is the input.
        """
        output = self.base_layer(*args, **kwargs)
        names = [name for name in self.active_adapters if name in self.bottleneck_down]
        if self.disable_adapters or not names:
            return output
        hidden = output[0] if isinstance(output, tuple) else output
        if not isinstance(hidden, torch.Tensor):
            raise TypeError(f"bottleneck: {type(self.get_base_layer()).__name__} returns no hidden states to adapt")
        for name in names:
            config = self.bottleneck_config[name]
            x = self._input(args, kwargs) if config.placement == "parallel" else hidden
            x = cast_layer_input(self, x, self.bottleneck_down[name].weight.dtype)
            inner = ACTIVATIONS[config.non_linearity](self.bottleneck_down[name](x))
            change = self.bottleneck_up[name](self.bottleneck_dropout[name](inner))
            # A mixture of experts may return its tokens in one flat row.
            hidden = (hidden + config.scaling * change.reshape(hidden.shape)).to(hidden.dtype)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        """Raises NotImplementedError: there is nothing to merge into."""
        raise NotImplementedError(CANNOT_MERGE)

    def unmerge(self) -> NoReturn:
        """Raises NotImplementedError: nothing was merged."""
        raise NotImplementedError(CANNOT_MERGE)

    def _input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        states = args[0] if args else kwargs.get("hidden_states", kwargs.get("x", kwargs.get("input")))
        if not isinstance(states, torch.Tensor):
            raise TypeError(f"bottleneck: {type(self.get_base_layer()).__name__} was called without hidden states to adapt")
        return states


class BottleneckModel(BaseTuner):
    """PEFT's model class for bottleneck adapters: `get_peft_model(model, BottleneckConfig(...))` makes one."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _create_and_replace(
        self,
        peft_config: BottleneckConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, BottleneckLayer):
            target.update_layer(adapter_name, peft_config)
            return
        ancestors = _ancestors(self.model, current_key)
        if any(isinstance(module, BottleneckLayer) for module in ancestors):
            raise ValueError(f"bottleneck: {current_key} lies inside another target; name one of the two in target_modules")
        new = BottleneckLayer(target, adapter_name, peft_config, _width(target, current_key, ancestors))
        self._replace_module(parent, target_name, new, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own hands `weight` on, which a sublayer lacks, and moves adapters, which `update_layer` has put in place.
        setattr(parent, child_name, new_module)

    def _check_merge_allowed(self) -> NoReturn:
        raise NotImplementedError(CANNOT_MERGE)

    def unmerge_adapter(self) -> NoReturn:
        """Raises NotImplementedError: nothing was merged."""
        raise NotImplementedError(CANNOT_MERGE)


def bottleneck_targets(model: nn.Module, root: str, placement: Placement) -> list[str]:
    """Full paths of the sublayers that a placement wraps, found by structure.

    A block is an item of an `nn.ModuleList` with one attention and one feed-forward child (`ATTENTIONS`, `FEED_FORWARDS`), the
    feed-forward being dense or a mixture of experts. The sublayers themselves are wrapped, so an adapter acts on what the
    output projection returns. Where the block puts more between that and the residual sum, that comes after the adapter: the
    post norms of Gemma 2 and 3, the layer scale of DINOv2, dropout. Houlsby et al. place theirs so ("directly to the output
    of the sub-layer, after the projection back to the input size"), a parallel adapter can sit nowhere else, and the adapter's
    share then keeps its size relative to the sublayer's, however the block scales both.

    Args:
        model: a model, before or after adapters are attached.
        root: the component's path, such as `model.language_model`; empty for the whole model.
        placement: houlsby for both sublayers of each block, pfeiffer and parallel for the feed-forward.

    Returns:
        Paths that `model.get_submodule` takes, in the order of the model.

    Raises:
        UserError: there is no such path, there are no blocks, a block among them has other sublayers, or one adds the residual
            itself.
    """
    try:
        component = model.get_submodule(root)
    except AttributeError as error:
        raise UserError(f"bottleneck: {type(model).__name__} has no module {root!r}") from error
    where = root or type(model).__name__
    targets: list[str] = []
    for name, stack in component.named_modules():
        if not isinstance(stack, nn.ModuleList) or not any(all(_sublayers(block)) for block in stack):
            continue
        for index, block in enumerate(stack):
            path = ".".join(part for part in (root, name, str(index)) if part)
            attention, feed_forward = _sublayers(block)
            children = ", ".join(child for child, _ in block.named_children()) or "nothing"
            if len(attention) != 1 or len(feed_forward) != 1:
                raise UserError(
                    f"bottleneck: {where}: {path} ({type(block).__name__}) is not one attention and one feed-forward sublayer; "
                    f"it holds {children}"
                )
            for child in (*attention, *feed_forward):
                sublayer = block.get_submodule(child)
                bare = sublayer.get_base_layer() if isinstance(sublayer, BaseTunerLayer) else sublayer
                if "residual" in inspect.signature(bare.forward).parameters:
                    raise UserError(f"bottleneck: {where}: {path}.{child} ({type(bare).__name__}) adds the residual itself")
            targets += [f"{path}.{child}" for child in ((*attention,) if placement == "houlsby" else ()) + (*feed_forward,)]
    if not targets:
        stacks = [module for module in component.modules() if isinstance(module, nn.ModuleList)]
        kinds = sorted({type(item).__name__ for stack in stacks for item in stack})
        raise UserError(
            f"bottleneck: found no transformer blocks in {where} ({type(component).__name__}): a list of modules with an "
            f"attention child ({', '.join(ATTENTIONS)}) and a feed-forward child ({', '.join(FEED_FORWARDS)}); "
            f"its lists hold: {', '.join(kinds) or 'nothing'}"
        )
    return targets


def _sublayers(block: nn.Module) -> tuple[list[str], list[str]]:
    children = [name for name, _ in block.named_children()]
    return [name for name in children if name in ATTENTIONS], [name for name in children if name in FEED_FORWARDS]


def _ancestors(model: nn.Module, path: str) -> list[nn.Module]:
    """The modules that enclose `path`, the nearest first and the model last."""
    chain, module = [model], model
    for part in path.split(".")[:-1]:
        module = getattr(module, part)
        chain.append(module)
    return chain[::-1]


def _width(module: nn.Module, path: str, ancestors: list[nn.Module]) -> tuple[int, int]:
    """Input and output width of a linear layer (quantized ones too), or the hidden size of the sublayer, twice.

    A sublayer's first linear layer takes hidden states, and one of its linear layers gives them back. The config is asked only
    where none does, as in a mixture of experts: in Qwen2-VL's tower `config.hidden_size` is the language model's width.
    """
    linears: list[Any] = [layer for layer in module.modules() if isinstance(getattr(layer, "in_features", None), int)]
    sizes: list[tuple[int, int]] = [(linear.in_features, linear.out_features) for linear in linears]
    if linears and linears[0] is module:
        return sizes[0]
    if any(outputs == sizes[0][0] for _, outputs in sizes):
        return sizes[0][0], sizes[0][0]
    for holder in (module, *ancestors):
        size = getattr(getattr(holder, "config", None), "hidden_size", None)
        if isinstance(size, int) and (not sizes or sizes[0][0] == size):
            return size, size
    raise ValueError(f"bottleneck: cannot tell the width of {path} ({type(module).__name__}); name a linear layer inside it")


register("bottleneck", BottleneckConfig, BottleneckModel)
