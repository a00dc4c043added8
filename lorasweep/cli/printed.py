"""What an action returns, and the one place that prints it, as text or as JSON."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

Text = str | Iterable[str]


@dataclass(frozen=True)
class Answer:
    """What an action returns: for programs a value, for people text, and the exit status.

    An action that watches something yields several. What happens before the answer is known, such
    as progress and warnings, goes to stderr (`progress.notifier`).
    """

    value: Any = None
    """What format=json prints, made of JSON values. None: the text, as {"output": LINES}."""
    text: Text | Callable[[], Text] = ""
    """Text or lines, or a function that makes them: it is called for format=text only."""
    status: int = 0
    """Exit status: 0 done, 1 something failed, 130 stopped."""

    def as_text(self) -> str:
        """Return the text that people read."""
        text = self.text() if callable(self.text) else self.text
        return text if isinstance(text, str) else "\n".join(text)

    def plain(self) -> Any:
        """Return the value that programs read."""
        return {"output": self.as_text().splitlines()} if self.value is None else self.value

    def show(self, as_json: bool) -> None:
        """Print the answer on stdout; an empty text prints no line."""
        if shown := json.dumps(self.plain()) if as_json else self.as_text():
            print(shown, flush=True)
