"""One fact put to several methods, side by side: what `palimpsest ask` shows."""
