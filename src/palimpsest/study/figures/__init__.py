"""What studies draw: plotly figures for the page, matplotlib pictures for papers."""
