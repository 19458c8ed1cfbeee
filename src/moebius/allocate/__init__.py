"""How many bits each unit gets under one budget."""
