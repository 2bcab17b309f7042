"""Pre-training and supervised fine-tuning: objective, optimiser, the jitted step, the loop, checkpoints and metrics."""
