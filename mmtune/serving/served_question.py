"""One held-out question, answered by the trained model and by an engine."""

from __future__ import annotations

from dataclasses import dataclass

from mmtune.chat_templates.tool_calls import has_words
from mmtune.data.message import Sample
from mmtune.serving.engine_client import EngineAnswer
from mmtune.serving.trained_answers import TrainedAnswer


@dataclass(frozen=True)
class ServedQuestion:
    """One question, answered by the trained model and by the engine.

    Attributes:
        sample: the held-out sample, as the engine reads it.
        trained: the trained model's answer.
        engine: the engine's answer; None if it rejected the question. If it failed only at its answer, the number of prompt
            tokens alone.
        rejection: the engine's words.
        unread: what the engine does to the conversation, keys of `unread_parts.PARTS`.
    """

    sample: Sample
    trained: TrainedAnswer
    engine: EngineAnswer | None
    rejection: str = ""
    unread: tuple[str, ...] = ()

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
        """Whether both give the same answer, by `shown_text`, or the engine failed at its own.

        Of an answer with `parts`, the words of each must occur in the trained answer.
        """
        if self.engine is None:
            return False
        if self.engine.parts:
            return all(has_words(self.trained.text, part) for part in self.engine.parts)
        return self.failed or shown_text(self.engine.text) == shown_text(self.trained.text)

    @property
    def failed(self) -> bool:
        """Whether the engine failed at its answer, so that there is none to compare."""
        return self.engine is not None and self.rejection != ""


def shown_text(text: str) -> str:
    """An answer without surrounding white space and a character that the last token leaves incomplete, which vLLM leaves out."""
    return text.strip().rstrip("\ufffd").rstrip()


def log_probability_difference(trained: TrainedAnswer, served: EngineAnswer) -> float | None:
    """The largest over the tokens that both sides have, as an engine may leave out the end of turn; None if it gives none."""
    pairs = zip(trained.log_probabilities, served.log_probabilities or (), strict=False)
    return max((abs(ours - theirs) for ours, theirs in pairs), default=None)
