"""Networks and training of SDIM (Li et al. 2020) and of its discriminative twin."""
