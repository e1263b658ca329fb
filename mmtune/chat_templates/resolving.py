"""Chat templates: ours by name, the reader's by path, and what a tokenizer and a model must hold for one to work."""

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
    "tiny": ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
}
"""What a shipped template writes and the tokenizer must hold as single tokens. The others need only `eos_token`."""

BY_MODEL_TYPE = {
    "llama": "vicuna_v1",
    "qwen2": "chatml",
    "qwen3": "chatml",
    "mistral": "mistral",
    "gemma": "gemma",
    "gemma3_text": "gemma",
}

WITHOUT_ROLES = ("plain", "paligemma")
"""Shipped templates that nothing in a tokenizer speaks for or against."""
PALIGEMMA_TOKEN = "<loc0000>"
"""In every PaliGemma tokenizer, whose processor adds it, and in no other."""

QUESTION: dict[str, Any] = {
    "role": "user",
    "content": [{"type": "image", "image": "image"}, {"type": "text", "text": "What is it?"}],
}
ANSWER: dict[str, Any] = {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}


def template_names() -> list[str]:
    """Names of the shipped chat templates."""
    return sorted(path.stem for path in TEMPLATES.glob("*.jinja"))


def resolve_chat_template(
    name: str | None, tokenizer: PreTrainedTokenizerBase, *, model_type: str | None = None, image_token: str = "<image>"
) -> str:
    """The text of a chat template that places images and lets the assistant's words be told from the rest.

    Args:
        name: a shipped template, or the path of a `.jinja` file. None: the tokenizer's own template if it does both (a text
            model's own seldom does), else the one of the model type's family.
        tokenizer: must hold the template's markers as single tokens.
        model_type: the text model's, for a default.
        image_token: what the template must write for an image.

    Raises:
        UserError: an unknown name, a template that cannot be read, that leaves images out or hides answers, or one
            whose markers the tokenizer does not hold.
    """
    if name is None:
        own = tokenizer.chat_template
        if isinstance(own, str) and not _fault(own, tokenizer, image_token):
            return own
        name = _default(tokenizer, model_type)
        if name is None:
            raise RecipeValueError(
                "model.chat_template",
                f"there is no default for model_type {model_type!r}, and its tokenizer's own template "
                + ("is missing" if not own else f"does not serve: {_fault(str(own), tokenizer, image_token)}")
                + f"; {_advice(None, tokenizer, image_token)}",
            )
    if name in template_names():
        template = _shipped(name)
        lacks = _lacks(name, tokenizer)
        if lacks:
            raise RecipeValueError("model.chat_template", f"{name} {lacks}; {_advice(None, tokenizer, image_token)}")
    elif name.endswith(".jinja"):
        if not Path(name).is_file():
            raise RecipeValueError("model.chat_template", f"there is no file {name}")
        template = Path(name).read_text(encoding="utf-8")
    else:
        near = nearest(name, template_names())
        raise RecipeValueError("model.chat_template", f"unknown name {name!r}{near}; or the path of a .jinja file")
    fault = _fault(template, tokenizer, image_token)
    if fault:
        raise RecipeValueError("model.chat_template", f"{name}: {fault}; {_advice(template, tokenizer, image_token)}")
    return template


def training_chat_template(processor: ProcessorMixin) -> str:
    """The chat template of a ready vision-language model, made to mark answers where it does not.

    A template without `{% generation %}` marks is exchanged for TRL's training template of the same text, when there is
    one; otherwise it stays, if its answers can be found in what it writes (see `mmtune.chat_templates.rendering`).

    Raises:
        UserError: no chat template, or one whose answers cannot be told from the rest.
    """
    own = _published(processor)
    tokenizer, image_token = processor.tokenizer, processor.image_token
    if own is None:
        raise UserError(f"it has no chat template; {_advice(None, tokenizer, image_token)}")
    if has_generation_tags(own) and not _fault(own, tokenizer, image_token):
        return own
    from trl.chat_template_utils import get_training_chat_template

    processor.chat_template = own
    try:
        marked = get_training_chat_template(_NotRendered(own))
    except ValueError:  # a template that TRL does not know
        marked = None
    fault = _fault(marked or own, tokenizer, image_token)
    if fault:
        raise UserError(f"its chat template does not serve: {fault}; {_advice(own, tokenizer, image_token)}")
    return marked or own


