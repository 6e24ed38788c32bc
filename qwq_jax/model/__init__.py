"""The Qwen2 architecture in Flax NNX: one forward for training, prefill and decode."""
