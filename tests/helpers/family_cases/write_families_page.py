"""Write `docs/families.md`: `python tests/helpers/family_cases/write_families_page.py`."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs" / "families.md"
HEAD = """# Model families

Every image-text model type of transformers {version}, and whether mmtune fine-tunes it: {works} of {total} types work.
This page is written by `tests/helpers/family_cases/write_families_page.py`; a test fails when it differs.

"Works" means that a tiny checkpoint with the type's real classes passes `tests/families/test_families.py`:

- `recipe check`, `data check`, `plan`, training, `merge` with parity, and `chat`;
- loss and gradients of a LoRA step equal those of plain transformers and PEFT;
- the supervised tokens decode to the answers and their end-of-turn tokens;
- the merged model gives the same answer in plain transformers.

No weights of the releases were loaded in these tests.

Components, image tokens and positions are found in the structure of model and processor. A type with an entry in
`mmtune/families/family_table.py` (last column) differs from most; [CONTRIBUTING.md](../CONTRIBUTING.md) says how to add one.
Where the packing column does not say no, packing is proven at the start of a run on the model's own logits. A type that is not
in this table, or is marked "not tested", is handled by structure alone: what is ambiguous is an error before weights load, and
`merge` compares the result with the run.

| `model_type` | class | | `model.chat_template` | packing | entry |
|---|---|---|---|---|---|
"""


def page() -> str:
    """The text of the page."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    from family_cases import CASES
    from mmtune.families.family_table import NOT_SUPPORTED, OUT_OF_SCOPE, family_of

    lines, works = [], 0
    for model_type, kind in sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items()):
        case, family = CASES.get(model_type), family_of(model_type)
        if case is None:
            out_of_scope = OUT_OF_SCOPE.get(model_type)
            reason = f"out of scope: {out_of_scope}" if out_of_scope else NOT_SUPPORTED.get(model_type, "not tested")
            lines.append(f"| `{model_type}` | {kind} | {reason} | | | |")
            continue
        works += 1
        template = f"`{case.base.required_template}`" if case.base.required_template else "its own"
        template = "a `.jinja` file that you write" if case.template_file else template
        packing = "no" if family.unpackable else ""
        entry = f"`{family.name}`" if family.model_types else ""
        lines.append(f"| `{model_type}` | {kind} | works | {template} | {packing} | {entry} |")
    head = HEAD.format(version=transformers.__version__, works=works, total=len(lines))
    return head + "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests" / "helpers"))
    from mmtune.utils.torchvision_support import prepare_torchvision

    prepare_torchvision()
    PAGE.write_text(page(), encoding="utf-8")
