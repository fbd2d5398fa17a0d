import signal

# a shell that starts the tests in the background has SIGINT ignored, and so would the programs they interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)