class _NotRendered:
    """A chat template that TRL recognizes by its text. TRL would also render it, without a bound, to see if it takes tools."""

    def __init__(self, template: str) -> None:
        self.chat_template = template

    def apply_chat_template(self, *_: Any, **__: Any) -> str:
        raise TemplateError("not rendered")


def _published(processor: ProcessorMixin) -> str | None:
    """The chat template that transformers would use: the processor's, or else the tokenizer's; of several by name the default.

    Raises:
        UserError: several, and none of them is the default.
    """
    for owner in (processor, processor.tokenizer):
        templates = owner.chat_template
        if isinstance(templates, dict) and templates:
            names = ", ".join(sorted(templates))
            if "default" not in templates:
                raise UserError(
                    f"it has the chat templates {names}, and none is called default; save one of them as a file and "
                    "set model.chat_template: FILE.jinja"
                )
            if len(templates) > 1:
                print(f"chat template: of its chat templates ({names}) the one called default is used, and released alone")
            return str(templates["default"])
        if templates:
            return str(templates)
    return None


def use_chat_template(model: PreTrainedModel, processor: ProcessorMixin, template: str) -> None:
    """Make a template the processor's and the tokenizer's, and the model stop where it ends a turn.

    A tokenizer that adds the beginning-of-sequence token itself is told not to when the template writes it: text that
    is rendered first and tokenized later would have two. Generation stops at the tokenizer's eos and at the end of
    turn.

    Raises:
        UserError: when the tokenizer goes on adding tokens around the rendered text.
    """
    set_chat_template(processor, template)
    tokenizer = processor.tokenizer
    config = model.generation_config
    assert config is not None  # every generative model has one
    config.eos_token_id = stop_token_ids(config, tokenizer, template)
    config.bos_token_id, config.pad_token_id = tokenizer.bos_token_id, tokenizer.pad_token_id


def set_chat_template(processor: ProcessorMixin, template: str) -> None:
    """The processor's and the tokenizer's half of `use_chat_template`, for where there is no model.

    Raises:
        UserError: as there.
    """
    processor.chat_template = processor.tokenizer.chat_template = template
    configure_special_tokens(processor.tokenizer, template)


def stop_token_ids(config: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase, template: str) -> list[int]:
    """Ids of the tokens that end an answer: the generation config's, the tokenizer's eos, and what the template writes."""
    eos = config.eos_token_id if config is not None else None
    wanted = [*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id, *end_of_turn_ids(tokenizer, template)]
    return list(dict.fromkeys(int(token) for token in wanted if token is not None))


def end_of_turn_ids(tokenizer: PreTrainedTokenizerBase, template: str) -> list[int]:
    """Ids of the special tokens that the template writes after an answer; empty for `plain`, which writes a newline."""
    text, [(start, stop)] = render_conversation([{**QUESTION, "content": QUESTION["content"][1:]}, ANSWER], template, tokenizer)
    word = ANSWER["content"][0]["text"]
    after = text[text.index(word, start) + len(word) : stop]
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return [token for token in tokenizer.encode(after, add_special_tokens=False) if token in special]


