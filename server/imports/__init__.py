"""What an operator brings in: a file with a model's values, checked whole before anything is replaced."""
