"""Two checkpoints become one: exact weights, right token counts, exact labels, and refusals with their reasons."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file

import mmtune.model.parts as parts
from mmtune.errors import UserError
from mmtune.model.assemble import assemble, load_projector, resolve_chat_template, save_checkpoint
from mmtune.model.chat_template import template_names
from mmtune.model.tiny import LANGUAGE_FAMILIES, VISION_FAMILIES, family_of, tiny_language, tiny_llava, tiny_vision

torch.set_num_threads(1)

IMAGES = [Image.new("RGB", (90, 60), "teal"), Image.new("RGB", (20, 70), "red")]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every tiny part, written once."""
    root = tmp_path_factory.mktemp("shelf")
    for seed, family in enumerate(VISION_FAMILIES):
        tiny_vision(family, root / family, seed)
    for seed, family in enumerate(LANGUAGE_FAMILIES):
        tiny_language(family, root / family, seed)
    return root


@pytest.fixture(scope="module")
def llava(shelf: Path) -> tuple[Any, Any]:
    return assemble(str(shelf / "clip"), str(shelf / "llama"))


def _talk(*turns: tuple[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "role": role,
            "content": [
                {"type": "text", "text": piece} if isinstance(piece, str) else {"type": "image", "image": piece}
                for piece in (said if isinstance(said, list) else [said])
            ],
        }
        for role, said in turns
    ]


def _encode(processor: Any, messages: list[dict[str, Any]]) -> tuple[list[int], list[list[int]]]:
    """Token ids, and the supervised ones span by span."""
    out = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = out["input_ids"][0], out["assistant_masks"][0]
    spans: list[list[int]] = []
    for position, (token, on) in enumerate(zip(ids, mask, strict=True)):
        if on:
            if not position or not mask[position - 1]:
                spans.append([])
            spans[-1].append(token)
    return list(ids), spans


@pytest.mark.parametrize("language", LANGUAGE_FAMILIES)
@pytest.mark.parametrize("vision", VISION_FAMILIES)
def test_parts_keep_their_weights_and_tokens_match_features(shelf: Path, vision: str, language: str) -> None:
    model, processor = assemble(str(shelf / vision), str(shelf / language))
    batch = processor(images=IMAGES, text=["<image> a cat", "<image> b"], return_tensors="pt", padding=True)
    with torch.no_grad():
        own = tf.AutoModel.from_pretrained(shelf / vision)
        own = getattr(own, "vision_model", own)
        expected = own(pixel_values=batch["pixel_values"], output_hidden_states=True).hidden_states[-2]
        if vision != "siglip":
            expected = expected[:, 1:]
        got = model.model.vision_tower(batch["pixel_values"], output_hidden_states=True).hidden_states[-2]
        assert torch.equal(got[:, -expected.shape[1] :], expected)
        projected = model.get_image_features(pixel_values=batch["pixel_values"]).pooler_output
        assert torch.equal(torch.stack(projected), model.model.multi_modal_projector(expected))
        counts = (batch["input_ids"] == model.config.image_token_id).sum(dim=1).tolist()
        assert counts == [features.shape[0] for features in projected] == [16, 16]
        assert processor._get_num_multimodal_tokens(image_sizes=[(60, 90)])["num_image_tokens"] == [16]
        assert model.config.image_seq_length == 16
        model(**batch)

        causal = tf.AutoModelForCausalLM.from_pretrained(shelf / language)
        ids = processor.tokenizer("Some words.", return_tensors="pt")["input_ids"]
        theirs = causal(ids, output_hidden_states=True)
        mine = model(ids, output_hidden_states=True)
        assert torch.equal(mine.hidden_states[-1], theirs.hidden_states[-1])
        rows = causal.get_input_embeddings().weight.shape[0]
        assert torch.equal(mine.logits[..., :rows], theirs.logits)
        assert torch.equal(model.get_input_embeddings().weight[:rows], causal.get_input_embeddings().weight)
        assert torch.equal(model.lm_head.weight[:rows], causal.lm_head.weight)
    tied = bool(LANGUAGE_FAMILIES[language].get("tied"))
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied == model.config.tie_word_embeddings
    total = model.get_input_embeddings().weight.shape[0]
    assert total == model.lm_head.weight.shape[0] == model.config.text_config.vocab_size
    assert total == (rows if "multiple" in LANGUAGE_FAMILIES[language] else len(processor.tokenizer))  # spare rows first

    tokenizer = processor.tokenizer
    eos = model.generation_config.eos_token_id
    assert tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in eos
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    ids, spans = _encode(processor, _talk(("user", [IMAGES[0], "What?"]), ("assistant", "a cat")))
    assert spans[0][-1] in eos
    assert tokenizer.bos_token_id is None or ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize(("known", "rows", "after"), [(319, 320, 384), (320, 320, 322), (300, 320, 320)])
