"""Networks and training of Defense-GAN (Samangouei et al. 2018, arXiv:1805.06605)."""
