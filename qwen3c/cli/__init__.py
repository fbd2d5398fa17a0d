"""People at a terminal: the commands run, export and train, the chat, what they print."""
