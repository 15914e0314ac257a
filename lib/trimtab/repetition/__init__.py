"""Repetition in generated text: metrics, unlikelihood, policy gradient, decoding."""
