"""Training throughput on one GPU at 7B shapes: LoRA and QLoRA on packed rows, mmtune beside plain transformers and PEFT.

Weights are random and made on the device, so that nothing is downloaded. Rows and JPEG files are those of benchmarks/peers, read
by mmtune's data loader in worker processes. Both ways train the same packed rows:

* mmtune: attention of each sample alone, logits at supervised positions only, patch embeddings as matrix products;
* plain: the same batch through transformers and PEFT by themselves.

TFLOP/s are counted twice: `ours` from the products that the step needs (2 N for a token in the forward pass, 2 N more where an
input needs a gradient, 2 N more where the weight is trained, so 4 N for frozen and 6 N for trained weights; attention within
samples, 4 n^2 for each number of a head's width, three times with its gradients; in the frozen tower once, within an image or a
window), and `6N` with all weights of the language model. MFU is `ours` by the dense bf16 peak of the device (989 TFLOP/s on H100
and H200).

    python benchmarks/gpu.py --part qwen2_5 --attention flash_attention_2
    python benchmarks/gpu.py --part qwen2_5_vl --size tiny --device cpu        # seconds, on any machine
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks" / "peers")]

from mmtune.utils.torchvision_support import prepare_torchvision  # noqa: E402

prepare_torchvision()

import fixture  # noqa: E402
import torch  # noqa: E402
import transformers as tf  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from mmtune.data.batching.bin_packing import pack_lengths  # noqa: E402
from mmtune.data.batching.collate import Collator, pack  # noqa: E402
from mmtune.data.dataset import IndexedSamples, SampleEncoder, TrainingSet  # noqa: E402
from mmtune.families.patch_embedding import use_patch_products  # noqa: E402
from mmtune.models.packed_attention import attention_by_sample, packed_inputs  # noqa: E402
from mmtune.models.tiny.tiny_bases import BASES, write_tiny_base  # noqa: E402
from mmtune.objectives.sft import pad_token_id, score_supervised_only  # noqa: E402
from mmtune.recipe.recipe import DataSection  # noqa: E402
from mmtune.training.throughput.flops import peak_flops  # noqa: E402

MODELS = ("llava", "qwen2_5_vl", "qwen2_5")
PARTS = (*MODELS, *(f"{name}_qlora" for name in MODELS))
QWEN_TEXT = {
    "7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1024,
    },
}
QWEN_VISION = {
    "7b": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
    "tiny": {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "fullatt_block_indexes": [1]},
}
QWEN_SECTIONS = {"7b": [16, 24, 24], "tiny": [2, 3, 3]}
TOWER_ATTENTION = ("CLIPAttention", "Qwen2_5_VLVisionAttention")
Batch = dict[str, Any]


def write_processor(name: str, size: str, folder: Path) -> Path:
    """A tiny checkpoint whose tokenizer and processor make the inputs of the model."""
    if name == "qwen2_5_vl":
        return write_tiny_base(BASES["qwen2_5_vl"], folder / "base")
    shape = fixture.SIZES[size]
    fixture.SIZES["processor"] = fixture.Size((32, 64, 2, 2), (32, 64, 2, 2), shape.image, shape.vocabulary)
    fixture.write_model(folder / "base", "processor")
    return folder / "base"


def config_of(name: str, size: str, base: Path) -> Any:
    """The config with the shapes of LLaVA-1.5-7B, Qwen2.5-VL-7B or Qwen2.5-7B, and the tokens of the processor."""
    if name == "qwen2_5":
        return tf.Qwen2Config(**QWEN_TEXT[size])
    config = tf.AutoConfig.from_pretrained(base)
    if name == "llava":
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        shape = fixture.SIZES[size]
        for part, widths in ((config.vision_config, shape.vision), (config.text_config, shape.text)):
            for key, value in zip(names, widths, strict=True):
                setattr(part, key, value)
        config.text_config.num_key_value_heads = config.text_config.num_attention_heads
        config.text_config.head_dim = shape.text[0] // shape.text[3]
        return config
    text = {
        **QWEN_TEXT[size],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": QWEN_SECTIONS[size]},
    }
    vision = {**QWEN_VISION[size], "out_hidden_size": text["hidden_size"], "patch_size": 14, "window_size": 112}
    tokens = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return tf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **{token: getattr(config, token) for token in tokens})


def build(config: Any, device: torch.device, attention: str, qlora: bool) -> Any:
    """A model with random weights in bf16 (fp32 on a CPU), with LoRA r 16 on all linear layers of the language model."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    auto = tf.AutoModelForCausalLM if config.model_type == "qwen2" else tf.AutoModelForImageTextToText
    with device:
        model = auto.from_config(config, dtype=dtype, attn_implementation=attention)
    model.requires_grad_(False)
    if qlora:
        quantize(model.get_decoder(), device)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    decoder = next(name for name, module in model.named_modules() if module is model.get_decoder())
    targets = [name for name in linear if name.startswith(f"{decoder}.layers.")]
    return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=targets)).train()


