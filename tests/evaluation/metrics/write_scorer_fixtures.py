"""Write `tests/evaluation/metrics/fixtures/scorers.json.gz`: answers with the scores that the published scorers give them.

The scorers are not part of this project, and no test needs them. To repeat the comparison, make a folder with

- `vqaEval.py`: GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation (Python 2; its print statements are rewritten here),
- `m4c_evaluator.py`: haotian-liu/LLaVA, llava/eval/m4c_evaluator.py, for TextVQA (a copy of facebookresearch/mmf),
- `mmmu_eval_utils.py`: MMMU-Benchmark/MMMU, mmmu/utils/eval_utils.py,
- `pix2struct_metrics.py`: google-research/pix2struct, pix2struct/metrics.py, for ChartQA's relaxed accuracy,
- `pope_evaluate.py`: RUCAIBox/POPE, evaluate.py,
- `squad_v1_evaluate.py`: huggingface/evaluate, metrics/squad/compute_score.py, the official script of SQuAD 1.1,
- `libs/`: pip install --no-deps --target libs anls jiwer rapidfuzz click pycocoevalcap pycocotools,

have `java` on the path, and run

    .venv/bin/python tests/evaluation/metrics/write_scorer_fixtures.py FOLDER [SCORER ...]

With names of functions below, only their cases are written again.
"""

from __future__ import annotations

import ast
import contextlib
import gzip
import io
import json
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

Case = dict[str, Any]

TARGET = Path(__file__).parent / "fixtures" / "scorers.json.gz"
COUNT = 300

_WORDS = """
a an the cat dog man's woman isn't dont yes no none one two ten 3 12 3.5 1,000 blue red/white black-and-white left
Left on top of it's its street sign STOP u.s. o'clock oclock youre couldn'tve 'ows'at don\u2019t café 50% $5 #1
7-up hot-dog e-mail (maybe) and & sitting riding table, pizza. bus; train: what? wow! ... -- A B C Mr. St. No. 5
etc. cannot gonna naïve 日本 £5 \u201cquoted\u201d 'single'
"""
WORDS = _WORDS.split()
_MMMU_WORDS = (
    "the answer is So so thus final could be A B C A B (A) (B) (A) (B) (C) B. 12.345 1,234 -3 3e5 .5 = \n MgS 24/7 dog cat it, !"
)
MMMU_WORDS = _MMMU_WORDS.split(" ")
POPE_THINGS = ["dog", "cat", "car", "person", "dining table", "cell phone", "traffic light", "bottle", "umbrella", "surfboard"]
POPE_PLACES = ["in the image", "in the picture", "on the left", "in the background", "next to the man", "on the table"]
POPE_WHOLE = (
    "Yes",
    "No",
    "yes",
    "Yes.",
    "No.",
    "Yes, it is.",
    "No, it is not.",
    "Yes it is",
    "No it is not",
    "Yes there is",
    "No there is not.",
)
POPE_FORMS = (
    "Yes, there is a {thing} {place}.",
    "Yes, there is a {thing} {place}",
    "Yes there is a {thing} {place}.",
    "Yes, a {thing} is visible {place}.",
    "Yes, I can see a {thing} {place}.",
    "Yes. The {thing} is {place}.",
    "Yes, there are two of them: a {thing} stands {place}, and another one behind it.",
    "No, there is no {thing} {place}.",
    "No, there is no {thing} {place}",
    "No there is no {thing} {place}.",
    "No, there is not a {thing} {place}.",
    "No, a {thing} is not visible {place}.",
    "No, I do not see a {thing} {place}.",
    "No {thing} is visible {place}.",
    "No. The {thing} is missing {place}.",
    "No, the image does not show a {thing}. It shows something else {place}.",
)


def _text(draw: random.Random, longest: int = 6) -> str:
    """A few words; now and then with other case, doubled spaces, or a mark at the end."""
    text = " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, longest)))
    change = draw.random()
    if change < 0.1:
        text = text.upper()
    elif change < 0.2:
        text = text.capitalize()
    elif change < 0.3:
        text = text.replace(" ", "  ", 1)
    return text + draw.choice(["", "", "", ".", "!", " .", "?", ","])


