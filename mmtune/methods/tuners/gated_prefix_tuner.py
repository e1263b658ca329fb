"""Zero-gated prefix: LLaMA-Adapter's prompts and zero-initialised attention, as a PEFT tuner (arXiv 2303.16199).

Each of the upper decoder layers gets K prompt vectors P. They go through the layer's own frozen `k_proj` and `v_proj`, every
query attends to them in a softmax of their own, and a gate g for each head h lets the outcome in (section 3.2; M is the
layer's usual mask):

    attended_h = softmax(q_h k_h^T * scale + M) v_h + tanh(g_h) * softmax(q_h k_P^T * scale) v_P
    output = o_proj(attended)

The published code (OpenGVLab/LLaMA-Adapter, alpaca_finetuning_v1/llama/model.py) decides what the paper leaves open:

- the gate is one number for each head behind a tanh, zero at first, so that the first step is the base model;
- prompts go into the projections as they are, past the layer's input norm; where a layer has a norm of its own for keys (Qwen3,
  Gemma 3; LLaMA has none), prompt keys go through it, so that queries meet keys of the size that they know;
- prompt keys are not rotated. They have no position, and a prompt looks the same from every query;
- every query sees all prompts: no causal and no padding mask applies to them;
- prompts are drawn from N(0, 1), as `nn.Embedding` does, and so does PEFT. That is the size of what the projections read in
  training, which has been through an RMS norm. Drawn at 0.02, the size of token embeddings, values and the gate's first
  gradient are 50 times smaller.

PEFT's own ADAPTION_PROMPT has one gate for all heads and no tanh. It recomputes the rotated query from the projection for each
family it knows, applies `o_proj` a second time, and asks `model.config.model_type`, which inside a vision-language model is
`llava` and none of llama, mistral and gpt2. Here the attention module itself hands over its query: transformers' attention
modules call the function that their config names with the finished query, normed and rotated (multimodal rotation too), so
one function of that kind serves every family. Only the adapted modules see a config that names it; the model's
own, by which masks are built, stays as it is, and `model.set_attn_implementation` works at any time.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn
from transformers import AttentionInterface

from mmtune.methods.tuners.peft_private import register
from mmtune.utils.errors import UserError
from mmtune.utils.transformers_private import attention_of

ATTENTION = "mmtune_gated_prefix"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
LOWEST_SPARED = 2
"""Layers at the bottom without prompts when `adapter_layers` is None: the paper adapts 30 of LLaMA 7B's 32."""