def quantize(decoder: nn.Module, device: torch.device) -> None:
    """Replace the linear layers by nf4 layers of bitsandbytes with the same weights."""
    import bitsandbytes as bnb

    for name, module in list(decoder.named_modules()):
        if isinstance(module, nn.Linear):
            layer = bnb.nn.Linear4bit(
                module.in_features,
                module.out_features,
                bias=module.bias is not None,
                compute_dtype=module.weight.dtype,
                quant_type="nf4",
                device="meta",
            )
            layer.weight = bnb.nn.Params4bit(module.weight.data.cpu(), requires_grad=False, quant_type="nf4", module=layer)
            layer.bias = module.bias
            parent, _, child = name.rpartition(".")
            setattr(decoder.get_submodule(parent), child, layer.to(device))


def loader(name: str, size: str, base: Path | None, folder: Path, budget: int, workers: int, rows: int) -> Iterator[Batch]:
    """Endless packed batches; of random tokens for the model without images."""
    if base is None:
        generator = torch.Generator().manual_seed(0)
        while True:
            lengths = (300 * torch.exp(0.8 * torch.randn(64, generator=generator))).clamp(16, budget).int().tolist()
            samples = []
            for length in lengths:
                ids = torch.randint(10, QWEN_TEXT[size]["vocab_size"], (1, length), generator=generator)
                labels = ids.clone()
                labels[:, : length // 4] = -100
                samples.append({"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)})
            yield from (pack([samples[index] for index in row]) for row in pack_lengths(lengths, budget))
    if not (folder / "rows").exists():
        fixture.write_rows(folder / "rows", "single", rows, size)
    section = DataSection.model_validate({"train": [{"path": str(folder / "rows" / "mmtune.json"), "template": "llava"}]})
    processor = tf.AutoProcessor.from_pretrained(base)
    data = TrainingSet(IndexedSamples(section.train), SampleEncoder(processor, section))
    lengths = [data[index]["input_ids"].shape[1] for index in range(rows)]
    usable = [index for index in range(rows) if lengths[index] <= budget]
    order = [[usable[index] for index in row] for row in pack_lengths([lengths[index] for index in usable], budget)]
    batches = DataLoader(
        data,
        batch_sampler=list(itertools.islice(itertools.cycle(order), 10_000)),
        collate_fn=Collator(pad_token_id(processor), packed=True),
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if workers else None,
    )
    yield from ({key: value for key, value in batch.items() if isinstance(value, torch.Tensor)} for batch in batches)


class ProductFlops:
    """The FLOPs of the matrix products of steps with their backward passes, and of the attention within samples."""

    def __init__(self, model: Any) -> None:
        self.total = 0.0
        text = model.config.get_text_config()
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self._square = 3 * 4 * width * text.num_attention_heads * text.num_hidden_layers
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d)):
                size = math.prod(getattr(module, "kernel_size", ())) * getattr(module, "in_channels", 1)
                module.register_forward_hook(partial(self._add, getattr(module, "in_features", size)))
            if type(module).__name__ in TOWER_ATTENTION:
                module.register_forward_pre_hook(self._add_tower_attention, with_kwargs=True)

    def _add(self, columns: int, module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        self.total += 2 * output.numel() * columns * (1 + inputs[0].requires_grad + module.weight.requires_grad)

    def _add_tower_attention(self, module: Any, inputs: tuple[torch.Tensor, ...], settings: dict[str, Any]) -> None:
        hidden = (
            inputs[0] if inputs else settings["hidden_states"]
        )  # (images, patches, width), or (patches, width) with boundaries
        boundaries = settings.get("cu_seqlens")
        squares = hidden.shape[0] * hidden.shape[1] ** 2 if boundaries is None else int((boundaries.diff() ** 2).sum())
        self.total += 4 * hidden.shape[-1] * squares * (3 if hidden.requires_grad else 1)

    def add_attention(self, positions: torch.Tensor) -> None:
        starts = [*(positions[0] == 0).nonzero()[:, 0].tolist(), positions.shape[1]]
        self.total += self._square * sum((end - start) ** 2 for start, end in itertools.pairwise(starts))


def train(way: str, model: Any, batches: Iterator[Batch], steps: int, seconds: float, device: torch.device) -> dict[str, float]:
    """Steps of one way: seconds, tokens and FLOPs without the first two steps, the last loss and the peak memory in GB."""
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-4, fused=device.type == "cuda"
    )
    counter = ProductFlops(model)
    ours = way == "mmtune"
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    result, begin = {"tokens": 0.0}, time.perf_counter()
    for step in range(steps + 2):
        if step == 2:
            synchronize()
            counter.total, start = 0.0, time.perf_counter()
        elif step > 2 and time.perf_counter() - begin > seconds:
            break
        batch = {name: value.to(device, non_blocking=True) for name, value in next(batches).items()}
        counter.add_attention(batch["position_ids"])
        inputs = packed_inputs(model, batch)
        with (
            attention_by_sample() if ours else contextlib.nullcontext(),
            torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"),
        ):
            loss = model(**(score_supervised_only(inputs) if ours else inputs)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        result["tokens"] += batch["input_ids"].numel() * (step >= 2)
    synchronize()
    result |= {"seconds": time.perf_counter() - start, "flops": counter.total, "loss": float(loss.detach())}
    return result | {"memory": torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else math.nan}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--size", choices=("7b", "tiny"), default="7b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--attention", default="sdpa", help="transformers' attn_implementation")
    parser.add_argument("--checkpointing", action="store_true", help="activation checkpointing")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a packed row")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--workers", type=int, default=8, help="data-loader workers")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=150, help="limit for each way")
    options = parser.parse_args()
    name, qlora = options.part.removesuffix("_qlora"), options.part.endswith("_qlora")
    if qlora and importlib.util.find_spec("bitsandbytes") is None:
        print(f"{options.part}: skipped, bitsandbytes is not installed")
        return
    device = torch.device(options.device)
    peak = peak_flops(device)
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{options.part}, {options.size}, {hardware}, torch {torch.__version__}, transformers {tf.__version__}")
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        base = None if name == "qwen2_5" else write_processor(name, options.size, folder)
        config: Any = config_of(name, options.size, base or folder)
        for way in ("mmtune", "plain"):
            batches = loader(name, options.size, base, folder, options.tokens, options.workers, options.rows)
            model = build(config, device, options.attention, qlora)
            if way == "mmtune":
                use_patch_products(model)
            if options.checkpointing:
                if way == "mmtune":  # not in the frozen tower, through which the backward pass would run
                    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_())
                else:
                    model.enable_input_require_grads()
                model.gradient_checkpointing_enable({"use_reentrant": False})
            result = train(way, model, batches, options.steps, options.seconds, device)
            decoder = model.get_base_model().get_decoder()
            weights = sum(
                module.out_features * module.in_features for module in decoder.modules() if isinstance(module, nn.Linear)
            )
            head = model.get_base_model().get_output_embeddings()
            by_six = 6 * (weights + head.out_features * head.in_features) * result["tokens"]
            rate = 1 / result["seconds"]
            mfu = "-" if peak is None else f"{result['flops'] * rate / peak.at(torch.bfloat16, False):.1%}"
            print(
                f"{way:8} {result['tokens'] * rate:9,.0f} tokens/s  {1e-12 * result['flops'] * rate:7.2f} TFLOP/s ours  "
                f"{1e-12 * by_six * rate:7.2f} by 6N  MFU {mfu}  peak {result['memory']:.1f} GB  loss {result['loss']:.4f}",
                flush=True,
            )
            del model
            if device.type == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
