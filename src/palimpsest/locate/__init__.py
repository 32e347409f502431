"""Where to change: the choice of a site."""
