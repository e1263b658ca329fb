"""Chat template selection: shipped templates by name, others by path, and checks against the tokenizer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from mmtune.chat_templates.rendering import (
    ChatTemplateError,
    has_generation_tags,
    render_conversation,
    render_prompt,
    render_text,
)
from mmtune.utils.errors import RecipeValueError, UserError, nearest

TEMPLATES = Path(__file__).parent

MARKERS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "glm": ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"),
    "tiny": ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
}
"""Control tokens of a shipped template that the tokenizer must have. Other templates need only `eos_token`."""

BY_MODEL_TYPE = {
    "llama": "vicuna_v1",
    "qwen2": "chatml",
    "qwen3": "chatml",
    "qwen3_moe": "chatml",
    "mistral": "mistral",
    "mixtral": "mistral",
    "gemma": "gemma",
    "gemma3_text": "gemma",
}

WITHOUT_ROLES = ("plain", "paligemma", "instruction", "question_answer")
"""Shipped templates without role tokens, so that their fit cannot be inferred from a tokenizer."""
PALIGEMMA_TOKEN = "<loc0000>"
"""A token that only PaliGemma tokenizers have, because their processor adds it."""

QUESTION: dict[str, Any] = {
    "role": "user",
    "content": [{"type": "image", "image": "image"}, {"type": "text", "text": "What is it?"}],
}
ANSWER: dict[str, Any] = {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}


def template_names() -> list[str]:
    """Names of the shipped chat templates."""
    return sorted(path.stem for path in TEMPLATES.glob("*.jinja"))


def resolve_chat_template(
    name: str | None, tokenizer: PreTrainedTokenizerBase, *, model_type: str | None = None, image_token: str | None = "<image>"
) -> str:
    """Select a chat template that writes image placeholders and has exact answer spans.

    Args:
        name: a shipped template, or the path of a `.jinja` file. None selects the tokenizer's own template if it is usable
            (those of text models seldom are), or else the default for the model type.
        tokenizer: the tokenizer, which must have the template's control tokens as single tokens.
        model_type: the text model's type, for the default.
        image_token: the image placeholder that the template must write; None if it must write nothing for an image, because the
            processor puts all images before the text.

    Returns:
        The source text of the template.

    Raises:
        UserError: an unknown name, an unreadable template, one without images or exact answer spans, or one with control tokens
            that the tokenizer does not have.
    """
    if name is None:
        tokenizer_template = tokenizer.chat_template
        if isinstance(tokenizer_template, str) and not _incompatibility(tokenizer_template, tokenizer, image_token):
            return tokenizer_template
        name = _default_name(tokenizer, model_type)
        if name is None:
            problem = _incompatibility(str(tokenizer_template), tokenizer, image_token) if tokenizer_template else None
            raise RecipeValueError(
                "model.chat_template",
                f"there is no default for model_type {model_type!r}, and the tokenizer's own template "
                + (f"cannot be used: {problem}" if tokenizer_template else "is missing")
                + f"; {_advice(None, tokenizer, image_token)}",
            )
    if name in template_names():
        template = _read_shipped(name)
        missing_tokens = _missing_tokens(name, tokenizer)
        if missing_tokens:
            raise RecipeValueError("model.chat_template", f"{name} {missing_tokens}; {_advice(None, tokenizer, image_token)}")
    elif name.endswith(".jinja"):
        if not Path(name).is_file():
            raise RecipeValueError("model.chat_template", f"no such file: {name}")
        template = Path(name).read_text(encoding="utf-8")
    else:
        hint = nearest(name, template_names())
        raise RecipeValueError("model.chat_template", f"unknown name {name!r}{hint}; or the path of a .jinja file")
    problem = _incompatibility(template, tokenizer, image_token)
    if problem:
        raise RecipeValueError("model.chat_template", f"{name}: {problem}; {_advice(template, tokenizer, image_token)}")
    return template


def training_chat_template(processor: ProcessorMixin, image_token: str | None) -> str:
    """The chat template of a ready vision-language model, with `{% generation %}` tags if possible.

    A template without these tags is replaced by TRL's training template that writes the same text, if there is one. Otherwise it
    is used unchanged if the spans of its answers can be found exactly (see `mmtune.chat_templates.rendering`).

    Args:
        processor: the model's processor.
        image_token: as in `resolve_chat_template`.

    Raises:
        UserError: the model has no chat template, or one without exact answer spans.
    """
    published = _published_template(processor)
    tokenizer = processor.tokenizer
    if published is None:
        raise UserError(f"the model has no chat template; {_advice(None, tokenizer, image_token)}")
    if has_generation_tags(published) and not _incompatibility(published, tokenizer, image_token):
        return published
    from trl.chat_template_utils import get_training_chat_template

    processor.chat_template = published
    try:
        tagged = get_training_chat_template(_NotRendered(published))
    except ValueError:  # TRL does not know the template
        tagged = None
    problem = _incompatibility(tagged or published, tokenizer, image_token)
    if problem:
        raise UserError(f"the model's chat template cannot be used: {problem}; {_advice(published, tokenizer, image_token)}")
    return tagged or published


class _NotRendered:
    """A chat template for TRL, which identifies it by its text. TRL would also render it, without limits, to test for tools."""

    def __init__(self, template: str) -> None:
        self.chat_template = template

    def apply_chat_template(self, *_: Any, **__: Any) -> str:
        raise TemplateError("not rendered")


def _published_template(processor: ProcessorMixin) -> str | None:
    """The chat template that transformers would use: the processor's, or else the tokenizer's; of several, the default.

    Raises:
        UserError: there are several templates, and no default.
    """
    for owner in (processor, processor.tokenizer):
        templates = owner.chat_template
        if isinstance(templates, dict) and templates:
            names = ", ".join(sorted(templates))
            if "default" not in templates:
                raise UserError(
                    f"expected a chat template named default, got {names}; save one of them to a file and set "
                    "model.chat_template: FILE.jinja"
                )
            if len(templates) > 1:
                print(f"chat template: using default, of {names}; a release has only this one")
            return str(templates["default"])
        if templates:
            return str(templates)
    return None


def use_chat_template(model: PreTrainedModel, processor: ProcessorMixin, template: str) -> None:
    """Set the chat template of a processor and its tokenizer, and the stop tokens of the model.

    If the template writes the bos token, the tokenizer is configured not to add it, because text that is rendered and then
    tokenized would have two. Generation stops at the tokenizer's eos token and at the end-of-turn token.

    Raises:
        UserError: the tokenizer still adds special tokens to the rendered text.
    """
    set_chat_template(processor, template, getattr(model.config, "is_encoder_decoder", False))
    tokenizer = processor.tokenizer
    config = model.generation_config
    assert config is not None  # every generative model has one
    config.eos_token_id = stop_token_ids(config, tokenizer, template)
    config.bos_token_id, config.pad_token_id = tokenizer.bos_token_id, tokenizer.pad_token_id


def set_chat_template(processor: ProcessorMixin, template: str, encoder_decoder: bool = False) -> None:
    """Set the chat template of a processor and its tokenizer, without a model (see `use_chat_template`).

    Args:
        encoder_decoder: whether the tokenizer encodes a question and its answer alone, each with special tokens.

    Raises:
        UserError: the tokenizer still adds special tokens to the rendered text.
    """
    processor.chat_template = processor.tokenizer.chat_template = template
    if not encoder_decoder:
        configure_special_tokens(processor.tokenizer, template)


def stop_token_ids(config: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase, template: str) -> list[int]:
    """Ids of the stop tokens: the generation config's, the tokenizer's eos token, and the template's end-of-turn tokens."""
    eos = config.eos_token_id if config is not None else None
    token_ids = [*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id, *end_of_turn_ids(tokenizer, template)]
    return list(dict.fromkeys(int(token) for token in token_ids if token is not None))


