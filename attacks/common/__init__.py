"""What several attacks are made of: the ascent in a ball, the search for the least move, optimisers."""
