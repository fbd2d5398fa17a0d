"""Tools of other servers in the chat: connected in a thread beside it, and called when the person says so."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from ..system.terminal import note, visible, waiting

if TYPE_CHECKING:
    from ..model import Model
    from ..serve.host import Config, HostTool

QUESTION = "allow once (y), always for this tool (a), no (n)? "
ANY_TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "", "parameters": {"type": "object"}},
}
DENIED = "The user does not allow this call."
CHANGED = "The definition of this tool has changed since; it was not called. Look at it again."
T = TypeVar("T")


@contextmanager
def opened_tools(path: str | None, model: Model) -> Iterator[Tools | None]:
    """The tools of the servers that a file names, connected; None if there is no
    file. At the end all are closed.

    ValueError if the chat template cannot tell a model of tools, or the file is not as it should be.
    """
    if path is None:
        yield None
        return
    from ..serve.host import read_servers

    configs = read_servers(path)
    asked = [{"role": "user", "content": ""}]
    if model.chat_prompt(asked, tools=[ANY_TOOL]) == model.chat_prompt(asked):
        raise ValueError("--mcp: the chat template of this model has no place for tools")
    tools = Tools(configs)
    try:
        tools.refresh()
        note(tools.summary())
        yield tools
    finally:
        tools.close()


class Tools:
    """The tools of other servers as the chat has them. `functions`: what the model is told of.

    A call is made when the person allows it: once, or always in this session while the
    tool's definition is the same.
    """

    def __init__(self, configs: Sequence[Config]) -> None:
        from ..serve.host import Host

        logging.getLogger("mcp").setLevel(
            logging.CRITICAL
        )  # it says with tracebacks what a server does wrong
        self._host = Host(configs)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._tools: dict[str, HostTool] = {}
        self._allowed: set[str] = set()  # digests, which are those of a definition and its server
        self.functions: list[dict[str, Any]] = []

    def refresh(self) -> None:
        """Connect what is not connected, and ask every server for its tools."""
        with waiting("asking MCP servers for their tools"):
            tools = self._wait(self._host.refresh())
        self._tools = {tool.name: tool for tool in tools}
        self.functions = [tool.function() for tool in tools]

    def summary(self) -> str:
        """One line: how many tools there are, and what is wrong with servers."""
        servers = self._host.servers.values()
        faults = [f"{server.config.name}: {server.error}" for server in servers if server.error]
        return " | ".join([f"tools: {len(self._tools)} (/tools lists them)", *map(_shown, faults)])

    def listed(self) -> str:
        """Every server with its state, and under it its tools."""
        lines = []
        for server in self._host.servers.values():
            error = f": {server.error}" if server.error else ""
            lines.append(_shown(f"{server.config.name} {server.state}{error}"))
            for tool in server.tools.values():
                first = tool.description.strip().split("\n")[0]
                always = " (always allowed)" if self._key(tool) in self._allowed else ""
                lines.append(f"  {tool.name}{always}  {first}"[:200])
        return "\n".join(lines)

    def run(self, call: dict[str, Any], confirm: Callable[[str], str] | None) -> str:
        """What a call of the model comes to, for the model. confirm: asks the
        person; None: nobody is there to ask.

        KeyboardInterrupt ends the call.
        """
        from ..serve.errors import ApiError

        arguments = call.get("arguments", {})
        name = str(call["name"])
        tool = self._tools.get(name)
        if tool is None:
            note(_shown(f"the model calls {name}, which is no tool"))
            return f"There is no tool {name[:100]}."
        if not isinstance(arguments, dict):
            note(_shown(f"the model calls {name} without proper arguments"))
            return "The arguments are not an object."
        note(_shown(f"the model calls {name} {json.dumps(arguments, ensure_ascii=False)}"))
        if not self._may(tool, confirm):
            return DENIED
        try:
            with waiting(f"waiting for {name}"):
                found = self._wait(self._host.call(name, arguments, tool.digest))
        except ApiError as error:
            self.refresh()
            note(_shown(f"({error}; it was not called)"))
            return CHANGED
        content = str(found["content"])
        note(
            f"({len(content)} characters{', an error' * bool(found['isError'])}"
            f"{', cut' * bool(found['truncated'])})"
        )
        return content

    def close(self) -> None:
        """End all servers."""
        self._wait(self._host.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _may(self, tool: HostTool, confirm: Callable[[str], str] | None) -> bool:
        if self._key(tool) in self._allowed:
            return True
        if confirm is None:
            note("(not called: nobody is there to ask)")
            return False
        try:
            answer = confirm(QUESTION).strip().lower()
        except EOFError:
            answer = "n"
        if answer in ("a", "always"):
            self._allowed.add(self._key(tool))
        return answer in ("y", "yes", "a", "always")

    def _key(self, tool: HostTool) -> str:
        return f"{tool.name} {tool.digest}"

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` comes to in the other thread. An exception here, such as Ctrl-C, cancels it there."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise


def _shown(text: str) -> str:
    return visible(text).replace("\n", "\\n").replace("\t", "\\t")