def test_embeddings_grow_only_where_needed_and_stay_padded(
    shelf: Path, tmp_path: Path, known: int, rows: int, after: int
) -> None:
    """Two tokens are new, `<pad>` and `<image>`; rows beyond the tokenizer's mean that the source was padded."""
    tokenizer = tf.AutoTokenizer.from_pretrained(shelf / "llama")
    tokenizer.add_tokens([f"<extra{number}>" for number in range(known - len(tokenizer))])
    tokenizer.save_pretrained(tmp_path)
    source = tf.AutoModelForCausalLM.from_pretrained(shelf / "llama")
    source.resize_token_embeddings(rows)
    source.save_pretrained(tmp_path)
    model, processor = assemble(str(shelf / "vit"), str(tmp_path))
    assert len(processor.tokenizer) == known + 2
    head, embeddings = model.lm_head.weight, model.get_input_embeddings().weight
    assert head.shape[0] == embeddings.shape[0] == model.config.text_config.vocab_size == after
    assert torch.equal(head[:rows], source.lm_head.weight)
    assert torch.equal(embeddings[:rows], source.get_input_embeddings().weight)
    assert torch.allclose(head[rows:], source.lm_head.weight.mean(dim=0).expand(after - rows, -1), atol=1e-6)


def test_a_padding_token_that_ends_turns_is_exchanged(shelf: Path, tmp_path: Path) -> None:
    tiny_language("qwen2", tmp_path)
    tokenizer = tf.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_special_tokens({"pad_token": "<|im_end|>"})
    tokenizer.save_pretrained(tmp_path)
    model, processor = assemble(str(shelf / "vit"), str(tmp_path))
    assert processor.tokenizer.pad_token == "<|endoftext|>"
    assert model.generation_config.pad_token_id == model.config.text_config.pad_token_id == processor.tokenizer.pad_token_id


def test_the_projector_comes_from_the_seed_and_nothing_else_does(shelf: Path) -> None:
    torch.manual_seed(5)
    first, _ = assemble(str(shelf / "clip"), str(shelf / "llama"), seed=1)
    after = torch.rand(1)
    same, _ = assemble(str(shelf / "clip"), str(shelf / "llama"), seed=1)
    other, _ = assemble(str(shelf / "clip"), str(shelf / "llama"), seed=2)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))  # the caller's random state is left alone
    changed = {name for name, value in first.state_dict().items() if not torch.equal(value, other.state_dict()[name])}
    assert changed == {f"model.multi_modal_projector.linear_{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")}
    assert all(torch.equal(value, same.state_dict()[name]) for name, value in first.state_dict().items())


