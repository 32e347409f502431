"""Changing what a model says or shows: methods, and the interventions they leave."""
