"""Probes of hidden states and what they tell."""
