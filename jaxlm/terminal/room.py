"""Whether a descriptor takes what is written, or would keep the program waiting."""

import select


def has_room(descriptor: int, seconds: float = 0.0) -> bool:
    """Whether a write of up to `select.PIPE_BUF` bytes returns, and returns at once.

    A pipe or a terminal whose reader is stopped takes no more when it is full. A file
    always has room, and so has a pipe without a reader: the write fails.

    Args:
      seconds: how long to wait for room.
    """
    room = select.poll()
    room.register(descriptor, select.POLLOUT)
    return bool(room.poll(1000 * seconds))
