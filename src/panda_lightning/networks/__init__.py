"""Pretrained networks in a frozen and an adapted part, small ones from scratch, and what is done to their input."""
