"""Biases that a policy asks to be factored, fitted or computed: taken out of a site, and what stands for them."""