def _near(draw: random.Random, text: str) -> str:
    """A text, unchanged or with one word or letter changed."""
    change = draw.random()
    if change < 0.3:
        return text
    if change < 0.5:
        return text.lower()
    if change < 0.75:
        words = text.split()
        words[draw.randrange(len(words))] = draw.choice(WORDS)
        return " ".join(words)
    place = draw.randrange(len(text))
    return text[:place] + draw.choice("abc ,.") + text[place + draw.randint(0, 1) :]


def _near_cases(seed: int, references: int, longest: int = 6) -> list[Case]:
    draw, cases = random.Random(seed), []
    for _ in range(COUNT):
        texts = [_text(draw, longest) for _ in range(draw.randint(1, references))]
        prediction = _near(draw, draw.choice(texts)) if draw.random() < 0.8 else _text(draw, longest)
        cases.append({"prediction": prediction, "references": texts})
    cases.append({"prediction": "", "references": ["cat"]})
    return cases


def _annotated_cases(seed: int) -> list[Case]:
    """Cases with the answers of ten annotators."""
    draw, cases = random.Random(seed), []
    for _ in range(COUNT):
        texts = [_text(draw, 3) for _ in range(draw.randint(1, 3))]
        answers = [_near(draw, draw.choice(texts)) if draw.random() < 0.3 else draw.choice(texts) for _ in range(10)]
        prediction = _near(draw, draw.choice(answers)) if draw.random() < 0.8 else _text(draw, 3)
        cases.append({"prediction": prediction, "references": answers})
    return cases


def textvqa_accuracy(folder: Path) -> tuple[list[Case], list[float]]:
    scope: dict[str, Any] = {}
    source = (folder / "m4c_evaluator.py").read_text(encoding="utf-8").replace("from tqdm import tqdm", "tqdm = list")
    exec(compile(source, "m4c_evaluator.py", "exec"), scope)  # noqa: S102
    evaluator, cases = scope["TextVQAAccuracyEvaluator"](), _annotated_cases(9)
    entries = [{"pred_answer": case["prediction"], "gt_answers": case["references"]} for case in cases]
    return cases, [evaluator.eval_pred_list([entry]) for entry in entries]


def vqa_accuracy(folder: Path) -> tuple[list[Case], list[float]]:
    cases = _annotated_cases(1)
    source = re.sub(r"print (\".*\")", r"print(\1)", (folder / "vqaEval.py").read_text(encoding="utf-8").expandtabs(8))
    scope: dict[str, Any] = {}
    exec(compile(source, "vqaEval.py", "exec"), scope)  # noqa: S102

    class Answers:
        def __init__(self, qa: dict[int, Any]) -> None:
            self.qa = qa

        def getQuesIds(self) -> list[int]:  # noqa: N802
            return list(self.qa)

    truth = {
        number: {
            "answers": [{"answer": text, "answer_id": index} for index, text in enumerate(case["references"])],
            "question_type": "what",
            "answer_type": "other",
        }
        for number, case in enumerate(cases)
    }
    scorer = scope["VQAEval"](Answers(truth), Answers({n: {"answer": c["prediction"]} for n, c in enumerate(cases)}), n=12)
    with contextlib.redirect_stdout(io.StringIO()):
        scorer.evaluate()
    return cases, [scorer.evalQA[number] / 100 for number in range(len(cases))]


def mmmu(folder: Path) -> tuple[list[Case], list[float | None]]:
    """Questions with options and open ones. Where MMMU's code would draw a letter at random, the score is null."""
    scope: dict[str, Any] = {}
    exec((folder / "mmmu_eval_utils.py").read_text(encoding="utf-8"), scope)  # noqa: S102
    scope["random"].choice = lambda letters: None
    texts = [["cat", "dog", "blue"], ["$6", "<image 1>", "12"], ["a", "the dog", "A B"]]
    golds = [["12.35"], ["1,234"], ["$MgS$", "MgS"], ["24/7", "3.429"], ["B"], ["-3.0"], ["dog"], ["300000"]]
    draw, cases, scores = random.Random(10), [], []
    for number in range(COUNT):
        answer = " ".join(draw.choices(MMMU_WORDS, k=draw.randint(1, 12)))
        if number % 2:
            options = draw.choice(texts)
            letters = dict(zip("ABC", options, strict=True))
            letter = scope["parse_multi_choice_response"](answer, list(letters), letters)
            cases.append({"prediction": answer, "references": [draw.choice("ABC")], "options": options})
            scores.append(None if letter is None else float(scope["eval_multi_choice"](cases[-1]["references"], letter)))
        else:
            cases.append({"prediction": answer, "references": draw.choice(golds)})
            scores.append(float(scope["eval_open"](cases[-1]["references"], scope["parse_open_response"](answer))))
    return cases, scores