def end_of_turn_ids(tokenizer: PreTrainedTokenizerBase, template: str) -> list[int]:
    """Ids of the special tokens that the template writes after an answer; empty for `plain`, which writes only a newline."""
    text, [(start, stop)] = render_conversation([{**QUESTION, "content": QUESTION["content"][1:]}, ANSWER], template, tokenizer)
    word = ANSWER["content"][0]["text"]
    after = text[text.index(word, start) + len(word) : stop]
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return [token for token in tokenizer.encode(after, add_special_tokens=False) if token in special]


def _read_shipped(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def _missing_tokens(name: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The control tokens that a shipped template needs and the tokenizer does not have, as a message; None if it has them all."""
    vocabulary = tokenizer.get_vocab()
    missing = [marker for marker in MARKERS.get(name, ()) if marker not in vocabulary]
    if missing:
        return f"writes {', '.join(missing)}, which the tokenizer does not have"
    if name in ("vicuna_v1", "mistral", "instruction", "question_answer") and tokenizer.eos_token is None:
        return "ends a turn with eos_token, which the tokenizer does not have"
    return None


def _advice(template: str | None, tokenizer: PreTrainedTokenizerBase, image_token: str | None) -> str:
    """How to fix the recipe: a shipped template that writes the same turns, or else all shipped templates that would work.

    Args:
        template: the template that cannot be used; None if there is none.
        tokenizer: the tokenizer.
        image_token: as in `resolve_chat_template`.
    """
    if PALIGEMMA_TOKEN in tokenizer.get_vocab():
        return "set model.chat_template: paligemma"
    usable = {
        name: text
        for name in template_names()
        if (name not in WITHOUT_ROLES or image_token is None)
        and not _missing_tokens(name, tokenizer)
        and not _incompatibility(text := _read_shipped(name), tokenizer, image_token)
    }
    for name, text in usable.items():
        (end,) = tokenizer.convert_ids_to_tokens(end_of_turn_ids(tokenizer, text))
        if template and _turn_separators(template, tokenizer, end) == _turn_separators(text, tokenizer, end):
            return f"set model.chat_template: {name}, which writes the same turns and an end-of-turn token after every answer"
    needs = f"which writes {image_token or 'nothing'} for an image, the answers, and an end-of-turn token after each answer"
    if usable:
        names = " or ".join(usable)
        return f"set model.chat_template to {names} if the model was trained with it, or to a .jinja file ({needs})"
    return f"set model.chat_template: FILE.jinja, {needs}; no shipped template works with this tokenizer"


def _turn_separators(template: str, tokenizer: PreTrainedTokenizerBase, end: str) -> tuple[str, ...] | None:
    """The text between an answer and the next question, and between a question and its answer, without the token `end` and with
    white space normalized; None if the template cannot be rendered or changes the words."""
    words = ("zebra", "violin", "glacier", "walnut")
    roles = ("user", "assistant", "user", "assistant")
    messages = [{"role": role, "content": [{"type": "text", "text": word}]} for role, word in zip(roles, words, strict=True)]
    try:
        text = render_text(messages, template, tokenizer)
    except ChatTemplateError:
        return None
    pieces = re.fullmatch(f".*{words[1]}(.*){words[2]}(.*){words[3]}.*", text, re.DOTALL)
    return tuple(" ".join(piece.replace(end, " ").split()) for piece in pieces.groups()) if pieces else None


def _default_name(tokenizer: PreTrainedTokenizerBase, model_type: str | None) -> str | None:
    name = BY_MODEL_TYPE.get(model_type or "")
    if model_type == "llama":  # one architecture with several chat formats: the tokenizer's tokens decide
        vocabulary = tokenizer.get_vocab()
        name = next((chat_format for chat_format in ("llama3", "chatml") if vocabulary.keys() >= set(MARKERS[chat_format])), name)
    return name


def _incompatibility(template: str, tokenizer: PreTrainedTokenizerBase, image_token: str | None) -> str | None:
    """Why a template cannot be used with this tokenizer; None if it can."""
    try:
        prompt = render_prompt([QUESTION], template, tokenizer)
        if image_token is None:
            if prompt != render_prompt([{**QUESTION, "content": QUESTION["content"][1:]}], template, tokenizer):
                return "expected nothing for an image, because the processor puts all images before the text"
        elif prompt.count(image_token) != 1:
            return f"expected one {image_token} for an image, got {prompt.count(image_token)}"
        render_conversation([QUESTION, ANSWER], template, tokenizer)
    except ChatTemplateError as error:
        return f"on a question with an image, {error}"
    return None


def configure_special_tokens(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """Configure a tokenizer not to add special tokens to a rendered conversation that already has them.

    Raises:
        UserError: the tokenizer still adds special tokens.
    """
    text = render_text([QUESTION, ANSWER], template, tokenizer)
    bare = tokenizer(text, add_special_tokens=False)["input_ids"]
    writes_bos = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    allowed = [bare] if writes_bos or tokenizer.bos_token_id is None else [bare, [tokenizer.bos_token_id, *bare]]
    if tokenizer(text)["input_ids"] not in allowed:
        if writes_bos:
            tokenizer.add_bos_token = False
        tokenizer.add_eos_token = False
    input_ids = tokenizer(text)["input_ids"]
    if input_ids not in allowed:
        raise UserError(
            f"tokenizer: it adds special tokens to a rendered conversation that already has them: expected {len(bare)} "
            f"tokens, got {len(input_ids)}, from {tokenizer.decode(input_ids[:3])!r} to {tokenizer.decode(input_ids[-3:])!r}"
        )
