"""Tables become pages, terminal lines, CSV, LaTeX and pictures."""
