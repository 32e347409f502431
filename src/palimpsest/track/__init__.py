"""Runs shown by wandb while they work and after."""
