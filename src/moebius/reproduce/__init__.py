"""The tables and figures of the papers, and the field's own figures: published rows, and the recipes that make them again."""
