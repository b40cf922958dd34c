"""Many Unix stream sockets over one byte stream between two machines that share nothing else.

`frames` is the wire format, `channel` one socket's state, `multiplexer` the thread at each end.
"""
