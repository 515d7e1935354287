"""What both stages share: optimiser, accumulation, loop, checkpoints, metrics."""
