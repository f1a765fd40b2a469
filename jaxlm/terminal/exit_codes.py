"""The exit codes of the programs, which scripts and schedulers read."""

EXIT_DONE = 0
# A check of `jaxlm verify` exceeds its limit.
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_NO_CHECKPOINT = 3
EXIT_NOT_FINITE = 4
# EX_TEMPFAIL: the run goes on when it is started again.
EXIT_PREEMPTED = 75
# Another process of the run is gone; as EXIT_PREEMPTED, starting again goes on.
EXIT_PROCESS_LOST = 76
# As shells report a program that SIGINT ended.
EXIT_INTERRUPTED = 130
# As shells report a program that wrote to a closed pipe.
EXIT_PIPE_CLOSED = 141
