"""A tokenizer of single characters, as sentencepiece's `tokenizer.model` and as transformers' tokenizer of the same tokens.

llama.cpp's converter takes byte-level tokenizers that it knows, so none of a tiny model, but any of sentencepiece.
"""

from __future__ import annotations

import string
import struct
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
"""Types of pieces (sentencepiece_model.proto)."""
SPACE = "\u2581"


def character_tokenizer(specials: list[str], *, prefix_space: bool, **settings: Any) -> PreTrainedTokenizerFast:
    """The tokenizer of transformers.

    Args:
        specials: the special tokens, without `<unk>`.
        prefix_space: whether a space is put before a text, as sentencepiece does by default.
        settings: of the tokenizer.
    """
    pieces = [piece for piece, _ in _pieces(specials)]
    backend = Tokenizer(
        BPE({piece: number for number, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.add_special_tokens(specials)
    backend.post_processor = processors.ByteLevel(trim_offsets=False)  # says to the converter that no bos is added
    spaces = [normalizers.Replace(" ", SPACE)]
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), *spaces] if prefix_space else spaces)
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", clean_up_tokenization_spaces=False, **settings)


def write_sentencepiece(specials: list[str], out: Path) -> None:
    """Write the same tokens as `tokenizer.model`."""
    pieces = b"".join(
        _field(1, _field(1, piece.encode()) + struct.pack("<Bf", 0x15, -float(number)) + _number(3, kind))
        for number, (piece, kind) in enumerate(_pieces(specials))
    )
    trainer = _number(3, 2) + _number(4, len(_pieces(specials))) + _number(35, 1)  # BPE, the vocabulary's size, bytes
    out.write_bytes(pieces + _field(2, trainer))


def _pieces(specials: list[str]) -> list[tuple[str, int]]:
    characters = [SPACE, "\n", *string.ascii_letters, *string.digits, *string.punctuation]
    return [
        ("<unk>", UNKNOWN),
        ("<s>", CONTROL),  # llama.cpp warms up with this id, and fails at an embedding of zeros, as that of a padding token
        ("</s>", CONTROL),
        *((token, CONTROL) for token in specials),
        *((f"<0x{byte:02X}>", BYTE) for byte in range(256)),
        *((character, NORMAL) for character in characters),
    ]


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])
