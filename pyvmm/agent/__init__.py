"""The host's end of the guest's agent: commands, files, clock and power of a running guest.

    agent = Agent(lambda: connect_vsock("vm", PORT))
    agent.wait_ready(timeout=60)
    print(agent.run(["uname", "-r"]).stdout)

`client` has `Agent`, `process` a command that runs, `files` the copying, `session` one connection,
`protocol` what is spoken on it (docs/guest-agent.md). The guest is not trusted: whatever comes from
it is bounded and checked. How a connection is made is not known here.
"""

from __future__ import annotations

from pyvmm.agent.client import Agent, Clock, Completed, Info
from pyvmm.agent.errors import AgentError, AgentGone, CommandTimeout, NoAgent, WrongAgent, WrongUser
from pyvmm.agent.files import Copied
from pyvmm.agent.process import Output, Process
from pyvmm.agent.protocol import PORT

__all__ = [
    "PORT",
    "Agent",
    "AgentError",
    "AgentGone",
    "Clock",
    "CommandTimeout",
    "Completed",
    "Copied",
    "Info",
    "NoAgent",
    "Output",
    "Process",
    "WrongAgent",
    "WrongUser",
]
