"""Reinforcement learning with verifiable rewards: tasks, rollouts, advantages, policy gradient."""
