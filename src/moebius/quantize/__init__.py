"""Weights to few bits, batched over experts: sign planes, integers, saliency and error feedback."""
