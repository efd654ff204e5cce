"""Networks and training of CNN-F (Huang et al. 2020, arXiv:2007.09200) and of its feed-forward twin."""
