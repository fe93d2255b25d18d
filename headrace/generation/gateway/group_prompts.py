"""The distinct prompts of a group's segments, as the wire has them. Pure."""

from collections.abc import Sequence

import numpy as np


class GroupPrompts:
    """`further`: all but the ticket's, as int32 arrays."""

    def __init__(self, ticket_prompt: Sequence[int]) -> None:
        self.further: list[np.ndarray] = []
        self._places = {np.array(ticket_prompt, np.int32).tobytes(): 0}

    def place(self, tokens: Sequence[int]) -> int:
        """0 for the ticket's prompt, n for the n-th of `further`; a new one is added."""
        prompt = np.array(tokens, np.int32)
        place = self._places.setdefault(prompt.tobytes(), len(self._places))
        if place > len(self.further):
            self.further.append(prompt)
        return place
