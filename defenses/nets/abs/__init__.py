"""Networks and training of ABS (Schott et al. 2018, arXiv:1805.09190)."""
