"""Private members of libraries: each is used only in the file of its library and behaves as that file expects.

A test that fails here after an upgrade names the library and the member; its file is where the change belongs.
"""

from __future__ import annotations

import ast
import inspect
import multiprocessing
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftType
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import (
    AttentionInterface,
    AutoModelForImageTextToText,
    GenerationMixin,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    ProcessorMixin,
    Trainer,
    trainer_optimizer,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from mmtune.data.torch_private import end_workers
from mmtune.training.trainer import TuningTrainer

ROOT = Path(__file__).parents[1]
PRIVATE_FILES = {
    "mmtune/utils/transformers_private.py",
    "mmtune/training/trainer_private.py",
    "mmtune/methods/tuners/peft_private.py",
    "mmtune/distributed/deepspeed_private.py",
    "mmtune/distributed/accelerate_private.py",
    "mmtune/data/torch_private.py",
    "mmtune/models/fake_tensors.py",  # torch's fake tensors and dispatch modes
}
NAMEDTUPLE = {"_replace", "_asdict", "_fields", "_make"}
"""Public members of named tuples, whatever their names look like."""
DEEPSPEED = {"ds_id", "ds_numel", "ds_shape", "ds_tensor", "ds_status"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name not in NAMEDTUPLE


def own_names(trees: list[ast.AST]) -> set[str]:
    """Names that the package defines: functions, classes, variables, arguments, and attributes of `self`."""
    names: set[str] = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) in ("self", "cls"):
            names.add(node.attr)
    return names


def library_members(source: str, own: set[str]) -> list[str]:
    """Private members of libraries that a file touches, as far as its source shows."""
    tree, members = ast.parse(source), []
    imported = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("mmtune")
        for alias in node.names
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (is_private(node.attr) or node.attr in DEEPSPEED) and node.attr not in own:
            members.append(ast.unparse(node))
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and node.attr[0] == "_"
            and ast.unparse(node.value) in imported
        ):
            members.append(f"{ast.unparse(node)} = ...")  # a patched library
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("mmtune"):
            parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            members += [f"from {node.module} import {part}" for part in parts if is_private(part)]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
            names = [each.value for each in node.args[1:2] if isinstance(each, ast.Constant) and isinstance(each.value, str)]
            members += [f"{ast.unparse(node.func)} {name}" for name in names if is_private(name) or name in DEEPSPEED]
    return members


def test_private_members_of_libraries_are_used_in_their_files_only() -> None:
    files = {str(path.relative_to(ROOT)): path.read_text("utf-8") for path in sorted((ROOT / "mmtune").rglob("*.py"))}
    assert files.keys() >= PRIVATE_FILES
    own = own_names([ast.parse(text) for name, text in files.items() if name not in PRIVATE_FILES])
    members = {name: library_members(text, own) for name, text in files.items() if name not in PRIVATE_FILES}
    assert {name: each for name, each in members.items() if each} == {}


@pytest.mark.parametrize(
    "source",
    [
        "processor._merge_kwargs()",
        "self._tr_loss.clone()",
        "from transformers.utils.chat_template_utils import _compile_jinja_template",
        "from torch._subclasses import fake_tensor",
        "from accelerate.state import AcceleratorState\nAcceleratorState.__init__ = patched",
        "hasattr(parameter, 'ds_id')",
        "parameter.ds_tensor.data",
        "getattr(model, '_weight_conversions', None)",
    ],
)
def test_a_private_member_elsewhere_is_reported(source: str) -> None:
    assert library_members(source, {"_own"}) != []


@pytest.mark.parametrize("source", ["self._own", "turn._replace(content=[])", "module.__dict__", "from mmtune.x import _own"])
def test_a_member_of_the_package_is_not_a_fault(source: str) -> None:
    assert library_members(source, {"_own"}) == []


def test_the_trainer_overrides_only_public_names() -> None:
    overridden = {name for name in vars(TuningTrainer) if hasattr(Trainer, name)}
    assert {name for name in overridden if is_private(name)} == set()


