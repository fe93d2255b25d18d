"""An agent: a program that talks with the model by a client of its own, and knows nothing but OPENAI_BASE_URL,
OPENAI_API_KEY and OPENAI_MODEL.

Each line that it reads is a list of messages to add to the conversation; it answers with a line, `{"text": ...}`, or
`{"limit": ...}` where the episode has reached a limit. It gives up on a reply that takes long and asks again, as
OpenAI's clients do. The name of its process is its number of replies.
"""

import json
import os
import sys
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

TIMEOUT_S = 5.0
NAME = "agent-"
"""And the number of replies."""
OK, UNAVAILABLE = 200, 503


def main() -> None:
    messages: list[dict[str, Any]] = []
    for number, line in enumerate(sys.stdin, 1):
        messages += json.loads(line)
        choice = ask(messages)
        if "limit" in choice:
            print(json.dumps({"limit": choice["limit"]}), flush=True)
            continue
        messages.append(choice["message"])
        Path("/proc/self/comm").write_text(f"{NAME}{number}")
        print(json.dumps({"text": choice["message"]["content"] or ""}), flush=True)


def ask(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """The choice of the reply, which is asked for until the endpoint gives one."""
    num_tries = 0
    while (choice := _ask_once(messages, num_tries)) is None:
        num_tries += 1
    return choice


def _ask_once(messages: list[dict[str, Any]], num_tries: int) -> dict[str, Any] | None:
    url = urlsplit(os.environ["OPENAI_BASE_URL"])
    headers = {"Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}", "Content-Type": "application/json"}
    headers["x-stainless-retry-count"] = str(num_tries)
    body = json.dumps({"model": os.environ["OPENAI_MODEL"], "messages": messages})
    connection = HTTPConnection(str(url.hostname), url.port, timeout=TIMEOUT_S)
    try:
        connection.request("POST", f"{url.path}/chat/completions", body, headers)
        response = connection.getresponse()
        content = response.read()
    except TimeoutError:
        return None
    finally:
        connection.close()
    if response.status == UNAVAILABLE:
        return None
    if response.status != OK:
        raise RuntimeError(f"{response.status}: {content.decode(errors='replace')}")
    choice: dict[str, Any] = json.loads(content)["choices"][0]
    return choice


if __name__ == "__main__":
    main()
