"""Reinforcement learning as in DeepSeekMath and R1: pure losses and advantages, rewards, tasks, and the GRPO loop."""
