"""Attackers who look for the old object."""
