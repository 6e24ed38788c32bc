"""Supervised fine-tuning on conversations: examples from JSONL, the loss, and the loop around the train step."""
