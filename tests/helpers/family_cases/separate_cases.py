"""Families whose image features are resampled by queries, attended to across, or read by an encoder."""

from __future__ import annotations

from typing import Any

from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, PreTrainedConfig, ProcessorMixin

from family_cases.family_case import FamilyCase
from mmtune.models.tiny.tiny_bases import SENTENCEPIECE, VISION, TinyBase, text_sizes, tiny_tokenizer, token_id
from mmtune.models.tiny.tiny_models import IMAGE, PATCH
from mmtune.models.tiny.tiny_templates import TEMPLATES

SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def _idefics2() -> ProcessorMixin:
    from transformers import Idefics2ImageProcessor, Idefics2Processor

    specials = ("<unk>", "<s>", "</s>", "<fake_token_around_image>", "<image>", "<end_of_utterance>")
    images = Idefics2ImageProcessor(size={"shortest_edge": 28, "longest_edge": 56}, do_image_splitting=True)
    processor: ProcessorMixin = Idefics2Processor(images, tiny_tokenizer(specials, pad="<unk>", **SENTENCEPIECE), image_seq_len=3)
    return processor


def _idefics2_config(processor: Any) -> PreTrainedConfig:
    heads = {"resampler_n_heads": 4, "resampler_head_dim": 16, "num_key_value_heads": 2}
    return AutoConfig.for_model(
        "idefics2",
        vision_config={**VISION, "image_size": 56, "patch_size": 14},
        perceiver_config={"resampler_n_latents": 3, "resampler_depth": 1, "hidden_size": 64, **heads},
        text_config={"model_type": "mistral", **text_sizes(processor.tokenizer)},
        image_token_id=token_id(processor, "<image>"),
        tie_word_embeddings=False,
    )


QFORMER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
QFORMER |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # a reference has other random numbers


def _blip_images() -> Any:
    from transformers import BlipImageProcessor

    return BlipImageProcessor(size={"height": IMAGE, "width": IMAGE})


def _blip2() -> ProcessorMixin:
    from transformers import Blip2Processor

    tokenizer = tiny_tokenizer(("<pad>", "</s>", "<unk>"), bos="</s>", eos="</s>", pad="<pad>", unk="<unk>")
    processor: ProcessorMixin = Blip2Processor(_blip_images(), tokenizer, num_query_tokens=3)
    return processor


def _blip2_config(processor: Any) -> PreTrainedConfig:
    text = text_sizes(processor.tokenizer)
    opt = {"model_type": "opt", **text, "word_embed_proj_dim": 64, "ffn_dim": 64, "dropout": 0.0, "activation_function": "relu"}
    return AutoConfig.for_model(
        "blip-2",
        vision_config=VISION,
        qformer_config=QFORMER,
        text_config=opt,
        num_query_tokens=3,
        image_token_index=token_id(processor, "<image>"),
    )


def _instructblip() -> ProcessorMixin:
    from transformers import InstructBlipProcessor

    tokenizer = tiny_tokenizer(("<unk>", "<s>", "</s>", "<pad>"), pad="<pad>", **SENTENCEPIECE)
    questions = tiny_tokenizer(("[PAD]", "[UNK]", "[CLS]"), pad="[PAD]", unk="[UNK]", bos="[CLS]")
    processor: ProcessorMixin = InstructBlipProcessor(_blip_images(), tokenizer, questions, num_query_tokens=3)
    return processor


def _instructblip_config(processor: Any) -> PreTrainedConfig:
    return AutoConfig.for_model(
        "instructblip",
        vision_config=VISION,
        qformer_config={**QFORMER, "vocab_size": len(processor.qformer_tokenizer)},
        text_config={"model_type": "llama", **text_sizes(processor.tokenizer)},
        num_query_tokens=3,
        image_token_index=token_id(processor, "<image>"),
    )


def _blip2_t5() -> ProcessorMixin:
    from transformers import Blip2Processor

    tokenizer = tiny_tokenizer(("<pad>", "</s>", "<unk>"), eos="</s>", pad="<pad>", unk="<unk>")
    _adds(tokenizer, "$A </s>", "</s>")
    processor: ProcessorMixin = Blip2Processor(_blip_images(), tokenizer, num_query_tokens=3)
    return processor


def _adds(tokenizer: Any, template: str, *tokens: str) -> None:
    """Let a tokenizer add special tokens around a text, as those of encoder-decoder models do."""
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in tokens]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=ids)


