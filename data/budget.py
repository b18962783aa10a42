"""What a conversation may take at most, and the error that says by how much it takes more."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data.record import Record, RecordError
from data.sizes import Size, Sizes
from vl2.prompt import IMAGE_PLACEHOLDER
from vl2.tiles import num_image_tokens
from vl2.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Limits of one conversation; None does not check."""

    max_tokens: int | None = None
    """Of a pack, tokens."""
    max_tiles_per_pack: int | None = None
    """Of a pack, tiles with global views."""
    context: int | None = None
    """Positions the model was made for, tokens. Training may go beyond them."""

    def far_too_long(self, record: Record, tokenizer: Tokenizer, field: str) -> RecordError | None:
        """Tell of a text that cannot fit whatever its tokens are: to encode 50 MB takes minutes and all memory.

        Args:
            record: the conversation.
            tokenizer: counts its text.
            field: that holds the conversation, for the error.
        """
        longest = min([limit for limit in (self.max_tokens, self.context) if limit is not None], default=None)
        if longest is None:
            return None
        texts = [message.content.strip() for message in record.messages]
        characters = sum(map(len, texts))
        if 4 * characters <= longest:  # no token is shorter than a byte, no character longer than four
            return None
        least = sum(map(tokenizer.least_tokens, texts))
        if least <= longest:
            return None
        return record.error(
            field,
            f"conversation of {characters} characters, at least {least} tokens, expected at most {longest} tokens; "
            "shorten it",
        )

    def exceeded(self, sizes: Sizes) -> np.ndarray:
        """Find the conversations over the budget: bool [N]."""
        over = np.zeros(len(sizes), dtype=bool)
        for limit in (self.max_tokens, self.context):
            if limit is not None:
                over |= sizes.tokens > limit
        if self.max_tiles_per_pack is not None:
            over |= sizes.tiles > self.max_tiles_per_pack
        return over

    def problem(self, size: Size, field: str) -> tuple[str, str]:
        """Say what a conversation over the budget has too much of: (field, problem).

        Args:
            size: of the conversation.
            field: that holds it.
        """
        of_images = sum(num_image_tokens(grid) for grid in size.grids)
        found = f"conversation of {size.tokens} tokens ({of_images} of them for {len(size.grids)} {IMAGE_PLACEHOLDER})"
        if self.max_tokens is not None and size.tokens > self.max_tokens:
            return (
                field,
                f"{found}, expected at most data.max_tokens={self.max_tokens}; "
                "shorten it, lower data.max_tiles or raise data.max_tokens",
            )
        if self.context is not None and size.tokens > self.context:
            return (
                field,
                f"{found}, expected at most the {self.context} that the model was made for; shorten it",
            )
        return (
            "images",
            f"conversation of {size.tiles} tiles, expected at most data.max_tiles_per_pack={self.max_tiles_per_pack}; "
            "lower data.max_tiles or raise data.max_tiles_per_pack",
        )
