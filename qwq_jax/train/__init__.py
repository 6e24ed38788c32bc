"""What every fine-tuning job shares, whatever its loss: packing, state, optimizer, the jitted step, metrics."""
