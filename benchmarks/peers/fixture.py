"""A LLaVA-1.5 checkpoint with random weights and rows of synthetic questions, in the formats of every program of the suite.

Everything follows from a seed: words of syllables with Zipf frequencies, a Llama-like BPE tokenizer trained on them, JPEG files
of 640 x 480 pixels, answers of log-normal length. The checkpoint has the key names and files of llava-hf/llava-1.5-7b-hf.

    python benchmarks/peers/fixture.py runs/peers                              # model_60m/ and rows_single_256/
    python benchmarks/peers/fixture.py runs/peers --size 7b --dtype bfloat16   # 14 GB
    python benchmarks/peers/fixture.py runs/peers --variant mixed --rows 64
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmtune.utils.torchvision_support import prepare_torchvision

prepare_torchvision()

import torch  # noqa: E402
from PIL import Image, ImageDraw  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers  # noqa: E402
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, PreTrainedTokenizerFast  # noqa: E402

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
# Vicuna's format, as LLaVA-1.5 was trained: every answer ends with the end of sequence.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% if messages[0].role != 'system' %}{{ '" + SYSTEM.replace("'", "\\'") + " ' }}{% endif %}"
    "{% for message in messages %}"
    "{% if message.role == 'system' %}{{ message.content if message.content is string else message.content[0].text }}{{ ' ' }}"
    "{% elif message.role == 'user' %}{{ 'USER: ' }}"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{{ '<image>\n' if part.type == 'image' else part.text }}{% endfor %}{% endif %}{{ ' ' }}"
    "{% else %}{{ 'ASSISTANT:' }}{% generation %}"
    "{{ ' ' + (message.content if message.content is string else message.content[0].text) + eos_token }}"
    "{% endgeneration %}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
IMAGE_MEAN, IMAGE_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # CLIP's


@dataclass(frozen=True)
class Size:
    """Shapes of a checkpoint: widths, layers and heads of the CLIP tower and of the Llama, image side in pixels, vocabulary."""

    vision: tuple[int, int, int, int]  # hidden, intermediate, layers, heads
    text: tuple[int, int, int, int]
    image: int = 336
    vocabulary: int = 32_000


SIZES = {
    "tiny": Size((32, 64, 2, 2), (32, 64, 2, 2), image=56, vocabulary=600),
    "60m": Size((384, 1536, 10, 6), (384, 1024, 10, 6)),
    "400m": Size((768, 3072, 12, 12), (1024, 2816, 20, 16)),
    "7b": Size((1024, 4096, 24, 16), (4096, 11008, 32, 32)),  # LLaVA-1.5-7B
}
PATCH = 14


@dataclass(frozen=True)
class Variant:
    """Rows of one kind: images per row, and the answers' length in words (log-normal, limited to 1 to 600)."""

    images: tuple[int, int]  # fewest, most
    median: float
    sigma: float


VARIANTS = {
    "single": Variant((1, 1), 48, 1.0),
    "text_heavy": Variant((1, 1), 256, 0.5),
    "image_heavy": Variant((1, 1), 3, 0.5),
    "many_image": Variant((2, 5), 16, 0.8),
    "text_only": Variant((0, 0), 128, 0.8),
}
MIXED = ("single", "text_heavy", "image_heavy", "many_image", "text_only")  # `mixed` takes a kind for each row


def words(size: int, generator: np.random.Generator) -> list[str]:
    """Distinct words of one to four syllables, the shorter ones first, as the frequent words of a language are."""
    onsets, vowels, codas = [*"bcdfghklmnprstvwz", "br", "ch", "pl", "st", "th", "tr"], "aeiou", ["", "", *"nrstl"]
    distinct: dict[str, None] = {}
    while len(distinct) < size:
        syllables = 1 + min(3, int(4 * (len(distinct) / size) ** 0.3))
        draws = generator.integers(0, [len(onsets), len(vowels), len(codas)], size=(syllables, 3))
        distinct["".join(onsets[o] + vowels[v] + codas[c] for o, v, c in draws)] = None
    return list(distinct)


def zipf(size: int) -> np.ndarray:
    """Probabilities of words by rank (Zipf-Mandelbrot, exponent 1)."""
    weights = 1 / (np.arange(size) + 2.7)
    return weights / weights.sum()


