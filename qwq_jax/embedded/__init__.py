"""Models that ship with the package, as ordinary Hugging Face directories."""

from pathlib import Path

TINY_REASONER = Path(__file__).with_name("tiny-reasoner")
"""A Qwen2 model of under four megabytes that reasons about sums; trained by `configs/sft/tiny_reasoner.toml`."""
