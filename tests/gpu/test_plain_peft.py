"""bf16, int8 and nf4: loss and gradients of LoRA beside plain transformers and PEFT on the same batch, on the CPU and on CUDA."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

from mmtune.data.batching.collate import collate
from mmtune.data.dataset import IndexedSamples
from mmtune.data.encoding.encode import encode_sample
from mmtune.models.compute import prepare_computation
from mmtune.models.packed_attention import attention_by_sample
from mmtune.models.quantize import prepare_quantized, quantization_config
from mmtune.objectives.sft import SupervisedTuning
from mmtune.recipe.recipe import Recipe

TARGETS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The device, with TF32 off: for products by default, for convolutions here."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert torch.get_float32_matmul_precision() == "highest"
    name: str = request.param
    return name


@pytest.fixture
def gradients(device: str, make_recipe: Callable[..., Recipe], base: Path) -> Callable[..., torch.Tensor]:
    """A function from the dtype, whether mmtune computes, and settings of `from_pretrained` to loss and gradients, in fp32."""
    recipe, processor = make_recipe(), AutoProcessor.from_pretrained(str(base))
    encoded = [encode_sample(sample, processor) for sample in IndexedSamples(recipe.data.train)][:6]
    batch = {name: value.to(device) for name, value in collate(encoded, processor.tokenizer.pad_token_id).items()}
    count = int((batch["labels"][:, 1:] != -100).sum())
    objective = SupervisedTuning(recipe.objective)

    def compute(dtype: torch.dtype, ours: bool, **settings: Any) -> torch.Tensor:
        plain = AutoModelForImageTextToText.from_pretrained(str(base), dtype=dtype, device_map={"": device}, **settings)
        if ours:
            prepare_computation(plain)
        if ours and settings:
            prepare_quantized(plain)
        torch.manual_seed(1)
        model: Any = get_peft_model(plain, LoraConfig(r=4, target_modules=TARGETS)).train()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at first, which would leave the other factor without a gradient
                torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator(device).manual_seed(len(name)))
        with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16), attention_by_sample():
            if ours:
                loss = objective.compute_loss(model, objective.model_inputs(model, dict(batch)), count).loss
            else:
                loss = model(**batch).loss
        loss.backward()
        trained = [parameter.grad.flatten().float() for parameter in model.parameters() if parameter.grad is not None]
        assert len(trained) > 8
        return torch.cat([loss.detach().float()[None], *trained]).cpu()

    return compute


def test_bf16_is_as_near_to_plain_peft_as_its_rounding(gradients: Callable[..., torch.Tensor]) -> None:
    """The rounding is measured: plain transformers and PEFT in bf16 beside fp32."""
    exact = gradients(torch.float32, False)
    assert float((gradients(torch.float32, True) - exact).norm() / exact.norm()) < 1e-5
    rounded = gradients(torch.bfloat16, False)
    rounding = float((rounded - exact).norm())
    assert 0 < rounding < 0.1 * float(exact.norm())
    assert float((gradients(torch.bfloat16, True) - rounded).norm()) < 2 * rounding


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_a_quantized_base_has_the_gradients_of_plain_peft(
    gradients: Callable[..., torch.Tensor], device: str, base: Path, precision: str
) -> None:
    """Our quantization config, and one that is written out: only the language model is quantized.

    On CUDA the head's product over fewer rows may have another kernel, whose rounding is allowed.
    """
    skipped = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.bfloat16}
    kind = {"load_in_8bit": True} if precision == "int8" else {"load_in_4bit": True, **nf4}
    written = BitsAndBytesConfig(llm_int8_skip_modules=skipped, **kind)
    plain = gradients(torch.bfloat16, False, quantization_config=written)
    unquantized = gradients(torch.bfloat16, False)
    assert float((plain - unquantized).norm() / unquantized.norm()) > 1e-4
    ours = quantization_config(AutoConfig.from_pretrained(str(base)), precision)
    rounding = float((unquantized - gradients(torch.float32, False)).norm())
    limit = 1e-5 * float(plain.norm()) if device == "cpu" else 2 * rounding
    assert float((gradients(torch.bfloat16, True, quantization_config=ours) - plain).norm()) < limit
