"""Networks and training of SDIM (anonymous submission, 2019) and of its discriminative twin."""