def test_bf16_and_the_last_layer(shelf: Path) -> None:
    model, processor = assemble(
        str(shelf / "dinov2"),
        str(shelf / "gemma"),
        dtype=torch.bfloat16,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert processor.vision_feature_select_strategy == model.config.vision_feature_select_strategy == "full"
    assert model.config.image_seq_length == 17


def test_a_classifiers_vit_and_a_bare_clip_tower_serve(shelf: Path, tmp_path: Path) -> None:
    whole = tf.CLIPModel.from_pretrained(shelf / "clip")
    whole.vision_model.save_pretrained(tmp_path / "bare")
    tf.AutoImageProcessor.from_pretrained(shelf / "clip").save_pretrained(tmp_path / "bare")
    model, _ = assemble(str(tmp_path / "bare"), str(shelf / "llama"))
    theirs = whole.vision_model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in model.model.vision_tower.state_dict().items())

    classifier = tf.ViTForImageClassification(tf.ViTConfig.from_pretrained(shelf / "vit"))
    classifier.save_pretrained(tmp_path / "classifier")
    tf.AutoImageProcessor.from_pretrained(shelf / "vit").save_pretrained(tmp_path / "classifier")
    model, _ = assemble(str(tmp_path / "classifier"), str(shelf / "llama"))
    tower = model.model.vision_tower.state_dict()
    assert all(torch.equal(value, tower[name]) for name, value in classifier.vit.state_dict().items())


def test_registers_are_counted(shelf: Path, tmp_path: Path) -> None:
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2, "patch_size": 14}
    config = tf.Dinov2WithRegistersConfig(**size, image_size=56, num_register_tokens=3)
    tf.Dinov2WithRegistersModel(config).save_pretrained(tmp_path)
    tf.AutoImageProcessor.from_pretrained(shelf / "dinov2").save_pretrained(tmp_path)
    model, processor = assemble(str(tmp_path), str(shelf / "llama"))
    assert processor.num_additional_image_tokens == 4 and model.config.image_seq_length == 19


def test_image_processors_are_fitted_to_the_tower(shelf: Path, tmp_path: Path) -> None:
    for family, settings in {
        "clip": {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}},
        "siglip": {"size": {"height": 384, "width": 384}},
        "vit": {"size": {"height": 224, "width": 224}},
    }.items():
        tf.AutoModel.from_pretrained(shelf / family).save_pretrained(tmp_path / family)
        processor = tf.AutoImageProcessor.from_pretrained(shelf / family, **settings)
        processor.save_pretrained(tmp_path / family)
        made = assemble(str(tmp_path / family), str(shelf / "llama"))[1]
        pixels = made.image_processor([Image.new("L", (100, 80))], return_tensors="pt")["pixel_values"]
        assert pixels.shape == (1, 3, 56, 56), family
    _, made = assemble(str(shelf / "dinov2"), str(shelf / "llama"))
    assert made.image_processor.crop_size["height"] == 56  # the published crop stays; the checkpoint's image_size is 70


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
talk = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]}]
ask = {"add_generation_prompt": True}
batch = processor.apply_chat_template(talk, tokenize=True, return_dict=True, return_tensors="pt", **ask)
again = processor(images=[image], text=processor.apply_chat_template(talk, **ask))
assert again["input_ids"][0] == batch["input_ids"][0].tolist(), "rendered first, tokenized later"
with torch.no_grad():
    torch.save([batch["input_ids"], model(**batch).logits, model.generation_config.eos_token_id], sys.argv[2])
