"""The vocabulary of code, tests and docs: identifiers and phrases that were replaced by the field's terms.

Each pattern has what to write instead. A literal space in a pattern also matches a line break, in comments too.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("mmtune", "tests", "docs", "benchmarks", "recipes", "data_templates")
SUFFIXES = {".py", ".md", ".yaml", ".jinja", ".css"}

IDENTIFIERS: Mapping[str, str] = {
    r"\bWorld\b": "DistributedContext",
    r"\bALONE\b": "SINGLE_PROCESS",
    r"\bjoin_world\b": "init_distributed",
    r"\bfrom_first\b": "broadcast_object",
    r"\bis_first\b|\.first\(": "is_main_process",
    r"\brunnable\b": "gathered_forward",
    r"\bto_save\b": "full_state_dict",
    r"\bframes\(\)": "meta_init()",
    r"\bas_trained\b": "training_autocast",
    r"\bin_parts\b": "is_sharded",
    r"\bgo_on\b": "restore_training_state",
    r"\bcut_back\b": "truncate_to_step",
    r"\bkeep_checkpoint\b": "finalize_checkpoint",
    r"\bFrozenInputsStayFrozen\b": "DisableInputRequireGrads",
    r"\bMoveRanks\b": "MethodStep",
    r"\b(save|load)_live\b": "save_adapter_state, load_adapter_state",
    r"\bsettle_(base|console|fsdp|worker|quantized|special_tokens)\b": "configure_* or prepare_*; materialize_base",
    r"\bDoctor\b": "Validator",
    r"\bFindings?\b": "Issue",
    r"\bPlaces\b": "TokenSpans",
    r"\bObserved\b": "ModelOutputs",
    r"\bforetell\w*": "predict",
    r"\bUnusable\b": "DataIssueError",
    r"\bNotExact\b": "ChatTemplateError",
    r"\bStopRun\b": "StopRunError",
    r"\bin_processes\(": "map_rows",
    r"\b(has_marks|MARK_START|MARK_END|tokenize_marked|unmark)\b": "has_generation_tags, escape_control_tokens, ESCAPE_START",
    r"\b(own_chat_template|as_shown|sizes_of)\b": "training_chat_template, to_template_messages, image_sizes",
    r"\b(shrink_to_fit|media_root_of|named_media)\b": "resize_images, default_media_root, media_values",
    r"\b(JoinedRows|LeftOutRows|ClosedSet|Prompting|AS_THEY_ARE)\b": "ConcatenatedRows, ClosedAnswers, PromptSettings",
    r"\b(use_hub_key_names|check_whole|refused_pickles|brings_code)\b": "set_hub_key_mapping, check_weights_loaded, ...",
    r"\b(find_trained|trained_part|removal_named|located_base_of|base_of_adapter)\b": "the names in trained_weights.py",
    r"\b(read_tower|locate_part|projector_parts|prove_packing)\b": "read_vision_tower, locate_component, verify_packing",
    r"\b(CountedMemory|forget_peak|fullest_moment)\b": "MemoryTracker, reset_peak, peak_phase",
    r"\b(bound_patterns|open_processor|NEVER_PACKED|ANSWER_TOKENS|carry_over)\b": "expand_patterns, UNPACKABLE, append_tensors",
    r"\b(fold_weighted|weights_of_run|adapter_of|_enforce_\w+|_Job)\b": "merge_weighted, locate_run_weights, ...",
    r"\bmerge_(fold|carried)\w*|\bcarried_tensors\b": "merge_unrounded_difference, merge_copied_tensors, copied_tensors",
    r"\b(image_at|make_part|talker|shelf)\b": "resolve_image, write_split, a fixture's content",
    r"\b(BorrowedSettings|_TRAIN_OWNED|_TRAIN_GONE|_arrange)\b": "PassThroughArguments, _TRAIN_MANAGED, _TRAIN_RENAMED",
    r"\b(about_key|has_key|open_as_umask_says|list_again)\b": "errors_at_key, apply_umask, refresh_entry",
    r"\b(linked_directory|check_links_stay|becomes_seen)\b": "resolve_link, check_links, wait_until_visible",
    r"\b(escapes_output|ends_on_signals|takes_any_character)\b": "escape_output, exit_on_signals, supports_unicode",
    r"\b(layouts_for|print_layouts|as_time|base_is_here)\b": "memory_by_strategy, format_duration, is_base_local",
    r"\b(SEEN_WITHIN_S|ECHO_S|PATIENCE_S)\b": "VISIBLE_TIMEOUT_S, REPEAT_S, TIMEOUT_S",
    r"\bmmtune[/.]model\b": "mmtune.models",
    r"\bmmtune[/.](world|recipe_\w+|cli_\w+|chat_rendering)\b": "the module's present path (docs/architecture.md)",
}
"""Old names of functions, classes and modules, and the present ones."""

PHRASES: Mapping[str, str] = {
    r"\b(to|could|can|cannot|may) be had\b": "available, not available",
    r"\b(whereof|thereof|therein|thereby|wherein|herein|whereby)\b": "of it, in it, by it: a sentence of its own",
    r"\bis no (role|JSON value|range)\b": "unknown role; is not a JSON value",
    r"\bmeans nothing beside\b": "cannot be used with",
    r"\bone of those that ship\b": "a shipped one",
    r"\bstand side by side\b": "are adjacent",
    r"\btext cannot be made of\b": "expected text or a number, got",
    r"\banew\b": "again",
    r"\blest\b|\bought to\b": "so that ... not; should",
    r"\bin vain\b": "without success",
    r"\bbe it\b|\bwere it\b": "if it is",
    r"\bfor want of\b|\bfor the sake of\b": "without; for",
    r"\bhangs? on\b": "depends on",
    r"\bdear to\b": "expensive",
    r"\bmend(s|ed|ing)?\b": "fix, correct",
    r"\bforetold\b": "predicted",
    r"\bcommonest answer\b": "majority-class baseline",
    r"\b(what|where it) trains\b": "trainable parameters, adapted modules",
    r"\bstand-?ins?\b": "dummy sample, placeholder, tiny model",
    r"\bdoctor\b": "validation",
    r"\bunscored\b": "dummy",
    r"\bborrowed\b": "pass-through",
    r"\b(foldable|unfolded)\b": "mergeable, unmerged",
    r"\b(go|goes|going) on\b": "continue, resume",
    r"\b(is|are|was|were|be) told\b": "gets; is an error; is reported",
    r"\b(is|are) to be\b": "must be",
    r"\bset right\b": "completed, corrected",
    r"\blean(s|t)? on\b": "use",
    r"\bcomes? to be\b": "is",
    r"\bheld? (it )?against\b": "compared with",
    r"\b(is|are) asked for\b": "is requested",
    r"\bwhat is left\b": "the rest",
    r"\bso many\b": "this many, too many",
    r"\bat hand\b": "available",
    r"\bwherever\b": "if, where",
    r"\bneed not\b": "does not have to",
    r"\bthe first process\b": "the main process",
    r"\b(the|one) road\b": "the path, the job",
    r"\bfullest moment\b": "peak",
    r"\bfold(s|ed|ing)? in(to)?\b|\bfolded model\b": "merge, merged model",
    r"\bnot a whole\b": "its weights do not match; missing tensors",
    r"\bcarried over\b": "copied",
    r"\bloaded back from disk\b": "reloaded from disk",
    r"not a recipe's to\b": "not supported in a recipe",
    r"\bhas not been proven\b": "is not supported",
    r"\bonly means something\b": "not supported with; needs",
}
"""Wording that a reader has to translate, whatever its case, and plain English."""


VARIABLES = {"told", "said", "made", "found", "given", "kept", "mine", "brought", "came"}
"""Names of variables and parameters that say when a value came and not what it is."""


def checked_files() -> list[Path]:
    """Every text file that the vocabulary holds for, but this one."""
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*")) if path.suffix in SUFFIXES]
    return [
        path for path in [*files, *sorted(ROOT.glob("README*.md")), ROOT / "CONTRIBUTING.md"] if path != Path(__file__).resolve()
    ]


def _literal(pattern: str) -> str:
    """The longest word that every match of a pattern contains, in lower case; empty if there is none."""
    fixed = re.sub(r"\([^()]*\)\??|\[[^]]*\]|\\\w[*+]?|.\?", "-", pattern)
    return "" if "|" in fixed else max(re.findall(r"[a-z_]+", fixed.lower()), key=len, default="")


EXPRESSIONS = [
    (_literal(pattern), re.compile(pattern.replace(" ", r"[\s#]+"), flags), instead)
    for words, flags in ((IDENTIFIERS, 0), (PHRASES, re.IGNORECASE))
    for pattern, instead in words.items()
]


def old_words(text: str) -> Iterator[tuple[int, str, str]]:
    """Line, words and replacement of each old identifier and phrase."""
    lower = text.lower()
    for literal, expression, instead in EXPRESSIONS:
        if literal in lower:  # much faster than the expression
            for match in expression.finditer(text):
                yield text.count("\n", 0, match.start()) + 1, " ".join(match[0].split()), instead


def word_issues(path: str, text: str) -> list[str]:
    """`path:line: 'words': write ...` for each old identifier and phrase in a file's path and text."""
    issues = [f"{path}: {words!r}: write {instead}" for _, words, instead in old_words(path)]
    return issues + [f"{path}:{line}: {words!r}: write {instead}" for line, words, instead in old_words(text)]


