"""What force tables say, wherever they came from."""