"""


@pytest.mark.parametrize(("vision", "language"), [("siglip", "llama3"), ("vit", "gemma")])
def test_a_saved_checkpoint_loads_without_mmtune(shelf: Path, tmp_path: Path, vision: str, language: str) -> None:
    model, processor = assemble(str(shelf / vision), str(shelf / language))
    save_checkpoint(model, processor, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert (tmp_path / "out" / "model.safetensors").is_file()
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", RELOAD, str(tmp_path / "out"), str(tmp_path / "said")],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    ids, logits, eos = torch.load(tmp_path / "said")
    batch = processor.apply_chat_template(
        _talk(("user", [IMAGES[0], "What?"])),
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    assert torch.equal(batch["input_ids"], ids)
    with torch.no_grad():
        assert torch.allclose(model(**batch).logits, logits, atol=1e-6)
    assert eos == model.generation_config.eos_token_id


def test_an_existing_directory_is_only_replaced_on_purpose(llava: tuple[Any, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "keep").write_text("mine")
    with pytest.raises(UserError, match="out exists"):
        save_checkpoint(*llava, out)
    assert (out / "keep").read_text() == "mine"
    save_checkpoint(*llava, out, overwrite=True)
    assert not (out / "keep").exists() and (out / "config.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# ------------------------------------------------------------------------------------------------------- chat templates

END = {"vicuna_v1": "</s>", "chatml": "<|im_end|>", "llama3": "<|eot_id|>", "mistral": "</s>", "gemma": "<end_of_turn>"}
END |= {"plain": "\n", "tiny": "<|end|>"}
SPEAKS = {
    "vicuna_v1": "llama",
    "chatml": "qwen2",
    "llama3": "llama3",
    "mistral": "mistral",
    "gemma": "gemma",
    "plain": "llama",
}
PROMPT_ENDS_MID_LINE = ("vicuna_v1", "mistral")  # the answer's leading space is then the model's to write


@pytest.fixture(scope="module")
def speakers(shelf: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A processor for each shipped template."""
    made = {name: assemble(str(shelf / "clip"), str(shelf / family), chat_template=name)[1] for name, family in SPEAKS.items()}
    tiny = tmp_path_factory.mktemp("tiny")
    tiny_language("llama", tiny)
    tokenizer = tf.AutoTokenizer.from_pretrained(tiny)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]})
    tokenizer.save_pretrained(tiny)
    made["tiny"] = assemble(str(shelf / "clip"), str(tiny), chat_template="tiny")[1]
    return made


def test_every_shipped_template_is_tested() -> None:
    assert set(template_names()) == set(END)


@pytest.mark.parametrize("name", END)
def test_supervised_tokens_are_the_answer_and_its_end(speakers: dict[str, Any], name: str) -> None:
    processor = speakers[name]
    space = " " if name in PROMPT_ENDS_MID_LINE else ""
    answers = ["a cat, twice.", "No: 2 dogs\nand\n\na bird"]
    system = [] if name == "plain" else [("system", "Be brief.")]
    talk = _talk(
        *system,
        ("user", [IMAGES[0], "What is it?"]),
        ("assistant", answers[0]),
        ("user", ["And ", IMAGES[1], " here?"]),
        ("assistant", answers[1]),
    )
    ids, spans = _encode(processor, talk)
    assert ids.count(processor.image_token_id) == 32
    assert [processor.tokenizer.decode(span) for span in spans] == [space + answer + END[name] for answer in answers]
    if system:
        assert "Be brief." in processor.tokenizer.decode(ids)
    spoken = [message for message in talk if message["role"] != "user"]
    plain_strings = [{**message, "content": message["content"][-1]["text"]} for message in spoken]
    if name not in ("mistral", "gemma"):
        assert [processor.tokenizer.decode(span) for span in _encode(processor, plain_strings)[1]] == (
            [space + answer + END[name] for answer in answers] if name != "plain" else [f"{answers[0]}\n{answers[1]}\n"]
        )


@pytest.mark.parametrize("name", sorted(set(END) - {"plain"}))
def test_the_prompt_of_a_question_is_a_prefix_of_the_training_text(speakers: dict[str, Any], name: str) -> None:
    processor = speakers[name]
    talk = _talk(("system", "Be brief."), ("user", [IMAGES[0], "What?"]), ("assistant", "it is"))
    prompt = processor.apply_chat_template(talk[:-1], tokenize=True, return_dict=True, add_generation_prompt=True)
    asked = prompt["input_ids"][0]
    ids, spans = _encode(processor, talk)
    assert ids[: len(asked)] == asked
    assert ids[len(asked) : len(asked) + len(spans[0])] == spans[0]


