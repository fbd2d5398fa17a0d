"""The server: models behind HTTP, for chat pages, editors, agents and evaluation tools."""
