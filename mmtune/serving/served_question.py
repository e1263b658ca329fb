"""One held-out question, answered by the trained model and by an engine."""

from __future__ import annotations

from dataclasses import dataclass

from mmtune.data.message import Sample
from mmtune.serving.engine_client import EngineAnswer
from mmtune.serving.trained_answers import TrainedAnswer


@dataclass(frozen=True)
class ServedQuestion:
    """One question, answered by the trained model and by the engine.

    Attributes:
        sample: the held-out sample.
        trained: the trained model's answer.
        engine: the engine's answer; None if it rejected the question.
        rejection: the engine's words.
    """

    sample: Sample
    trained: TrainedAnswer
    engine: EngineAnswer | None
    rejection: str = ""

    @property
    def prompt_tokens(self) -> int:
        """The number of prompt tokens of the training path."""
        return self.trained.prompt_tokens

    @property
    def same_tokens(self) -> bool:
        """Whether both count the same number of prompt tokens."""
        return self.engine is not None and self.engine.prompt_tokens == self.prompt_tokens

    @property
    def same_answer(self) -> bool:
        """Whether both give the same answer, by `shown_text`, or the engine's cannot be compared because it is `parsed`."""
        if self.engine is None:
            return False
        return self.engine.parsed or shown_text(self.engine.text) == shown_text(self.trained.text)


def shown_text(text: str) -> str:
    """An answer without surrounding white space and a character that the last token leaves incomplete, which vLLM leaves out."""
    return text.strip().rstrip("\ufffd").rstrip()
