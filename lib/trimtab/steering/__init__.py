"""Bias-only adaptation: steering vectors trained by reinforcement learning, read, folded and exported."""
