"""Packed and padded samples train exactly as each sample alone."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from packing_models import CONFIGS, IMAGE, TEXT, TOWER, samples, tiny
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import (
    AttentionInterface,
    AutoModelForImageTextToText,
    Gemma3Config,
    Lfm2VlConfig,
    PaliGemmaConfig,
    TrainingArguments,
    modeling_flash_attention_utils,
)
from transformers.masking_utils import (
    create_causal_mask,
    create_chunked_causal_mask,
    create_sliding_window_causal_mask,
    sdpa_mask,
)

from mmtune.data.batching.batch_sampler import Mixture, MixtureBatchSampler
from mmtune.data.batching.collate import Collator, RowSize, collate, pack
from mmtune.data.data_report import DataReport
from mmtune.methods.tuners.gated_prefix_tuner import GatedPrefixConfig
from mmtune.models import packed_attention
from mmtune.models.packed_attention import (
    SampleMask,
    attention_by_sample,
    check_packable,
    check_packable_family,
    packed_inputs,
    verify_packing,
)
from mmtune.objectives.sft import SupervisedTuning
from mmtune.recipe.objective_section import SftSection
from mmtune.training.trainer import TuningTrainer
from mmtune.utils.errors import UserError
from mmtune.utils.transformers_private import own_attention_functions

PAD = 0
Encoded = list[dict[str, torch.Tensor]]


def single(encoded: Encoded) -> list[dict[str, Any]]:
    return [collate([sample], PAD) for sample in encoded]


def supervised(encoded: Encoded) -> int:
    return sum(int((sample["labels"][:, 1:] != -100).sum()) for sample in encoded)


def training_autocast(model: Any, batch: dict[str, Any], count: int, out: Path) -> torch.Tensor:
    """The loss of one batch as our trainer computes it."""
    settings = {
        "args": TrainingArguments(output_dir=str(out), use_cpu=True, report_to="none"),
        "learning_rates": {},
        "dummy_batch": {},
    }
    trainer = TuningTrainer(
        model=model, data_report=DataReport(rows=1), objective=SupervisedTuning(SftSection()), max_bad_fraction=0, **settings
    )
    loss: torch.Tensor = trainer.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(count))
    return loss


def as_plain(model: Any, batch: dict[str, Any], count: int) -> torch.Tensor:
    """The loss of one batch as transformers' own model computes it."""
    loss: torch.Tensor = model(**batch, num_items_in_batch=count).loss
    return loss


def gradients(model: Any, losses: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.stack(losses).sum().backward()
    by_name = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert by_name
    return {"loss": torch.stack(losses).sum().detach(), **by_name}


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


def adapted(model: Any, config: Any) -> Any:
    torch.manual_seed(2)
    model = get_peft_model(model, config).train()
    with torch.no_grad():  # LoRA's B and the gates start at zero, and would leave the rest without a gradient
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "gate" in name:
                parameter.normal_(std=0.3)
    return model


LORA = partial(LoraConfig, r=4, target_modules=r".*(language_model|text_model)\.layers.*_proj")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", CONFIGS)
def test_packed_padded_and_single_samples_have_the_same_gradients(family: str, attention: str, tmp_path: Path) -> None:
    model, encoded = tiny(family, attention), samples(family)
    count = supervised(encoded)
    expected = gradients(model, [as_plain(model, batch, count) for batch in single(encoded)])
    assert any("vision" in name or "visual" in name for name in expected)
    assert_same(gradients(model, [training_autocast(model, collate(encoded, PAD), count, tmp_path)]), expected)
    assert_same(gradients(model, [training_autocast(model, pack(encoded), count, tmp_path)]), expected)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "smolvlm"])
def test_gradients_of_an_adapter_agree_too(family: str, checkpointing: bool, tmp_path: Path) -> None:
    model, encoded = adapted(tiny(family), LORA()), samples(family)
    count = supervised(encoded)
    expected = gradients(model, [as_plain(model, batch, count) for batch in single(encoded)])
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    assert_same(gradients(model, [training_autocast(model, collate(encoded, PAD), count, tmp_path)]), expected)
    assert_same(gradients(model, [training_autocast(model, pack(encoded), count, tmp_path)]), expected)


def test_gated_prefixes_see_one_sample_at_a_time(tmp_path: Path) -> None:
    modules = [f"model.language_model.layers.{layer}.self_attn" for layer in (0, 1)]
    model, encoded = adapted(tiny("llava"), GatedPrefixConfig(adapter_len=3, target_modules=modules)), samples("llava")
    count = supervised(encoded)
    expected = gradients(model, [as_plain(model, batch, count) for batch in single(encoded)])
    assert_same(gradients(model, [training_autocast(model, pack(encoded), count, tmp_path)]), expected)