RENDERED = {
    "vicuna_v1": (
        "<s>A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. "
        "USER: <image>\nWhat? ASSISTANT: cat</s>USER: And\n<image>\n now? ASSISTANT: dog</s>"
    ),
    "chatml": (
        "<|im_start|>user\n<image>\nWhat?<|im_end|>\n<|im_start|>assistant\ncat<|im_end|>\n"
        "<|im_start|>user\nAnd\n<image>\n now?<|im_end|>\n<|im_start|>assistant\ndog<|im_end|>\n"
    ),
    "llama3": (
        "<|begin_of_text|>"
        "<|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\ncat<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nAnd\n<image>\n now?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\ndog<|eot_id|>"
    ),
    "mistral": "<s>[INST] <image>\nWhat? [/INST] cat</s>[INST] And\n<image>\n now? [/INST] dog</s>",
    "gemma": (
        "<bos><start_of_turn>user\n<image>\nWhat?<end_of_turn>\n<start_of_turn>model\ncat<end_of_turn>\n"
        "<start_of_turn>user\nAnd\n<image>\n now?<end_of_turn>\n<start_of_turn>model\ndog<end_of_turn>\n"
    ),
    "plain": "<s><image>cat\n<image>dog\n",
    "tiny": ("<|user|><image>\nWhat?<|end|><|assistant|>cat<|end|><|user|>And\n<image>\n now?<|end|><|assistant|>dog<|end|>"),
}


@pytest.mark.parametrize("name", END)
def test_rendered_text_is_the_familys(speakers: dict[str, Any], name: str) -> None:
    talk = _talk(
        ("user", [IMAGES[0], "What?"]),
        ("assistant", "cat"),
        ("user", ["And\n", IMAGES[1], " now?"]),
        ("assistant", "dog"),
    )
    assert speakers[name].apply_chat_template(talk) == RENDERED[name]
    talk[0]["content"][1]["text"] = "\nWhat?"  # a source that leaves LLaVA's own newline in: still one newline
    assert speakers[name].apply_chat_template(talk) == RENDERED[name]


def test_templates_refuse_what_they_would_lose(speakers: dict[str, Any]) -> None:
    for talk, reason in (
        (_talk(("user", "Draw."), ("assistant", [IMAGES[0]])), "text only"),
        (_talk(("tool", "x")), "tool"),
        ([{"role": "user", "content": [{"type": "audio", "audio": "x"}]}], "audio"),
    ):
        for name, processor in speakers.items():
            with pytest.raises(Exception, match=reason):
                processor.apply_chat_template(talk)
                raise AssertionError(name)
    with pytest.raises(Exception, match="system"):
        speakers["gemma"].apply_chat_template(_talk(("system", "Be brief."), ("assistant", "yes")))


def test_a_sentencepiece_tokenizer_and_its_own_bos(shelf: Path, tmp_path: Path) -> None:
    """Llama's real tokenizer class: a metaspace before words, and a beginning token that it adds itself."""
    tiny_language("llama", tmp_path)
    letters = sorted(set("▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ'.,:?"))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).unlink()
    tokenizer = tf.LlamaTokenizer(vocab={token: n for n, token in enumerate(tokens)}, merges=[], add_bos_token=True)
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer("a")["input_ids"][0] == 1
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    model.resize_token_embeddings(len(tokens))
    model.save_pretrained(tmp_path)
    model, processor = assemble(str(shelf / "clip"), str(tmp_path))
    save_checkpoint(model, processor, tmp_path / "out")
    for each in (processor, tf.AutoProcessor.from_pretrained(tmp_path / "out")):
        talk = _talk(("user", [IMAGES[0], "What?"]), ("assistant", "a cat"))
        ids, spans = _encode(each, talk)
        assert each.tokenizer.decode(spans[0]) == "a cat</s>"
        later = each(images=IMAGES[:1], text=each.apply_chat_template(talk))["input_ids"][0]
        assert later == ids and ids.count(1) == 1


