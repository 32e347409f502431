"""What a run leaves behind: rows, files, provenance. What they mean is told by `study`."""