def _shipped(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def _lacks(name: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What a shipped template needs and the tokenizer has not, or None."""
    vocabulary = tokenizer.get_vocab()
    missing = [marker for marker in MARKERS.get(name, ()) if marker not in vocabulary]
    if missing:
        return f"writes {', '.join(missing)}, and the tokenizer has no such token"
    if name in ("vicuna_v1", "mistral") and tokenizer.eos_token is None:
        return "ends a turn with eos_token, and the tokenizer has none"
    return None


def _advice(template: str | None, tokenizer: PreTrainedTokenizerBase, image_token: str) -> str:
    """Which line of the recipe puts a template right: a shipped one that writes the same turns, or else those that would work.

    Args:
        template: the one that does not serve; None where there is none.
    """
    if PALIGEMMA_TOKEN in tokenizer.get_vocab():
        return "set model.chat_template: paligemma"
    usable = {
        name: text
        for name in template_names()
        if name not in WITHOUT_ROLES
        and not _lacks(name, tokenizer)
        and not _fault(text := _shipped(name), tokenizer, image_token)
    }
    for name, text in usable.items():
        (end,) = tokenizer.convert_ids_to_tokens(end_of_turn_ids(tokenizer, text))
        if template and _turns(template, tokenizer, end) == _turns(text, tokenizer, end):
            return f"set model.chat_template: {name}, which writes the same turns and ends every answer"
    writes = f"a file that writes {image_token} for an image, the answers, and a token after each that ends it"
    if usable:
        return f"set model.chat_template to {' or '.join(usable)} if the model knows one of these, or to a .jinja file ({writes})"
    return f"set model.chat_template: FILE.jinja, {writes}; none that ships works with this tokenizer"


def _turns(template: str, tokenizer: PreTrainedTokenizerBase, end: str) -> tuple[str, ...] | None:
    """What a template writes between an answer and the next question, and between that and its answer, but for `end` and for
    white space; None where it cannot be told."""
    words = ("zebra", "violin", "glacier", "walnut")
    roles = ("user", "assistant", "user", "assistant")
    messages = [{"role": role, "content": [{"type": "text", "text": word}]} for role, word in zip(roles, words, strict=True)]
    try:
        text = render_text(messages, template, tokenizer)
    except ChatTemplateError:
        return None
    pieces = re.fullmatch(f".*{words[1]}(.*){words[2]}(.*){words[3]}.*", text, re.DOTALL)
    return tuple(" ".join(piece.replace(end, " ").split()) for piece in pieces.groups()) if pieces else None


def _default(tokenizer: PreTrainedTokenizerBase, model_type: str | None) -> str | None:
    name = BY_MODEL_TYPE.get(model_type or "")
    if model_type == "llama":  # one architecture, many dialects: the tokenizer says which
        vocabulary = tokenizer.get_vocab()
        name = next((dialect for dialect in ("llama3", "chatml") if all(m in vocabulary for m in MARKERS[dialect])), name)
    return name


def _fault(template: str, tokenizer: PreTrainedTokenizerBase, image_token: str) -> str | None:
    """Why a template cannot be used here, or None."""
    try:
        prompt = render_prompt([QUESTION], template, tokenizer)
        if prompt.count(image_token) != 1:
            return f"it writes {image_token} {prompt.count(image_token)} times for one image"
        render_conversation([QUESTION, ANSWER], template, tokenizer)
    except ChatTemplateError as error:
        return f"on a question with an image, {error}"
    return None


def configure_special_tokens(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """Tell a tokenizer not to add a token around a rendered conversation that the template writes, and none behind it.

    Raises:
        UserError: when it goes on adding tokens.
    """
    text = render_text([QUESTION, ANSWER], template, tokenizer)
    bare = tokenizer(text, add_special_tokens=False)["input_ids"]
    writes_bos = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    allowed = [bare] if writes_bos or tokenizer.bos_token_id is None else [bare, [tokenizer.bos_token_id, *bare]]
    if tokenizer(text)["input_ids"] not in allowed:
        if writes_bos:
            tokenizer.add_bos_token = False
        tokenizer.add_eos_token = False
    found = tokenizer(text)["input_ids"]
    if found not in allowed:
        raise UserError(
            f"tokenizer: it adds special tokens around a rendered conversation that already has its own: {len(found)} tokens "
            f"where {len(bare)} are right, beginning {tokenizer.decode(found[:3])!r}, ending {tokenizer.decode(found[-3:])!r}"
        )
