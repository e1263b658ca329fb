"""`train.torch_compile`: the losses and gradients of the model that is not compiled, and few compilations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModelForImageTextToText

from mmtune.data.batching.collate import collate, pack
from mmtune.models.packed_attention import attention_by_sample
from mmtune.objectives.sft import SupervisedTuning
from mmtune.recipe.objective_section import SftSection

IMAGE = 3
LENGTHS = ((9, 14, 6), (14, 9, 7, 11), (6, 12, 13), (12, 8), (13, 10, 9, 14), (7, 9, 8))
"""Of the samples of each batch. The first has the shapes of a graph, the second makes the sizes variable."""


def sample(length: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(8, 64, (1, length), generator=generator)
    ids[:, 1:5] = IMAGE
    labels = ids.clone()
    labels[:, :-3] = -100
    pixels = torch.randn(1, 3, 28, 28, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "pixel_values": pixels}


def small_model() -> Any:
    from transformers import LlavaConfig

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    tower = {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14, **sizes, "num_hidden_layers": 2}
    text = {"model_type": "llama", "vocab_size": 64, **sizes}
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(LlavaConfig(vision_config=tower, text_config=text, image_token_id=IMAGE))
    model = get_peft_model(model, LoraConfig(r=2, target_modules=r".*language_model.*\.[qv]_proj")).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2) if "lora_B" in name else None
    return model


@pytest.mark.slow
@pytest.mark.parametrize("packing", [True, False])
def test_a_compiled_model_has_the_gradients_of_the_model_and_is_compiled_for_all_lengths_at_once(packing: bool) -> None:
    model, objective, backend = small_model(), SupervisedTuning(SftSection()), CompileCounterWithBackend("eager")
    compiled, graphs = torch.compile(model, backend=backend), []

    def gradients(forward: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        model.zero_grad()
        with attention_by_sample():
            loss = objective.compute_loss(forward, objective.model_inputs(model, dict(batch)), 10).loss
        loss.backward()
        by_name = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return {"loss": loss.detach(), **by_name}

    for lengths in LENGTHS:
        samples = [sample(length) for length in lengths]
        batch = pack(samples) if packing else collate(samples, 0)
        expected, actual = gradients(model, batch), gradients(compiled, batch)
        assert len(expected) > 4 and expected.keys() == actual.keys()
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name], atol=1e-5, rtol=0)
        graphs.append(backend.frame_count)
    assert graphs[0] > 0 and graphs[-1] == graphs[-2], graphs