def vocabulary(size: int, seed: int) -> list[str]:
    """The words of a tokenizer of `size` tokens: twice as many, so that rare words are several tokens."""
    return words(2 * size, np.random.default_rng(seed))


def build_tokenizer(size: int, seed: int) -> PreTrainedTokenizerFast:
    """A BPE tokenizer of `size` tokens with spaces as `▁` and byte fallback, as Llama's, then LLaVA's `<image>` and `<pad>`."""
    lexicon = vocabulary(size, seed)
    counts = np.maximum(1, np.round(zipf(len(lexicon)) * 20 * len(lexicon))).astype(int)

    def corpus() -> Iterator[str]:
        yield f"{SYSTEM} USER: ASSISTANT: USER: ASSISTANT:"
        for word, count in zip(lexicon, counts, strict=True):
            yield " ".join([word] * int(count)) + " ." + f" {word.capitalize()}" * (int(count) // 8)

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special + [f"<0x{byte:02X}>" for byte in range(256)], show_progress=False
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    # The bytes are ordinary tokens, and not special ones as the trainer takes them.
    stored = json.loads(tokenizer.to_str())
    stored["added_tokens"] = [token for token in stored["added_tokens"] if token["content"] in special]
    tokenizer = Tokenizer.from_str(json.dumps(stored))
    if tokenizer.get_vocab_size() != size:
        raise SystemExit(f"the tokenizer has {tokenizer.get_vocab_size()} tokens, expected {size}: more words are needed")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=4096,
        padding_side="right",
    )
    fast.add_special_tokens({"additional_special_tokens": ["<image>"]})
    fast.add_special_tokens({"pad_token": "<pad>"})
    return fast


def hub_name(name: str) -> str:
    """The key of a weight in llava-hf/llava-1.5-7b-hf, which every version of transformers reads."""
    for ours, hub in (
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
    ):
        if name.startswith(ours):
            return hub + name.removeprefix(ours)
    raise SystemExit(f"no key of the hub's checkpoint for {name}")