def anls(folder: Path) -> tuple[list[Case], list[float]]:
    from anls import anls_score

    cases = _near_cases(2, 3)
    return cases, [anls_score(case["prediction"], case["references"]) for case in cases]


def token_f1(folder: Path) -> tuple[list[Case], list[float]]:
    scope: dict[str, Any] = {"__name__": "squad"}
    exec((folder / "squad_v1_evaluate.py").read_text(encoding="utf-8"), scope)  # noqa: S102
    # Two texts that are empty after normalization: SQuAD 1.1 gives 0, 2.0 gives 1. Every reference here has a word.
    cases = [
        {**case, "references": references}
        for case in _near_cases(3, 3)
        if (references := [text for text in case["references"] if scope["normalize_answer"](text)])
    ]
    best = scope["metric_max_over_ground_truths"]
    return cases, [float(best(scope["f1_score"], case["prediction"], case["references"])) for case in cases]


def relaxed_accuracy(folder: Path) -> tuple[list[Case], list[float]]:
    tree = ast.parse((folder / "pix2struct_metrics.py").read_text(encoding="utf-8"))
    wanted = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "relaxed_correctness"]
    scope: dict[str, Any] = {}
    exec("from typing import Optional\n" + ast.unparse(wanted[0]), scope)  # noqa: S102
    draw, cases = random.Random(4), []
    for _ in range(COUNT):
        number = draw.choice([0, 1, 12, 2014, 0.5, -3, 12.11, 1e6]) * draw.choice([1, 1, 100])
        wrong = number * draw.choice([1, 1.05, 0.95, 1.051, 0.949, 1.2, -1]) + draw.choice([0, 0, 0, 0.01])
        mark = draw.choice(["", "", "", "%", " %", " dollars"])
        reference = draw.choice([f"{number}{mark}", f"{number:g}{mark}", _text(draw, 2), "Yes", "[1, 2]"])
        prediction = draw.choice([f"{wrong:.6g}{mark}", f"{wrong}", f"${wrong}", reference, reference.lower(), "nan", "inf"])
        cases.append({"prediction": prediction, "references": [reference]})
    return cases, [float(scope["relaxed_correctness"](case["references"][0], case["prediction"])) for case in cases]


def yes_no(folder: Path) -> tuple[list[Case], dict[str, float]]:
    """POPE's numbers, on 240 different answers in which it and a reader see the same.

    POPE keeps the text before the first full stop. With the word `No`, `no` or `not` it is no, otherwise yes.
    """
    draw = random.Random(5)
    answers = dict.fromkeys(POPE_WHOLE)
    while len(answers) < 240:
        answers[draw.choice(POPE_FORMS).format(thing=draw.choice(POPE_THINGS), place=draw.choice(POPE_PLACES))] = None
    cases = [{"prediction": answer, "references": [draw.choice(["yes", "no"])]} for answer in answers]
    source = (folder / "pope_evaluate.py").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as place:
        for name, lines in {
            "ans_file": [{"answer": case["prediction"]} for case in cases],
            "label_file": [{"label": case["references"][0]} for case in cases],
        }.items():
            path = Path(place) / name
            path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
            source = source.replace(f"{name} = ''", f"{name} = {str(path)!r}")
        with contextlib.redirect_stdout(io.StringIO()):
            scope: dict[str, Any] = {}
            exec(source, scope)  # noqa: S102
    names = {"accuracy": "acc", "precision": "precision", "recall": "recall", "f1": "f1", "yes_ratio": "yes_ratio"}
    return cases, {name: scope[variable] for name, variable in names.items()}


