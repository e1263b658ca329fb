"""Write `tests/evaluation/tasks/fixtures/task_scores.json`: answers to `benchmark_files.py`, scored by the benchmarks' code.

The scorers read the benchmarks' files themselves; nothing of mmtune is used. They are not part of this project, and no test needs
them. To repeat the comparison, make a folder with

- `pope_evaluate.py`: RUCAIBox/POPE, evaluate.py,
- `m4c_evaluator.py`, `eval_science_qa.py`: haotian-liu/LLaVA, llava/eval/,
- `vqaEval.py`: GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation (Python 2; its print statements are rewritten here),
- `eval_utils.py`: MMMU-Benchmark/MMMU, mmmu/utils/,
- `chartqa_utils.py`, `mmbench_evals.py`, `utils_rec.py`: EvolvingLMMs-Lab/lmms-eval, lmms_eval/tasks/chartqa/utils.py,
  tasks/mmbench/ and tasks/refcoco/,
- `libs/`: pip install --no-deps --target libs anls pycocoevalcap loguru,

and run

    .venv/bin/python tests/evaluation/tasks/write_task_scores.py FOLDER
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmark_files import BENCHMARKS
from pyarrow import parquet

TARGET = Path(__file__).parent / "fixtures" / "task_scores.json"
ANSWERS: dict[str, list[str]] = {
    "pope": ["Yes", "No", "No", "Yes", "Yes, there is.", "No", "No.", "yes", "no", "Yes", "No", "Yes"],
    "textvqa": ["Dakota Digital", "COPENHAGEN", "Three", "McCoy's"],
    "textvqa_ocr": ["DAKOTA", "Copenhagen.", "four", "mccoys"],
    "vqa_v2": ["netting", "Yes", "2"],
    "chartqa": ["14.5", "0.6", "germany", "0.36", "2014"],
    "docvqa": ["0.28", "University of Californa", "ATC"],
    "scienceqa_img": ["C", "B. wool", "A"],
    # Passes of four questions in the order of the index: 241 is right in one of three, 242 in three of four, the others in all.
    "mmbench_en": ["B", "D", "A.", "(A)", "B", "A", "B.", "B", "B", "B", "C", "A", "D"],
    "mmmu": ["(B) Klimt", "B", "The answer is MgS.", "pH = 12.97", "I think that it shows none of the two, so C"],
    "refcoco": [
        "[100, 100, 500, 500]",
        "[0, 0, 480, 1000]",
        "It is at [700, 600, 1000, 1000].",
        "[500, 200, 900, 800]",
        "[0, 0, 600, 800]",
    ],
    "coco_caption": ["a man on a red moped", "two dogs run in the park", "a table with a plate of food"],
    "flickr30k": ["a man riding a moped on a road", "a dog", "a white plate with food on a table"],
}
"""Answers in the order of the rows."""


def _load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _scope(path: Path) -> dict[str, Any]:
    source = path.read_text(encoding="utf-8").expandtabs(8).replace("from tqdm import tqdm", "tqdm = list")
    scope: dict[str, Any] = {}
    exec(compile(re.sub(r"print (\".*\")", r"print(\1)", source), path.name, "exec"), scope)  # noqa: S102
    return scope


def pope(scorers: Path, files: Path, answers: list[str]) -> dict[str, Any]:
    source, scores, start = (scorers / "pope_evaluate.py").read_text(encoding="utf-8"), {}, 0
    for name in ("random", "popular", "adversarial"):
        labels = files / f"coco_pope_{name}.json"
        own = answers[start : (start := start + len(labels.read_text().splitlines()))]
        path = files / "answers.json"
        path.write_text("".join(json.dumps({"answer": each}) + "\n" for each in own), encoding="utf-8")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            code = source.replace("ans_file = ''", f"ans_file = {str(path)!r}")
            exec(code.replace("label_file = ''", f"label_file = {str(labels)!r}"), {})  # noqa: S102
        numbers = dict(line.split(": ") for line in printed.getvalue().splitlines() if ": " in line)
        keys = {"score": "Accuracy", "precision": "Precision", "recall": "Recall", "f1": "F1 score", "yes_ratio": "Yes ratio"}
        scores[labels.name] = {key: float(numbers[value]) for key, value in keys.items()}
    return scores


def textvqa(scorers: Path, files: Path, answers: list[str]) -> dict[str, Any]:
    rows = _load(files / "TextVQA_0.5.1_val.json")["data"]
    entries = [{"pred_answer": each, "gt_answers": row["answers"]} for each, row in zip(answers, rows, strict=True)]
    return {"overall": {"score": _scope(scorers / "m4c_evaluator.py")["TextVQAAccuracyEvaluator"]().eval_pred_list(entries)}}


def vqa_v2(scorers: Path, files: Path, answers: list[str]) -> dict[str, Any]:
    class Questions:
        def __init__(self, qa: dict[int, Any]) -> None:
            self.qa = qa

        def getQuesIds(self) -> list[int]:  # noqa: N802
            return list(self.qa)

    questions = _load(files / "v2_OpenEnded_mscoco_val2014_questions.json")["questions"]
    truth = {row["question_id"]: row for row in _load(files / "v2_mscoco_val2014_annotations.json")["annotations"]}
    predictions = {row["question_id"]: {"answer": each} for row, each in zip(questions, answers, strict=True)}
    scorer = _scope(scorers / "vqaEval.py")["VQAEval"](Questions(truth), Questions(predictions), n=12)
    with contextlib.redirect_stdout(io.StringIO()):
        scorer.evaluate()
    by_type = {name: {"score": value / 100} for name, value in scorer.accuracy["perAnswerType"].items()}
    return {**by_type, "overall": {"score": scorer.accuracy["overall"] / 100}}


def chartqa(scorers: Path, files: Path, answers: list[str]) -> dict[str, Any]:
    relaxed, scores, start = _scope(scorers / "chartqa_utils.py")["relaxed_correctness"], {}, 0
    everything: list[bool] = []
    for name in ("test_human.json", "test_augmented.json"):
        rows = _load(files / name)
        own = answers[start : (start := start + len(rows))]
        right = [relaxed(each, row["label"]) for each, row in zip(own, rows, strict=True)]
        everything += right
        scores[name] = {"score": sum(right) / len(right)}
    return {**scores, "overall": {"score": sum(everything) / len(everything)}}


def docvqa(scorers: Path, files: Path, answers: list[str]) -> dict[str, Any]:
    from anls import anls_score

    rows = _load(files / "val_v1.0_withQT.json")["data"]
    scores = [anls_score(each, row["answers"]) for each, row in zip(answers, rows, strict=True)]
    return {"overall": {"score": sum(scores) / len(scores)}}


def scienceqa_img(scorers: Path, files: Path, answers: list[str]) -> dict[str, Any]:
    problems = _load(files / "problems.json")
    test = [number for number, problem in problems.items() if problem["split"] == "test"]
    (files / "pid_splits.json").write_text(json.dumps({"test": test}), encoding="utf-8")
    remaining, lines = iter(answers), []
    for number in test:
        has_image = problems[number]["image"] is not None
        text = next(remaining) if has_image else "A"
        lines.append(json.dumps({"question_id": number, "prompt": "<image>" if has_image else "", "text": text}) + "\n")
    (files / "answers.jsonl").write_text("".join(lines), encoding="utf-8")
    outputs = [f"--{kind}={files / kind}" for kind in ("output-file", "output-result")]
    command = [sys.executable, scorers / "eval_science_qa.py", f"--base-dir={files}", f"--result-file={files / 'answers.jsonl'}"]
    done = subprocess.run([*map(str, command), *outputs], capture_output=True, text=True, check=True)
    match = re.search(r"IMG-Accuracy: ([\d.]+)%", done.stdout)
    assert match is not None
    return {"overall": {"score": float(match[1]) / 100}}


def mmbench_en(scorers: Path, files: Path, answers: list[str]) -> dict[str, Any]:
    [file] = files.glob("en/dev-*.parquet")
    rows = [{**row, "prediction": each} for row, each in zip(parquet.read_table(file).to_pylist(), answers, strict=True)]
    for row in rows:
        row.pop("image")
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator = _scope(scorers / "mmbench_evals.py")["MMBench_Evaluator"]()
        overall, by_category, _ = evaluator.eval_result(rows, eval_method="openai")
    return {**{name: {"score": value} for name, value in by_category.items()}, "overall": {"score": float(overall)}}


def refcoco(scorers: Path, files: Path, answers: list[str]) -> dict[str, Any]:
    """Answers in thousandths, as InternVL's and Qwen3-VL's; the benchmark's boxes are in pixels."""
    scope, scores, boxes, start = _scope(scorers / "utils_rec.py"), {}, [], 0
    for name in ("val", "testA", "testB"):
        path = files / "data" / "refcoco" / f"refcoco_{name}.jsonl"
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for row, answer in zip(rows, answers[start : start + len(rows)], strict=True):
            numbers = scope["parse_float_sequence_within"](answer)
            sides = [row["width"], row["height"]] * 2
            boxes.append({"bbox": row["bbox"], "pred": [each * side / 1000 for each, side in zip(numbers, sides, strict=True)]})
        with contextlib.redirect_stdout(io.StringIO()):
            scores[path.name] = {"score": scope["refcoco_bbox_rec_acc05"](boxes[start:])}
            scores["overall"] = {"score": scope["refcoco_bbox_rec_acc05"](boxes)}
        start = len(boxes)
    return scores


