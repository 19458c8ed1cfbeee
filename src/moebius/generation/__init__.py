"""Text from a model: completions, and conversations by its chat template."""