def error_rates(folder: Path) -> tuple[list[Case], dict[str, Any]]:
    import jiwer

    cases = [case for case in _near_cases(6, 1) if case["references"][0].strip()]
    pairs = [(" ".join(case["references"][0].split()), " ".join(case["prediction"].split())) for case in cases]
    references, predictions = [list(texts) for texts in zip(*pairs, strict=True)]
    return cases, {
        "cer": [jiwer.cer(*pair) for pair in pairs],
        "wer": [jiwer.wer(*pair) for pair in pairs],
        "all": {"cer": jiwer.cer(references, predictions), "wer": jiwer.wer(references, predictions)},
    }


def boxes(folder: Path) -> tuple[list[Case], list[float]]:
    """COCO's IoU of two boxes."""
    from pycocotools.mask import iou

    draw, cases, scores = random.Random(7), [], []
    for _ in range(COUNT):
        pair = []
        for _ in range(2):
            x, y = draw.randint(0, 600), draw.randint(0, 600)
            pair.append([x, y, x + draw.randint(1, 400), y + draw.randint(1, 400)])
        if draw.random() < 0.5:
            pair[1] = [edge + draw.randint(-20, 20) for edge in pair[0]]
            pair[1] = [min(pair[1][0], pair[1][2]), min(pair[1][1], pair[1][3]), *map(max, pair[1][:2], pair[1][2:])]
        cases.append({"prediction": str(pair[0]), "references": [str(pair[1])]})
        by_size = [[x1, y1, x2 - x1, y2 - y1] for x1, y1, x2, y2 in pair]
        scores.append(float(iou(by_size[:1], by_size[1:], [0])[0][0]))
    return cases, scores


def captions(folder: Path) -> tuple[list[Case], dict[str, Any]]:
    """Tokens of the Java tokenizer, and pycocoevalcap's scores of them."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS, STANFORD_CORENLP_3_4_1_JAR

    cases = _near_cases(8, 5, longest=14)
    texts = [text for case in cases for text in (case["prediction"], *case["references"])]
    # Each text alone: its rules look at the next line, so a neutral line separates two texts.
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
        file.write("".join(f"{text}\nx\n" for text in texts))
        file.flush()
        jar = folder / "libs" / "pycocoevalcap" / "tokenizer" / STANFORD_CORENLP_3_4_1_JAR
        options = ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase", file.name]
        done = subprocess.run(["java", "-cp", jar, *options], capture_output=True, check=True)
    lines = done.stdout.decode("utf-8").split("\n")[0 : 2 * len(texts) : 2]
    tokens = [" ".join(word for word in line.rstrip().split(" ") if word not in PUNCTUATIONS) for line in lines]
    iterator = iter(tokens)
    predictions, references = {}, {}
    for number, case in enumerate(cases):
        predictions[number] = [next(iterator)]
        references[number] = [next(iterator) for _ in case["references"]]
    cider, ciders = Cider().compute_score(references, predictions)
    with contextlib.redirect_stdout(io.StringIO()):
        bleu, bleus = Bleu(4).compute_score(references, predictions)
    rouge, rouges = Rouge().compute_score(references, predictions)
    return cases, {
        "tokens": tokens,
        "cider_d": {"all": float(cider), "each": list(map(float, ciders))},
        "bleu": {"all": list(map(float, bleu)), "each": list(map(float, bleus[3]))},
        "rouge_l": {"all": float(rouge), "each": list(map(float, rouges))},
    }


SCORERS = (vqa_accuracy, textvqa_accuracy, mmmu, anls, token_f1, relaxed_accuracy, yes_no, error_rates, boxes, captions)


def main() -> None:
    folder = Path(sys.argv[1])
    sys.path.insert(0, str(folder / "libs"))
    names = sys.argv[2:]
    fixtures = json.loads(gzip.decompress(TARGET.read_bytes())) if names else {}
    for scorer in SCORERS:
        if names and scorer.__name__ not in names:
            continue
        cases, scores = scorer(folder)
        fixtures[scorer.__name__] = {"cases": cases, "scores": scores}
        print(f"{scorer.__name__}: {len(cases)} cases")
    TARGET.parent.mkdir(exist_ok=True)
    text = json.dumps(fixtures, ensure_ascii=False, separators=(",", ":"))
    TARGET.write_bytes(gzip.compress(text.encode("utf-8"), mtime=0))
    print(f"{TARGET}: {TARGET.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