def write_model(folder: Path, size: str, seed: int = 0, dtype: str = "float32") -> None:
    """A checkpoint of `SIZES[size]` with random weights, its tokenizer, processor and chat template.

    Args:
        dtype: float32 or bfloat16.
    """
    shape = SIZES[size]
    tokenizer = build_tokenizer(shape.vocabulary, seed)
    hidden, intermediate, layers, heads = shape.vision
    vision = CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=shape.image,
        patch_size=PATCH,
        projection_dim=hidden,
    )
    hidden, intermediate, layers, heads = shape.text
    text = LlamaConfig(
        vocab_size=shape.vocabulary + 64,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=shape.vocabulary + 1,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=shape.vocabulary,
        image_seq_length=(shape.image // PATCH) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config.dtype = getattr(torch, dtype)
        model = LlavaForConditionalGeneration._from_config(config, dtype=config.dtype)
    folder.mkdir(parents=True, exist_ok=True)
    model.config.architectures = ["LlavaForConditionalGeneration"]
    model.config.save_pretrained(folder)
    save_file(
        {hub_name(name): value.contiguous() for name, value in model.state_dict().items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    tokenizer.save_pretrained(folder)
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": shape.vocabulary + 1})
    write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "CLIPImageProcessor",
            "processor_class": "LlavaProcessor",
            "do_resize": True,
            "size": {"shortest_edge": shape.image},
            "resample": 3,
            "do_center_crop": True,
            "crop_size": {"height": shape.image, "width": shape.image},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": IMAGE_MEAN,
            "image_std": IMAGE_STD,
            "do_convert_rgb": True,
        },
    )
    write_json(
        folder / "processor_config.json",
        {
            "processor_class": "LlavaProcessor",
            "image_token": "<image>",
            "patch_size": PATCH,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
    )
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def draw_image(path: Path, generator: np.random.Generator) -> None:
    """A JPEG of 640 x 480 pixels, 60 to 100 kB as photographs of this size: soft colours, shapes and grain."""
    soft = generator.integers(0, 256, size=(6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(soft).resize((640, 480), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for left, top, width, height, *color in generator.integers(0, [600, 440, 200, 200, 256, 256, 256], size=(24, 7)).tolist():
        (draw.ellipse if width > height else draw.rectangle)((left, top, left + width + 8, top + height + 8), fill=tuple(color))
    grain = generator.normal(0, 7, size=(480, 640, 1))
    pixels = np.clip(np.asarray(image, dtype=np.float64) + grain, 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(path, quality=88)


def sentence(lexicon: list[str], length: int, generator: np.random.Generator) -> str:
    drawn = [lexicon[rank] for rank in generator.choice(len(lexicon), size=length, p=zipf(len(lexicon)))]
    return " ".join(drawn).capitalize()


def make_rows(variant: str, count: int, lexicon: list[str], seed: int) -> list[dict[str, Any]]:
    """`count` rows of question, answer and number of images."""
    generator = np.random.default_rng([seed, 1])
    rows = []
    for _ in range(count):
        kind = VARIANTS[MIXED[generator.integers(len(MIXED))] if variant == "mixed" else variant]
        length = int(np.clip(round(generator.lognormal(np.log(kind.median), kind.sigma)), 1, 600))
        images = int(generator.integers(kind.images[0], kind.images[1] + 1))
        question = sentence(lexicon, int(generator.integers(6, 24)), generator) + "?"
        rows.append({"question": question, "answer": sentence(lexicon, length, generator) + ".", "images": images})
    return rows


def write_rows(folder: Path, variant: str, count: int, size: str = "60m", seed: int = 0) -> None:
    """The same rows for every program, and their images in `images/`.

    `mmtune.json` (template llava), `sharegpt.json` with `dataset_info.json` (LLaMA-Factory), `swift.jsonl` (ms-swift),
    `trl.jsonl` (TRL). Image paths are relative to the folder.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng([seed, 2])
    ours, sharegpt, swift, trl = [], [], [], []
    drawn = 0
    for number, row in enumerate(make_rows(variant, count, vocabulary(SIZES[size].vocabulary, seed), seed)):
        images = [f"images/{drawn + index:05}.jpg" for index in range(row["images"])]
        for image in images:
            draw_image(folder / image, generator)
        drawn += len(images)
        question, answer = row["question"], row["answer"]
        marked = "<image>\n" * len(images) + question
        turns = [{"from": "human", "value": marked}, {"from": "gpt", "value": answer}]
        named = {"image": images[0] if len(images) == 1 else images} if images else {}
        ours.append({"id": f"{number:05}", **named, "conversations": turns})
        sharegpt.append({"conversations": turns, "images": images})
        swift.append(
            {
                "messages": [{"role": "user", "content": marked}, {"role": "assistant", "content": answer}],
                "images": images,
            }
        )
        blocks = [{"type": "image", "text": None}] * len(images) + [{"type": "text", "text": question}]
        trl.append(
            {
                "images": images,
                "messages": [
                    {"role": "user", "content": blocks},
                    {"role": "assistant", "content": [{"type": "text", "text": answer}]},
                ],
            }
        )
    write_json(folder / "mmtune.json", ours)
    write_json(folder / "sharegpt.json", sharegpt)
    columns = {"messages": "conversations", "images": "images"}
    write_json(
        folder / "dataset_info.json", {"peers": {"file_name": "sharegpt.json", "formatting": "sharegpt", "columns": columns}}
    )
    for name, rows in (("swift.jsonl", swift), ("trl.jsonl", trl)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where model_SIZE/ and rows_VARIANT_COUNT/ are written")
    parser.add_argument("--size", choices=SIZES, default="60m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--variant", choices=(*VARIANTS, "mixed"), default="single")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model, rows = arguments.folder / f"model_{arguments.size}", arguments.folder / f"rows_{arguments.variant}_{arguments.rows}"
    for path in (model, rows):
        shutil.rmtree(path, ignore_errors=True)
    write_model(model, arguments.size, arguments.seed, arguments.dtype)
    write_rows(rows, arguments.variant, arguments.rows, arguments.size, arguments.seed)
    print(model, rows)


if __name__ == "__main__":
    main()
