"""Chat templates: ours by name, the reader's by path, and what a tokenizer and a model must hold for one to work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from mmtune.chat_rendering import NotExact, has_marks, render_conversation, render_prompt
from mmtune.errors import UserError, nearest

TEMPLATES = Path(__file__).parent / "chat_templates"

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
            raise UserError(
                f"chat_template: there is no default for model_type {model_type!r}, and its tokenizer's own template "
                + ("is missing" if not own else f"does not serve: {_fault(str(own), tokenizer, image_token)}")
                + f"; name one ({', '.join(template_names())}) or give the path of a .jinja file"
            )
    if name in template_names():
        template = (TEMPLATES / f"{name}.jinja").read_text()
        vocabulary = tokenizer.get_vocab()
        missing = [marker for marker in MARKERS.get(name, ()) if marker not in vocabulary]
        if missing:
            raise UserError(
                f"chat_template: {name} writes {', '.join(missing)}, and the tokenizer has no such token; take another"
            )
        if name in ("vicuna_v1", "mistral") and tokenizer.eos_token is None:
            raise UserError(f"chat_template: {name} ends a turn with eos_token, and the tokenizer has none")
    elif name.endswith(".jinja"):
        if not Path(name).is_file():
            raise UserError(f"chat_template: there is no file {name}")
        template = Path(name).read_text()
    else:
        raise UserError(f"chat_template: unknown name {name!r}{nearest(name, template_names())}; or the path of a .jinja file")
    fault = _fault(template, tokenizer, image_token)
    if fault:
        raise UserError(f"chat_template {name}: {fault}")
    return template


def own_chat_template(processor: ProcessorMixin) -> str:
    """The chat template of a ready vision-language model, made to mark answers where it does not.

    A template without `{% generation %}` marks is exchanged for TRL's training template of the same text, when there is
    one; otherwise it stays, if its answers can be found in what it writes (see `mmtune.chat_rendering`).

    Raises:
        UserError: no chat template, or one whose answers cannot be told from the rest.
    """
    own = processor.chat_template
    names = f"name one with model.chat_template ({', '.join(template_names())}) or give the path of a .jinja file"
    if not isinstance(own, str) or not own:
        raise UserError(f"model.base: its processor has no chat template; {names}")
    if has_marks(own) and not _fault(own, processor.tokenizer, processor.image_token):
        return own
    from trl.chat_template_utils import get_training_chat_template

    try:
        marked = get_training_chat_template(processor)
    except ValueError:  # TRL's word for a template it does not know
        marked = None
    fault = _fault(marked or own, processor.tokenizer, processor.image_token)
    if fault:
        raise UserError(f"model.base: its chat template cannot give exact labels: {fault}; {names}")
    return marked or own


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
    eos = [] if config.eos_token_id is None else config.eos_token_id
    wanted = [*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id, *end_of_turn_ids(tokenizer, template)]
    config.eos_token_id = list(dict.fromkeys(int(token) for token in wanted if token is not None))
    config.bos_token_id, config.pad_token_id = tokenizer.bos_token_id, tokenizer.pad_token_id


def set_chat_template(processor: ProcessorMixin, template: str) -> None:
    """The processor's and the tokenizer's half of `use_chat_template`, for where there is no model.

    Raises:
        UserError: as there.
    """
    processor.chat_template = processor.tokenizer.chat_template = template
    _settle_special_tokens(processor.tokenizer, template)


def end_of_turn_ids(tokenizer: PreTrainedTokenizerBase, template: str) -> list[int]:
    """Ids of the special tokens that the template writes after an answer; empty for `plain`, which writes a newline."""
    text, [(start, stop)] = render_conversation([{**QUESTION, "content": QUESTION["content"][1:]}, ANSWER], template, tokenizer)
    word = ANSWER["content"][0]["text"]
    after = text[text.index(word, start) + len(word) : stop]
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return [token for token in tokenizer.encode(after, add_special_tokens=False) if token in special]


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
    except NotExact as error:
        return f"labels would not be exact on a question with an image: {error}"
    except TypeError as error:  # a text-only template adds a list to a string
        return f"it fails on a question with an image: {error}"
    return None


def _settle_special_tokens(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    text = str(tokenizer.apply_chat_template([QUESTION, ANSWER], chat_template=template, tokenize=False))
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