SIGNATURES: dict[tuple[str, str], tuple[Callable[..., Any], list[str]]] = {
    ("transformers", "Trainer._run_epoch"): (
        Trainer._run_epoch,
        [
            *("self", "model", "epoch", "train_dataloader", "steps_in_epoch", "num_update_steps_per_epoch", "trial"),
            *("ignore_keys_for_eval", "start_time", "resume_from_checkpoint", "epochs_trained", "steps_trained_in_current_epoch"),
        ],
    ),
    ("transformers", "Trainer._get_grad_norm"): (Trainer._get_grad_norm, ["self", "model", "grad_norm"]),
    ("transformers", "Trainer._get_output_dir"): (Trainer._get_output_dir, ["self", "trial"]),
    ("transformers", "Trainer._save"): (Trainer._save, ["self", "output_dir", "state_dict"]),
    ("transformers", "Trainer._save_checkpoint"): (Trainer._save_checkpoint, ["self", "model", "trial"]),
    ("transformers", "Trainer._load_from_checkpoint"): (
        Trainer._load_from_checkpoint,
        ["self", "resume_from_checkpoint", "model"],
    ),
    ("transformers", "Trainer.save_model"): (Trainer.save_model, ["self", "output_dir", "_internal_call"]),
    ("transformers", "_get_control_tokens"): (PreTrainedTokenizerBase._get_control_tokens, ["self", "chat_template"]),
    ("transformers", "_encode_without_added_tokens"): (PreTrainedTokenizerFast._encode_without_added_tokens, ["self", "text"]),
    ("transformers", "_compile_jinja_template"): (
        inspect.unwrap(chat_template_utils._compile_jinja_template),
        ["chat_template"],
    ),
    ("transformers", "_plain_template_data"): (chat_template_utils._plain_template_data, ["value"]),
    ("transformers", "ProcessorMixin._merge_kwargs"): (
        ProcessorMixin._merge_kwargs,
        ["self", "ModelProcessorKwargs", "tokenizer_init_kwargs", "kwargs"],
    ),
    ("transformers", "GenerationMixin._sample"): (
        GenerationMixin._sample,
        [
            *("self", "input_ids", "logits_processor", "stopping_criteria", "generation_config", "synced_gpus", "streamer"),
            "model_kwargs",
        ],
    ),
    ("transformers", "GenerationMixin._update_model_kwargs_for_generation"): (
        GenerationMixin._update_model_kwargs_for_generation,
        ["self", "outputs", "model_kwargs", "is_encoder_decoder", "num_new_tokens"],
    ),
    ("peft", "BaseTunerLayer._cast_input_dtype"): (BaseTunerLayer._cast_input_dtype, ["self", "x", "dtype"]),
}


@pytest.mark.parametrize(("library", "member"), SIGNATURES)
def test_a_private_function_has_the_expected_parameters(library: str, member: str) -> None:
    function, parameters = SIGNATURES[library, member]
    assert [*inspect.signature(function).parameters] == parameters, f"{library} {metadata.version(library)} changed {member}"


def test_transformers_trainer_still_accumulates_its_logged_loss_in_private() -> None:
    """`accumulated_loss` and `leave_step_out_of_log` rest on two attributes, which the log divides by each other."""
    source = inspect.getsource(Trainer)
    changed = f"transformers {metadata.version('transformers')} changed the logged loss of Trainer"
    assert "self._tr_loss += tr_loss_step" in source, changed
    assert 'logs["loss"] = tr_loss_scalar / (self.state.global_step - self._globalstep_last_logged)' in source, changed