@dataclass
class GatedPrefixConfig(PeftConfig):
    """Configuration of a `GatedPrefixModel`. Names and lengths are those of PEFT's ADAPTION_PROMPT and the paper."""

    adapter_len: int = field(default=10, metadata={"help": "Prompt vectors in each adapted layer."})
    adapter_layers: int | None = field(
        default=None,
        metadata={"help": "Adapted layers, counted from the top. None: all but the lowest two, and at least one."},
    )
    init_std: float = field(
        default=1.0, metadata={"help": "Standard deviation of the normal distribution that prompts are drawn from."}
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Full paths of the attention modules; mmtune fills them in (`gated_prefix_targets`)."},
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules that are trained whole and saved beside the adapter."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Rows of the embeddings or of a named module that train, as in PEFT's LoraConfig."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = GATED_PREFIX
        if self.adapter_len < 1:
            raise UserError(f"adapter_len: {self.adapter_len} prompt vectors; at least 1 is needed")
        if self.init_std <= 0:
            raise UserError(f"init_std: {self.init_std}; prompts that are all zero would never train, give a number above 0")


def gated_prefix_targets(model: nn.Module, root: str, adapter_layers: int | None) -> list[str]:
    """Full paths of the attention modules in the top layers of a decoder, lowest first, for `target_modules`.

    Args:
        model: holds the decoder; may be wrapped by PEFT, adapted or not.
        root: path of the decoder in it, such as `model.language_model`.
        adapter_layers: how many layers. None: all but the lowest two, and at least one.

    Raises:
        UserError: the decoder is not a stack of layers with one attention module each that this method understands, or it has
            fewer layers than asked for.
    """
    attentions = _attention_of_each_layer(model.get_submodule(root), root)
    for path, attention in attentions.items():
        if fault := _fault(attention):
            raise UserError(f"gated_prefix: {path} ({type(_base(attention)).__name__}) {fault}")
    kinds = sorted({type(_base(attention)).__name__ for attention in attentions.values()})
    if len(kinds) > 1:
        raise UserError(f"gated_prefix: the layers of {root} have attention modules of several kinds: {', '.join(kinds)}")
    count = max(1, len(attentions) - LOWEST_SPARED) if adapter_layers is None else adapter_layers
    if not 1 <= count <= len(attentions):
        raise UserError(f"adapter_layers: {adapter_layers} is out of range; {root} has {len(attentions)} layers")
    return list(attentions)[-count:]


class GatedPrefixLayer(nn.Module, BaseTunerLayer):
    """An attention module with gated prompts. Attributes that it lacks are the attention module's.

    Parameters of each adapter, in fp32 whatever the base's precision:
        gated_prefix_prompt: (adapter_len, hidden_size).
        gated_prefix_gate: (num_attention_heads,), zero at first.

    Terms of several active adapters add up.
    """

    adapter_layer_names = ("gated_prefix_prompt", "gated_prefix_gate")

    def __init__(self, base_layer: Any, adapter_name: str, config: GatedPrefixConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.gated_prefix_prompt = nn.ParameterDict()
        self.gated_prefix_gate = nn.ParameterDict()
        self._active_adapter = adapter_name
        self.base_layer.config = _Overlay(self.base_layer.config, _attn_implementation=ATTENTION, gated_prefix=self)
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: GatedPrefixConfig) -> None:
        """Add an adapter, its prompts random and its gates closed."""
        attention = self.base_layer
        device = attention.k_proj.weight.device
        heads = attention.q_proj.out_features // attention.head_dim
        prompt = torch.empty(config.adapter_len, attention.k_proj.in_features, dtype=torch.float32, device=device)
        self.gated_prefix_prompt[adapter_name] = nn.Parameter(prompt.normal_(std=config.init_std))
        self.gated_prefix_gate[adapter_name] = nn.Parameter(torch.zeros(heads, dtype=torch.float32, device=device))
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def release(self) -> None:
        """Leave the attention module as it was before."""
        self.base_layer.config = self.base_layer.config.beneath

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the attention module returns; on the way it calls `add_prompts` through its attention function."""
        return self.base_layer(*args, **kwargs)

    def add_prompts(self, attended: torch.Tensor, query: torch.Tensor, scaling: float) -> torch.Tensor:
        """Add the gated terms of the active adapters.

        Args:
            attended: what the usual attention gives, (batch, length, heads, head_dim).
            query: normed and rotated, (batch, heads, length, head_dim).
            scaling: of the scores.

        Returns:
            As `attended`, in shape and dtype.
        """
        names = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.gated_prefix_prompt]
        result = attended
        for name in names:
            keys, values = self._keys_and_values(self.gated_prefix_prompt[name], query)
            term = F.scaled_dot_product_attention(query, keys, values, scale=scaling).transpose(1, 2)
            result = result + torch.tanh(self.gated_prefix_gate[name])[:, None] * term
        return result.to(attended.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise _cannot_merge()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":  # not there yet
                raise
            return getattr(self.base_layer, name)

    def _keys_and_values(self, prompt: torch.Tensor, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Both (batch, heads, adapter_len, head_dim), in the query's dtype."""
        attention = self.base_layer
        shape = (len(prompt), -1, attention.head_dim)
        keys = attention.k_proj(prompt.to(_compute_dtype(attention.k_proj, query))).view(shape)
        values = attention.v_proj(prompt.to(_compute_dtype(attention.v_proj, query))).view(shape)
        if getattr(attention, "k_norm", None) is not None:
            keys = attention.k_norm(keys)
        groups = query.shape[1] // keys.shape[1]

        def for_each_query_head(heads: torch.Tensor) -> torch.Tensor:
            repeated = heads.to(query.dtype).transpose(0, 1).repeat_interleave(groups, dim=0)
            return repeated.expand(len(query), -1, -1, -1)

        return for_each_query_head(keys), for_each_query_head(values)


class GatedPrefixModel(BaseTuner):
    """A model whose attention modules have gated prompts. See `GatedPrefixConfig` and PEFT's `BaseTuner`."""

    prefix = "gated_prefix_"
    tuner_layer_cls = GatedPrefixLayer

    def _prepare_adapter_config(self, peft_config: GatedPrefixConfig, model_config: dict[str, Any]) -> GatedPrefixConfig:
        if not peft_config.target_modules:
            raise UserError("gated_prefix: target_modules names no attention module; gated_prefix_targets finds them")
        return peft_config

    def _create_and_replace(
        self,
        peft_config: GatedPrefixConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, GatedPrefixLayer):
            target.update_layer(adapter_name, peft_config)
            return
        if fault := _fault(target):
            raise UserError(f"gated_prefix: {current_key} ({type(target).__name__}) {fault}")
        layer = GatedPrefixLayer(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        setattr(parent, target_name, layer)

    def _check_merge_allowed(self) -> None:
        raise _cannot_merge()

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Put a module back at unloading. PEFT's own copies `child.weight`, and attention modules and projectors have none."""
        if isinstance(child, GatedPrefixLayer):
            child.release()
        setattr(parent, child_name, new_module)


class _Overlay:
    """Answers as the object beneath it does, except for the attributes laid over it."""

    def __init__(self, beneath: Any, **over: Any) -> None:
        self.beneath = beneath
        self.__dict__.update(over)

    def __getattr__(self, name: str) -> Any:
        if name == "beneath" or name.startswith("__"):  # a copy asks before there is anything beneath
            raise AttributeError(name)
        return getattr(self.beneath, name)


def _attend(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """transformers' attention function of an adapted module: the one that the model's config names, and the prompts."""
    overlay: Any = module.config
    usual = AttentionInterface().get_interface(attention_of(overlay.beneath), _names(module)["eager_attention_forward"])
    attended, weights = usual(_Overlay(module, config=overlay.beneath), query, key, value, mask, **kwargs)
    return overlay.gated_prefix.add_prompts(attended, query, kwargs["scaling"]), weights


def _names(attention: nn.Module) -> Mapping[str, Any]:
    """The global names that the attention module's forward sees."""
    forward: Any = inspect.unwrap(type(attention).forward)
    return forward.__globals__ if "ALL_ATTENTION_FUNCTIONS" in forward.__code__.co_names else {}


def _attention_of_each_layer(decoder: nn.Module, root: str) -> dict[str, nn.Module]:
    """The attention module of each of a decoder's layers by full path."""
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise UserError(f"gated_prefix: {root} ({type(decoder).__name__}) has no list of decoder layers under `layers`")
    attention = {}
    for number, layer in enumerate(layers):
        own = [(name, child) for name, child in layer.named_children() if not _missing(child)]
        if len(own) != 1:
            raise UserError(
                f"gated_prefix: {root}.layers.{number} ({type(layer).__name__}) has {len(own)} attention modules with "
                f"{', '.join(PROJECTIONS)}; there must be one"
            )
        attention[f"{root}.layers.{number}.{own[0][0]}"] = own[0][1]
    return attention


def _missing(attention: nn.Module) -> list[str]:
    return [name for name in PROJECTIONS if not isinstance(getattr(attention, name, None), nn.Module)]


def _base(attention: nn.Module) -> Any:
    return attention.base_layer if isinstance(attention, GatedPrefixLayer) else attention


def _fault(attention: nn.Module) -> str | None:
    """Why this attention module cannot have gated prompts, if it cannot."""
    module = _base(attention)
    if missing := _missing(module):
        return f"has no {' and no '.join(missing)}"
    if "eager_attention_forward" not in _names(module):
        return "does not take its attention function from transformers' AttentionInterface"
    if not isinstance(getattr(module, "head_dim", None), int) or not hasattr(module.k_proj, "in_features"):
        return "has no head_dim, or a k_proj that is not linear"
    if getattr(module, "attn_logit_softcapping", None) is not None:
        return "caps its scores (attn_logit_softcapping), which is not supported"
    if hasattr(module, "v_norm"):
        return "norms its values (v_norm), which is not supported"
    norm = getattr(module, "k_norm", None)
    if norm is not None and any(weight.shape != (module.head_dim,) for weight in norm.parameters()):
        return "norms its keys across heads (k_norm), which is not supported"
    return None


def _compute_dtype(projection: Any, query: torch.Tensor) -> torch.dtype:
    """What the projection takes: its weight's dtype, or for a quantized one that of the activations."""
    dtype: torch.dtype = projection.weight.dtype
    return dtype if dtype in (torch.float32, torch.bfloat16, torch.float16) else query.dtype


def _cannot_merge() -> UserError:
    return UserError(
        "gated_prefix cannot be merged: its prompts attend beside the base's weights and are part of none of them; release the "
        "adapter beside its base"
    )


AttentionInterface.register(ATTENTION, _attend)
GATED_PREFIX = register("gated_prefix", GatedPrefixConfig, GatedPrefixModel)
