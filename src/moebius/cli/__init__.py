"""The command line: parse, build a recipe, call one function, print."""