@pytest.mark.parametrize(
    ("name", "family", "reason"),
    [
        ("vicuna", "llama", "unknown name 'vicuna'; did you mean 'vicuna_v1'"),
        ("nowhere.jinja", "llama", "no file nowhere.jinja"),
        ("chatml", "llama", r"<\|im_start\|>"),
    ],
)
def test_chat_template_names_are_checked(shelf: Path, name: str, family: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        assemble(str(shelf / "clip"), str(shelf / family), chat_template=name)


def test_chat_templates_from_files_are_checked(shelf: Path, tmp_path: Path) -> None:
    tokenizer = tf.AutoTokenizer.from_pretrained(shelf / "qwen2")
    for text, reason in {
        "{{ messages[0].role }}": "writes <image> 0 times",
        "<image>{{ messages[0].role }}": "no {% generation %} marks",
        "{% if %}": "fails on a question",
    }.items():
        (tmp_path / "own.jinja").write_text(text)
        with pytest.raises(UserError) as caught:
            resolve_chat_template(str(tmp_path / "own.jinja"), tokenizer)
        assert reason in str(caught.value)
    good = "<image>{% for m in messages %}{% generation %}{{ m.role }}{% endgeneration %}{% endfor %}"
    (tmp_path / "own.jinja").write_text(good)
    assert resolve_chat_template(str(tmp_path / "own.jinja"), tokenizer) == good


def test_a_text_models_own_template_is_not_taken_unless_it_places_images(shelf: Path) -> None:
    tokenizer = tf.AutoTokenizer.from_pretrained(shelf / "qwen2")
    assert tokenizer.chat_template is not None
    chatml = resolve_chat_template("chatml", tokenizer)
    assert resolve_chat_template(None, tokenizer, model_type="qwen2") == chatml
    tokenizer.chat_template = chatml + "{# mine #}"
    assert resolve_chat_template(None, tokenizer, model_type="qwen2") == chatml + "{# mine #}"


# ------------------------------------------------------------------------------------------------------------- refusals


def _config_only(path: Path, config: Any) -> str:
    """A checkpoint with no weights: what is refused here is refused before any are read."""
    config.save_pretrained(path)
    return str(path)


def test_language_models_that_do_not_fit_are_refused(shelf: Path, tmp_path: Path) -> None:
    clip = str(shelf / "clip")
    gemma2 = tf.Gemma2Config(hidden_size=32, num_hidden_layers=1, vocab_size=64)
    for config, reason in (
        (tf.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64), "GPT2Model has no embed_tokens"),
        (tf.BertConfig(), "is an encoder;"),
        (tf.T5Config(), "encoder-decoder"),
        (gemma2, "final_logit_softcapping 30"),
        (tf.LlavaConfig(), "model.base"),
        (tf.CLIPVisionConfig(), "not a causal language model"),
    ):
        with pytest.raises(UserError, match=reason):
            assemble(clip, _config_only(tmp_path / config.model_type, config))


def test_towers_that_do_not_fit_are_refused(shelf: Path, tmp_path: Path) -> None:
    llama = str(shelf / "llama")
    for config, reason in (
        (tf.Siglip2Config(), "NaFlex"),
        (tf.Siglip2VisionConfig(), "NaFlex"),
        (tf.ConvNextConfig(), "not known to be a sequence of patches"),
        (tf.LlamaConfig(), "not known to be a sequence of patches"),
    ):
        with pytest.raises(UserError, match=reason):
            assemble(_config_only(tmp_path / config.model_type, config), llama)


def test_a_torchvision_only_processor_is_refused_without_torchvision(shelf: Path, tmp_path: Path) -> None:
    from transformers.utils import is_torchvision_available

    if is_torchvision_available():
        pytest.skip("torchvision is here")
    path = _config_only(tmp_path / "dinov3", tf.DINOv3ViTConfig(hidden_size=32, num_hidden_layers=2))
    (tmp_path / "dinov3" / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "DINOv3ViTImageProcessor"}))
    with pytest.raises(UserError, match=r"(?i)torchvision"):
        assemble(path, str(shelf / "llama"))