def test_a_step_over_a_packed_row_is_the_step_over_a_padded_batch(tmp_path: Path) -> None:
    """The whole way, through the data loader: the same weights after a step, and the same count of tokens."""
    after, seen = [], []
    for packed in (False, True):
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            report_to="none",
            max_steps=1,
            per_device_train_batch_size=4,
            optim="sgd",
            max_grad_norm=0,
            logging_steps=1,
            learning_rate=0.1,
            remove_unused_columns=False,
            label_names=["labels"],
            save_strategy="no",
        )
        trainer = TuningTrainer(
            model=tiny("qwen2_5_vl"),
            args=arguments,
            train_dataset=samples("qwen2_5_vl"),
            data_collator=Collator(PAD, packed=packed),
            data_report=DataReport(rows=4),
            objective=SupervisedTuning(SftSection()),
            max_bad_fraction=0,
            learning_rates={},
            dummy_batch={},
            batches=MixtureBatchSampler(Mixture.by_repeats([4], [1.0]), seed=0, size=arguments.per_device_train_batch_size),
        )
        trainer.train()
        after.append(dict(trainer.model.named_parameters()))
        seen.append(trainer.state.num_input_tokens_seen)
    assert_same(after[1], after[0])
    assert seen == [sum(sample["input_ids"].shape[1] for sample in samples("qwen2_5_vl"))] * 2


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "smolvlm"])
def test_positions_that_continue_across_samples_are_detected(family: str, tmp_path: Path) -> None:
    """What the tests above hold fails by far when samples in a row see each other."""
    model, encoded = tiny(family), samples(family)
    count = supervised(encoded)
    expected = gradients(model, [as_plain(model, batch, count) for batch in single(encoded)])
    joined = pack(encoded)
    joined["position_ids"] = torch.arange(joined["input_ids"].shape[1])[None]
    with pytest.raises(AssertionError, match="not close"):
        assert_same(gradients(model, [training_autocast(model, joined, count, tmp_path)]), expected)
    with pytest.raises(UserError, match=rf"packing is not supported: {family}: the logits .* differ"):
        verify_packing(model, joined, single(encoded))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "smolvlm"])
@pytest.mark.parametrize("pair", [(0, 1), (1, 0), (0, 2), (2, 3)])
def test_packing_verification_passes_for_pairs_of_samples(family: str, pair: tuple[int, int]) -> None:
    model = tiny(family)
    model.lm_head.eval()
    encoded = [samples(family)[number] for number in pair]
    check_packable(model)
    verify_packing(model, pack(encoded), single(encoded))
    assert [name for name, module in model.named_modules() if not module.training] == ["lm_head"]  # as it was
    verify_packing(model.bfloat16(), pack(encoded), single(encoded))


def test_the_cache_that_a_config_asks_for_does_not_join_samples() -> None:
    """transformers makes no mask between samples where there is a cache; a plain config has one."""
    model, encoded = tiny("llava"), samples("llava")
    model.config.text_config.use_cache = True
    assert packed_inputs(model, pack(encoded))["use_cache"] is False
    verify_packing(model, pack(encoded), single(encoded))


def test_three_positions_are_the_models_own_for_every_sample() -> None:
    model, encoded = tiny("qwen2_5_vl"), samples("qwen2_5_vl")
    positions = packed_inputs(model, pack(encoded))["position_ids"]
    start = 0
    for sample in encoded:
        length = sample["input_ids"].shape[1]
        grid = sample.get("image_grid_thw")
        own, _ = model.model.get_rope_index(sample["input_ids"], sample["mm_token_type_ids"], image_grid_thw=grid)
        torch.testing.assert_close(positions[1:, :, start : start + length], own)
        torch.testing.assert_close(positions[0, 0, start : start + length], torch.arange(length))
        start += length
    assert positions.shape == (4, 1, start)


def test_padded_batches_pass_unchanged() -> None:
    batch = collate(samples("llava"), PAD)
    assert packed_inputs(tiny("llava"), batch) is batch


# -------------------------------------------------------------------------------------------------- attention