def test_transformers_still_has_the_private_attributes() -> None:
    changed = f"transformers {metadata.version('transformers')} changed"
    assert isinstance(AttentionInterface._global_mapping, dict) and "sdpa" in AttentionInterface._global_mapping, changed
    assert isinstance(trainer_optimizer._OPTIMIZER_HANDLERS, dict), changed
    assert callable(trainer_optimizer._get_bitsandbytes_optimizer), changed
    assert AutoModelForImageTextToText._model_mapping.get(LlavaConfig, None) is LlavaForConditionalGeneration, changed
    assert hasattr(PreTrainedModel, "_no_split_modules") and hasattr(PreTrainedModel, "_tied_weights_keys"), changed
    assert len(chat_template_utils._CONTROL_TOKEN_START) == len(chat_template_utils._CONTROL_TOKEN_END) == 1, changed


def test_transformers_builds_models_in_full_inside_set_zero3_state() -> None:
    from transformers import modeling_utils

    from mmtune.utils.transformers_private import without_zero3_init

    with without_zero3_init():
        assert modeling_utils._is_ds_init_called, f"transformers {metadata.version('transformers')} changed set_zero3_state"
    assert not modeling_utils._is_ds_init_called


def test_peft_still_reads_layers_of_some_families_as_experts() -> None:
    from mmtune.methods.tuners.peft_private import names_read_as_experts

    changed = f"peft {metadata.version('peft')} changed the conversion of adapters from before transformers 5"
    assert names_read_as_experts("glm4v_moe") == {"gate", "gate_proj", "up_proj", "down_proj"}, changed
    assert not names_read_as_experts("qwen3_vl_moe"), changed


def test_peft_still_renames_the_tensors_of_an_adapter_by_a_mapping_of_this_name() -> None:
    from peft.utils import transformers_weight_conversion as conversion

    from mmtune.methods.tuners.peft_private import adapter_keys_as_stored

    mapping = conversion.get_checkpoint_conversion_mapping
    assert mapping("deepseek_ocr2"), f"peft {metadata.version('peft')} changed how it renames the tensors of adapters"
    with adapter_keys_as_stored():
        assert conversion.get_checkpoint_conversion_mapping("deepseek_ocr2") is None
    assert conversion.get_checkpoint_conversion_mapping is mapping


def test_pefts_types_are_an_enumeration_that_can_be_extended() -> None:
    changed = f"peft {metadata.version('peft')} or Python changed PeftType"
    assert PeftType._value2member_map_["LORA"] is PeftType._member_map_["LORA"] is PeftType.LORA, changed
    assert "LORA" in PeftType._member_names_, changed


def test_accelerate_sets_the_distributed_type_where_it_is_patched() -> None:
    from accelerate.state import AcceleratorState, PartialState

    changed = f"accelerate {metadata.version('accelerate')} changed AcceleratorState"
    assert "fsdp_plugin" in inspect.signature(AcceleratorState.__init__).parameters, changed
    assert isinstance(PartialState._shared_state, dict), changed


def test_deepspeed_still_sets_the_attributes_of_sharded_parameters() -> None:
    from deepspeed.runtime.zero import partition_parameters
    from transformers.integrations import deepspeed as integration

    source = inspect.getsource(partition_parameters)
    for name in ("ds_id", "ds_numel", "ds_shape", "ds_tensor"):
        assert f"param.{name} = " in source, f"deepspeed {metadata.version('deepspeed')} changed param.{name}"
    for name in ("HfDeepSpeedConfig", "set_hf_deepspeed_config", "unset_hf_deepspeed_config"):
        assert hasattr(integration, name), f"transformers {metadata.version('transformers')} changed {name}"


def test_torchs_fake_tensors_are_still_importable() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert torch.empty(4).untyped_storage()._cdata, f"torch {torch.__version__} changed fake tensors"


def test_torch_keeps_persistent_workers_with_the_iterator_of_a_loader() -> None:
    loader = torch.utils.data.DataLoader([0, 1], num_workers=1, persistent_workers=True)
    assert [*loader] and multiprocessing.active_children()
    end_workers(loader)
    assert multiprocessing.active_children() == []
