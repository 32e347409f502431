"""The model under standard names, its tokens, and its forward passes."""
