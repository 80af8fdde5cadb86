"""How files become pixels, and what they are called."""
