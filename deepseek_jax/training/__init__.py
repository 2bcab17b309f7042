"""Pre-training and supervised fine-tuning: objective, optimizer, the jitted step, the loop, checkpoints and metrics."""
