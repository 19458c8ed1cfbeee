"""Damped Hessians, Gram eigenbases and null spaces, batched over experts."""