def test_missing_paths_say_what_was_looked_for(shelf: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"vision: /nowhere/clip does not exist: a checkpoint directory with config.json"):
        assemble("/nowhere/clip", str(shelf / "llama"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"language: .*empty is here but holds no config.json"):
        assemble(str(shelf / "clip"), str(tmp_path / "empty"))


def test_weights_left_to_chance_are_refused(shelf: Path, tmp_path: Path) -> None:
    for file in (shelf / "dinov2").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("layernorm.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"no weights for layernorm.weight"):
        assemble(str(tmp_path), str(shelf / "llama"))


def test_arguments_are_checked(shelf: Path) -> None:
    with pytest.raises(UserError, match="no class token"):
        assemble(str(shelf / "siglip"), str(shelf / "llama"), vision_feature_select_strategy="default")
    with pytest.raises(UserError, match="neither"):
        assemble(str(shelf / "clip"), str(shelf / "llama"), vision_feature_select_strategy="cls")
    with pytest.raises(UserError, match=r"-5 is out of range.*3 layers"):
        assemble(str(shelf / "clip"), str(shelf / "llama"), vision_feature_layer=-5)


def test_a_text_model_with_no_template_to_take_is_refused(shelf: Path, tmp_path: Path) -> None:
    config = tf.OlmoConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=512)
    tf.OlmoForCausalLM(config).save_pretrained(tmp_path)
    tf.AutoTokenizer.from_pretrained(shelf / "llama").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"no default for model_type 'olmo'.*is missing"):
        assemble(str(shelf / "clip"), str(tmp_path))
    model, _ = assemble(str(shelf / "clip"), str(tmp_path), chat_template="vicuna_v1")
    assert type(model.model.language_model).__name__ == "OlmoModel"


def test_a_count_that_is_wrong_names_the_tower(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(parts.EXTRA_TOKENS, "dinov2", 2)
    with pytest.raises(UserError, match=r"vision: .*dinov2.*640 x 480 pixels the processor writes 17 tokens.*makes 16 features"):
        assemble(str(shelf / "dinov2"), str(shelf / "llama"))


def test_a_slow_tokenizer_is_refused(shelf: Path, tmp_path: Path) -> None:
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((shelf / "llama" / file).read_bytes())
    with pytest.raises(UserError, match="tokenizer"):
        assemble(str(shelf / "clip"), str(tmp_path))


# ------------------------------------------------------------------------------------------------------------ projector


def _other(shelf: Path) -> Any:
    return assemble(str(shelf / "clip"), str(shelf / "llama"), seed=9)[0]


def test_a_projector_is_read_from_an_adapter_a_run_and_a_checkpoint(shelf: Path, llava: tuple[Any, Any], tmp_path: Path) -> None:
    source = _other(shelf)
    expected = {key: value.clone() for key, value in source.model.multi_modal_projector.state_dict().items()}
    save_checkpoint(source, llava[1], tmp_path / "whole")
    lora = LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj", modules_to_save=["multi_modal_projector"])
    get_peft_model(source, lora).save_pretrained(tmp_path / "run" / "adapter")
    for path in (tmp_path / "whole", tmp_path / "run", tmp_path / "run" / "adapter"):
        model, _ = assemble(str(shelf / "clip"), str(shelf / "llama"))
        load_projector(model, path)
        got = model.model.multi_modal_projector.state_dict()
        assert got.keys() == expected.keys() and all(torch.equal(got[key], expected[key]) for key in got)


def test_a_projector_that_does_not_fit_is_named(shelf: Path, llava: tuple[Any, Any], tmp_path: Path) -> None:
    model, _ = llava
    before = {key: value.clone() for key, value in model.state_dict().items()}
    good = {
        f"model.multi_modal_projector.{key}": value
        for key, value in _other(shelf).model.multi_modal_projector.state_dict().items()
    }
    first = "model.multi_modal_projector.linear_1.weight"
    for change, reason in (
        ({first: None}, f"missing {first}"),
        (
            {"model.multi_modal_projector.linear_3.bias": torch.zeros(1)},
            "unexpected model.multi_modal_projector.linear_3.bias",
        ),
        ({first: torch.zeros(3, 3)}, rf"{first} has shape \(3, 3\) where \(32, 32\)"),
        (dict.fromkeys(good), "no projector weights"),
    ):
        tensors = {key: value for key, value in {**good, "other": torch.zeros(1), **change}.items() if value is not None}
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=reason):
            load_projector(model, tmp_path)
    with pytest.raises(UserError, match="no directory"):
        load_projector(model, tmp_path / "nowhere")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds none of"):
        load_projector(model, tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# ----------------------------------------------------------------------------------------------------------------- tiny


def test_tiny_llava_is_a_ready_base(tmp_path: Path) -> None:
    model = tf.AutoModelForImageTextToText.from_pretrained(tiny_llava(tmp_path / "base"))
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert family_of(str(tmp_path / "base"), "base") == "llava"


def test_tiny_tokenizers_learn_from_texts(tmp_path: Path) -> None:
    tiny_language("llama", tmp_path, texts=["how many sevens are there"] * 5, vocab_size=290)
    tokenizer = tf.AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer("sevens", add_special_tokens=False)["input_ids"]) < 6
    assert tokenizer.decode(tokenizer("naïve 日本", add_special_tokens=False)["input_ids"]) == "naïve 日本"


