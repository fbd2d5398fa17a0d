"""The server: what the engine can do, over HTTP, for people and their programs."""
