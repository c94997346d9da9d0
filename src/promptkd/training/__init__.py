"""A run: its parts, its steps, its checks, and what it leaves in its directory."""
