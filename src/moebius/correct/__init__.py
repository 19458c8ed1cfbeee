"""Corrections after quantization that are fused into scales and cost no byte."""
