"""What a run leaves: stored results, manifests, outcomes, and the fingerprints of the code that made them."""
