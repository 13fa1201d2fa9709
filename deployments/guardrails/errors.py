"""What guardrails raise.

    Cosmos3Error
    ├── ContentBlocked          a prompt or pictures must not be used
    ├── GuardrailUnavailable    nobody can say whether they may; the request fails, nothing passes unchecked
    └── AdapterError            the configured adapter cannot be used; the stage does not start

All of them cross process boundaries whole: their arguments are all they hold. None repeats a prompt.
"""

from __future__ import annotations

from cosmos3_core.errors import Cosmos3Error


class ContentBlocked(Cosmos3Error):
    """The guardrail has stopped a request.

    Args:
        what: that must not be used: "prompt" or "pictures".
    """

    def __init__(self, what: str) -> None:
        self.what = what
        super().__init__(what)

    def __str__(self) -> str:
        advice = "; change the prompt" if self.what == "prompt" else ""
        return f"the guardrail has stopped the request because of its {self.what}{advice}"


class GuardrailUnavailable(Cosmos3Error):
    """The guardrail has failed, is away or takes too long. Why is in its own log.

    Args:
        what: that it was to look at: "prompt" or "pictures".
    """

    def __init__(self, what: str) -> None:
        self.what = what
        super().__init__(what)

    def __str__(self) -> str:
        return f"the guardrail cannot look at the {self.what} just now, and nothing passes without; try again later"


class AdapterError(Cosmos3Error):
    """The adapter of ``guardrails`` in the configuration cannot be used.

    Args:
        adapter: as it is configured.
        problem: what is wrong with it.
        hint: what to do about it, a full sentence.
    """

    def __init__(self, adapter: str, problem: str, hint: str) -> None:
        self.adapter, self.problem, self.hint = adapter, problem, hint
        super().__init__(adapter, problem, hint)

    def __str__(self) -> str:
        return f"guardrails.adapter={self.adapter}: {self.problem}. {self.hint}"
