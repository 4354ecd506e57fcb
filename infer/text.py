"""From tokens as they are drawn to text that may be shown: whole characters, up to a stop text."""

from collections.abc import Sequence

from llama_jax.tokenizer import StreamDecoder, Tokenizer


class TextStream:
    """The text of one completion as it grows.

    Text that may turn out to begin a stop text is held back until it is clear, so what was shown
    is never taken back. The stop text itself is not part of the completion.
    """

    def __init__(self, tokenizer: Tokenizer, context_ids: Sequence[int], stops: Sequence[str]):
        self.text = ""  # final and safe to show
        self.tokens: list[int] = []  # all that were read, the one that completes a stop included
        self.stopped = False  # a stop text was met; further tokens are ignored
        self._decoder = StreamDecoder(tokenizer, context_ids)
        self._stops = stops
        self._held = ""

    def push(self, tokens: Sequence[int]) -> str:
        """Reads further tokens; returns the text that they make final."""
        before = len(self.text)
        for token in tokens:
            if self.stopped:
                break
            self.tokens.append(token)
            self._held += self._decoder.push(token)
            self._release(len(self._held) - self._longest_beginning())
        return self.text[before:]

    def flush(self) -> str:
        """Ends the completion; returns the text that was held back."""
        before = len(self.text)
        if not self.stopped:
            self._held += self._decoder.flush()
            self._release(len(self._held))
        return self.text[before:]

    def _release(self, length: int) -> None:
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped, length = True, min(found)
        self.text += self._held[:length]
        self._held = self._held[length:]

    def _longest_beginning(self) -> int:
        """Length of the longest end of the held text that begins a stop text."""
        for length in range(min(len(self._held), max(map(len, self._stops), default=0)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0
