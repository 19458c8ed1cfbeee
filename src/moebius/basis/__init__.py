"""Bases that the experts of a layer share."""