def _blip2_t5_config(processor: Any) -> PreTrainedConfig:
    text = {
        key: value
        for key, value in text_sizes(processor.tokenizer).items()
        if key in ("vocab_size", "eos_token_id", "pad_token_id")
    }
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    t5 = {"model_type": "t5", **text, **sizes, "decoder_start_token_id": processor.tokenizer.pad_token_id}
    return AutoConfig.for_model(
        "blip-2",
        vision_config=VISION,
        qformer_config=QFORMER,
        text_config={**t5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        num_query_tokens=3,
        image_token_index=token_id(processor, "<image>"),
    )


def _florence2() -> ProcessorMixin:
    from transformers import CLIPImageProcessor, Florence2Processor

    names: dict[str, Any] = {"bos": "<s>", "eos": "</s>", "pad": "<pad>", "unk": "<unk>"}
    tokenizer = tiny_tokenizer(("<s>", "<pad>", "</s>", "<unk>"), {"image_token": "<image>"}, **names)
    _adds(tokenizer, "<s> $A </s>", "<s>", "</s>")
    images = CLIPImageProcessor(size={"height": 64, "width": 64}, do_center_crop=False)
    images.image_seq_length = 17
    processor: ProcessorMixin = Florence2Processor(images, tokenizer)
    return processor


def _florence2_config(processor: Any) -> PreTrainedConfig:
    vision = {
        "depths": [1, 1],
        "patch_size": [7, 3],
        "patch_stride": [4, 4],
        "patch_padding": [3, 1],
        "patch_prenorm": [False, True],
    }
    vision |= {"embed_dim": [32, 64], "num_heads": [2, 4], "num_groups": [2, 4], "window_size": 4, "drop_path_rate": 0.0}
    ids = {name: getattr(processor.tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    ends = {**ids, "decoder_start_token_id": ids["eos_token_id"], "forced_bos_token_id": ids["bos_token_id"]}
    sizes = {"d_model": 64, "dropout": 0.0, "max_position_embeddings": 256, "vocab_size": -(-len(processor.tokenizer) // 64) * 64}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 2, f"{side}_attention_heads": 4, f"{side}_ffn_dim": 64}
    return AutoConfig.for_model(
        "florence2",
        vision_config={**vision, "projection_dim": 64},
        text_config={"model_type": "bart", **ends, **sizes},
        image_token_id=token_id(processor, "<image>"),
    )


def _kosmos2() -> ProcessorMixin:
    from transformers import CLIPImageProcessor, Kosmos2Processor

    tokenizer = tiny_tokenizer(("<s>", "<pad>", "</s>", "<unk>"), pad="<pad>", **SENTENCEPIECE)
    _adds(tokenizer, "<s> $A </s>", "<s>", "</s>")
    images = CLIPImageProcessor(size={"shortest_edge": IMAGE}, crop_size={"height": IMAGE, "width": IMAGE})
    processor: ProcessorMixin = Kosmos2Processor(images, tokenizer, num_patch_index_tokens=16)
    return processor


def _kosmos2_config(processor: Any) -> PreTrainedConfig:
    text = text_sizes(processor.tokenizer)
    ids = {name: text[name] for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    dropout = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), 0.0)
    return AutoConfig.for_model(
        "kosmos-2",
        vision_config=VISION,
        text_config={**ids, **dropout, "embed_dim": 64, "layers": 2, "ffn_dim": 64, "attention_heads": 4},
        latent_query_num=64,
    )


MLLAMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{% for b in m.content %}{{ b.text if b.type == 'text' else '<|image|>' }}{% endfor %}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def _mllama() -> ProcessorMixin:
    from transformers import MllamaImageProcessor, MllamaProcessor

    headers = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>", "<|finetune_right_pad_id|>")
    tokenizer = tiny_tokenizer(
        ("<|begin_of_text|>", "<|end_of_text|>", *headers),
        bos="<|begin_of_text|>",
        eos="<|end_of_text|>",
        pad="<|finetune_right_pad_id|>",
    )
    tokenizer.add_tokens(["<|image|>"], special_tokens=True)  # the first of the eight embedding rows beyond the vocabulary
    size = {"height": IMAGE, "width": IMAGE}
    processor: ProcessorMixin = MllamaProcessor(MllamaImageProcessor(size=size, max_image_tiles=4), tokenizer)
    return processor


def _mllama_config(processor: Any) -> PreTrainedConfig:
    vision = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "attention_heads": 4}
    layers = {"num_global_layers": 1, "intermediate_layers_indices": [0], "vision_output_dim": 128}
    text = {**text_sizes(processor.tokenizer), "cross_attention_layers": [1]}
    text.pop("head_dim")
    return AutoConfig.for_model(
        "mllama",
        vision_config={**vision, **layers, "image_size": IMAGE, "patch_size": PATCH, "max_num_tiles": 4},
        text_config={**text, "vocab_size": token_id(processor, "<|image|>")},
        image_token_index=token_id(processor, "<|image|>"),
    )


ONE_ANSWER: dict[str, Any] = {"end": "</s>", "needs_image": True, "supervise": "last"}

SEPARATE_CASES: dict[str, FamilyCase] = {
    "idefics2": FamilyCase(
        TinyBase(_idefics2, _idefics2_config, template=str(TEMPLATES["idefics3"]).replace("<|im_start|>", "")),
        "<end_of_utterance>",
        leading=" ",
    ),
    "mllama": FamilyCase(TinyBase(_mllama, _mllama_config, template=MLLAMA_TEMPLATE), "<|eot_id|>", alone=True),
    "blip-2": FamilyCase(
        TinyBase(_blip2, _blip2_config, required_template="question_answer"), "</s>", leading=" ", needs_image=True
    ),
    "blip-2_t5": FamilyCase(TinyBase(_blip2_t5, _blip2_t5_config, required_template="question_answer"), **ONE_ANSWER),
    "florence2": FamilyCase(
        TinyBase(_florence2, _florence2_config, required_template="instruction"), leading="<s>", one_image=True, **ONE_ANSWER
    ),
    "kosmos-2": FamilyCase(
        TinyBase(_kosmos2, _kosmos2_config, required_template="question_answer"),
        "</s>",
        leading=" ",
        needs_image=True,
        one_image=True,
    ),
    "instructblip": FamilyCase(
        TinyBase(_instructblip, _instructblip_config, required_template="instruction"),
        "</s>",
        leading=" ",
        needs_image=True,
        idle=r"qformer.*layer\.1\.(intermediate|output)\.",  # what the last layer makes of the question, which only queries read
    ),
}
