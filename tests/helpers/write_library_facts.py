"""Write `library_facts.json` from the installed libraries: `python tests/helpers/write_library_facts.py`."""

from __future__ import annotations

import json
from importlib import metadata

from mmtune.recipe.pass_through.library_facts import FACTS, STORED
from mmtune.utils.torchvision_support import prepare_torchvision

if __name__ == "__main__":
    prepare_torchvision()
    facts = {}
    for name, (library, read) in FACTS.items():
        facts[name] = {"library": library, "version": metadata.version(library), "value": read()}
    STORED.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