@pytest.mark.parametrize(
    ("checkpoint", "kind", "family"),
    [
        ("openai/clip-vit-large-patch14-336", "vision", "clip"),
        ("google/siglip-so400m-patch14-384", "vision", "siglip"),
        ("facebook/dinov2-large", "vision", "dinov2"),
        ("google/vit-base-patch16-224-in21k", "vision", "vit"),
        ("lmsys/vicuna-7b-v1.5", "language", "llama"),
        ("meta-llama/Llama-3.1-8B-Instruct", "language", "llama3"),
        ("Qwen/Qwen2.5-1.5B-Instruct", "language", "qwen2"),
        ("Qwen/Qwen3-4B", "language", "qwen3"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "language", "mistral"),
        ("google/gemma-2b-it", "language", "gemma"),
        ("google/gemma-3-1b-it", "language", "gemma3"),
        ("llava-hf/llava-1.5-7b-hf", "base", "llava"),
        ("builtin:tiny-llava", "base", "llava"),
    ],
)
def test_families_of_well_known_names(checkpoint: str, kind: Any, family: str) -> None:
    assert family_of(checkpoint, kind) == family


def test_families_of_local_checkpoints_and_unknown_names(shelf: Path) -> None:
    for name in VISION_FAMILIES:
        assert family_of(str(shelf / name), "vision") == name
    for name in ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma3"):
        assert family_of(str(shelf / name), "language") == name
    with pytest.raises(UserError, match=r"model_type 'clip'.*llama"):
        family_of(str(shelf / "clip"), "language")
    for name in (
        "someone/model",
        "google/siglip2-base-patch16-naflex",
        "Qwen/Qwen2-VL-7B-Instruct",
        "google/gemma-2-9b",
    ):
        with pytest.raises(UserError, match=r"download its config.json once|model_type"):
            family_of(name, "vision" if "siglip" in name else "language")
    with pytest.raises(UserError, match="did you mean 'clip'"):
        tiny_vision("clp", shelf / "x")
    with pytest.raises(UserError, match="no tiny language model 'gpt2'"):
        tiny_language("gpt2", shelf / "x")
