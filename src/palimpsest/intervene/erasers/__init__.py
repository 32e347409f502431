"""Methods that make a concept unreadable."""
