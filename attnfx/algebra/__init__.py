"""What expressions are made of, what they evaluate to, and what intervals prove of them."""