def variable_issues(path: str, source: str) -> list[str]:
    """`path:line: 'name': ...` for each variable and parameter of a name in `VARIABLES`."""
    if not any(name in source for name in VARIABLES):  # parsing takes longer
        return []
    names = [
        (node.lineno, node.arg if isinstance(node, ast.arg) else node.id)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.arg) or (isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store))
    ]
    return [f"{path}:{line}: {name!r}: name the variable by what it holds" for line, name in names if name in VARIABLES]


def test_no_file_has_an_old_word() -> None:
    files = checked_files()
    assert len(files) > 300
    issues = [issue for path in files for issue in word_issues(str(path.relative_to(ROOT)), path.read_text("utf-8"))]
    assert not issues, "\n".join(issues)


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("mmtune/a.py", "x = 1\ny = join_world()\n", "mmtune/a.py:2: 'join_world': write init_distributed"),
        ("docs/a.md", "It begins Anew.\n", "docs/a.md:1: 'Anew': write again"),
        ("mmtune/cut_back.py", "", "mmtune/cut_back.py: 'cut_back': write truncate_to_step"),
    ],
)
def test_an_old_word_is_reported(path: str, text: str, expected: str) -> None:
    assert word_issues(path, text) == [expected]


def test_a_phrase_is_reported_across_a_line_break_of_a_comment() -> None:
    assert word_issues("a.py", "# that hangs\n    # on it") == ["a.py:1: 'hangs # on': write depends on"]


@pytest.mark.parametrize("text", ["the worlds of ALONELY", "go_online()", "a placeholder", "is_main_process"])
def test_other_words_pass(text: str) -> None:
    assert word_issues("mmtune/a.py", text) == []


def test_variables_say_what_they_hold() -> None:
    files = [path for path in checked_files() if path.suffix == ".py"]
    issues = [issue for path in files for issue in variable_issues(str(path.relative_to(ROOT)), path.read_text("utf-8"))]
    assert not issues, "\n".join(issues)


@pytest.mark.parametrize("source", ["found = 1", "def f(told): pass", "for made in rows: pass", "x = (kept := 1)", "a, said = b"])
def test_a_variable_that_says_when_is_reported(source: str) -> None:
    assert [issue.partition(": ")[0] for issue in variable_issues("a.py", source)] == ["a.py:1"]


def test_attributes_and_keywords_are_not_variables() -> None:
    assert variable_issues("a.py", "f(found=1)\nx.told\nfrom hypothesis import given") == []
