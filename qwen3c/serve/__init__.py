"""The server: one engine, many clients; the surfaces that they speak to it by."""