def mmmu(scorers: Path, files: Path, answers: list[str]) -> dict[str, Any]:
    scope = _scope(scorers / "eval_utils.py")
    remaining, by_subject = iter(answers), {}
    for file in sorted(files.glob("*/validation-*.parquet")):
        samples = []
        for row in parquet.read_table(file).to_pylist():
            options = ast.literal_eval(row["options"])
            answer = ast.literal_eval(row["answer"]) if row["answer"].startswith("[") else row["answer"]
            letters = dict(zip("ABCDEFGHI", options, strict=False))
            text = next(remaining)
            kind = row["question_type"]
            parsed = (
                scope["parse_multi_choice_response"](text, list(letters), letters)
                if kind == "multiple-choice"
                else scope["parse_open_response"](text)
            )
            samples.append({"id": row["id"], "question_type": kind, "answer": answer, "parsed_pred": parsed})
        by_subject[file.parent.name] = {**scope["evaluate"](samples)[1], "num_example": len(samples)}
    scores = {name: {"score": each["acc"]} for name, each in by_subject.items()}
    return {**scores, "overall": {"score": scope["calculate_ins_level_acc"](by_subject)}}


def captions(scorers: Path, files: Path, answers: list[str]) -> dict[str, Any]:
    from pycocoevalcap.cider.cider import Cider

    [file] = files.glob("dataset_*.json")
    rows = [row for row in _load(file)["images"] if row["split"] == "test"]
    # The captions are words in lower case without punctuation, which the tokenizer leaves as they are.
    references = {row["imgid"]: [sentence["raw"] for sentence in row["sentences"]] for row in rows}
    score, _ = Cider().compute_score(references, {row["imgid"]: [each] for row, each in zip(rows, answers, strict=True)})
    return {"overall": {"score": float(score)}}


SCORERS = {"textvqa_ocr": textvqa, "coco_caption": captions, "flickr30k": captions}
SCORERS |= {each.__name__: each for each in (pope, textvqa, vqa_v2, chartqa, docvqa, scienceqa_img, mmbench_en, refcoco, mmmu)}


def main() -> None:
    scorers = Path(sys.argv[1]).resolve()
    sys.path.insert(0, str(scorers / "libs"))
    recorded = {}
    for name, answers in ANSWERS.items():
        with tempfile.TemporaryDirectory() as folder:
            BENCHMARKS[name](Path(folder))
            recorded[name] = {"answers": answers, "scores": SCORERS[name](scorers, Path(folder), answers)}
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")
    print(f"{TARGET}: {', '.join(recorded)}")


if __name__ == "__main__":
    main()
