"""Assembly: unchanged weights of both components, and image tokens that match the image features."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as tf
from PIL import Image
from programs import run_program

from mmtune.models.assemble import assemble, save_checkpoint
from mmtune.models.tiny.tiny_models import LANGUAGE_FAMILIES, VISION_FAMILIES, write_tiny_language, write_tiny_vision

IMAGES = [Image.new("RGB", (90, 60), "teal"), Image.new("RGB", (20, 70), "red")]


@pytest.mark.parametrize("language", LANGUAGE_FAMILIES)
@pytest.mark.parametrize("vision", VISION_FAMILIES)
def test_assembled_components_have_their_weights_and_tokens_match_features(
    tiny_checkpoints: Path, vision: str, language: str
) -> None:
    model, processor = assemble(str(tiny_checkpoints / vision), str(tiny_checkpoints / language))
    batch = processor(images=IMAGES, text=["<image> a cat", "<image> b"], return_tensors="pt", padding=True)
    with torch.no_grad():
        tower = tf.AutoModel.from_pretrained(tiny_checkpoints / vision)
        tower = getattr(tower, "vision_model", tower)
        expected = tower(pixel_values=batch["pixel_values"], output_hidden_states=True).hidden_states[-2]
        if vision != "siglip":
            expected = expected[:, 1:]
        actual = model.model.vision_tower(batch["pixel_values"], output_hidden_states=True).hidden_states[-2]
        assert torch.equal(actual[:, -expected.shape[1] :], expected)
        projected = model.get_image_features(pixel_values=batch["pixel_values"]).pooler_output
        assert torch.equal(torch.stack(projected), model.model.multi_modal_projector(expected))
        counts = (batch["input_ids"] == model.config.image_token_id).sum(dim=1).tolist()
        assert counts == [features.shape[0] for features in projected] == [16, 16]
        assert processor._get_num_multimodal_tokens(image_sizes=[(60, 90)])["num_image_tokens"] == [16]
        assert model.config.image_seq_length == 16
        model(**batch)

        causal = tf.AutoModelForCausalLM.from_pretrained(tiny_checkpoints / language)
        ids = processor.tokenizer("Some words.", return_tensors="pt")["input_ids"]
        language_output = causal(ids, output_hidden_states=True)
        output = model(ids, output_hidden_states=True)
        assert torch.equal(output.hidden_states[-1], language_output.hidden_states[-1])
        rows = causal.get_input_embeddings().weight.shape[0]
        assert torch.equal(output.logits[..., :rows], language_output.logits)
        assert torch.equal(model.get_input_embeddings().weight[:rows], causal.get_input_embeddings().weight)
        assert torch.equal(model.lm_head.weight[:rows], causal.lm_head.weight)
    tied = bool(LANGUAGE_FAMILIES[language].get("tied"))
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied == model.config.tie_word_embeddings
    total = model.get_input_embeddings().weight.shape[0]
    assert total == model.lm_head.weight.shape[0] == model.config.text_config.vocab_size
    assert total == (rows if "multiple" in LANGUAGE_FAMILIES[language] else len(processor.tokenizer))  # unused rows first


@pytest.mark.parametrize(("known", "rows", "after"), [(319, 320, 384), (320, 320, 322), (300, 320, 320)])
def test_embeddings_grow_only_if_needed_and_remain_padded(
    tiny_checkpoints: Path, tmp_path: Path, known: int, rows: int, after: int
) -> None:
    """`<pad>` and `<image>` are new; more rows than tokens mean that the source was padded."""
    tokenizer = tf.AutoTokenizer.from_pretrained(tiny_checkpoints / "llama")
    tokenizer.add_tokens([f"<extra{number}>" for number in range(known - len(tokenizer))])
    tokenizer.save_pretrained(tmp_path)
    source = tf.AutoModelForCausalLM.from_pretrained(tiny_checkpoints / "llama")
    source.resize_token_embeddings(rows)
    source.save_pretrained(tmp_path)
    model, processor = assemble(str(tiny_checkpoints / "vit"), str(tmp_path))
    assert len(processor.tokenizer) == known + 2
    head, embeddings = model.lm_head.weight, model.get_input_embeddings().weight
    assert head.shape[0] == embeddings.shape[0] == model.config.text_config.vocab_size == after
    assert torch.equal(head[:rows], source.lm_head.weight)
    assert torch.equal(embeddings[:rows], source.get_input_embeddings().weight)
    assert torch.allclose(head[rows:], source.lm_head.weight.mean(dim=0).expand(after - rows, -1), atol=1e-6)


def test_a_padding_token_that_ends_turns_is_replaced(tiny_checkpoints: Path, tmp_path: Path) -> None:
    write_tiny_language("qwen2", tmp_path)
    tokenizer = tf.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_special_tokens({"pad_token": "<|im_end|>"})
    tokenizer.save_pretrained(tmp_path)
    model, processor = assemble(str(tiny_checkpoints / "vit"), str(tmp_path))
    assert processor.tokenizer.pad_token == "<|endoftext|>"
    assert model.generation_config.pad_token_id == model.config.text_config.pad_token_id == processor.tokenizer.pad_token_id


def test_only_the_projector_depends_on_the_seed(tiny_checkpoints: Path) -> None:
    torch.manual_seed(5)
    first, _ = assemble(str(tiny_checkpoints / "clip"), str(tiny_checkpoints / "llama"), seed=1)
    after = torch.rand(1)
    same, _ = assemble(str(tiny_checkpoints / "clip"), str(tiny_checkpoints / "llama"), seed=1)
    other, _ = assemble(str(tiny_checkpoints / "clip"), str(tiny_checkpoints / "llama"), seed=2)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))  # the global random state is unchanged
    changed = {name for name, value in first.state_dict().items() if not torch.equal(value, other.state_dict()[name])}
    assert changed == {f"model.multi_modal_projector.linear_{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")}
    assert all(torch.equal(value, same.state_dict()[name]) for name, value in first.state_dict().items())


def test_bf16_and_the_last_layer(tiny_checkpoints: Path) -> None:
    model, processor = assemble(
        str(tiny_checkpoints / "dinov2"),
        str(tiny_checkpoints / "gemma"),
        dtype=torch.bfloat16,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert processor.vision_feature_select_strategy == model.config.vision_feature_select_strategy == "full"
    assert model.config.image_seq_length == 17


def test_a_classifiers_vit_and_a_clip_vision_model_are_vision_towers(tiny_checkpoints: Path, tmp_path: Path) -> None:
    clip = tf.CLIPModel.from_pretrained(tiny_checkpoints / "clip")
    clip.vision_model.save_pretrained(tmp_path / "bare")
    tf.AutoImageProcessor.from_pretrained(tiny_checkpoints / "clip").save_pretrained(tmp_path / "bare")
    model, _ = assemble(str(tmp_path / "bare"), str(tiny_checkpoints / "llama"))
    weights = clip.vision_model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in model.model.vision_tower.state_dict().items())

    classifier = tf.ViTForImageClassification(tf.ViTConfig.from_pretrained(tiny_checkpoints / "vit"))
    classifier.save_pretrained(tmp_path / "classifier")
    tf.AutoImageProcessor.from_pretrained(tiny_checkpoints / "vit").save_pretrained(tmp_path / "classifier")
    model, _ = assemble(str(tmp_path / "classifier"), str(tiny_checkpoints / "llama"))
    tower = model.model.vision_tower.state_dict()
    assert all(torch.equal(value, tower[name]) for name, value in classifier.vit.state_dict().items())


def test_register_tokens_are_counted(tiny_checkpoints: Path, tmp_path: Path) -> None:
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2, "patch_size": 14}
    config = tf.Dinov2WithRegistersConfig(**size, image_size=56, num_register_tokens=3)
    tf.Dinov2WithRegistersModel(config).save_pretrained(tmp_path)
    tf.AutoImageProcessor.from_pretrained(tiny_checkpoints / "dinov2").save_pretrained(tmp_path)
    model, processor = assemble(str(tmp_path), str(tiny_checkpoints / "llama"))
    assert processor.num_additional_image_tokens == 4 and model.config.image_seq_length == 19


def test_image_processors_are_set_to_the_towers_image_size(tiny_checkpoints: Path, tmp_path: Path) -> None:
    for family, settings in {
        "clip": {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}},
        "siglip": {"size": {"height": 384, "width": 384}},
        "vit": {"size": {"height": 224, "width": 224}},
    }.items():
        tf.AutoModel.from_pretrained(tiny_checkpoints / family).save_pretrained(tmp_path / family)
        processor = tf.AutoImageProcessor.from_pretrained(tiny_checkpoints / family, **settings)
        processor.save_pretrained(tmp_path / family)
        assembled = assemble(str(tmp_path / family), str(tiny_checkpoints / "llama"))[1]
        pixels = assembled.image_processor([Image.new("L", (100, 80))], return_tensors="pt")["pixel_values"]
        assert pixels.shape == (1, 3, 56, 56), family
    _, assembled = assemble(str(tiny_checkpoints / "dinov2"), str(tiny_checkpoints / "llama"))
    assert assembled.image_processor.crop_size["height"] == 56  # the published crop; the checkpoint's image_size is 70


RELOAD = """
import sys, torch
sys.modules["mmtune"] = None
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
model, report = AutoModelForImageTextToText.from_pretrained(sys.argv[1], output_loading_info=True)
assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
processor = AutoProcessor.from_pretrained(sys.argv[1])
assert processor._get_num_multimodal_tokens(image_sizes=[(9, 9)])["num_image_tokens"] == [16]
image = Image.new("RGB", (90, 60), "teal")
messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]}]
settings = {"add_generation_prompt": True}
batch = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt", **settings)
two_steps = processor(images=[image], text=processor.apply_chat_template(messages, **settings))
assert two_steps["input_ids"][0] == batch["input_ids"][0].tolist(), "rendered first, tokenized later"
with torch.no_grad():
    torch.save([batch["input_ids"], model(**batch).logits, model.generation_config.eos_token_id], sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.parametrize(("vision", "language"), [("siglip", "llama3"), ("vit", "gemma")])
def test_a_saved_checkpoint_loads_without_mmtune(tiny_checkpoints: Path, tmp_path: Path, vision: str, language: str) -> None:
    model, processor = assemble(str(tiny_checkpoints / vision), str(tiny_checkpoints / language))
    save_checkpoint(model, processor, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert (tmp_path / "out" / "model.safetensors").is_file()
    run_program(RELOAD, tmp_path / "out", tmp_path / "results", cwd=tmp_path)
    ids, logits, eos = torch.load(tmp_path / "results")
    batch = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image", "image": IMAGES[0]}, {"type": "text", "text": "What?"}]}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    assert torch.equal(batch["input_ids"], ids)
    with torch.no_grad():
        assert torch.allclose(model(**batch).logits, logits, atol=1e-6)
    assert eos == model.generation_config.eos_token_id


def test_the_processor_of_resolve_model_equals_that_of_load_base(base: Path, tmp_path: Path) -> None:
    from mmtune.models.load import load_base, resolve_model
    from mmtune.recipe.recipe import ModelSection

    write_tiny_vision("siglip", tmp_path / "vision")
    write_tiny_language("qwen2", tmp_path / "language")
    ready = {"base": str(base)}
    assembled = {"vision": str(tmp_path / "vision"), "language": str(tmp_path / "language")}
    for values in (ready, {"base": "builtin:tiny-llava-untrained"}, assembled, {**assembled, "chat_template": "plain"}):
        section = ModelSection.model_validate(values)
        bare, loaded = resolve_model(section).processor, load_base(resolve_model(section), seed=0)[1]
        assert bare.to_dict() == loaded.to_dict()
        assert bare.chat_template == loaded.chat_template == bare.tokenizer.chat_template
        assert bare.tokenizer.get_vocab() == loaded.tokenizer.get_vocab()
        assert bare.tokenizer("<s>a cat").input_ids == loaded.tokenizer("<s>a cat").input_ids
