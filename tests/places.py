"""Where the tests find the repository and the numbers of the official code."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GOLDENS = ROOT / "tests" / "goldens"
# The three model families, the smallest of each: MHA, latent attention, latent attention with a correction bias.
FAMILIES = ("nano_tiny", "nano_small", "nano_base")
# The goldens' tokenizer, whose ids those of their conversations are.
NANO_BPE = GOLDENS / "nano_bpe"
