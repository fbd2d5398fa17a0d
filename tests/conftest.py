import os
import signal

# on a busy machine two threads of a BLAS wait for each other; before anything imports NumPy
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# a shell that starts the tests in the background has SIGINT ignored, nohup SIGHUP, and so would the programs
# they start: what is ignored is inherited, a handler is not
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda number, frame: None)