def dense_masks(model: Any, batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> int:
    """The number of dense masks that a forward pass of a batch makes for the language model."""
    masks = []

    def count(**arguments: Any) -> Any:
        masks.extend([arguments] * (arguments["q_length"] == batch["input_ids"].shape[1]))
        return sdpa_mask(**arguments)

    monkeypatch.setattr(packed_attention, "sdpa_mask", count)
    with torch.no_grad(), attention_by_sample():
        model(**packed_inputs(model, batch))
    return len(masks)


@pytest.mark.parametrize("family", CONFIGS)
def test_sdpa_makes_dense_masks_only_for_windows_that_are_shorter_than_a_sample(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = 1 if family in ("llava_mistral", "llava_gemma3") else 0
    assert dense_masks(tiny(family), pack(samples(family)), monkeypatch) == expected


def test_a_mask_that_another_function_reads_has_its_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask is read where a model changes it, as Gemma 4 does; here by a slice in every layer."""
    model, batch = tiny("llava"), pack(samples("llava"))
    with torch.no_grad():
        expected = model(**packed_inputs(model, batch)).logits
        attend = own_attention_functions()["sdpa"]

        def sliced(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
            return attend(module, query, key, value, mask if mask is None else mask[..., : key.shape[-2]], **kwargs)

        monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", sliced)
        assert dense_masks(model, batch, monkeypatch) == 1  # which every layer reads
        with attention_by_sample():
            logits = model(**packed_inputs(model, batch)).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("window", [None, 3, 5, 6])
@pytest.mark.parametrize("kind", ["causal", "sliding", "chunked", "image"])
def test_attention_by_sample_equals_that_with_the_mask(kind: str, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks of transformers over samples of 5, 1, 4 and 2 tokens, with and without a window, for one query of random numbers."""
    config = tiny("llava").config.text_config
    config.sliding_window = config.attention_chunk_size = window or 100
    positions = torch.cat([torch.arange(length) for length in (5, 1, 4, 2)])[None]
    hidden, make = torch.zeros(1, 12, 32), create_causal_mask
    arguments = {"config": config, "inputs_embeds": hidden, "attention_mask": None, "past_key_values": None}
    if kind in ("sliding", "chunked"):
        make = create_sliding_window_causal_mask if kind == "sliding" else create_chunked_causal_mask
    elif kind == "image":  # three tokens of the third sample see each other
        blocks = torch.full((1, 12), -1)
        blocks[0, 6:9] = 0
        arguments["block_sequence_ids"] = blocks
    mask = make(**arguments, position_ids=positions)
    with attention_by_sample():
        by_sample = make(**arguments, position_ids=positions)
    whole = kind != "image" and (kind == "causal" or window is None or window >= 5 or kind == "chunked")
    assert isinstance(by_sample, SampleMask) == whole
    query, key, value = torch.randn(3, 1, 2, 12, 8, generator=torch.Generator().manual_seed(0)).unbind()
    attend = torch.nn.functional.scaled_dot_product_attention
    torch.testing.assert_close(attend(query, key, value, attn_mask=by_sample), attend(query, key, value, attn_mask=mask))
    assert by_sample.shape == mask.shape and by_sample.dtype == mask.dtype and torch.equal(by_sample & True, mask)


def by_loop(query: Any, key: Any, value: Any, cu_seqlens_q: torch.Tensor, **settings: Any) -> torch.Tensor:
    """Variable-length causal attention from its definition: tensors of shape (tokens, heads, width)."""
    attended = []
    for start, end in pairwise(cu_seqlens_q.tolist()):
        q, k, v = (tensor[start:end].transpose(0, 1).double() for tensor in (query, key, value))
        k, v = (tensor.repeat_interleave(len(q) // len(tensor), 0) for tensor in (k, v))
        scores = (q @ k.mT * settings["scale"]).masked_fill(torch.ones(end - start, end - start).triu(1).bool(), -torch.inf)
        attended.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(attended).to(query.dtype)


@pytest.mark.parametrize("family", ["llava", "llava_qwen3", "qwen2_5_vl", "qwen3_vl", "smolvlm"])
def test_kernels_for_samples_of_variable_length_get_their_boundaries(
    family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """torch's kernel under sdpa, and flash attention, with another implementation in place of the kernels, which need a GPU."""
    model, encoded = tiny(family), samples(family)
    count = supervised(encoded)
    expected = gradients(model, [training_autocast(model, pack(encoded), count, tmp_path)])
    lengths, calls = [sample["input_ids"].shape[1] for sample in encoded], []

    def torch_kernel(query: Any, key: Any, value: Any, starts: Any, _: Any, longest: int, *__: Any, **settings: Any) -> Any:
        assert settings.pop("window_size") == (-1, 0) and longest == max(lengths) and starts.dtype == torch.int32
        calls.append(starts.diff().tolist())
        return by_loop(query, key, value, starts, **settings)

    monkeypatch.setattr(packed_attention, "_varlen_dtype", lambda query, value: query.dtype)
    monkeypatch.setattr(packed_attention, "varlen_attn", torch_kernel)
    assert_same(gradients(model, [training_autocast(model, pack(encoded), count, tmp_path)]), expected)
    assert calls == [lengths] * 2

    def flash_kernel(
        query: Any, key: Any, value: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, softmax_scale: float, causal: bool, **_: Any
    ) -> Any:
        assert causal and torch.equal(cu_seqlens_q, cu_seqlens_k)
        calls.append(cu_seqlens_q.diff().tolist())
        return by_loop(query, key, value, cu_seqlens_q, scale=softmax_scale)

    monkeypatch.setattr(modeling_flash_attention_utils, "_lazy_imports", lambda *_, **__: (None, flash_kernel, *[None] * 3))
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)
    model.config.text_config._attn_implementation = "flash_attention_2"
    check_packable(model)
    calls.clear()
    assert_same(gradients(model, [training_autocast(model, pack(encoded), count, tmp_path)]), expected)
    assert calls == [lengths] * 2


# -------------------------------------------------------------------------------------------------- refused


def small(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


SIGLIP = {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14, **TOWER}
GEMMA = {**TEXT, "head_dim": 16}


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda: small(PaliGemmaConfig(vision_config=SIGLIP, text_config={"model_type": "gemma", **GEMMA})),
            "paligemma: its prompts attend in both directions",
        ),
        (lambda: small(Gemma3Config(vision_config=SIGLIP, text_config=GEMMA)), "gemma3: its image tokens attend in both"),
        (
            lambda: small(Lfm2VlConfig(text_config={**TEXT, "model_type": "lfm2", "layer_types": ["conv", "full_attention"]})),
            "lfm2_vl has conv layers",
        ),
        (
            lambda: get_peft_model(tiny("llava"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)),
            "prompt_tuning adds its virtual tokens only before the first sample",
        ),
        (
            lambda: get_peft_model(tiny("llava"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)),
            "prefix_tuning adds its virtual tokens only before the first sample",
        ),
    ],
    ids=["paligemma", "gemma3", "convolutions", "prompt_tuning", "prefix_tuning"],
)
def test_unpackable_models_are_rejected_by_name(make: Any, reason: str) -> None:
    with pytest.raises(UserError, match=f"packing is not supported: {reason}.*set data.packing: false"):
        check_packable(make())


def test_a_family_is_rejected_before_it_has_weights() -> None:
    with pytest.raises(UserError, match="gemma3: its image tokens attend in both"):
        check_packable_family(Gemma3Config(vision_config=SIGLIP, text_config=GEMMA))
    for make in CONFIGS.values():
        check_packable_family(make())


def test_an_attention_without_masks_between_samples_is_rejected() -> None:
    model = tiny("llava")
    model.config.text_config._attn_implementation = "paged|sdpa"
    with pytest.raises(UserError, match=r"attention 'paged\|sdpa' has no mask between samples"):
        check_packable(model)


def test_packing_verification_detects_an_unsupported_family() -> None:
    """Gemma 3, had it not been refused by name."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(
        Gemma3Config(vision_config=SIGLIP, text_config=GEMMA, mm_tokens_per_image=4, image_token_id=IMAGE)
    )
    encoded = [samples("llava")[number] for number in (0, 2)]
    for sample in encoded:
        sample["token_type_ids"] = (sample["input_ids"] == IMAGE).long()
    with pytest.raises(UserError, match="gemma3: the logits of"):
        verify_packing(model, pack(encoded), single(encoded))


# -------------------------------------------------------------------------------------------------- rows


def test_packed_rows_have_the_tokens_positions_and_labels_of_their_samples() -> None:
    encoded = samples("smolvlm")
    row = pack(encoded)
    lengths = [sample["input_ids"].shape[1] for sample in encoded]
    assert row["input_ids"].tolist() == [[token for sample in encoded for token in sample["input_ids"][0].tolist()]]
    assert row["position_ids"].tolist() == [[place for length in lengths for place in range(length)]]
    assert int((encoded[1]["labels"] != -100).sum()) == lengths[1]  # all of it supervised, and its first token by nothing
    starts = [sum(lengths[:number]) for number in range(4)]
    assert row["labels"][0, starts].tolist() == [-100] * 4
    assert int((row["labels"] != -100).sum()) == supervised(encoded)
    assert row["pixel_values"].shape == (1, 4 + 3 + 2 + 12, 3, 28, 28)
    assert row["pixel_attention_mask"].shape == (1, 21, 28, 28)


def test_the_collator_packs_rows_and_returns_faults_with_them() -> None:
    encoded = samples("qwen2_5_vl")
    image = {**encoded[0], "labels": torch.full_like(encoded[0]["labels"], -100)}
    batch = Collator(PAD, dummy_sample=image, packed=True)([encoded[1]])
    assert batch.pop("faults") == batch.pop("rows") == []
    assert batch.pop("sizes") == [RowSize(encoded[1]["input_ids"].shape[1], supervised([encoded[1]]), 0)]
    expected = pack([encoded[1], image])
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[key], expected[key]) for key in expected)
    assert Collator(PAD, packed=True)([]) == {"faults": [], "rows": [], "sizes": []}
