"""What is cut from results: metrics, flags and tables."""
