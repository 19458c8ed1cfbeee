"""Modules that keep their weights packed in memory and unpack what a token needs."""
