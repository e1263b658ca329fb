"""A patch embedding computed as a matrix product equals torch's convolution, in its gradients and under LoRA too."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from mmtune.families.patch_embedding import PatchConv3d, use_patch_products
from mmtune.models.compute import prepare_computation


class Embedding(nn.Module):
    def __init__(self, **settings: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj = nn.Conv3d(3, 16, kernel_size=(2, 4, 4), stride=(2, 4, 4), **settings)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.proj(x)
        return y


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [(2, 4, 4), (2, 8, 12)])
def test_the_product_equals_the_convolution(bias: bool, size: tuple[int, int, int]) -> None:
    plain, product = Embedding(bias=bias).double(), Embedding(bias=bias).double()
    use_patch_products(product)
    assert type(product.proj) is PatchConv3d and product.state_dict().keys() == plain.state_dict().keys()
    results = []
    for module in (plain, product):
        x = torch.randn(5, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = module(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(parameter.grad for parameter in module.parameters())])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_other_convolutions_stay() -> None:
    modules = [Embedding(padding=(0, 1, 1)), Embedding(dilation=(1, 2, 2))]
    for module in modules:
        use_patch_products(module)
        assert type(module.proj) is nn.Conv3d


def test_lora_adapts_it() -> None:
    results = []
    for prepare in (lambda _: None, use_patch_products):
        module = Embedding()
        prepare(module)
        torch.manual_seed(1)
        assert (type(module.proj) is PatchConv3d) == (prepare is use_patch_products)
        tuned = get_peft_model(module, LoraConfig(r=2, target_modules=["proj"], init_lora_weights=False))
        results.append(tuned(torch.ones(2, 3, 2, 4, 4)))
    torch.testing.assert_close(*results)


def test_a_model_that_is_loaded_has_it() -> None:
    config = Qwen2VLConfig(
        text_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "vocab_size": 32,
        },
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4},
    )
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(config)
    pixels = torch.randn(8, 3 * 2 * 4 * 4)
    expected = model.model.visual.patch_embed(pixels)
    prepare_computation(model)
    assert type(model.model.visual.patch_embed.proj) is PatchConv3d
    torch.testing.assert_close(model.model.visual.patch_embed(pixels), expected)
