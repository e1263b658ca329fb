"""Key of the cached token counts of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata

from transformers import ProcessorMixin

from mmtune.data.encoding.token_counts import processor_settings
from mmtune.data.sources.row_cache import cache_key, file_signatures
from mmtune.recipe.recipe import Source

FORMAT = 3
"""Version of the counting and of the file format. It is part of the key, so that older files are not read."""


def plan_key(sources: Sequence[Source], processor: ProcessorMixin, supervise: str) -> str:
    """The key of a plan: 32 characters that depend on everything the counts depend on.

    These are the sources of the recipe, the content of their files and templates, the settings of the processor with its
    tokenizer and chat template, and the versions of the libraries. Media files are not included: the plan has a stamp of each.
    Rows on the hub are identified by the recipe only.

    Args:
        sources: the recipe's.
        processor: of the model, with its chat template.
        supervise: the recipe's `data.supervise`.
    """
    tokenizer = processor.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    inputs = {
        "format": FORMAT,
        "versions": [metadata.version(name) for name in ("transformers", "tokenizers", "pillow", "mmtune")],
        "sources": [source.model_dump(mode="json", exclude={"weight"}) for source in sources],
        "held_out_parts": [source.is_held_out for source in sources],
        "files": file_signatures(sources),
        "processor": [processor_settings(processor), processor.to_json_string()],
        "tokenizer": [backend.to_str() if backend else tokenizer.get_vocab(), tokenizer.special_tokens_map],
        "bos_eos": [getattr(tokenizer, name, None) for name in ("add_bos_token", "add_eos_token")],
        "chat_template": processor.chat_template,
        "supervise": supervise,
    }
    return cache_key(inputs)
