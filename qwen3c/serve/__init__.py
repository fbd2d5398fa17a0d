"""The server: surfaces of an API over HTTP, the scheduler behind them, the cloud before them."""
